"""Held-out metrics of pre-training: retrieval over the whole set, ITM, MLM, and boxes.

Shape legend: B rows of a batch, n valid rows of a rank, G valid rows of all ranks, E features.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed
from torch import Tensor

from train.evaluation.runner import evaluate

if TYPE_CHECKING:
    from data_pipeline.batches import PretrainBatch
    from models.xvlm import XVLM

__all__ = [
    "PairMetrics",
    "RegionMetrics",
    "box_iou",
    "evaluate_pretraining",
    "predict_boxes",
    "retrieval_ranks",
]

# Similarities in memory at a time.
_BLOCK = 1 << 26
Sums = dict[str, tuple[Tensor, Tensor]]


def evaluate_pretraining(
    model: XVLM,
    pairs: Iterable[Any],
    regions: Iterable[Any] | None,
    dist: Any = None,
    **options: Any,
) -> dict[str, float]:
    """Metrics of one pass over image-text pairs, and over region batches where there are any.

    image_to_text_r1, text_to_image_r1: how often a row's own partner is nearest among ALL partners
        of the set (not of the batch).
    itm_accuracy, itm_positive, itm_negative: on matching pairs, and on pairs of an image with the
        next text of its batch.
    mlm_accuracy: on masked words.   box_iou: mean IoU of predicted boxes of regions.

    Args:
        dist: has .rank, .world_size, .device; None is one process on the model's device.
        options: of `runner.evaluate`.
    Collective.
    """
    metrics = PairMetrics()
    result = evaluate(model, metrics, pairs, dist, **options)
    device = dist.device if dist is not None else next(model.parameters()).device
    result |= metrics.retrieval(device, 1 if dist is None else dist.world_size)
    if regions is not None:
        result |= evaluate(model, RegionMetrics(), regions, dist, **options)
    return result


class PairMetrics:
    """`runner.evaluate`'s task for image-text pairs; keeps their features for `retrieval`."""

    def __init__(self) -> None:
        self._images: list[Tensor] = []
        self._texts: list[Tensor] = []

    def evaluate(self, model: XVLM, batch: PretrainBatch) -> Sums:
        """ITM and MLM sums of a batch, and its features noted."""
        valid, count = batch.valid, batch.rows
        images = model.encode_image(batch.images).last[batch.image_index]
        text = model.encode_text(batch.text_ids, batch.text_mask).last
        self._images.append(model.image_feature(images)[valid])
        self._texts.append(model.text_feature(text)[valid])

        # The next row that counts, so that padding is nobody's partner.
        rows = torch.arange(count, device=valid.device)
        other = rows.clone()
        other[valid] = rows[valid].roll(-1)
        fused = model.fuse(
            text.repeat(2, 1, 1),
            batch.text_mask.repeat(2, 1),
            torch.cat([images, images[other]]),
            None,
        )
        matches = model.match_logits(fused.last).argmax(-1).view(2, count)
        right = torch.stack([matches[0] == 1, matches[1] == 0])
        # One row alone has no other text.
        counted = torch.stack([valid, valid & (other != rows)])

        masked = model.multimodal(batch.mlm_ids, batch.text_mask, images, None)
        words = model.mlm_logits(masked.words, batch.mlm_positions).argmax(-1)
        slots = (batch.mlm_labels != -100) & valid[:, None]
        hits = (right & counted).sum(1)
        return {
            "itm_positive": (hits[0], counted[0].sum()),
            "itm_negative": (hits[1], counted[1].sum()),
            "itm_accuracy": (hits.sum(), counted.sum()),
            "mlm_accuracy": (((words == batch.mlm_labels) & slots).sum(), slots.sum()),
        }

    @torch.inference_mode()
    def retrieval(self, device: torch.device | str, world_size: int) -> dict[str, float]:
        """R@1 both ways over what all ranks have seen. Collective."""
        images, first = _gather(self._images, device, world_size)
        texts, _ = _gather(self._texts, device, world_size)
        own = sum(len(part) for part in self._images)
        mine = slice(first, first + own)
        hits = torch.stack(
            [
                (retrieval_ranks(images[mine], texts, first) == 0).sum(),
                (retrieval_ranks(texts[mine], images, first) == 0).sum(),
            ]
        ).double()
        if world_size > 1:
            torch.distributed.all_reduce(hits)
        shares = (hits / max(1, len(images))).tolist()
        return {
            "image_to_text_r1": shares[0],
            "text_to_image_r1": shares[1],
            "retrieval_count": float(len(images)),
        }


class RegionMetrics:
    """`runner.evaluate`'s task for region batches."""

    def evaluate(self, model: XVLM, batch: PretrainBatch) -> Sums:
        """IoU of the boxes of valid region rows; boxes are predicted from the whole image."""
        assert batch.boxes is not None and batch.is_region is not None
        found = box_iou(predict_boxes(model, batch), batch.boxes)
        counted = batch.valid & batch.is_region
        return {"box_iou": (torch.where(counted, found, 0.0).sum(), counted.sum())}


def predict_boxes(model: XVLM, batch: PretrainBatch) -> Tensor:
    """(B, 4) normalised (cx, cy, w, h) of what each row's text describes."""
    images = model.encode_image(batch.images).last[batch.image_index]
    text = model.encode_text(batch.text_ids, batch.text_mask).last
    return model.predict_box(model.fuse(text, batch.text_mask, images, None).last)


def box_iou(a: Tensor, b: Tensor) -> Tensor:
    """(B,) IoU row by row of normalised (cx, cy, w, h) (B, 4); 0 where neither has an area."""
    low = torch.maximum(a[:, :2] - a[:, 2:] / 2, b[:, :2] - b[:, 2:] / 2)
    high = torch.minimum(a[:, :2] + a[:, 2:] / 2, b[:, :2] + b[:, 2:] / 2)
    inner = (high - low).clamp(min=0).prod(1)
    union = a[:, 2:].prod(1) + b[:, 2:].prod(1) - inner
    return torch.where(union > 0, inner / union, 0.0)


def retrieval_ranks(queries: Tensor, gallery: Tensor, first: int = 0) -> Tensor:
    """(n,) how many entries of gallery (G, E) are nearer to query i than its own, number first + i.

    An equal similarity counts as nearer unless it is its own: a model that maps everything to one
    point has not found anything.
    """
    ranks = []
    step = max(1, _BLOCK // max(1, len(gallery)))
    for start in range(0, len(queries), step):
        part = queries[start : start + step]
        similar = part @ gallery.T
        own = torch.arange(first + start, first + start + len(part), device=part.device)
        ranks.append((similar >= similar.gather(1, own[:, None])).sum(1) - 1)
    return torch.cat(ranks) if ranks else torch.zeros(0, dtype=torch.int64, device=gallery.device)


def _gather(parts: list[Tensor], device: torch.device | str, world_size: int) -> tuple[Tensor, int]:
    """(G, E) rows of all ranks in rank order, and where this rank's begin. Collective.

    Ranks may hold different numbers of rows (padding is left out): blocks of the largest travel.
    """
    own = torch.cat(parts)
    if world_size == 1:
        return own, 0
    counts = torch.zeros(world_size, dtype=torch.int64, device=device)
    rank = torch.distributed.get_rank()
    counts[rank] = len(own)
    torch.distributed.all_reduce(counts)
    sizes = counts.tolist()
    block = own.new_zeros(max(sizes), own.shape[1])
    block[: len(own)] = own
    blocks = [torch.empty_like(block) for _ in sizes]
    torch.distributed.all_gather(blocks, block)
    whole = torch.cat([part[:size] for part, size in zip(blocks, sizes, strict=True)])
    return whole, sum(sizes[:rank])
