"""What a task is: it turns (student, teacher, batch) into named losses, and a model's outputs into
metrics.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from data_pipeline.batches import Batch

if TYPE_CHECKING:
    from models.xvlm import XVLM
    from train.runtime.teacher import Teacher

__all__ = ["Losses", "StepContext", "Task"]


@dataclass(frozen=True)
class StepContext:
    """Where a step stands. `generator` (CPU) is keyed by (seed, step): every rank draws the same
    numbers from it.
    """

    step: int
    rank: int
    world_size: int
    generator: torch.Generator


@dataclass
class Losses:
    """Named loss terms of one micro-batch.

    Attributes:
        terms: name -> scalar tensor, raw.
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


class Task(ABC):
    """One training objective. Holds no parameters and no state of a step."""

    name: ClassVar[str]

    @abstractmethod
    def losses(
        self, student: XVLM, teacher: Teacher | None, batch: Batch, context: StepContext
    ) -> Losses:
        """Losses of one micro-batch. Runs inside the engine's forward, on every rank with the same
        calls.
        """

    @abstractmethod
    def evaluate(self, model: XVLM, batch: Batch) -> dict[str, Any]:
        """Sums over the batch's valid rows: name -> (sum, count) as tensors; the runner adds them
        over ranks.
        """
