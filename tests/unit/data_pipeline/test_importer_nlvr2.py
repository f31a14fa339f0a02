"""NLVR2: lines of statements and pairs of pictures, to shards."""

import json

import pytest

from data_pipeline.importers.nlvr2 import build_nlvr2
from tests.unit.data_pipeline.published import picture, samples, verb


def line(identifier, sentence, label, **more):
    return {
        "sentence": sentence,
        "writer": "99",
        "validation": {"77": label},
        "left_url": "http://x/left.jpg",
        "right_url": "http://x/right.jpg",
        "label": label,
        "synset": "beer bottle",
        "query": "some beer bottles2",
        "identifier": identifier,
    } | more


def write(path, lines):
    path.write_text("".join(json.dumps(entry) + "\n" for entry in lines))
    return path


@pytest.fixture
def published(tmp_path):
    images = tmp_path / "images"
    raw = {}
    for number, name in enumerate(
        [
            "train/28/train-10171-0-img0.png",
            "train/28/train-10171-0-img1.png",
            "train/53/train-7-3-img0.png",
            "train/53/train-7-3-img1.png",
            "dev/dev-850-0-img0.png",
            "dev/dev-850-0-img1.png",
        ]
    ):
        kind = "PNG" if number % 2 else "JPEG"  # "despite the extension, not all are PNGs"
        raw[name] = picture(images / name, number, (30 + number, 20), kind)
    train = write(
        tmp_path / "train.json",
        [
            line("train-10171-0-0", "An image shows\n one  case.", "False", directory=28),
            line("train-7-3-0", "Two dogs.", "True", directory="53"),
            line("train-10171-0-1", "Both are red.", "True", directory=28),
        ],
    )
    dev = write(tmp_path / "dev.json", [line("dev-850-0-0", "It is so.", True)])
    return train, dev, images, tmp_path / "out", raw


def test_statements_about_a_pair_become_one_sample(published):
    train, _, images, out, raw = published
    counts = build_nlvr2([train], [images], out, processes=1)
    found = list(samples(out / "nlvr2" / "train"))
    assert [key for key, *_ in found] == ["nlvr2-train-10171-0", "nlvr2-train-7-3"]
    key, members, row = found[0]
    assert row == {
        "image_ids": ["nlvr2-train-10171-0-img0", "nlvr2-train-10171-0-img1"],
        "statements": [
            {
                "sentence": "An image shows one case.",
                "label": False,
                "identifier": "train-10171-0-0",
            },
            {"sentence": "Both are red.", "label": True, "identifier": "train-10171-0-1"},
        ],
    }
    assert members["0.jpg"] == raw["train/28/train-10171-0-img0.png"], "a JPEG, whatever its name"
    assert members["1.png"] == raw["train/28/train-10171-0-img1.png"]
    assert (counts.samples, counts.images, counts.details["statements"]) == (2, 4, 3)


@pytest.mark.parametrize("folder", [".", "dev"])
def test_dev_pictures_have_no_directories(published, folder):
    _, dev, images, out, raw = published
    build_nlvr2([dev], [images / folder], out, split="val", processes=1)
    [(key, members, row)] = samples(out / "nlvr2" / "val")
    assert key == "nlvr2-dev-850-0" and row["statements"][0]["label"] is True
    assert members["0.jpg"] == raw["dev/dev-850-0-img0.png"]


@pytest.mark.parametrize(
    ("entry", "told"),
    [
        (line("train-1-0", "x", "True"), "SPLIT-SET-PAIR-SENTENCE"),
        (line("../a-1-0-0", "x", "True"), "SPLIT-SET-PAIR-SENTENCE"),
        (line("train-1-0-0", "x", "maybe"), "'label'.*maybe"),
        (line("train-1-0-0", "x", None), "'label'"),
        (line("train-1-0-0", 5, "True"), "'sentence'"),
        (line("train-1-0-0", "x", "True", directory="../.."), "plain name"),
        (line("dev-850-0-0", "x", "True"), "occurs twice"),
        (["x"], "not an object"),
    ],
)
def test_wrong_lines_are_named(published, entry, told):
    _, dev, images, out, _ = published
    dev.write_text(dev.read_text() + "\n" + json.dumps(entry))
    with pytest.raises(ValueError, match=rf"dev\.json: line 3.*{told}"):
        build_nlvr2([dev], [images], out)


def test_files_that_are_none(published):
    _, dev, images, out, _ = published
    dev.write_text('{"a": ')
    with pytest.raises(ValueError, match=r"line 1 is not valid JSON"):
        build_nlvr2([dev], [images], out)
    dev.write_text("\n")
    with pytest.raises(ValueError, match="no statements"):
        build_nlvr2([dev], [images], out)
    with pytest.raises(FileNotFoundError, match=r"none\.json"):
        build_nlvr2([dev.with_name("none.json")], [images], out)


def test_a_pair_needs_both_pictures(published):
    train, _, images, out, _ = published
    (images / "train" / "53" / "train-7-3-img1.png").unlink()
    with pytest.raises(ValueError, match=r"train-7-3-img1\.png.*--skip-bad"):
        build_nlvr2([train], [images], out, processes=1)
    counts = build_nlvr2([train], [images], out, processes=1, skip_bad=True)
    assert (counts.samples, counts.skipped) == (1, 1)


def test_the_verb(published, capsys):
    train, dev, images, out, _ = published
    words = ["build", "nlvr2", "--statements", train, dev, "--images", images, "--out", out]
    assert verb(*words, "--processes", "1", "--max-side", "16") == 0
    assert "3 samples" in capsys.readouterr().out
    assert len(list(samples(out / "nlvr2" / "train"))) == 3
