"""The COCO importer on small files in the official formats."""

import argparse
import json
import zipfile
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from PIL import Image

from data_pipeline import commands
from data_pipeline.importers.coco import build_coco_captions
from data_pipeline.index import load_index
from data_pipeline.manifest import load_manifest
from data_pipeline.records import parse_record
from data_pipeline.verify import read_members, verify


@pytest.fixture
def coco(tmp_path):
    images = tmp_path / "train2017"
    images.mkdir()
    rng = np.random.default_rng(0)
    for name, shape in (("a.jpg", (40, 60, 3)), ("b.png", (30, 30, 3)), ("grey.jpg", (20, 90))):
        Image.fromarray(rng.integers(0, 255, shape, dtype=np.uint8)).save(images / name)
    content = {
        "info": {},
        "images": [
            {"id": 7, "file_name": "a.jpg", "height": 40, "width": 60},
            {"id": 8, "file_name": "b.png"},
            {"id": 9, "file_name": "grey.jpg"},
            {"id": 10, "file_name": "no-caption.jpg"},
        ],
        "licenses": [],
        "annotations": [
            {"image_id": 7, "id": 1, "caption": "A dog\n runs. "},
            {"image_id": 8, "id": 2, "caption": "a caf\u00e9"},
            {"image_id": 9, "id": 3, "caption": "grey"},
            {"image_id": 7, "id": 4, "caption": "A second one."},
            {"image_id": 9, "id": 5, "caption": " \n"},
        ],
    }
    file = tmp_path / "captions_train2017.json"
    file.write_text(json.dumps(content))
    return file, images, tmp_path / "out"


@pytest.fixture
def instances(tmp_path):
    def row(number, image, category, box, crowd=0):
        polygon = {"counts": [1], "size": [2, 2]} if crowd else [[1.5, 2.5, 3.0, 4.0, 5.0, 6.0]]
        return {
            "segmentation": polygon, "area": 1.5, "iscrowd": crowd, "image_id": image,
            "bbox": box, "category_id": category, "id": number,
        }  # fmt: skip

    content = {
        "info": {"description": "COCO 2017 Dataset"},
        "licenses": [{"id": 1}],
        "images": [
            {"id": 7, "file_name": "a.jpg", "height": 40, "width": 60},
            {"id": 8, "file_name": "b.png", "height": 30, "width": 30},
            {"id": 9, "file_name": "grey.jpg", "height": 20, "width": 90},
        ],
        "annotations": [
            row(1, 7, 18, [10.5, 2.25, 20.0, 30.0]),
            row(2, 7, 44, [50.0, 30.0, 20.0, 20.0]),
            row(3, 7, 44, [5.0, 5.0, 0.4, 20.0]),
            row(4, 8, 18, [1.0, 1.0, 20.0, 20.0], crowd=1),
        ],
        "categories": [
            {"supercategory": "animal", "id": 18, "name": "dog"},
            {"supercategory": "kitchen", "id": 44, "name": "bottle"},
        ],
    }
    file = tmp_path / "instances_train2017.json"
    file.write_text(json.dumps(content))
    return file


@pytest.fixture
def karpathy(tmp_path):
    def image(number, split, folder, sentences):
        return {
            "filepath": folder, "sentids": [1], "imgid": 0, "split": split, "cocoid": number,
            "filename": f"COCO_{folder}_{number:012d}.jpg",
            "sentences": [
                {"tokens": text.lower().split(), "raw": text, "imgid": 0, "sentid": 1}
                for text in sentences
            ],
        }  # fmt: skip

    content = {
        "images": [
            image(1, "train", "train2014", ["A man.", " A\tman  runs"]),
            image(2, "restval", "val2014", ["A cat."]),
            image(3, "val", "val2014", ["A dog."]),
            image(4, "test", "val2014", ["A bird.", ""]),
        ],
        "dataset": "coco",
    }
    file = tmp_path / "dataset_coco.json"
    file.write_text(json.dumps(content))
    for folder, numbers in (("train2014", (1,)), ("val2014", (2, 3, 4))):
        (tmp_path / "coco" / folder).mkdir(parents=True)
        for number in numbers:
            path = tmp_path / "coco" / folder / f"COCO_{folder}_{number:012d}.jpg"
            Image.new("RGB", (20, 10), (number * 50, 0, 0)).save(path)
    return file, tmp_path / "coco"


def build(captions, images, out, **options: Any):
    return build_coco_captions(captions, [images], out, processes=1, **options)


def read(folder, task) -> Iterator[tuple[dict[str, bytes], Any]]:
    manifest = load_manifest(folder)
    for number in range(len(manifest.shards)):
        path = manifest.path(number)
        index, data = load_index(path), path.read_bytes()
        for sample in range(len(index)):
            members = read_members(data, index, sample)
            yield members, parse_record(task, members["json"], path.name, index.key(sample))


def test_official_format_to_shards(coco):
    file, images, out = coco
    counts = build(file, images, out, tasks=("pretrain", "retrieval"), per_shard=2)
    assert set(counts) == {"pretrain", "retrieval"}
    assert (counts["pretrain"].images, counts["pretrain"].shards) == (3, 2)
    details = {"captions": 4, "captions_empty": 1, "images_without_caption": 1}
    assert counts["pretrain"].details == counts["retrieval"].details == details
    assert verify(out)[1] == []
    rows = list(read(out / "pretrain" / "train", "pretrain"))
    assert rows[0][1].captions == ("A dog runs.", "A second one.")
    assert (rows[0][1].width, rows[0][1].height) == (60, 40)
    assert rows[0][0]["jpg"] == (images / "a.jpg").read_bytes(), "bytes are kept"
    assert "png" in rows[1][0] and rows[1][1].captions == ("a caf\u00e9",)
    found = [r.image_id for _, r in read(out / "retrieval" / "train", "retrieval")]
    assert found == ["coco-7", "coco-8", "coco-9"]


def test_the_published_zip_gives_the_same_shards(coco, tmp_path):
    file, images, out = coco
    with zipfile.ZipFile(tmp_path / "train2017.zip", "w") as archive:
        for path in images.iterdir():
            archive.write(path, f"train2017/{path.name}")
    build(file, images, out)
    build(file, tmp_path / "train2017.zip", tmp_path / "zipped")
    name = "pretrain/train/shard-000000.tar"
    assert (out / name).read_bytes() == (tmp_path / "zipped" / name).read_bytes()


def test_large_images_are_scaled_down(coco, instances):
    file, images, out = coco
    build(file, images, out, max_side=45, instances=[instances])
    rows = [record for _, record in read(out / "pretrain" / "train", "pretrain")]
    assert [(r.width, r.height) for r in rows] == [(45, 30), (30, 30), (45, 10)]
    assert rows[0].elements[0].box == (7.87, 1.68, 15.0, 22.51)
    assert verify(out)[1] == []


def test_instances_become_regions(coco, instances):
    file, images, out = coco
    counts = build(file, images, out, instances=[instances], tasks=("pretrain", "captioning"))
    rows = [record for _, record in read(out / "pretrain" / "train", "pretrain")]
    assert [(e.captions, e.box) for e in rows[0].elements] == [
        (("dog",), (10.5, 2.25, 20.0, 30.0)),
        (("bottle",), (50.0, 30.0, 10.0, 10.0)),
    ]
    assert rows[1].elements == rows[2].elements == ()
    found = counts["pretrain"].details
    assert found["regions_of_crowds_left_out"] == 1
    assert (found["elems"], found["boxes_clipped"], found["boxes_dropped"]) == (2, 1, 1)
    assert "elems" not in counts["captioning"].details
    assert verify(out)[1] == []


def test_karpathy_splits(karpathy, tmp_path):
    file, images = karpathy
    options = {"karpathy": file, "tasks": ("retrieval",)}
    out = tmp_path / "out"
    build(None, images, out, karpathy_splits=("train", "restval"), **options)
    counts = build(None, images, out, split="test", **options)
    rows = [record for _, record in read(out / "retrieval/train", "retrieval")]
    assert [row.image_id for row in rows] == ["coco-1", "coco-2"]
    assert rows[0].captions == ("A man.", "A man runs")
    assert [r.captions for _, r in read(out / "retrieval/test", "retrieval")] == [("A bird.",)]
    assert counts["retrieval"].details["captions_empty"] == 1
    # The pictures of 2017 are the same under other names.
    renamed = tmp_path / "val2017"
    renamed.mkdir()
    picture = (images / "val2014/COCO_val2014_000000000004.jpg").read_bytes()
    (renamed / "000000000004.jpg").write_bytes(picture)
    build(None, renamed, tmp_path / "other", split="test", **options)
    name = "retrieval/test/shard-000000.tar"
    assert (out / name).read_bytes() == (tmp_path / "other" / name).read_bytes()
    with pytest.raises(ValueError, match="dev"):
        build(None, images, out, split="dev", **options)


@pytest.mark.parametrize("damage", ["missing", "cut"])
def test_bad_images_stop_or_are_counted(coco, damage):
    file, images, out = coco
    if damage == "missing":
        (images / "a.jpg").unlink()
    else:
        (images / "a.jpg").write_bytes((images / "a.jpg").read_bytes()[:200])
    with pytest.raises(ValueError, match=r"a\.jpg.*--skip-bad"):
        build(file, images, out)
    assert not list(out.rglob("*.tar*")), "nothing half-written stays"
    assert build(file, images, out, skip_bad=True)["pretrain"].skipped == 1
    assert load_manifest(out / "pretrain" / "train").extra["skipped"] == 1


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "not valid JSON"),
        ("[]", "'images'"),
        ('{"images": []}', "'annotations'"),
        ('{"images": {}, "annotations": []}', "'images' must be a list"),
        ('{"images": [{"id": 1}], "annotations": []}', r"images\[0\]"),
        (
            '{"images": [{"id": 1, "file_name": "a"}, {"id": 1, "file_name": "b"}]}',
            "1 occurs twice",
        ),
        ('{"images": [], "annotations": [{"image_id": 4, "caption": "x"}]}', "image_id 4"),
        ('{"images": [], "annotations": [{"image_id": 4}]}', r"annotations\[0\]"),
        ('{"images": [], "annotations": []}', "no captions"),
    ],
)
def test_wrong_annotation_files_are_named(coco, content, message):
    file, images, out = coco
    file.write_text(content)
    with pytest.raises(ValueError, match=message):
        build(file, images, out)


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ('"category_id": 44', '"category_id": 45', "category_id 45"),
        ('"image_id": 8', '"image_id": 80', None),
        ('"image_id": 7', '"image_id": 70', "image_id 70"),
        ('"bbox"', '"box"', r"annotations\[0\]"),
        ('"name"', '"title"', r"categories\[0\]"),
    ],
)
def test_wrong_instances_are_named(coco, instances, old, new, message):
    file, images, out = coco
    instances.write_text(instances.read_text().replace(old, new))
    if message is None:  # a crowd, which is not used
        build(file, images, out, instances=[instances])
        return
    with pytest.raises(ValueError, match=message):
        build(file, images, out, instances=[instances])


def test_file_names_may_not_leave_the_folder(coco):
    file, images, out = coco
    text = file.read_text().replace("a.jpg", "../captions_train2017.json")
    file.write_text(text)
    with pytest.raises(ValueError, match="refused"):
        build(file, images, out, skip_bad=True)


def test_other_refusals(coco, instances):
    file, images, out = coco
    with pytest.raises(ValueError, match="vqa"):
        build(file, images, out, tasks=("vqa",))
    with pytest.raises(ValueError, match="--split"):
        build(file, images, out, split="../x")
    with pytest.raises(ValueError, match="--instances"):
        build(file, images, out, tasks=("retrieval",), instances=[instances])
    with pytest.raises(ValueError, match="either"):
        build(file, images, out, karpathy=file)
    with pytest.raises(FileNotFoundError, match="image folder"):
        build(file, images / "none", out)
    with pytest.raises(FileNotFoundError, match=r"none\.json"):
        build(file.with_name("none.json"), images, out)
    build(file, images, out)
    with pytest.raises(ValueError, match="already holds"):
        build(file, images, out, per_shard=2)


def test_the_verb(coco, instances, capsys):
    file, images, out = coco
    parser = argparse.ArgumentParser()
    commands.add_parsers(parser.add_subparsers(dest="verb"))
    words = ["data", "build", "coco-captions", "--captions", str(file), "--images", str(images)]
    words += ["--instances", str(instances), "--processes", "1", "--out", str(out)]
    assert commands.run(parser.parse_args([*words, "--split", "val"])) == 0
    assert "pretrain/val: 3 images, 3 samples, 0 skipped" in capsys.readouterr().out
    assert load_manifest(out / "pretrain" / "val").samples == 3
