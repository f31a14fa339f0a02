"""VQA v2: questions and annotations as published, to shards and an answer list."""

import json
import zipfile
from typing import Any

import pytest

from data_pipeline.importers.vqa import build_vqa
from data_pipeline.manifest import load_manifest
from tests.unit.data_pipeline.published import dump, picture, samples, verb


def questions(path, subset, rows):
    """`rows`: (image, question id, question)."""
    return dump(
        path / f"v2_OpenEnded_mscoco_{subset}_questions.json",
        {
            "info": {"version": "2.0", "year": 2017},
            "task_type": "Open-Ended",
            "data_type": "mscoco",
            "license": {"name": "CC BY 4.0", "url": "http://creativecommons.org"},
            "data_subtype": subset,
            "questions": [
                {"image_id": image, "question": text, "question_id": number}
                for image, number, text in rows
            ],
        },
    )


def annotations(path, subset, rows):
    """`rows`: (image, question id, the ten answers, answer type)."""
    return dump(
        path / f"v2_mscoco_{subset}_annotations.json",
        {
            "info": {},
            "license": {},
            "data_subtype": subset,
            "annotations": [
                {
                    "question_type": "what is this",
                    "multiple_choice_answer": max(given, key=given.count),
                    "answers": [
                        {"answer": answer, "answer_confidence": "maybe", "answer_id": n + 1}
                        for n, answer in enumerate(given)
                    ],
                    "image_id": image,
                    "answer_type": kind,
                    "question_id": number,
                }
                for image, number, given, kind in rows
            ],
            "data_type": "mscoco",
        },
    )


@pytest.fixture
def published(tmp_path):
    """Two training pictures, one validation picture and one test picture."""
    raw = {
        "a": picture(tmp_path / "train2014" / "COCO_train2014_000000000009.jpg", 1),
        "b": picture(tmp_path / "train2014" / "COCO_train2014_000000581921.jpg", 2),
        "c": picture(tmp_path / "val2014" / "COCO_val2014_000000000042.jpg", 3),
        "d": picture(tmp_path / "test2015" / "COCO_test2015_000000000001.jpg", 4),
    }
    files = {
        "train": questions(
            tmp_path,
            "train2014",
            [
                (581921, 581921000, "What is\n this? "),
                (9, 9001, "Is it?"),
                (581921, 581921001, "Who?"),
            ],
        ),
        "val": questions(tmp_path, "val2014", [(42, 42000, "How many?")]),
        "dev": questions(tmp_path, "test-dev2015", [(1, 1000, "Why?"), (1, 1001, "Where?")]),
        "train answers": annotations(
            tmp_path,
            "train2014",
            [
                (9, 9001, ["yes"] * 9 + ["no"], "yes/no"),
                (581921, 581921000, ["Net "] * 6 + ["net"] * 2 + ["mesh", ""], "other"),
                (581921, 581921001, ["net"] * 10, "other"),
            ],
        ),
        "val answers": annotations(tmp_path, "val2014", [(42, 42000, ["2"] * 10, "number")]),
    }
    return tmp_path, files, raw


def build(files, *splits, **options):
    chosen: dict[str, Any] = {"min_count": 1, "processes": 1} | options
    root = files["train"].parent
    return build_vqa(
        [files[split] for split in splits],
        [files[f"{split} answers"] for split in splits if f"{split} answers" in files],
        [root / "train2014", root / "val2014", root / "test2015"],
        root / "out",
        **chosen,
    )


def test_train_and_val_become_one_split(published):
    root, files, raw = published
    counts = build(files, "train", "val")
    found = list(samples(root / "out" / "vqa" / "train"))
    assert [key for key, *_ in found] == ["vqa-581921", "vqa-9", "vqa-42"]
    assert [members["jpg"] for _, members, _ in found] == [raw["b"], raw["a"], raw["c"]]
    assert [row["image_id"] for *_, row in found] == ["coco-581921", "coco-9", "coco-42"]
    assert found[0][2]["questions"] == [
        {
            "question_id": "581921000",
            "question": "What is this?",
            "answers": {"net": 0.8, "mesh": 0.1},
            "type": "other",
            "question_type": "what is this",
        },
        {
            "question_id": "581921001",
            "question": "Who?",
            "answers": {"net": 1.0},
            "type": "other",
            "question_type": "what is this",
        },
    ]
    assert found[1][2]["questions"][0]["answers"] == {"yes": 0.9, "no": 0.1}
    assert (counts.samples, counts.details["questions"]) == (3, 4)
    assert counts.details["empty_answers"] == 1


def test_hidden_answers(published):
    root, files, raw = published
    build(files, "dev", split="test-dev", min_count=None)
    [(key, members, row)] = samples(root / "out" / "vqa" / "test-dev")
    assert (key, members["jpg"]) == ("vqa-1", raw["d"]), "test-dev asks about test2015's pictures"
    assert [question["answers"] for question in row["questions"]] == [{}, {}]
    assert not (root / "out" / "vqa" / "answers.json").exists()


def test_answer_list_from_counts(published):
    root, files, _ = published
    counts = build(files, "train", min_count=2)
    path = root / "out" / "vqa" / "answers.json"
    assert json.loads(path.read_text()) == ["net"], "the answer of two questions"
    assert counts.details["questions_without_listed_answer"] == 1
    before = path.read_bytes()
    build(files, "val", split="val", min_count=None)
    assert path.read_bytes() == before, "validation answers do not choose the candidates"
    with pytest.raises(ValueError, match=r"another answer list.*remove it"):
        build(files, "train", min_count=1)


def test_answer_list_is_ordered_by_count_then_name(published):
    root, files, _ = published
    build(files, "train", "val", min_count=1)
    listed = json.loads((root / "out" / "vqa" / "answers.json").read_text())
    assert listed == ["net", "2", "yes"]


def test_the_default_list_needs_nine_questions(published):
    _, files, _ = published
    with pytest.raises(ValueError, match=r"of 9 questions; lower --min-count"):
        build(files, "train", min_count=None)


def test_answer_list_of_a_file_is_kept_as_it_is(published):
    root, files, _ = published
    given = dump(root / "answer_list.json", ["zebra", "net", "Yes!"])
    counts = build(files, "train", answers=given, min_count=None)
    listed = json.loads((root / "out" / "vqa" / "answers.json").read_text())
    assert listed == ["zebra", "net", "Yes!"]
    assert counts.details["questions_without_listed_answer"] == 1, "yes is not Yes!"


@pytest.mark.parametrize(
    ("content", "told"),
    [
        ("{", "not valid JSON"),
        ("{}", "list"),
        ('["a", ""]', "empty"),
        ('["a", "a"]', "'a'"),
        ("[]", "empty"),
    ],
)
def test_bad_answer_lists(published, content, told):
    root, files, _ = published
    (root / "list.json").write_text(content)
    with pytest.raises(ValueError, match=rf"list\.json.*{told}"):
        build(files, "train", answers=root / "list.json", min_count=None)


@pytest.mark.parametrize(
    ("file", "change", "told"),
    [
        ("train", lambda c: c.pop("questions"), r"needs 'questions' \(a list\)"),
        ("train", lambda c: c.pop("data_subtype"), "data_subtype"),
        ("train", lambda c: c.update(data_subtype="../x"), "data_subtype"),
        ("train", lambda c: c["questions"][1].pop("image_id"), r"questions\[1\] needs 'image_id'"),
        ("train", lambda c: c["questions"][1].update(question_id=True), "question_id"),
        ("train", lambda c: c["questions"].append(c["questions"][0]), "581921000 occurs twice"),
        ("train", lambda c: c["questions"][0].update(question_id=5), "5 has no annotation"),
        ("train answers", lambda c: c.pop("annotations"), "annotations"),
        ("train answers", lambda c: c["annotations"][2].pop("answers"), r"\[2\] needs 'answers'"),
        ("train answers", lambda c: c["annotations"][2].update(answers=[]), "empty"),
        ("train answers", lambda c: c["annotations"][2].update(answers=["x"]), "'answer'"),
        ("train answers", lambda c: c["annotations"].append(c["annotations"][0]), "9001.*twice"),
    ],
)
def test_wrong_files_are_named(published, file, change, told):
    _, files, _ = published
    content = json.loads(files[file].read_text())
    change(content)
    files[file].write_text(json.dumps(content))
    with pytest.raises(ValueError, match=told) as error:
        build(files, "train")
    assert files[file].name in str(error.value)


def test_a_picture_of_two_sets_is_refused(published):
    _, files, _ = published
    content = json.loads(files["val"].read_text())
    content["questions"][0].update(image_id=9)
    files["val"].write_text(json.dumps(content))
    with pytest.raises(ValueError, match="image_id 9"):
        build(files, "train", "val")


def test_missing_pictures_are_an_error_or_listed(published):
    root, files, _ = published
    (root / "train2014" / "COCO_train2014_000000000009.jpg").unlink()
    with pytest.raises(ValueError, match=r"COCO_train2014_000000000009\.jpg.*--skip-bad"):
        build(files, "train")
    assert build(files, "train", skip_bad=True).skipped == 1
    assert load_manifest(root / "out" / "vqa" / "train").samples == 1


def test_pictures_of_2017_and_zips_serve_as_well(published):
    root, files, raw = published
    with zipfile.ZipFile(root / "train2014.zip", "w") as archive:
        archive.write(
            root / "train2014" / "COCO_train2014_000000000009.jpg",
            "train2014/COCO_train2014_000000000009.jpg",
        )
    (root / "2017").mkdir()
    old = root / "train2014" / "COCO_train2014_000000581921.jpg"
    old.rename(root / "2017" / "000000581921.jpg")
    build_vqa(
        [files["train"]],
        [files["train answers"]],
        [root / "train2014.zip", root / "2017"],
        root / "out",
        min_count=1,
        processes=1,
    )
    found = {key: members["jpg"] for key, members, _ in samples(root / "out" / "vqa" / "train")}
    assert found == {"vqa-9": raw["a"], "vqa-581921": raw["b"]}


def test_the_verb(published, capsys):
    root, files, _ = published
    words = ["build", "vqa", "--questions", files["train"], files["val"], "--annotations"]
    words += [files["train answers"], files["val answers"], "--images", root, "--out", root / "out"]
    assert verb(*words, "--min-count", "1", "--processes", "1") == 0
    assert "3 samples" in capsys.readouterr().out
    with pytest.raises(ValueError, match="--min-count must be"):
        verb(*words, "--min-count", "0")
    with pytest.raises(FileNotFoundError, match=r"none\.json"):
        verb(*words[:2], "--questions", root / "none.json", "--images", root, "--out", root / "o")
