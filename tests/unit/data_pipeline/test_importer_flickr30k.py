"""Flickr30k with Karpathy's splits, to shards of three tasks."""

import json

import pytest

from data_pipeline.importers.flickr30k import build_flickr30k
from tests.unit.data_pipeline.published import dump, picture, samples, verb


def entry(number, split, said):
    first = number * 5
    return {
        "sentids": [first + n for n in range(len(said))],
        "imgid": number,
        "sentences": [
            {"tokens": text.lower().split(), "raw": text, "imgid": number, "sentid": first + n}
            for n, text in enumerate(said)
        ],
        "split": split,
        "filename": f"100009279{number}.jpg",
    }


@pytest.fixture
def published(tmp_path):
    raw = [
        picture(tmp_path / "flickr30k-images" / f"100009279{n}.jpg", n, (40 + n, 30))
        for n in range(4)
    ]
    images = [
        entry(0, "train", ["Two young guys.", "Two  men\nin green . "]),
        entry(1, "test", ["A dog runs."]),
        entry(2, "train", ["", "A caf\u00e9."]),
        entry(3, "train", [" "]),
    ]
    return dump(
        tmp_path / "dataset_flickr30k.json", {"images": images, "dataset": "flickr30k"}
    ), raw


def test_captions_as_written_for_every_task(published):
    file, raw = published
    root, out = file.parent, file.parent / "out"
    counts = build_flickr30k(
        file,
        [root / "flickr30k-images"],
        out,
        tasks=("retrieval", "captioning", "pretrain"),
        processes=1,
    )
    for task in ("retrieval", "captioning", "pretrain"):
        found = list(samples(out / task / "train"))
        assert [key for key, *_ in found] == ["flickr30k-1000092790", "flickr30k-1000092792"]
        assert [members["jpg"] for _, members, _ in found] == [raw[0], raw[2]]
        assert [row["captions"] for *_, row in found] == [
            ["Two young guys.", "Two men in green ."],
            ["A caf\u00e9."],
        ]
        assert found[0][2]["image_id"] == "flickr30k-1000092790"
        assert counts[task].details == {
            "captions": 3,
            "captions_empty": 2,
            "images_without_caption": 1,
        }
    assert [(row["width"], row["height"]) for *_, row in found] == [(40, 30), (42, 30)]


def test_splits_are_kept_apart(published):
    file, _ = published
    build_flickr30k(file, [file.parent], file.parent / "out", split="test", processes=1)
    [(key, *_)] = samples(file.parent / "out" / "retrieval" / "test")
    assert key == "flickr30k-1000092791"
    with pytest.raises(ValueError, match="'val'; its splits are: test, train"):
        build_flickr30k(file, [file.parent], file.parent / "out", split="val")


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (lambda images: images[1].pop("filename"), r"images\[1\] needs 'filename'"),
        (lambda images: images[1].pop("split"), r"images\[1\] needs 'split'"),
        (lambda images: images[0].update(sentences={}), r"'sentences' \(a list\)"),
        (lambda images: images[0]["sentences"][1].pop("raw"), "'raw'"),
        (lambda images: images[0].update(filename="../../x.jpg"), "refused"),
        (lambda images: images[0].update(filename=images[2]["filename"]), "twice|two items"),
    ],
)
def test_wrong_files_are_named(published, change, told):
    file, _ = published
    content = json.loads(file.read_text())
    change(content["images"])
    file.write_text(json.dumps(content))
    with pytest.raises(ValueError, match=told):
        build_flickr30k(file, [file.parent / "flickr30k-images"], file.parent / "out", processes=1)


def test_other_tasks_are_refused(published):
    file, _ = published
    with pytest.raises(ValueError, match="retrieval, captioning, pretrain"):
        build_flickr30k(file, [file.parent], file.parent / "out", tasks=("vqa",))


def test_the_verb(published, capsys):
    file, _ = published
    out = file.parent / "out"
    words = ["build", "flickr30k", "--karpathy", file, "--images", file.parent, "--out", out]
    assert verb(*words, "--tasks", "retrieval,captioning", "--processes", "1") == 0
    said = capsys.readouterr().out.splitlines()
    assert len(said) == 2 and all("2 samples" in row and "3 captions" in row for row in said)
