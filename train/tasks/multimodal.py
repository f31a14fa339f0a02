"""Tasks of one image pass and one pass of the whole text stack: NLVR2, grounding, captioning."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from torch import Tensor

from models.config import ModelConfig
from models.outputs import Capture, EncoderOutput
from models.xvlm import XVLM
from train.config import KdConfig
from train.losses.distillation import LayerPairs
from train.runtime.teacher import Teacher
from train.tasks.base import Losses, StepContext
from train.tasks.kd import (
    Distils,
    capture,
    hidden_projections,
    pass_terms,
    stack_pairs,
    upper_part,
)
from train.tasks.scored import Scored

__all__ = ["MultimodalTask", "PassPairs", "Part", "Passes", "part_terms"]


@dataclass(frozen=True)
class PassPairs:
    """Layer pairs of an image pass and of one pass through the whole text stack.

    The text layers and the fusion layers have weights of their own; the state between the two
    belongs to the text layers. NLVR2's fusion layers are paired by the image they read.
    """

    image: LayerPairs
    text: LayerPairs
    fusion: LayerPairs
    whole: LayerPairs

    @classmethod
    def between(cls, kd: KdConfig, student: ModelConfig, teacher: ModelConfig) -> PassPairs:
        """Raises ValueError as `stack_pairs`."""
        pairs = stack_pairs(kd, student, teacher)
        whole = pairs.text.then(pairs.fusion)
        fusion = upper_part(whole, pairs.text.student_layers)
        return cls(pairs.vision, pairs.text, fusion, whole)


class Passes(NamedTuple):
    """What one model computed on a batch; `output` is its head's."""

    image: EncoderOutput
    text: EncoderOutput
    output: Tensor


class Part(NamedTuple):
    """Raw terms of one part (see `kd.pass_terms`), the part's weight, and a further factor on its
    hidden states.
    """

    terms: Mapping[str, Tensor]
    weight: float
    hidden: float = 1.0


def part_terms(
    kd: KdConfig, parts: Mapping[str, Part]
) -> tuple[dict[str, Tensor], dict[str, float]]:
    """Terms and weights by name: kd_PART_hidden, kd_PART_attention, kd_PART_cross_attention."""
    terms, weights = {}, {}
    for name, part in parts.items():
        for kind, value in part.terms.items():
            factor = part.hidden if kind == "hidden" else 1.0
            terms[f"kd_{name}_{kind}"] = value
            weights[f"kd_{name}_{kind}"] = kd.kd_weight * part.weight * factor
    return terms, weights


class MultimodalTask(Distils):
    """What a task says: how a model runs, what its output should be, how two outputs differ.

    Every rank has as many rows, so means over rows need no shares.
    """

    def __init__(
        self,
        weights: dict[str, float],
        kd: KdConfig,
        student: ModelConfig,
        teacher: ModelConfig | None,
    ) -> None:
        self.weights = weights
        self.kd = kd
        self.plan = None
        if teacher is not None:
            self.plan = PassPairs.between(kd, student, teacher)
            self.projections = hidden_projections(student, teacher)

    @abstractmethod
    def run(self, model: XVLM, batch: Any, side: str) -> Passes:
        """One model's passes; `side` as in `kd.capture`."""

    @abstractmethod
    def task_terms(self, output: Tensor, batch: Any, share: dict[str, Tensor]) -> dict[str, Tensor]:
        """The losses against the truth."""

    @abstractmethod
    def output_terms(
        self, output: Tensor, target: Tensor, batch: Any, share: dict[str, Tensor]
    ) -> dict[str, Tensor]:
        """The losses against the teacher's output, named kd_..., weighted by kd.logits."""

    def metrics(self, output: Tensor, batch: Any, share: dict[str, Tensor]) -> dict[str, Tensor]:
        """What is logged beside the losses."""
        return {}

    def captures(self, side: str) -> tuple[Capture, Capture]:
        """What the image pass and the text pass must return."""
        plan, kd = self.plan, self.kd
        if plan is None:
            return Capture(), Capture()
        first = plan.text.student_layers  # text layers have no cross-attention
        return capture(plan.image, side, kd), capture(plan.whole, side, kd, cross_from=first)

    def parts(self, plan: PassPairs, ours: Passes, theirs: Passes) -> dict[str, Part]:
        """What is imitated beside the output: image states, text layers, fusion layers."""
        kd, words = self.kd, self.project("text")
        text = pass_terms(kd, ours.text, theirs.text, plan.text, project=words)
        fusion = pass_terms(kd, ours.text, theirs.text, plan.fusion, cross=True, project=words)
        return {
            "image": self.image_part(plan, ours, theirs),
            "text": Part(text, kd.text),
            "fusion": Part(fusion, kd.fusion),
        }

    def image_part(self, plan: PassPairs, ours: Passes, theirs: Passes) -> Part:
        """The image pass without its last state, as published."""
        kd, pixels = self.kd, self.project("vision")
        terms = pass_terms(kd, ours.image, theirs.image, plan.image, drop_last=True, project=pixels)
        return Part(terms, kd.image, kd.image_hidden)

    def score(
        self,
        model: XVLM,
        batch: Any,
        context: StepContext,
        share: dict[str, Tensor],
        like: Scored | None = None,
    ) -> Scored:
        """One pass with its losses, see `Trimmable`."""
        done = self.run(model, batch, "none")
        terms = self.task_terms(done.output, batch, share)
        metrics = self.metrics(done.output.detach(), batch, share)
        return Scored(terms, metrics, done.output, done.image, done.text)

    def imitate(
        self, ours: Scored, theirs: Scored, batch: Any, share: dict[str, Tensor]
    ) -> dict[str, Tensor]:
        """The task's distillation of outputs, from one pass to another."""
        found = self.output_terms(ours.output, theirs.output.detach(), batch, share)
        return {name.removeprefix("kd_"): value for name, value in found.items()}

    def losses(
        self, student: XVLM, teacher: Teacher | None, batch: Any, context: StepContext
    ) -> Losses:
        if teacher is not None:
            teacher.inputs_ready()  # it reads the batch alone
        done = self.run(student, batch, "student")
        return self.compared(
            done, batch, context, teacher, lambda model: self.run(model, batch, "teacher")
        )

    def compared(
        self,
        done: Passes,
        batch: Any,
        context: StepContext,
        teacher: Teacher | None,
        imitated: Callable[[XVLM], Passes],
    ) -> Losses:
        """The losses of what the student computed; `imitated` runs the teacher's model."""
        kd, share = self.kd, self.shares(batch, context)
        terms = self.task_terms(done.output, batch, share)
        task = 1.0 if teacher is None else kd.task_weight
        weights = {name: task * self.weights.get(name, 1.0) for name in terms}
        if teacher is not None:
            assert self.plan is not None
            with teacher.running() as model:
                target = imitated(model)
            extra = self.output_terms(done.output, target.output, batch, share)
            terms |= extra
            weights |= dict.fromkeys(extra, kd.kd_weight * kd.logits)
            extra, extra_weights = part_terms(kd, self.parts(self.plan, done, target))
            terms |= extra
            weights |= extra_weights
        return Losses(terms, weights, self.metrics(done.output.detach(), batch, share))
