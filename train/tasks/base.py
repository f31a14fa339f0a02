"""What a task is: it turns (student, teacher, batch) into named losses, and a model's outputs into
metrics.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn

from data_pipeline.batches import Batch
from train.losses.gather import mean_counts

if TYPE_CHECKING:
    from models.xvlm import XVLM
    from train.runtime.teacher import Teacher

__all__ = ["Losses", "StepContext", "Task", "scaled"]


@dataclass(frozen=True)
class StepContext:
    """Where a step stands. `generator` (CPU) is keyed by (seed, step): every rank draws the same
    numbers from it.

    `mean_counts`: `Task.counts` averaged over the ranks and micro-batches of the optimizer step
    (losses.gather.mean_counts); None: the micro-batch is the whole step.
    """

    step: int
    rank: int
    world_size: int
    generator: torch.Generator
    mean_counts: Mapping[str, Tensor] | None = None


def scaled(term: Tensor, share: Tensor) -> Tensor:
    """`term` times `share` in the term's precision."""
    return term * share.to(term)


@dataclass
class Losses:
    """Named loss terms of one micro-batch.

    Attributes:
        terms: name -> scalar tensor, raw: this rank's share, so that the mean over ranks (and
            micro-batches) is the global mean, whatever the ranks' counts.
        weights: name -> factor in the total; every term has one.
        metrics: name -> scalar tensor that is logged and not trained on (accuracies, counts).
        touch: zero-valued scalar that depends on every parameter the terms do not (ZeRO needs a
            gradient for each).
    """

    terms: dict[str, Tensor]
    weights: dict[str, float]
    metrics: dict[str, Tensor] = field(default_factory=dict)
    touch: Tensor | None = None

    def total(self) -> Tensor:
        """Weighted sum, one scalar for one backward."""
        total = sum(self.weights[name] * term for name, term in self.terms.items())
        assert isinstance(total, Tensor)
        return total if self.touch is None else total + self.touch

    def logged(self) -> dict[str, Tensor]:
        """What is averaged over ranks and recorded: "loss.NAME" (raw), "weighted.NAME" (as it
        enters the total) and "metrics.NAME", detached.
        """
        values = {f"loss.{name}": term.detach() for name, term in self.terms.items()}
        for name, term in self.terms.items():
            values[f"weighted.{name}"] = self.weights[name] * term.detach()
        return values | {f"metrics.{name}": value.detach() for name, value in self.metrics.items()}


class Task(ABC):
    """One training objective. Holds no state of a step, and no parameters of its own: what it
    trains beside the student belongs to the engine.
    """

    name: ClassVar[str]

    def trainable_modules(self) -> dict[str, nn.Module]:
        """Modules to train beside the student, which are no part of it (its folder does not hold
        them), such as projections between widths. The engine shards and saves them.
        """
        return {}

    def frozen_parts(self) -> tuple[str, ...]:
        """Names of the student's modules that this objective reads and does not train."""
        return ()

    def counts(self, batch: Batch) -> dict[str, Tensor]:
        """What the means of this task's terms are over, where ranks or micro-batches may differ in
        it: name -> 0-d tensor. The same names for every batch of a kind.
        """
        return {}

    def shares(self, batch: Batch, context: StepContext) -> dict[str, Tensor]:
        """name -> own count over the mean count: a mean times its share has the denominator of the
        whole step (see `losses.gather.mean_counts`). 0 where nobody has any. Collective when the
        context brings no mean counts.
        """
        own = self.counts(batch)
        mean = context.mean_counts
        if mean is None:
            mean = mean_counts([own], batch.images.device)
        # Counts are whole numbers, so a mean over ranks and micro-batches is 0 or far above this.
        return {name: count / mean[name].clamp_min(1e-9) for name, count in own.items()}

    @abstractmethod
    def losses(
        self, student: XVLM, teacher: Teacher | None, batch: Batch, context: StepContext
    ) -> Losses:
        """Losses of one micro-batch. Runs inside the engine's forward, on every rank with the same
        calls.
        """

    def evaluate(self, model: XVLM, batch: Batch) -> dict[str, Any]:
        """Sums over the batch's valid rows: name -> (sum, count) as tensors; the runner adds them
        over ranks. Tasks that need the whole split at once have `evaluate_split` instead (see
        `evaluation.runner`).
        """
        raise NotImplementedError(f"task {self.name} is not evaluated batch by batch")
