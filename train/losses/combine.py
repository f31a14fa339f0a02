"""Named loss terms and their weights, collected while a task walks through its passes."""

from __future__ import annotations

import difflib
from collections.abc import Collection, Mapping

from torch import Tensor

from models.outputs import EncoderOutput
from train.config import KdConfig
from train.losses.distillation import LayerPairs, attention_sum, hidden_mse
from train.tasks.base import Losses

__all__ = ["LossBook", "check_loss_names"]


def check_loss_names(weights: Mapping[str, float], known: Collection[str]) -> None:
    """Refuses a weight for a loss that the task does not have.

    Raises:
        ValueError: names the key under `loss` and the nearest name.
    """
    for name in weights:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            hint = f"; did you mean {near[0]}?" if near else ""
            raise ValueError(
                f"loss.{name}: no such loss term, known are {', '.join(sorted(known))}{hint}"
            )


class LossBook:
    """Collects terms and weights: total = task_weight * sum(task) + kd_weight * sum(distilled).

    Without a teacher the task terms keep their own weights (task_weight belongs to the mixture).

    Args:
        weights: `loss` of the run file: task term -> factor, 1 when left out.
        kd: distillation weights, or None without a teacher.
    """

    def __init__(self, weights: Mapping[str, float], kd: KdConfig | None = None) -> None:
        self._weights = weights
        self._kd = kd
        self._losses = Losses(terms={}, weights={})

    def _add(self, name: str, value: Tensor, weight: float) -> None:
        if name in self._losses.terms:
            raise ValueError(f"loss term {name} was added twice in one step")
        self._losses.terms[name] = value
        self._losses.weights[name] = weight

    def task(self, name: str, value: Tensor) -> None:
        """Adds a task loss."""
        mixture = 1.0 if self._kd is None else self._kd.task_weight
        self._add(name, value, mixture * self._weights.get(name, 1.0))

    def distil(self, name: str, value: Tensor, weight: float = 1.0) -> None:
        """Adds a distillation loss, name without "kd_", with its factor inside the mixture."""
        assert self._kd is not None, "distillation terms need a KdConfig"
        self._add(f"kd_{name}", value, self._kd.kd_weight * weight)

    def distil_stack(
        self,
        name: str,
        student: EncoderOutput,
        teacher: EncoderOutput,
        pairs: LayerPairs,
        weight: float = 1.0,
        hidden_weight: float = 1.0,
        drop_last: bool = False,
        cross_from: int | None = None,
    ) -> None:
        """Adds the terms of one pass: kd_NAME_hidden, kd_NAME_attention and, with `cross_from`,
        kd_NAME_cross.

        Terms of weight 0 and attention under `kd.attention: none` are left out. Arguments as in
        `train.losses.distillation`; `weight` multiplies all of them.
        """
        assert self._kd is not None, "distillation terms need a KdConfig"
        if weight == 0:
            return
        if hidden_weight:
            value = hidden_mse(student.hidden, teacher.hidden, pairs, drop_last)
            self.distil(f"{name}_hidden", value, weight * hidden_weight)
        kind = self._kd.attention
        if kind == "none":
            return
        if pairs.attention:
            self.distil(
                f"{name}_attention",
                attention_sum(student.attention, teacher.attention, pairs.attention, kind),
                weight,
            )
        cross = [
            pair for pair in pairs.attention if cross_from is not None and pair[0] >= cross_from
        ]
        if cross:
            value = attention_sum(student.cross_attention, teacher.cross_attention, cross, kind)
            self.distil(f"{name}_cross", value, weight)

    def metric(self, name: str, value: Tensor) -> None:
        """Adds a scalar that is logged and not trained on."""
        self._losses.metrics[name] = value.detach()

    def losses(self, touch: Tensor | None = None) -> Losses:
        """The collected terms; `touch` as in `Losses`."""
        self._losses.touch = touch
        return self._losses
