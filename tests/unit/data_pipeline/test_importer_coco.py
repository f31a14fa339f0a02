"""The COCO captions importer on a small folder in the official format."""

import json

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
    images = tmp_path / "images"
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
        "annotations": [
            {"image_id": 7, "id": 1, "caption": "A dog\n runs. "},
            {"image_id": 8, "id": 2, "caption": "a caf\u00e9"},
            {"image_id": 9, "id": 3, "caption": "grey"},
            {"image_id": 7, "id": 4, "caption": "A second one."},
        ],
    }
    file = tmp_path / "captions.json"
    file.write_text(json.dumps(content))
    return file, images, tmp_path / "out"


def read(folder, task):
    manifest = load_manifest(folder)
    for number in range(len(manifest.shards)):
        path = manifest.path(number)
        index, data = load_index(path), path.read_bytes()
        for sample in range(len(index)):
            members = read_members(data, index, sample)
            yield members, parse_record(task, members["json"], path.name, index.key(sample))


def test_official_format_to_shards(coco):
    file, images, out = coco
    counts = build_coco_captions(file, images, out, tasks=("pretrain", "retrieval"), per_shard=2)
    assert counts == {"images": 3, "captions": 4, "skipped": 0}
    assert verify(out)[1] == []
    rows = list(read(out / "pretrain" / "train", "pretrain"))
    assert rows[0][1].captions == ("A dog runs.", "A second one.")
    assert (rows[0][1].width, rows[0][1].height) == (60, 40)
    assert rows[0][0]["jpg"] == (images / "a.jpg").read_bytes(), "bytes are kept"
    assert "png" in rows[1][0] and rows[1][1].captions == ("a caf\u00e9",)
    assert [r.image_id for _, r in read(out / "retrieval" / "train", "retrieval")] == [
        "7",
        "8",
        "9",
    ]


def test_large_images_are_scaled_down(coco):
    file, images, out = coco
    build_coco_captions(file, images, out, max_side=45)
    sizes = [(r.width, r.height) for _, r in read(out / "pretrain" / "train", "pretrain")]
    assert sizes == [(45, 30), (30, 30), (45, 10)]
    assert verify(out)[1] == []


@pytest.mark.parametrize("damage", ["missing", "cut"])
def test_bad_images_stop_or_are_counted(coco, damage):
    file, images, out = coco
    if damage == "missing":
        (images / "a.jpg").unlink()
    else:
        (images / "a.jpg").write_bytes((images / "a.jpg").read_bytes()[:200])
    with pytest.raises(ValueError, match=r"a\.jpg.*--skip-bad"):
        build_coco_captions(file, images, out)
    assert not list(out.rglob("*.tar*")), "nothing half-written stays"
    assert build_coco_captions(file, images, out, skip_bad=True)["skipped"] == 1
    assert load_manifest(out / "pretrain" / "train").extra["skipped"] == 1


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "not valid JSON"),
        ("[]", "'images'"),
        ('{"images": []}', "'annotations'"),
        ('{"images": [{"id": 1}], "annotations": []}', r"images\[0\]"),
        ('{"images": [], "annotations": [{"image_id": 4, "caption": "x"}]}', "image_id 4"),
        ('{"images": [], "annotations": [{"image_id": 4}]}', r"annotations\[0\]"),
        ('{"images": [], "annotations": []}', "no captions"),
    ],
)
def test_wrong_annotation_files_are_named(coco, content, message):
    file, images, out = coco
    file.write_text(content)
    with pytest.raises(ValueError, match=message):
        build_coco_captions(file, images, out)


def test_file_names_may_not_leave_the_folder(coco):
    file, images, out = coco
    text = file.read_text().replace("a.jpg", "../captions.json")
    file.write_text(text)
    with pytest.raises(ValueError, match="refused"):
        build_coco_captions(file, images, out, skip_bad=True)


def test_other_refusals(coco):
    file, images, out = coco
    with pytest.raises(ValueError, match="vqa"):
        build_coco_captions(file, images, out, tasks=("vqa",))
    with pytest.raises(ValueError, match="--split"):
        build_coco_captions(file, images, out, split="../x")
    with pytest.raises(FileNotFoundError, match="image folder"):
        build_coco_captions(file, images / "none", out)
    with pytest.raises(FileNotFoundError, match="captions file"):
        build_coco_captions(file.with_name("none.json"), images, out)
    build_coco_captions(file, images, out)
    with pytest.raises(ValueError, match="already holds"):
        build_coco_captions(file, images, out)


def test_the_verb(coco, capsys):
    import argparse

    file, images, out = coco
    parser = argparse.ArgumentParser()
    commands.add_parsers(parser.add_subparsers(dest="verb"))
    words = ["data", "build", "coco-captions", "--captions", str(file), "--images", str(images)]
    assert commands.run(parser.parse_args([*words, "--out", str(out), "--split", "val"])) == 0
    assert "3 images, 4 captions" in capsys.readouterr().out
    assert load_manifest(out / "pretrain" / "val").samples == 3
