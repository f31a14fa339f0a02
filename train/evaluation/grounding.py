"""Grounding: accuracy at IoU 0.5 and mean IoU of predicted boxes."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from train.evaluation.pretrain import box_iou

if TYPE_CHECKING:
    from data_pipeline.task_batches import GroundingBatch

__all__ = ["ENOUGH", "box_sums"]

# A hair of slack: a box of exactly half its union must not depend on the last bit of a product.
ENOUGH = 0.5 - 1e-6


def box_sums(boxes: Tensor, batch: GroundingBatch) -> dict[str, tuple[Tensor, Tensor]]:
    """ "accuracy" (IoU of at least 0.5, as the published evaluation counts) and "iou": sums over the
    valid rows, and their number.

    Boxes are normalised by the picture's sides, which changes no IoU.

    Args:
        boxes: (B, 4) predicted (cx, cy, w, h).
    """
    iou = torch.where(batch.valid, box_iou(boxes.float(), batch.boxes), 0.0)
    count = batch.valid.sum()
    return {"accuracy": ((iou >= ENOUGH).sum(), count), "iou": (iou.double().sum(), count)}
