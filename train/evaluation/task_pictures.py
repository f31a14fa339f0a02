"""Held-out examples of the downstream tasks for TensorBoard: what the model says beside the truth.

Every rank runs the same forwards; rank 0 writes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from models.trimming import see
from train.evaluation.pretrain import box_iou
from train.monitor.pictures import draw_boxes, framed

if TYPE_CHECKING:
    from data_pipeline.task_batches import (
        CaptionBatch,
        GroundingBatch,
        Nlvr2Batch,
        RetrievalBatch,
    )
    from models.xvlm import XVLM
    from train.evaluation.captioning import CaptionWriter
    from train.monitor import Monitor
    from train.runtime.distributed import Distributed

__all__ = ["SHOWN", "task_pictures"]

_RIGHT, _PREDICTED, _OTHER = "#2e9e5b", "#e08a1e", "#9aa5a0"
SHOWN = 5  # pictures found for a text

Made = tuple[list[Tensor], list[str]]  # pictures of one size, (3, H, W) uint8, and their texts


def task_pictures(
    task: str,
    monitor: Monitor,
    step: int,
    model: XVLM,
    loader: Iterable[Any],
    dist: Distributed,
    writer: CaptionWriter | None = None,
    count: int = 9,
) -> None:
    """Writes up to `count` examples of the first batch as TASK/held_out.

    nlvr2: both pictures, the sentence and the verdict.   grounding: the true box (green) and the
    predicted one (orange).   retrieval: a caption and the pictures found for it, best first, its own
    framed in green.   captioning, which needs a `writer`: what is said, and a reference.
    """
    makers: dict[str, Callable[[], Made]] = {
        "nlvr2": lambda: _truths(model, batch, count),
        "grounding": lambda: _boxes(model, batch, count),
        "retrieval": lambda: _found(model, batch, count),
    }
    if writer is not None:
        makers["captioning"] = lambda: _captions(writer, model, batch, count)
    if task not in makers:
        return
    batch = next(iter(loader)).to(dist.device)
    was_training = model.training
    model.eval()
    try:
        with torch.inference_mode():
            pictures, texts = makers[task]()
    finally:
        model.train(was_training)
    if pictures:
        monitor.pictures(step, f"{task}/held_out", torch.stack(pictures), texts)


def _rows(batch: Any, count: int) -> list[int]:
    return batch.valid.nonzero()[:count, 0].tolist()


def _truths(model: XVLM, batch: Nlvr2Batch, count: int) -> Made:
    indices = (batch.image_index, batch.second_index)
    ids, mask = batch.text_ids, batch.text_mask
    image, contexts = see(model, batch.images, indices, ids, mask)
    states, seen = zip(*contexts, strict=True)
    fused = model.multimodal(ids, mask, states, seen, text=image.guide)
    logits = model.truth_logits(fused.last)
    likely = logits.float().softmax(-1)[:, 1].tolist()
    pictures, texts = [], []
    for row in _rows(batch, count):
        sides = (batch.images[index[row]] for index in (batch.image_index, batch.second_index))
        pictures.append(torch.cat([framed(side, _OTHER) for side in sides], dim=2))
        said = likely[row] > 0.5
        verdict = "right" if said == bool(batch.label[row]) else "wrong"
        chance = likely[row] if said else 1 - likely[row]
        texts.append(f"{batch.sentences[row]}\nsays: {said}, {100 * chance:.0f} % ({verdict})")
    return pictures, texts


def _boxes(model: XVLM, batch: GroundingBatch, count: int) -> Made:
    ids, mask = batch.text_ids, batch.text_mask
    image, (context,) = see(model, batch.images, (batch.image_index,), ids, mask)
    boxes = model.predict_box(model.multimodal(ids, mask, *context, text=image.guide).last)
    overlap = box_iou(boxes, batch.boxes).tolist()
    pictures, texts = [], []
    for row in _rows(batch, count):
        frames = [(batch.boxes[row].tolist(), _RIGHT), (boxes[row].tolist(), _PREDICTED)]
        pictures.append(draw_boxes(batch.images[batch.image_index[row]], frames))
        texts.append(f"{batch.expressions[row]}\nIoU {overlap[row]:.2f}")
    return pictures, texts


def _captions(writer: CaptionWriter, model: XVLM, batch: CaptionBatch, count: int) -> Made:
    said, pictures, texts = writer(model, batch), [], []
    for row in _rows(batch, count):
        image = int(batch.image_index[row])
        pictures.append(batch.images[image].cpu())
        texts.append(f"says: {said[row]}\nreference: {batch.references[image][0]}")
    return pictures, texts


def _found(model: XVLM, batch: RetrievalBatch, count: int) -> Made:
    """The nearest pictures of the batch by cosine, in the order of the matching head."""
    kept = batch.image_valid.nonzero()[:, 0]
    image = model.encode_image(batch.images)
    states, seen = image.context(kept)
    words = model.encode_text(batch.text_ids, batch.text_mask)
    rows = _rows(batch, count)
    if not rows:
        return [], []
    near = model.text_feature(words.last[rows]) @ model.image_feature(states).T
    places = near.topk(min(SHOWN, len(kept)), dim=1).indices  # (rows, k)
    shown = places.shape[1]
    again = torch.tensor(rows, device=kept.device).repeat_interleave(shown)
    shown_masks = None if seen is None else seen[places.flatten()]
    pairs = states[places.flatten()], shown_masks
    asked = words.last[again], None if words.mask is None else words.mask[again]
    fused = model.fuse(*asked, *pairs).last
    scores = model.match_logits(fused)[:, 1].view(-1, shown)
    order = places.gather(1, scores.argsort(dim=1, descending=True))
    pictures, texts = [], []
    for row, best in zip(rows, kept[order].tolist(), strict=True):
        own = int(batch.image_index[row])
        strip = [framed(batch.images[one], _RIGHT if one == own else _OTHER) for one in best]
        pictures.append(torch.cat(strip, dim=2))
        rank = f"number {best.index(own) + 1}" if own in best else f"not among the first {shown}"
        texts.append(f"{batch.captions[row]}\nits own picture is {rank} of {len(kept)}")
    return pictures, texts
