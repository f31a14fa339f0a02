"""Captioning: the text stack writes behind a prompt what it sees (X-VLM 2111.08276).

The whole stack is the decoder: causal in all layers, cross-attention in the fusion layers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from data_pipeline.task_batches import CaptionBatch
from models.config import ModelConfig
from models.trimming import see
from models.xvlm import XVLM
from train.config import KdConfig
from train.evaluation.captioning import CaptionWriter, evaluate_captions
from train.losses import vl
from train.losses.distillation import logits_kl
from train.tasks.base import scaled
from train.tasks.kd import pass_terms
from train.tasks.multimodal import MultimodalTask, Part, Passes, PassPairs

__all__ = ["CaptionTask"]


class CaptionTask(MultimodalTask):
    """Language-model loss behind the prompt; BLEU-4 and CIDEr of captions by beam search.

    Args:
        smoothing: eps of label smoothing (see `vl.answer_loss`); published: 0.1 in fine-tuning.
        writer: how captions are written in evaluation; None when the task only trains.
    """

    name = "captioning"

    def __init__(
        self,
        weights: dict[str, float],
        kd: KdConfig,
        student: ModelConfig,
        teacher: ModelConfig | None,
        smoothing: float = 0.0,
        writer: CaptionWriter | None = None,
    ) -> None:
        super().__init__(weights, kd, student, teacher)
        self.smoothing = smoothing
        self.writer = writer

    def counts(self, batch: CaptionBatch) -> dict[str, Tensor]:
        """Tokens to be written: captions differ in length."""
        return {"tokens": batch.written.sum()}

    def run(self, model: XVLM, batch: CaptionBatch, side: str) -> Passes:
        captures = self.captures(side)
        # What has been written must not choose what is seen: the prompt alone does.
        index, prompt = (batch.image_index,), batch.text_ids[:, : batch.prompt_tokens]
        image, ((states, seen),) = see(model, batch.images, index, prompt, None, captures[0])
        text = model.decode(batch.text_ids, batch.text_mask, states, seen, captures[1])
        return Passes(image, text, text.logits)

    def task_terms(
        self, output: Tensor, batch: CaptionBatch, share: dict[str, Tensor]
    ) -> dict[str, Tensor]:
        every = torch.ones(batch.rows, device=output.device)
        total = vl.answer_loss(output, batch.text_ids, batch.written, every, 1, self.smoothing)
        return {"caption": scaled(total / batch.written.sum().clamp(min=1), share["tokens"])}

    def output_terms(
        self, output: Tensor, target: Tensor, batch: CaptionBatch, share: dict[str, Tensor]
    ) -> dict[str, Tensor]:
        # Positions whose next token is to be written.
        asked = batch.written[:, 1:]
        value = logits_kl(output[:, :-1], target[:, :-1], self.kd.temperature, asked)
        return {"kd_caption": scaled(value, share["tokens"])}

    def parts(self, plan: PassPairs, ours: Passes, theirs: Passes) -> dict[str, Part]:
        """All layers of the stack are decoder layers; its last state is dropped, as published."""
        terms = pass_terms(
            self.kd, ours.text, theirs.text, plan.whole,
            drop_last=True, cross=True, project=self.project("text"),
        )  # fmt: skip
        decoder = Part(terms, self.kd.decoder)
        return {"image": self.image_part(plan, ours, theirs), "decoder": decoder}

    def metrics(
        self, output: Tensor, batch: CaptionBatch, share: dict[str, Tensor]
    ) -> dict[str, Tensor]:
        asked = batch.written[:, 1:]
        right = (output[:, :-1].argmax(-1) == batch.text_ids[:, 1:]) & asked
        return {"token_accuracy": scaled(right.sum() / asked.sum().clamp(min=1), share["tokens"])}

    def evaluate_split(
        self, model: XVLM, batches: Callable[[], Iterator[CaptionBatch]], dist: Any = None
    ) -> dict[str, float]:
        """BLEU-4 and CIDEr of written captions over the whole split.

        Raises:
            ValueError: the task was built without a writer.
        """
        if self.writer is None:
            raise ValueError("captioning evaluation writes captions: it needs the tokenizer")
        return evaluate_captions(model, self.writer, batches, dist)
