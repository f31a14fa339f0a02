"""NLVR2: is a sentence true of two images? (X-VLM 2111.08276; EfficientVLM 2210.07795)

Fusion layers come in pairs that read one image each. The released distillation taught layers that
read the first image from layers that read the second; here a layer learns from one that reads the
same.
"""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import Tensor

from data_pipeline.task_batches import Nlvr2Batch
from models.trimming import see
from models.xvlm import XVLM
from train.losses.attention import widen
from train.losses.distillation import logits_kl
from train.tasks.multimodal import MultimodalTask, Passes

__all__ = ["Nlvr2Task"]


class Nlvr2Task(MultimodalTask):
    """Cross entropy of false and true; accuracy."""

    name = "nlvr2"

    def run(self, model: XVLM, batch: Nlvr2Batch, side: str) -> Passes:
        captures = self.captures(side)
        ids, mask = batch.text_ids, batch.text_mask
        indices = (batch.image_index, batch.second_index)
        image, contexts = see(model, batch.images, indices, ids, mask, *captures[:2])
        states, seen = zip(*contexts, strict=True)
        text = model.multimodal(ids, mask, states, seen, captures[1], image.guide)
        return Passes(image, text, model.truth_logits(text.last))

    def task_terms(
        self, output: Tensor, batch: Nlvr2Batch, share: dict[str, Tensor]
    ) -> dict[str, Tensor]:
        return {"truth": F.cross_entropy(widen(output), batch.label)}

    def output_terms(
        self, output: Tensor, target: Tensor, batch: Nlvr2Batch, share: dict[str, Tensor]
    ) -> dict[str, Tensor]:
        return {"kd_truth": logits_kl(output, target, self.kd.temperature)}

    def metrics(
        self, output: Tensor, batch: Nlvr2Batch, share: dict[str, Tensor]
    ) -> dict[str, Tensor]:
        return {"accuracy": (output.argmax(-1) == batch.label).float().mean()}

    def evaluate(self, model: XVLM, batch: Nlvr2Batch) -> dict[str, Any]:
        """Accuracy over valid rows."""
        right = self.run(model, batch, "none").output.argmax(-1) == batch.label
        return {"accuracy": ((right & batch.valid).sum(), batch.valid.sum())}
