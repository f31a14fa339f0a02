"""Example pictures of the four downstream tasks: what is drawn and told for known outputs."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from data_pipeline.blocksworld.build import build_blocksworld
from data_pipeline.loader import build_loader
from data_pipeline.text import load_tokenizer
from models import presets
from train.evaluation.captioning import CaptionWriter
from train.evaluation.task_pictures import SHOWN, task_pictures

TASKS = ("nlvr2", "grounding", "retrieval", "captioning")
CPU: Any = SimpleNamespace(device=torch.device("cpu"))
GREEN = torch.tensor([0x2E, 0x9E, 0x5B], dtype=torch.uint8)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("world") / "data"
    build_blocksworld(root, 16, val=8, test=4, image_size=48, tasks=TASKS)
    return root


class Board:
    """Keeps what a monitor would show."""

    def __init__(self) -> None:
        self.shown: dict[str, tuple[torch.Tensor, list[str]]] = {}

    def pictures(self, step: int, tag: str, images: torch.Tensor, captions: list[str]) -> None:
        assert len(images) == len(captions) and images.dtype == torch.uint8
        self.shown[tag] = (images, captions)


def shown(world: Path, task: str, rig: Any = None) -> tuple[torch.Tensor, list[str], Any]:
    tokenizer = load_tokenizer(world / "tokenizer")
    torch.manual_seed(0)
    model = presets.create(
        "blocksworld-micro-student", form=task, text={"vocab_size": len(tokenizer)}
    )
    loader = build_loader(
        task, world / task / "val", tokenizer=tokenizer, batch=8, train=False, image_size=48,
        patch_size=8, max_tokens=40, prompt="a picture of",
    )  # fmt: skip
    batch = next(iter(loader))
    if rig is not None:
        rig(model, batch)
    board: Any = Board()
    writer = CaptionWriter(tokenizer, beams=2)
    task_pictures(task, board, 3, model.train(), [batch], CPU, writer, count=4)
    assert model.training, "the mode comes back"
    images, captions = board.shown[f"{task}/held_out"]
    assert 1 <= len(images) <= 4
    return images, captions, batch


def test_verdicts_on_pairs(world: Path) -> None:
    def rig(model: Any, batch: Any) -> None:
        model.truth_logits = lambda fused: torch.tensor([[0.0, 2.0]]).expand(len(fused), 2)

    images, captions, batch = shown(world, "nlvr2", rig)
    assert images.shape[2:] == (192, 384), "left and right"
    for row, text in enumerate(captions):
        right = "right" if int(batch.label[row]) == 1 else "wrong"
        assert text == f"{batch.sentences[row]}\nsays: True, 88 % ({right})"


def test_boxes_beside_the_truth(world: Path) -> None:
    def rig(model: Any, batch: Any) -> None:
        model.predict_box = lambda fused: batch.boxes

    images, captions, batch = shown(world, "grounding", rig)
    assert captions[0] == f"{batch.expressions[0]}\nIoU 1.00"
    orange = torch.tensor([0xE0, 0x8A, 0x1E], dtype=torch.uint8)[:, None, None]
    assert (images[0] == orange).all(0).any()
    _, captions, _ = shown(world, "grounding")
    assert not all("IoU 1.00" in text for text in captions)


def test_pictures_found_for_a_caption(world: Path) -> None:
    def rig(model: Any, batch: Any) -> None:
        """Every text is nearest to its own picture, which the matching head puts first."""
        unit = torch.eye(32)
        images = iter([batch.image_valid.nonzero()[:, 0]])
        model.image_feature = lambda states: unit[next(images)]
        rows = batch.valid.nonzero()[:4, 0]
        model.text_feature = lambda words: unit[batch.image_index[rows]]
        own, match = batch.image_index[rows], model.match_logits

        def first(fused: torch.Tensor) -> torch.Tensor:
            logits = match(fused).clone()
            logits[:, 1] = torch.arange(len(fused), 0, -1)  # as cosine has it
            return logits

        model.match_logits = first
        assert len(own)

    images, captions, batch = shown(world, "retrieval", rig)
    side = images.shape[2]
    assert images.shape[3] == min(SHOWN, int(batch.image_valid.sum())) * side
    assert all(f"number 1 of {int(batch.image_valid.sum())}" in text for text in captions)
    for strip in images:
        corners = [strip[:, 0, place * side] for place in range(strip.shape[2] // side)]
        assert [torch.equal(corner, GREEN) for corner in corners].index(True) == 0


def test_captions_beside_a_reference(world: Path) -> None:
    _, captions, batch = shown(world, "captioning")
    said, reference = captions[0].split("\n")
    assert said.startswith("says: ") and reference == f"reference: {batch.references[0][0]}"
