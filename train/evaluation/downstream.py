"""`espalier eval` of NLVR2, retrieval, captioning and grounding: a model folder on a split."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

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
    from models.xvlm import XVLM

__all__ = ["evaluate_task", "table"]

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
    device: str = "cpu",
) -> dict[str, float]:
    """Metrics of a model folder on one split of DATA/TASK.

    nlvr2: "accuracy".   grounding: "accuracy" (IoU of at least 0.5) and "iou".
    retrieval: see `evaluate_retrieval`; `top_k` candidates are ranked again.
    captioning: see `evaluate_captions`; with `java` also "meteor", with `spice` both.

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
    return evaluate(model, tasks[task], loader, progress=True)


def table(result: dict[str, float]) -> str:
    """The metrics as lines for people, in percent where they are shares."""
    lines = []
    for name, value in result.items():
        counted = name in _COUNTS or name.endswith("_count")
        lines.append(f"  {name:28s} " + (f"{value:9.0f}" if counted else f"{100 * value:6.2f} %"))
    return "\n".join(lines)
