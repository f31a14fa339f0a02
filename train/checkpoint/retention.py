"""Which checkpoints stay: the last k, the best by a validation metric, every n steps."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from train.config import UserError
from train.recipes_io import nearest

__all__ = ["Best", "Retention", "lower_is_better", "stays"]

_FALLING = ("loss", "error", "perplexity")


def lower_is_better(metric: str) -> bool:
    """Losses, errors and perplexities fall when a model gets better; every other metric rises."""
    return any(word in metric.lower() for word in _FALLING)


@dataclass(frozen=True)
class Retention:
    """keep: how many of the newest stay (at least 1). every: a checkpoint whose step this divides
    stays for good (0: none). best: validation metric whose best checkpoint stays.
    """

    keep: int = 2
    every: int = 0
    best: str | None = None


def stays(scores: Mapping[int, float | None], rule: Retention) -> set[int]:
    """Steps that stay. scores: step of each complete checkpoint -> its value of the metric, if it
    was validated. Of equal values the earlier stays.
    """
    steps = sorted(scores, reverse=True)
    kept = set(steps[: max(1, rule.keep)])
    if rule.every > 0:
        kept |= {step for step in steps if step % rule.every == 0}
    judged = {step: value for step, value in scores.items() if value is not None}
    if rule.best is not None and judged:
        sign = 1.0 if lower_is_better(rule.best) else -1.0
        kept.add(min(judged, key=lambda step: (sign * judged[step], step)))
    return kept


class Best:
    """The best value of the metric so far, and the value at the step just validated."""

    def __init__(self, metric: str | None) -> None:
        self.metric = metric
        self.value: float | None = None
        self.step = -1
        self._last: tuple[int, float] | None = None

    def see(self, step: int, metrics: Mapping[str, Any]) -> bool:
        """Notes a validation; True when it is the best so far, so that it deserves a checkpoint.

        Raises UserError when the validation does not have the metric.
        """
        if self.metric is None or not metrics:
            return False
        if self.metric not in metrics:
            raise UserError(
                f"checkpoint.best: {self.metric!r} is not measured on the validation data; there "
                f"are: {', '.join(sorted(metrics))}{nearest(self.metric, metrics)}"
            )
        value = float(metrics[self.metric])
        if not math.isfinite(value):
            return False
        self._last = step, value
        sign = 1.0 if lower_is_better(self.metric) else -1.0
        if self.value is not None and sign * value >= sign * self.value:
            return False
        self.value, self.step = value, step
        return True

    def score_at(self, step: int) -> dict[str, Any] | None:
        """What the manifest of `step` says, None when this step was not validated."""
        if self._last is None or self._last[0] != step:
            return None
        return {"name": self.metric, "value": self._last[1]}

    def state_dict(self) -> dict[str, Any]:
        return {"metric": self.metric, "value": self.value, "step": self.step}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """With another metric than before, the search begins anew."""
        if state["metric"] == self.metric:
            self.value, self.step = state["value"], state["step"]


def scores_of(
    manifests: Iterable[Mapping[str, Any]], metric: str | None
) -> dict[int, float | None]:
    """step -> value of `metric` of each manifest."""
    found: dict[int, float | None] = {}
    for values in manifests:
        score = values.get("score")
        found[values["step"]] = score["value"] if score and score["name"] == metric else None
    return found
