"""`espalier eval` of NLVR2, retrieval, captioning and grounding: a model folder on a split."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from data_pipeline.loader import build_loader
from models import from_pretrained
from train.config import KdConfig
from train.evaluation.accuracy import find_split, require_form, tokenizer_of
from train.evaluation.caption_metrics import java_scores, need_java
from train.evaluation.captioning import CaptionWriter, write_split
from train.evaluation.runner import evaluate
from train.tasks.captioning import CaptionTask
from train.tasks.grounding import GroundingTask
from train.tasks.nlvr2 import Nlvr2Task
from train.tasks.retrieval import RetrievalTask

if TYPE_CHECKING:
    from data_pipeline.batches import Batch
    from models.xvlm import XVLM

__all__ = ["BlankPictures", "chance_recalls", "evaluate_task", "table"]

_COUNTS = ("images", "texts", "captions")  # numbers of a result that are no shares


class _JavaScores:
    """Captioning scored by pycocoevalcap. Raises ValueError at once where it could not be."""

    def __init__(self, writer: CaptionWriter, spice: bool) -> None:
        need_java(spice)
        self.writer, self.spice = writer, spice

    def evaluate_split(self, model: XVLM, batches: Any, dist: Any = None) -> dict[str, float]:
        found = write_split(model, self.writer, batches, dist)
        scores = java_scores([c.text for c in found], [c.references for c in found], self.spice)
        return scores | {"captions": float(len(found))}


def evaluate_task(
    folder: Path,
    task: str,
    data: Path,
    split: str = "test",
    *,
    batch: int = 64,
    max_tokens: int = 40,
    limit: int = 0,
    top_k: int = 128,
    prompt: str = "a picture of",
    beams: int = 3,
    max_length: int = 20,
    java: bool = False,
    spice: bool = False,
    blind: bool = True,
    device: str = "cpu",
) -> dict[str, float]:
    """Metrics of a model folder on one split of DATA/TASK.

    nlvr2: "accuracy".   grounding: "accuracy" (IoU of at least 0.5) and "iou".
    retrieval: see `evaluate_retrieval`; `top_k` candidates are ranked again.
    captioning: see `evaluate_captions`; with `java` also "meteor", with `spice` both.
    "blind_..." with `blind`: the same when every picture is one grey one, a second pass; of
    retrieval, where nothing is left to rank, what chance finds (`chance_recalls`).

    Raises:
        FileNotFoundError: no such split, model or tokenizer.
        ValueError: a model of another form, or pycocoevalcap or Java is missing.
    """
    where = find_split(data, task, split)
    model = from_pretrained(folder, device=device)
    require_form(model, task, folder)
    tokenizer = tokenizer_of(folder, where)
    writer, plain = (
        CaptionWriter(tokenizer, beams, max_length),
        ({}, KdConfig(), model.config, None),
    )
    tasks: dict[str, Any] = {
        "nlvr2": Nlvr2Task(*plain),
        "grounding": GroundingTask(*plain),
        "retrieval": RetrievalTask(*plain, k_test=top_k),
        "captioning": _JavaScores(writer, spice)
        if java or spice
        else CaptionTask(*plain, writer=writer),
    }
    vision = model.config.vision
    loader = build_loader(
        task, where, tokenizer=tokenizer, batch=batch, train=False, image_size=vision.image_size,
        patch_size=vision.patch_size, max_tokens=max_tokens, limit=limit, prompt=prompt,
    )  # fmt: skip
    result = evaluate(model, tasks[task], loader, progress=True)
    if not blind:
        return result
    if task == "retrieval":
        return result | chance_recalls(int(result["images"]), int(result["texts"]))
    grey = evaluate(
        model, tasks[task], BlankPictures(loader, model.config.image_mean), progress=True
    )
    return result | {f"blind_{name}": value for name, value in grey.items() if not _counted(name)}


class BlankPictures:
    """A loader whose pictures are all of one colour: what a model makes of the texts alone.

    Args:
        mean: of the pixels of training, 0 to 1 for each channel; normalised, it is close to 0.
    """

    def __init__(self, loader: Iterable[Batch], mean: Sequence[float]) -> None:
        self.loader = loader
        self.colour = torch.tensor([round(255 * value) for value in mean], dtype=torch.uint8)

    def __iter__(self) -> Iterator[Batch]:
        for batch in self.loader:
            blank = self.colour.to(batch.images.device).view(1, 3, 1, 1).expand_as(batch.images)
            yield replace(batch, images=blank.contiguous())


def chance_recalls(images: int, texts: int) -> dict[str, float]:
    """Expected recalls of a random order, each image with its equal share of the texts.

    "blind_image_to_text_r1" and so on: 1 - C(T - c, n) / C(T, n) for c captions of an image.
    """
    own = max(1, round(texts / images))
    ways = {"image_to_text": (texts, own), "text_to_image": (images, 1)}
    result = {
        f"blind_{way}_r{n}": 1 - math.comb(total - right, n) / math.comb(total, n)
        if n <= total - right
        else 1.0
        for way, (total, right) in ways.items()
        for n in (1, 5, 10)
    }
    return result | {"blind_r_mean": sum(result.values()) / len(result)}


def _counted(name: str) -> bool:
    return name in _COUNTS or name.endswith("_count")


def table(result: dict[str, float]) -> str:
    """The metrics as lines for people, in percent where they are shares; blind ones beside."""
    lines = []
    for name, value in result.items():
        if name.startswith("blind_"):
            continue
        said = f"{value:9.0f}" if _counted(name) else f"{100 * value:6.2f} %"
        blind = result.get(f"blind_{name}")
        beside = "" if blind is None else f"   blind {100 * blind:6.2f} %"
        lines.append(f"  {name:28s} {said}{beside}")
    return "\n".join(lines)
