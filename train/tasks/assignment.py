"""Domain stage of NLVR2: which of two images is a text about, or is it about neither? (X-VLM
2111.08276, section 3.3; text assignment of ALBEF 2107.07651)

From images with captions. As published without a teacher; with one, the pairs are drawn once, from
the student's image features, and both models judge them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from data_pipeline.task_batches import RetrievalBatch
from models.config import ModelConfig
from models.outputs import EncoderOutput
from models.xvlm import XVLM
from train.config import KdConfig
from train.losses.assignment import Assignments, draw_assignments
from train.losses.attention import widen
from train.losses.distillation import logits_kl
from train.losses.gather import RowExchange
from train.runtime.teacher import Teacher
from train.tasks.base import Losses, StepContext
from train.tasks.multimodal import MultimodalTask, Passes

__all__ = ["AssignmentTask"]


@dataclass(frozen=True, kw_only=True)
class _Assigned(RetrievalBatch):
    """The batch with the labels of its texts, (B,) int64."""

    label: Tensor


class _Pairs:
    """How to get the two images of each row; one exchange for each, used by both models."""

    def __init__(self, drawn: Assignments, rows: int, local: bool) -> None:
        self.label = drawn.label
        self._slots = [RowExchange(index, rows, local) for index in (drawn.first, drawn.second)]

    def share_with(self, teacher: Teacher | None) -> None:
        """See `matching.Partners.share_with`."""
        if teacher is not None and teacher.overlaps:
            for slot in self._slots:
                slot.settle()
            teacher.inputs_ready()

    def take(self, states: Tensor) -> tuple[Tensor, Tensor]:
        """(B, P, D) of the own images -> both images of each row."""
        first, second = (slot.take(states) for slot in self._slots)
        return first, second


class AssignmentTask(MultimodalTask):
    """Cross entropy of first, second and neither; accuracy.

    Args:
        global_negatives: images are drawn from all ranks' rows (published: the own rank's).
    """

    name = "nlvr2_pretrain"

    def __init__(
        self,
        weights: dict[str, float],
        kd: KdConfig,
        student: ModelConfig,
        teacher: ModelConfig | None,
        global_negatives: bool = True,
    ) -> None:
        super().__init__(weights, kd, student, teacher)
        self.local = not global_negatives

    def frozen_parts(self) -> tuple[str, ...]:
        """The projection of pre-training finds hard negatives, and no loss reaches it."""
        return ("image_projection",)

    def _encode(self, model: XVLM, batch: RetrievalBatch, side: str) -> EncoderOutput:
        return model.encode_image(batch.images, self.captures(side)[0])

    def _draw(
        self,
        model: XVLM,
        image: EncoderOutput,
        batch: RetrievalBatch,
        generator: torch.Generator,
        local: bool,
    ) -> _Pairs:
        with torch.no_grad():
            feature = model.image_feature(image.last)[batch.image_index]
        return _Pairs(draw_assignments(feature, batch.groups, generator, local), batch.rows, local)

    def _judge(
        self, model: XVLM, image: EncoderOutput, batch: RetrievalBatch, pairs: _Pairs, side: str
    ) -> Passes:
        both = pairs.take(image.last[batch.image_index])
        text = model.multimodal(batch.text_ids, batch.text_mask, both, None, self.captures(side)[1])
        return Passes(image, text, model.assignment_logits(text.last))

    def run(self, model: XVLM, batch: RetrievalBatch, side: str) -> Passes:
        """Pairs within this batch that are the same in every pass over the same data."""
        return self._held_out(model, batch, side)[0]

    def _held_out(
        self, model: XVLM, batch: RetrievalBatch, side: str = "none"
    ) -> tuple[Passes, Tensor]:
        image = self._encode(model, batch, side)
        generator = torch.Generator().manual_seed(int(batch.groups[0]))
        pairs = self._draw(model, image, batch, generator, True)
        return self._judge(model, image, batch, pairs, side), pairs.label

    def losses(
        self, student: XVLM, teacher: Teacher | None, batch: RetrievalBatch, context: StepContext
    ) -> Losses:
        image = self._encode(student, batch, "student")
        pairs = self._draw(student, image, batch, context.generator, self.local)
        pairs.share_with(teacher)
        done = self._judge(student, image, batch, pairs, "student")

        def imitated(model: XVLM) -> Passes:
            theirs = self._encode(model, batch, "teacher")
            return self._judge(model, theirs, batch, pairs, "teacher")

        assigned = _Assigned(**vars(batch), label=pairs.label)
        return self.compared(done, assigned, context, teacher, imitated)

    def task_terms(
        self, output: Tensor, batch: _Assigned, share: dict[str, Tensor]
    ) -> dict[str, Tensor]:
        return {"assignment": F.cross_entropy(widen(output), batch.label)}

    def output_terms(
        self, output: Tensor, target: Tensor, batch: _Assigned, share: dict[str, Tensor]
    ) -> dict[str, Tensor]:
        return {"kd_assignment": logits_kl(output, target, self.kd.temperature)}

    def metrics(
        self, output: Tensor, batch: _Assigned, share: dict[str, Tensor]
    ) -> dict[str, Tensor]:
        return {"accuracy": (output.argmax(-1) == batch.label).float().mean()}

    def evaluate(self, model: XVLM, batch: RetrievalBatch) -> dict[str, Any]:
        """Accuracy over valid rows, of pairs within the batch."""
        done, label = self._held_out(model, batch)
        right = (done.output.argmax(-1) == label) & batch.valid
        return {"accuracy": (right.sum(), batch.valid.sum())}
