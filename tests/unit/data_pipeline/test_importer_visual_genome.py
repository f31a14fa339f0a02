"""The Visual Genome importer on small files with the published keys."""

import argparse
import json
import zipfile
from typing import Any

import pytest
from PIL import Image

from data_pipeline import commands
from data_pipeline.importers.visual_genome import GenomeFiles, build_visual_genome
from data_pipeline.index import load_index
from data_pipeline.manifest import load_manifest
from data_pipeline.records import parse_record
from data_pipeline.verify import read_members, verify

URL = "https://cs.stanford.edu/people/rak248"


def region(number, image, phrase, x, y, width, height):
    return {"region_id": number, "width": width, "height": height, "image_id": image,
            "phrase": phrase, "y": y, "x": x}  # fmt: skip


def thing(number, names, x, y, w, h, **more):
    return {"synsets": ["tree.n.01"], "h": h, "object_id": number, "merged_object_ids": [],
            "names": names, "w": w, "y": y, "x": x} | more  # fmt: skip


CONTENT: dict[str, Any] = {
    "image_data": [
        {"width": 60, "url": f"{URL}/VG_100K_2/1.jpg", "height": 40, "image_id": 1,
         "coco_id": None, "flickr_id": None},
        {"width": 50, "url": f"{URL}/VG_100K/2.jpg", "height": 50, "image_id": 2,
         "coco_id": 547168, "flickr_id": 8505158818},
        {"width": 20, "url": f"{URL}/VG_100K/3.jpg", "height": 20, "image_id": 3,
         "coco_id": None, "flickr_id": 1},
    ],
    "region_descriptions": [
        {"regions": [
            region(1382, 1, "the  clock is green\n", 10, 5, 20, 30),
            region(1383, 1, "shade is along the street", -1, 30, 90, 5),
            region(1384, 1, " ", 0, 0, 5, 5),
            region(1385, 1, "the clock is green", 5, 5, 0, 30),
        ], "id": 1},
        {"regions": [region(1400, 2, "a man", 0, 0, 50, 50)], "id": 2},
        {"regions": [region(1500, 9, "not in image_data", 0, 0, 5, 5)], "id": 9},
    ],
    "objects": [
        {"image_id": 1, "objects": [
            thing(1058549, ["trees"], 0, 0, 57, 40),
            thing(1058534, ["sidewalk", "pavement"], 7, 10, 30, 20),
            thing(1058535, [""], 7, 10, 30, 20),
        ], "image_url": f"{URL}/VG_100K_2/1.jpg"},
        {"image_id": 3, "objects": [], "image_url": ""},
    ],
    "attributes": [
        {"image_id": 1, "attributes": [
            thing(1058549, ["trees"], 0, 0, 57, 40, attributes=["green", "tall ", "green"]),
            thing(1058534, ["sidewalk"], 7, 10, 30, 20),
        ]},
        {"image_id": 2, "attributes": []},
    ],
    "question_answers": [
        {"id": 1, "qas": [
            {"a_objects": [], "question": "What color is the clock?", "image_id": 1,
             "qa_id": 986768, "answer": "Green.", "q_objects": []},
            {"a_objects": [], "question": "Why?", "image_id": 1, "qa_id": 986769, "answer": ".",
             "q_objects": []},
        ]},
        {"id": 2, "qas": []},
    ],
}  # fmt: skip


@pytest.fixture
def genome(tmp_path):
    paths = {}
    for name, content in CONTENT.items():
        paths[name] = tmp_path / f"{name}.json"
        paths[name].write_text(json.dumps(content))
    for folder, number, size in (("VG_100K_2", 1, (60, 40)), ("VG_100K", 2, (50, 50)),
                                 ("VG_100K", 3, (20, 20))):  # fmt: skip
        (tmp_path / folder).mkdir(exist_ok=True)
        picture = Image.new("RGB", size, (number * 80, 10, 90))
        picture.save(tmp_path / folder / f"{number}.jpg")
    return paths


def files(genome, *names) -> GenomeFiles:
    keys = {"region_descriptions": "regions", "objects": "objects", "attributes": "attributes",
            "question_answers": "questions"}  # fmt: skip
    return GenomeFiles(genome["image_data"], **{keys[name]: genome[name] for name in names})


def folders(genome):
    return [genome["image_data"].parent / name for name in ("VG_100K", "VG_100K_2")]


def read(folder, task) -> list[tuple[dict[str, Any], Any]]:
    manifest = load_manifest(folder)
    found = []
    for number in range(len(manifest.shards)):
        path = manifest.path(number)
        index, data = load_index(path), path.read_bytes()
        for sample in range(len(index)):
            raw = read_members(data, index, sample)["json"]
            record = parse_record(task, raw, path.name, index.key(sample))
            found.append((json.loads(raw), record))
    return found


def test_regions_objects_and_attributes(genome, tmp_path):
    used = files(genome, "region_descriptions", "objects", "attributes")
    out = tmp_path / "out"
    counts = build_visual_genome(used, folders(genome), out, processes=1)["pretrain"]
    assert (counts.samples, counts.skipped) == (2, 1)
    assert counts.details == {
        "boxes_clipped": 1, "boxes_dropped": 1, "elems": 5, "objects_without_name": 1,
        "phrases_empty": 1, "regions_without_image": 1,
    }  # fmt: skip
    (raw, one), (other, two) = read(out / "pretrain/train", "pretrain")
    assert [(e.captions, e.box, e.attributes) for e in one.elements] == [
        (("the clock is green",), (10, 5, 20, 30), ()),
        (("shade is along the street",), (0, 30, 60, 5), ()),
        (("trees",), (0, 0, 57, 40), ("green", "tall")),
        (("sidewalk", "pavement"), (7, 10, 30, 20), ()),
    ]
    assert one.captions == () and "captions" not in raw, "no caption of the whole image"
    assert (one.image_id, one.width, one.height) == ("vg-1", 60, 40)
    assert "coco_id" not in raw and other["coco_id"] == 547168 and two.image_id == "vg-2"
    line = json.loads((out / "pretrain/train/skipped.jsonl").read_text())
    assert line["key"] == "vg-3" and "no elems" in line["reason"]
    assert verify(out)[1] == []


def test_phrases_as_captions(genome, tmp_path):
    used = files(genome, "region_descriptions")
    out = tmp_path / "out"
    counts = build_visual_genome(used, folders(genome), out, captions="regions", processes=1)
    one, two = (record for _, record in read(out / "pretrain/train", "pretrain"))
    assert one.captions == ("the clock is green", "shade is along the street")
    assert one.elements == () and two.captions == ("a man",)
    assert counts["pretrain"].details["phrases_repeated"] == 1
    assert verify(out)[1] == []


def test_questions_for_vqa(genome, tmp_path):
    out = tmp_path / "out"
    used = files(genome, "question_answers")
    counts = build_visual_genome(used, folders(genome), out, processes=1)
    assert list(counts) == ["vqa"] and counts["vqa"].details["questions_empty"] == 1
    ((_, record),) = read(out / "vqa/train", "vqa")
    (question,) = record.questions
    assert (question.question_id, question.question) == ("vg-986768", "What color is the clock?")
    assert (question.answers, question.kind) == ({"green": 0.5}, "vg")
    assert verify(out)[1] == []


def test_zips_and_processes_give_the_same_shards(genome, tmp_path):
    used = files(genome, "region_descriptions", "objects")
    zips = [tmp_path / "images.zip", tmp_path / "images2.zip"]
    for path, folder in zip(zips, folders(genome), strict=True):
        with zipfile.ZipFile(path, "w") as archive:
            for picture in folder.iterdir():
                archive.write(picture, f"{folder.name}/{picture.name}")
    build_visual_genome(used, folders(genome), tmp_path / "a", processes=1, per_shard=1)
    build_visual_genome(used, zips, tmp_path / "b", processes=2, per_shard=1)
    one, other = (
        {str(path.relative_to(tmp_path / name)): path.read_bytes()
         for path in (tmp_path / name).rglob("*.tar")}
        for name in "ab"
    )  # fmt: skip
    assert one == other and len(one) == 2


@pytest.mark.parametrize(
    ("name", "old", "new", "message"),
    [
        ("image_data", '"width": 60, ', "", r"image_data\.json: element 0 needs 'width'"),
        ("image_data", '"image_id": 2', '"image_id": 1', "image 1 is listed twice"),
        ("image_data", '"image_id": 2', '"image_id": "2"', "element 1 needs 'image_id'"),
        ("image_data", "547168", '"x"', "'coco_id'"),
        ("region_descriptions", '"phrase"', '"words"', "image 1, entry 0.*'phrase'"),
        ("region_descriptions", '"regions"', '"rows"', "list of objects 'regions'"),
        ("region_descriptions", '"id": 2', '"id": 1', "image 1 is listed twice"),
        ("objects", '"names"', '"name"', "image 1, entry 0.*'names'"),
        ("attributes", '"object_id"', '"object"', r"attributes\.json: image 1, entry 0"),
    ],
)
def test_wrong_files_are_named(genome, tmp_path, name, old, new, message):
    text = genome[name].read_text()
    assert old in text
    genome[name].write_text(text.replace(old, new))
    used = files(genome, "region_descriptions", "objects", "attributes")
    with pytest.raises(ValueError, match=message):
        build_visual_genome(used, folders(genome), tmp_path / "out", processes=1)


def test_what_does_not_go_together(genome, tmp_path):
    for names, options, message in (
        ((), {}, "at least one"),
        (("attributes",), {}, "--objects"),
        (("objects",), {"captions": "regions"}, "--regions"),
        (("objects",), {"captions": "all"}, "none, regions"),
    ):
        with pytest.raises(ValueError, match=message):
            build_visual_genome(files(genome, *names), folders(genome), tmp_path / "out", **options)
    missing = GenomeFiles(genome["image_data"], tmp_path / "none.json")
    with pytest.raises(FileNotFoundError, match=r"none\.json"):
        build_visual_genome(missing, folders(genome), tmp_path / "out")


def test_the_verb(genome, tmp_path, capsys):
    parser = argparse.ArgumentParser()
    commands.add_parsers(parser.add_subparsers(dest="verb"))
    words = ["data", "build", "visual-genome", "--image-data", genome["image_data"], "--regions",
             genome["region_descriptions"], "--questions", genome["question_answers"],
             "--processes", "1", "--out", tmp_path / "out"]  # fmt: skip
    words += ["--images", *folders(genome)]
    assert commands.run(parser.parse_args(list(map(str, words)))) == 0
    said = capsys.readouterr().out.splitlines()
    assert "pretrain/train: 2 images" in said[0] and "vqa/train: 1 images" in said[1]
