"""Grounding: the box that an expression means (X-VLM 2111.08276).

The published work does not distil this task: layers are taught as in NLVR2, and the student's box is
drawn to the teacher's by the same two losses as to the truth.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from data_pipeline.task_batches import GroundingBatch
from models.trimming import see
from models.xvlm import XVLM
from train.evaluation.grounding import box_sums
from train.evaluation.pretrain import box_iou
from train.losses import vl
from train.tasks.multimodal import MultimodalTask, Passes

__all__ = ["GroundingTask"]


class GroundingTask(MultimodalTask):
    """L1 (summed over coordinates) and 1 - GIoU of boxes; accuracy at IoU 0.5."""

    name = "grounding"

    def run(self, model: XVLM, batch: GroundingBatch, side: str) -> Passes:
        captures = self.captures(side)
        ids, mask = batch.text_ids, batch.text_mask
        image, ((states, seen),) = see(
            model, batch.images, (batch.image_index,), ids, mask, *captures[:2]
        )
        text = model.multimodal(ids, mask, states, seen, captures[1], image.guide)
        return Passes(image, text, model.predict_box(text.last))

    def task_terms(
        self, output: Tensor, batch: GroundingBatch, share: dict[str, Tensor]
    ) -> dict[str, Tensor]:
        l1, giou = vl.box_losses(output, batch.boxes, torch.ones_like(batch.valid))
        return {"box_l1": l1, "box_giou": giou}

    def output_terms(
        self, output: Tensor, target: Tensor, batch: GroundingBatch, share: dict[str, Tensor]
    ) -> dict[str, Tensor]:
        l1, giou = vl.box_losses(output, target, torch.ones_like(batch.valid))
        return {"kd_box_l1": l1, "kd_box_giou": giou}

    def metrics(
        self, output: Tensor, batch: GroundingBatch, share: dict[str, Tensor]
    ) -> dict[str, Tensor]:
        return {"iou": box_iou(output.float(), batch.boxes).mean()}

    def evaluate(self, model: XVLM, batch: GroundingBatch) -> dict[str, Any]:
        """Accuracy at IoU 0.5 and mean IoU over valid rows."""
        return box_sums(self.run(model, batch, "none").output, batch)
