"""`espalier eval --task vqa`: where the splits lie, and what is refused before any work is done."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch

from data_pipeline.blocksworld.build import build_blocksworld
from data_pipeline.text import load_tokenizer
from models import presets
from train.evaluation.accuracy import evaluate_model


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
