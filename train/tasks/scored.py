"""What a task hands over when two passes of one model are compared (see `tasks.trim`)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor

from models.outputs import EncoderOutput
from models.xvlm import XVLM
from train.tasks.base import StepContext

__all__ = ["Scored", "Trimmable"]


@dataclass
class Scored:
    """One pass of a model over a batch.

    Attributes:
        terms: losses against the truth, as `Losses.terms`.   metrics: as `Losses.metrics`.
        output: what self-distillation compares, of the task's own kind.
        image, text, fused: passes of the encoders; text where `encode_text` ran by itself.
        answer_tokens: decoder inputs of an answer, where there is an answer decoder.
        extra: what a second pass of the same batch shares with this one (drawn negatives).
    """

    terms: dict[str, Tensor]
    metrics: dict[str, Tensor]
    output: Any
    image: EncoderOutput
    fused: EncoderOutput
    text: EncoderOutput | None = None
    answer_tokens: int | None = None
    extra: Any = None


class Trimmable(Protocol):
    """What a task has to know to be trained with trimmers."""

    name: Any
    weights: dict[str, float]

    def counts(self, batch: Any) -> dict[str, Tensor]: ...

    def shares(self, batch: Any, context: StepContext) -> dict[str, Tensor]: ...

    def score(
        self,
        model: XVLM,
        batch: Any,
        context: StepContext,
        share: dict[str, Tensor],
        like: Scored | None = None,
    ) -> Scored:
        """One pass and its losses; `like`: an earlier pass of the batch, whose draws are used."""
        ...

    def imitate(
        self, ours: Scored, theirs: Scored, batch: Any, share: dict[str, Tensor]
    ) -> dict[str, Tensor]:
        """Distance of `ours.output` from `theirs.output`, which has no gradient, by name."""
        ...
