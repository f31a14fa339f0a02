"""RefCOCO: pickled references and instances, to shards of boxes; no pickle can run code."""

import io
import json
import os
import pickle
import pickletools
from typing import Any

import pytest

from data_pipeline.importers.refcoco import build_refcoco, read_plain_pickle
from tests.unit.data_pipeline.published import dump, picture, samples, verb


def python2(value):
    """A pickle as Python 2 writes it (protocol 0): byte strings, unicode strings, ints, lists."""

    def write(item):
        if isinstance(item, bytes):
            return b"S" + repr(item)[1:].encode() + b"\n"
        if isinstance(item, str):
            return b"V" + item.replace("\n", "\\u000a").encode("raw-unicode-escape") + b"\n"
        if isinstance(item, int):
            return b"I%d\n" % item
        if isinstance(item, list):
            return b"(l" + b"".join(write(one) + b"a" for one in item)
        return b"(d" + b"".join(write(k) + write(v) + b"s" for k, v in item.items())

    return write(value) + b"."


def ref(number, annotation, image, split, said):
    return {
        b"sent_ids": [number * 10 + n for n in range(len(said))],
        b"file_name": b"COCO_train2014_%012d_%d.jpg" % (image, annotation),
        b"ann_id": annotation,
        b"ref_id": number,
        b"image_id": image,
        b"split": split,
        b"sentences": [
            {
                b"tokens": text.lower().encode().split(),
                b"raw": text,
                b"sent_id": number * 10 + n,
                b"sent": text.lower().encode("latin1"),
            }
            for n, text in enumerate(said)
        ],
        b"category_id": 1,
    }


@pytest.fixture
def published(tmp_path):
    folder = tmp_path / "refcoco"
    folder.mkdir()
    for number, size in ((581857, (64, 48)), (9, (40, 30)), (25, (30, 30))):
        picture(tmp_path / "train2014" / f"COCO_train2014_{number:012d}.jpg", number, size)
    refs = [
        ref(0, 1719310, 581857, b"train", ["The LADY with\n the shirt", "girl"]),
        ref(1, 55, 9, b"testA", ["left man"]),
        ref(2, 1719311, 581857, b"train", ["caf\xe9 table"]),
        ref(3, 66, 25, b"train", ["dog", " "]),
    ]
    (folder / "refs(unc).p").write_bytes(python2(refs))
    images = [
        {"id": number, "file_name": f"COCO_train2014_{number:012d}.jpg", "width": w, "height": h}
        for number, w, h in ((581857, 640, 480), (9, 40, 30), (25, 30, 30))
    ]
    boxes = [
        {"id": 1719310, "image_id": 581857, "bbox": [103.5, 300, 135, 100.25], "category_id": 1},
        {"id": 1719311, "image_id": 581857, "bbox": [0, 0, 640, 480], "category_id": 2},
        {"id": 55, "image_id": 9, "bbox": [1, 2, 3, 4], "category_id": 1},
        {"id": 66, "image_id": 25, "bbox": [20, 20, 15, 15], "category_id": 1},
        {"id": 67, "image_id": 25, "bbox": [0, 0, 1, 1], "category_id": 1},
    ]
    dump(folder / "instances.json", {"images": images, "annotations": boxes, "categories": []})
    return folder, tmp_path / "out"


def build(folder, out, **options):
    chosen: dict[str, Any] = {"processes": 1} | options
    return build_refcoco(
        folder / "refs(unc).p",
        folder / "instances.json",
        [folder.parent / "train2014"],
        out,
        **chosen,
    )


def test_expressions_get_the_boxes_of_their_annotations(published):
    folder, out = published
    counts = build(folder, out)
    found = {key: row for key, _, row in samples(out / "grounding" / "train")}
    assert list(found) == ["coco-581857", "coco-25"]
    row = found["coco-581857"]
    assert (row["image_id"], row["width"], row["height"]) == ("coco-581857", 64, 48)
    said = [(one["text"], one["ref_id"], one["sent_id"]) for one in row["expressions"]]
    assert said == [("the lady with the shirt", 0, 0), ("girl", 0, 1), ("caf\xe9 table", 2, 20)]
    boxes = [one["bb"] for one in row["expressions"]]
    assert boxes[0] == boxes[1] == pytest.approx([10.35, 30, 13.5, 10.02], abs=0.011)
    assert boxes[2] == [0, 0, 64, 48]
    assert found["coco-25"]["expressions"][0]["bb"] == [20, 20, 10, 10], "clipped to the picture"
    assert counts.details == {"expressions": 4, "expressions_empty": 1, "boxes_clipped": 1}


def test_splits_are_those_of_the_references(published):
    folder, out = published
    build(folder, out, split="testA")
    [(key, _, row)] = samples(out / "grounding" / "testA")
    assert key == "coco-9" and row["expressions"][0]["bb"] == [1, 2, 3, 4]
    with pytest.raises(ValueError, match="'testB'; its splits are: testA, train"):
        build(folder, out, split="testB")


def test_instances_of_another_set_are_refused(published):
    folder, out = published
    content = json.loads((folder / "instances.json").read_text())
    content["annotations"][1]["image_id"] = 25
    dump(folder / "instances.json", content)
    with pytest.raises(ValueError, match=r"refs\[2\].*1719311.*the same data set"):
        build(folder, out)


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (lambda c: c.pop("images"), "images"),
        (lambda c: c["images"][0].pop("width"), r"images\[0\] needs 'width'"),
        (lambda c: c["annotations"][0].pop("bbox"), r"annotations\[0\] needs 'bbox'"),
        (lambda c: c["annotations"][0].update(bbox=[1, 2]), "bb"),
    ],
)
def test_wrong_instances_are_named(published, change, told):
    folder, out = published
    content = json.loads((folder / "instances.json").read_text())
    change(content)
    dump(folder / "instances.json", content)
    with pytest.raises(ValueError, match=told):
        build(folder, out)


@pytest.mark.parametrize(
    ("refs", "told"),
    [
        ({b"a": 1}, "must hold a list"),
        ([5], r"refs\[0\] needs 'split'"),
        ([{b"split": b"train"}], r"refs\[0\] needs 'ann_id'"),
        ([ref(0, 55, 9, b"train", ["x"]) | {b"sentences": [{}]}], "'sent'"),
    ],
)
def test_wrong_references_are_named(published, refs, told):
    folder, out = published
    (folder / "refs(unc).p").write_bytes(python2(refs))
    with pytest.raises(ValueError, match=told):
        build(folder, out)


# -- pickles --------------------------------------------------------------------------------------


class Malicious:
    """What an attacker would put into refs(unc).p."""

    def __init__(self, target):
        self.target = str(target)

    def __reduce__(self):
        return os.mkdir, (self.target,)


class Innocent:
    value = 5


def attacks(target):
    name = os.mkdir.__module__
    yield pickle.dumps([Malicious(target)], protocol=0)
    yield pickle.dumps([{"split": Malicious(target)}], protocol=2)
    yield pickle.dumps([Malicious(target)], protocol=5)
    yield f"cos\nmkdir\n(V{target}\ntR.".encode()  # REDUCE
    yield f"(V{target}\nios\nmkdir\n.".encode()  # INST
    yield f"(cos\nmkdir\nV{target}\no.".encode()  # OBJ
    yield f"\x80\x04\x8c{chr(len(name))}{name}\x8c\x05mkdir\x93V{target}\n\x85R.".encode("latin1")
    yield b"c__builtin__\neval\n(V1\ntR."
    yield pickle.dumps([Innocent()])
    yield b"Vsomething\nQ."  # BINPERSID
    yield b"Psomething\n."  # PERSID
    yield b"\x80\x02\x82\x01."  # EXT1
    yield b"}(Va\nI1\nub."  # BUILD without an object


def test_pickles_that_would_run_code_are_refused(tmp_path):
    target, file = tmp_path / "made", tmp_path / "refs(unc).p"
    pickle.loads(next(attacks(target)))
    assert target.is_dir(), "the attack works where it is not refused"
    target.rmdir()
    for raw in attacks(target):
        file.write_bytes(raw)
        with pytest.raises(ValueError, match=r"refs\(unc\)\.p: refused") as error:
            read_plain_pickle(file)
        assert not target.exists(), pickletools.dis(raw, out=io.StringIO())
        assert error.value.__cause__ is None


def test_damaged_pickles_are_told(tmp_path, published):
    raw = (published[0] / "refs(unc).p").read_bytes()
    file = tmp_path / "cut.p"
    for cut in range(0, len(raw) - 1, 97):
        file.write_bytes(raw[:cut])
        with pytest.raises(ValueError, match="refused"):
            read_plain_pickle(file)
    file.write_bytes(b"\x80\x04\x8e" + (1 << 62).to_bytes(8, "little"))
    with pytest.raises(ValueError, match="refused"):
        read_plain_pickle(file)
    with pytest.raises(FileNotFoundError):
        read_plain_pickle(tmp_path / "none.p")


@pytest.mark.parametrize("protocol", range(6))
def test_plain_data_of_every_protocol_is_read(tmp_path, protocol):
    value = [{"a": 1, "b": [1.5, None, True, (2, "\u00e9\u4e2d")], "c": 1 << 70}]
    (tmp_path / "x.p").write_bytes(pickle.dumps(value, protocol))
    assert read_plain_pickle(tmp_path / "x.p") == value


def test_the_verb(published, capsys):
    folder, out = published
    words = ["build", "refcoco", "--refs", folder / "refs(unc).p", "--images", folder.parent]
    words += ["--instances", folder / "instances.json", "--out", out, "--processes", "1"]
    assert verb(*words) == 0
    assert f"{out / 'grounding' / 'train'}: 2 images, 2 samples" in capsys.readouterr().out
