"""`espalier eval --task vqa`: where the splits lie, and what is refused before any work is done."""

from __future__ import annotations

import json
import shutil
import tarfile
from pathlib import Path

import pytest
import torch

from data_pipeline.blocksworld.build import build_blocksworld
from data_pipeline.shards import ShardSet, clear_shards, dump_json
from data_pipeline.text import load_tokenizer
from models import presets
from train.evaluation.accuracy import evaluate_model, questions_of


def hide_answers(split: Path, known: int = 0) -> None:
    """Makes a split one of hidden answers, but for its first `known` pictures."""
    samples: dict[str, dict[str, bytes]] = {}
    for shard in sorted(split.glob("*.tar")):
        with tarfile.open(shard) as tar:
            for member in tar:
                key, _, kind = member.name.partition(".")
                samples.setdefault(key, {})[kind] = tar.extractfile(member).read()  # type: ignore[union-attr]
    clear_shards(split)
    with ShardSet(split, per_shard=1000) as out:
        for number, (key, members) in enumerate(samples.items()):
            record = json.loads(members["json"])
            for question in record["questions"] if number >= known else ():
                question["answers"] = {}
            out.write(key, members | {"json": dump_json(record)})
    out.manifest("vqa", split.name)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("scenes") / "data"
    build_blocksworld(folder, 30, val=2, test=4, image_size=48, tasks=("vqa",), processes=1)
    return folder


@pytest.fixture(scope="module")
def model(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    words = load_tokenizer(data / "tokenizer")
    torch.manual_seed(0)
    made = presets.create("blocksworld-micro-student", form="vqa", text={"vocab_size": len(words)})
    folder = tmp_path_factory.mktemp("models") / "small"
    made.save_pretrained(folder, tokenizer=words)
    return folder


def test_the_baseline_learns_from_the_split_beside_whatever_the_layout(
    data: Path, model: Path
) -> None:
    found = [
        evaluate_model(model, place, batch=4, top_k=4)
        for place in (data, data / "vqa", data / "vqa" / "test")
    ]
    assert found[0]["blind_accuracy"] > 0
    assert found[0] == found[1] == found[2]


def test_a_missing_training_split_is_told_before_the_evaluation(
    data: Path, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(data / "vqa" / "test", tmp_path / "vqa" / "test")
    shutil.copy(data / "vqa" / "answers.json", tmp_path / "vqa")
    alone = evaluate_model(model, tmp_path, batch=4, top_k=4, blind=False)
    assert "accuracy" in alone and "blind_accuracy" not in alone

    def too_late(*_: object, **__: object) -> None:
        raise AssertionError("the model was evaluated")

    monkeypatch.setattr("train.evaluation.runner.evaluate", too_late)
    with pytest.raises(FileNotFoundError, match=r"vqa/train/manifest\.json.*--no-blind"):
        evaluate_model(model, tmp_path, batch=4, top_k=4)


def test_a_split_of_hidden_answers_is_refused_and_what_is_known_is_scored(
    data: Path, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(data / "vqa", tmp_path / "vqa")
    hide_answers(tmp_path / "vqa" / "test", known=1)
    known = [answers for _, _, answers in questions_of(tmp_path / "vqa" / "test") if answers]
    partly = evaluate_model(model, tmp_path, batch=4, top_k=4)
    whole = evaluate_model(model, data, batch=4, top_k=4, limit=1)
    assert partly["accuracy_count"] == len(known) == whole["accuracy_count"] > 0
    assert partly == whole
    hide_answers(tmp_path / "vqa" / "test")

    def too_late(*_: object, **__: object) -> None:
        raise AssertionError("the model was evaluated")

    monkeypatch.setattr("train.evaluation.runner.evaluate", too_late)
    with pytest.raises(ValueError, match=r"vqa/test: .*hidden.*espalier predict"):
        evaluate_model(model, tmp_path, batch=4, top_k=4)
