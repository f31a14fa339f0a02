"""`espalier eval --task vqa --answers-out`: the file of VQA's evaluation server, from the published
questions to the answers.
"""

from __future__ import annotations

import io
import json
from pathlib import Path

import pytest
import torch
from PIL import Image

from data_pipeline.blocksworld.vocabulary import write_tokenizer
from data_pipeline.importers.vqa import build_vqa
from data_pipeline.text import load_tokenizer
from models import presets
from tests.unit.data_pipeline.published import picture, samples
from tests.unit.data_pipeline.test_importer_vqa import annotations, questions
from train.evaluation.predictor import Predictor
from train.evaluation.server_answers import write_answers
from train.main import main

ANSWERS = ["red", "blue", "green", "circle", "square", "two", "three", "yes", "no"]
WORDS = ["what", "colour", "is", "the", "circle", "how", "many", "squares", "red", "blue", "there"]


def asked(first: int, images: range) -> list[tuple[int, int, str]]:
    """(image, question id, question): one to three questions a picture, ids in no order."""
    rows = []
    for image in images:
        for place in range(1 + image % 3):
            text = " ".join(WORDS[(image + 3 * place + n) % len(WORDS)] for n in range(4))
            rows.append((image, 1000 * (first - image) + place, f"{text}?"))
    return rows


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """data/ with vqa/val (answers known) and vqa/test-dev (hidden), and a model/."""
    root = tmp_path_factory.mktemp("server")
    for image in range(1, 8):
        picture(root / "test2015" / f"COCO_test2015_{image:012d}.jpg", image)
        picture(root / "val2014" / f"COCO_val2014_{image:012d}.jpg", 50 + image)
    known, hidden = asked(90, range(1, 6)), asked(50, range(1, 8))
    said = [(i, n, [ANSWERS[(i + n) % 5]] * 7 + ["no"] * 3, "other") for i, n, _ in known]
    pictures = [root / "test2015", root / "val2014"]
    (root / "list.json").write_text(json.dumps(ANSWERS))
    build_vqa(
        [questions(root, "val2014", known)], [annotations(root, "val2014", said)], pictures,
        root / "data", split="val", answers=root / "list.json", processes=1,
    )  # fmt: skip
    build_vqa(
        [questions(root, "test-dev2015", hidden)], [], pictures, root / "data", split="test-dev",
        processes=1,
    )  # fmt: skip
    write_tokenizer(root / "data" / "tokenizer")
    tokenizer = load_tokenizer(root / "data" / "tokenizer")
    torch.manual_seed(0)
    made = presets.create(
        "blocksworld-micro-student", form="vqa", text={"vocab_size": len(tokenizer)}
    )
    with torch.no_grad():  # fresh weights answer everything alike; larger ones have opinions
        for name, value in made.named_parameters():
            if value.dim() > 1 and ("cross_attention" in name or "word" in name):
                value.mul_(5)
    made.save_pretrained(root / "model", tokenizer=tokenizer)
    return root


def evaluate(world: Path, split: str, *more: str) -> int:
    words = ["eval", str(world / "model"), "--task", "vqa", "--data", str(world / "data")]
    return main([*words, "--split", split, "--batch", "3", "--top-k", "4", "--no-blind", *more])


def expected(world: Path, split: str) -> list[dict[str, object]]:
    """Each question of the imported records alone, asked by `espalier predict`'s code."""
    predictor = Predictor(
        world / "model", device="cpu", answers=world / "data" / "vqa" / "answers.json", top_k=4
    )
    rows = []
    for _, members, record in samples(world / "data" / "vqa" / split):
        image = Image.open(io.BytesIO(members["jpg"]))
        for question in record["questions"]:
            answer = predictor.answer(image, question["question"])
            rows.append({"question_id": int(question["question_id"]), "answer": answer})
    return sorted(rows, key=lambda row: row["question_id"])


@pytest.mark.parametrize("split", ["test-dev", "val"])
def test_every_question_of_the_published_file_is_answered(world, tmp_path, capsys, split):
    out, record = tmp_path / "deep" / "answers.json", tmp_path / "record.json"
    assert evaluate(world, split, "--answers-out", str(out), "--json", str(record)) == 0
    written = json.loads(out.read_text())
    published = next(world.glob(f"v2_OpenEnded_mscoco_{split.replace('-', '?')}*_questions.json"))
    numbers = [row["question_id"] for row in json.loads(published.read_text())["questions"]]
    assert [row["question_id"] for row in written] == sorted(numbers)
    assert len({row["answer"] for row in written}) > 1
    assert written == expected(world, split)
    assert list(out.parent.iterdir()) == [out], "nothing half written is left"
    told, printed = json.loads(record.read_text()), capsys.readouterr().out
    assert told["answers_out"] == str(out) and told["answered_count"] == len(numbers)
    assert f"{len(numbers)} answers in {out}" in printed
    if split == "val":
        assert told["answers"] == "known" and told["accuracy_count"] == len(numbers)
        assert "no score" not in printed and f"{100 * told['accuracy']:.2f} %" in printed
    else:
        assert told["answers"] == "hidden" and not any("accuracy" in name for name in told)
        assert "no score" in printed


def test_scores_are_those_of_an_evaluation_that_writes_no_answers(world, tmp_path):
    files = [tmp_path / "with.json", tmp_path / "without.json"]
    answers = ["--answers-out", str(tmp_path / "answers.json")]
    assert evaluate(world, "val", *answers, "--json", str(files[0])) == 0
    assert evaluate(world, "val", "--json", str(files[1])) == 0
    first, second = (json.loads(file.read_text()) for file in files)
    extra = {"answers_out", "answers", "answered_count"}
    assert first.keys() - second.keys() == extra
    assert {name: first[name] for name in second} == second


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--limit", "2"], "--limit"),
        (["--task", "nlvr2"], "--answers-out is for --task vqa"),
    ],
)
def test_what_does_not_go_together_is_refused(world, tmp_path, capsys, words, told):
    out = tmp_path / "answers.json"
    assert evaluate(world, "val", "--answers-out", str(out), *words) == 2
    assert told in capsys.readouterr().err and not out.exists()


def test_hidden_answers_without_a_file_name_the_option(world, capsys):
    assert evaluate(world, "test-dev") == 2
    assert "--answers-out" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("name", "told"),
    [("vg-17", "'vg-17' is no number.*data build vqa"), ("48000", "48000 comes twice.*data build")],
)
def test_questions_that_no_server_knows_are_refused_first(world, monkeypatch, tmp_path, name, told):
    from data_pipeline.records import Question, VqaRecord

    known = VqaRecord("a", (Question("48000", "who?", {}), Question(name, "what?", {})))
    monkeypatch.setattr("train.evaluation.items.records", lambda *_: iter([("key", known)]))

    def too_late(*_: object, **__: object) -> None:
        raise AssertionError("the model was evaluated")

    monkeypatch.setattr("train.evaluation.runner.evaluate", too_late)
    from train.evaluation.accuracy import evaluate_model

    with pytest.raises(ValueError, match=rf"test-dev: sample 'key': .*{told}"):
        evaluate_model(
            world / "model", world / "data", "test-dev", answers_out=tmp_path / "answers.json"
        )


def test_a_file_that_would_miss_questions_is_not_written(tmp_path):
    with pytest.raises(ValueError, match="2 questions, 1 of them answered"):
        write_answers(tmp_path / "a.json", {"1": "yes"}, {"1": 1, "2": 2})
    assert not list(tmp_path.iterdir())
