"""Scores picture by picture add up to the metrics of `espalier eval`; what needs no picture."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from data_pipeline.blocksworld.build import build_blocksworld
from data_pipeline.loader import build_loader
from data_pipeline.text import load_tokenizer
from models import presets
from tests.unit.train.test_accuracy import hide_answers
from train.config import KdConfig
from train.evaluation.captioning import CaptionWriter
from train.evaluation.items import HEADLINE, Items, blind_items, model_items, records
from train.evaluation.runner import evaluate
from train.evaluation.vqa import AnswerList, VqaEvaluator
from train.tasks.captioning import CaptionTask
from train.tasks.grounding import GroundingTask
from train.tasks.nlvr2 import Nlvr2Task
from train.tasks.retrieval import RetrievalTask

TOP_K = 4


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("scenes") / "data"
    build_blocksworld(out, 30, val=2, test=12, image_size=48, tasks=tuple(HEADLINE))
    return out


@pytest.fixture(scope="module")
def words(folder: Path) -> Any:
    return load_tokenizer(folder / "tokenizer")


def split(folder: Path, words: Any, task: str) -> Any:
    return build_loader(
        task, folder / task / "test", tokenizer=words, batch=4, train=False, image_size=48,
        patch_size=8, max_tokens=48,
    )  # fmt: skip


@pytest.mark.parametrize("task", list(HEADLINE))
def test_pictures_add_up_to_the_metric_of_the_whole_split(folder, words, task):
    torch.manual_seed(0)
    model = presets.create(
        "blocksworld-micro-student", form=task, text={"vocab_size": len(words)}
    ).eval()
    answers = AnswerList.load(folder, words)
    writer = CaptionWriter(words, beams=1, max_length=9)
    plain = ({}, KdConfig(), model.config, None)
    tasks: dict[str, Any] = {
        "vqa": VqaEvaluator(answers, TOP_K),
        "nlvr2": Nlvr2Task(*plain),
        "retrieval": RetrievalTask(*plain, k_test=TOP_K),
        "captioning": CaptionTask(*plain, writer=writer),
        "grounding": GroundingTask(*plain),
    }
    whole = evaluate(model, tasks[task], split(folder, words, task))
    items = model_items(
        model, task, iter(split(folder, words, task)), answers=answers, writer=writer,
        top_k=TOP_K, gallery=12,
    )  # fmt: skip
    means = items.means()
    for name in HEADLINE[task]:
        assert means[name] == pytest.approx(whole[name]), name
    assert len(items.units) == sum(1 for _ in records(folder / task / "test", task))
    assert items.score(HEADLINE[task]) == pytest.approx(
        np.mean([whole[name] for name in HEADLINE[task]])
    )


def test_a_gallery_that_is_not_full_is_left_out(folder, words):
    model = presets.create(
        "blocksworld-micro-student", form="retrieval", text={"vocab_size": len(words)}
    ).eval()
    items = model_items(
        model, "retrieval", iter(split(folder, words, "retrieval")), top_k=2, gallery=8
    )
    assert len(items.units) == 8  # of 12
    with pytest.raises(ValueError, match="no multiple of batches of 4"):
        model_items(model, "retrieval", iter(split(folder, words, "retrieval")), gallery=6)
    with pytest.raises(ValueError, match="vqa: unknown task, or no answer list"):
        model_items(model, "vqa", iter(()))


def test_files_keep_everything(tmp_path):
    items = Items(("a", "b"), {"x": np.array([1.0, 0.5])}, {"x": np.array([2.0, 1.0])})
    items.save(tmp_path / "items.npz")
    again = Items.load(tmp_path / "items.npz")
    assert again.units == items.units and again.items == 3
    assert again.means() == {"x": 0.5}
    np.savez(tmp_path / "other.npz", y=np.zeros(1))
    with pytest.raises(ValueError, match="not a file of per-picture scores"):
        Items.load(tmp_path / "other.npz")


# -- without pictures ------------------------------------------------------------------------------


def blind(folder: Path, task: str, gallery: int = 12) -> dict[str, float]:
    found = blind_items(task, folder / task / "train", folder / task / "test", gallery=gallery)
    return {name: float(value) for name, value in found.means().items()}


def test_chance_finds_what_a_random_order_finds(folder):
    found = blind(folder, "retrieval")
    found_records = records(folder / "retrieval" / "test", "retrieval")
    own = [len(record.captions) for _, record in found_records]  # type: ignore[union-attr]
    generator, at = np.random.default_rng(0), 5
    owner = np.repeat(np.arange(len(own)), own)
    hits = [
        any(owner[text] == image for text in generator.permutation(len(owner))[:at])
        for image in range(len(own))
        for _ in range(2000)
    ]
    assert found["image_to_text_r5"] == pytest.approx(np.mean(hits), abs=0.02)
    assert found["text_to_image_r5"] == pytest.approx(5 / 12)
    assert found["text_to_image_r10"] == pytest.approx(10 / 12)


def test_blind_answers_are_those_of_the_question_baseline(folder):
    from train.evaluation.accuracy import blind_scores

    expected = blind_scores(folder / "vqa" / "train", folder / "vqa" / "test")
    assert blind(folder, "vqa")["accuracy"] == pytest.approx(expected["blind_accuracy"])
    assert 0 < blind(folder, "nlvr2")["accuracy"] < 1


def test_hidden_answers_are_not_scored(folder, words, tmp_path):
    shutil.copytree(folder / "vqa", tmp_path / "vqa")
    hide_answers(tmp_path / "vqa" / "test", known=3)
    torch.manual_seed(0)
    model = presets.create("blocksworld-micro-student", form="vqa", text={"vocab_size": len(words)})
    answers = AnswerList.load(folder, words)

    def asked() -> Items:
        batches = iter(split(tmp_path, words, "vqa"))
        return model_items(model.eval(), "vqa", batches, answers=answers, top_k=TOP_K)

    known = [key for key, _ in records(folder / "vqa" / "test", "vqa", 3)]
    assert sorted(asked().units) == sorted(known)
    train, test = tmp_path / "vqa" / "train", tmp_path / "vqa" / "test"
    assert sorted(blind_items("vqa", train, test).units) == sorted(known)
    hide_answers(test)
    for score in (asked, lambda: blind_items("vqa", train, test)):
        with pytest.raises(ValueError, match="hidden"):
            score()


def test_the_mean_training_box_is_what_a_blind_guess_is(folder):
    def boxes(which: str) -> torch.Tensor:
        found = []
        for _, record in records(folder / "grounding" / which, "grounding"):
            for expression in record.expressions:  # type: ignore[union-attr]
                x, y, wide, high = (side / 48 for side in expression.box)
                found.append((x, y, x + wide, y + high))
        return torch.tensor(found, dtype=torch.float64)

    from torchvision.ops import box_convert, box_iou

    mean = box_convert(boxes("train"), "xyxy", "cxcywh").mean(0, keepdim=True)
    iou = box_iou(box_convert(mean, "cxcywh", "xyxy"), boxes("test"))[0]
    share = float((iou >= 0.5 - 1e-6).double().mean())
    assert blind(folder, "grounding")["accuracy"] == pytest.approx(share)


def test_a_blind_caption_is_one_that_was_seen(folder):
    assert 0 <= blind(folder, "captioning")["cider"] < 5
