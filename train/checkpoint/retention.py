"""Which checkpoints stay: the last k, the best by a validation metric, every n steps."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from train.config import UserError
from train.recipes_io import nearest

__all__ = ["Best", "Retention", "best_first", "lower_is_better", "stays"]

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
    if rule.best is not None:
        kept.update(best_first(scores, rule.best)[:1])
    return kept


class Best:
    """The best value of the metric so far, and the value at the step just validated.

    Validations of steps before `first` do not count (see selection.first_judged).
    """

    def __init__(self, metric: str | None, first: int = 0) -> None:
        self.metric, self.first = metric, first
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
        if not math.isfinite(value) or step < self.first:
            return False
        self._last = step, value
        sign = 1.0 if lower_is_better(self.metric) else -1.0
        if self.value is not None and sign * value >= sign * self.value:
            return False
        self.value, self.step = value, step
        return True

    def score_at(self, step: int) -> dict[str, Any] | None:
        """What the manifest of `step` says, None when no validation of this step counts."""
        if self._last is None or self._last[0] != step:
            return None
        return {"name": self.metric, "value": self._last[1]}

    def state_dict(self) -> dict[str, Any]:
        return {"metric": self.metric, "value": self.value, "step": self.step}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """With another metric than before, or a best step that does not count (any more), the
        search begins anew.
        """
        if state["metric"] == self.metric and state["step"] >= self.first:
            self.value, self.step = state["value"], state["step"]

    def scores_of(self, manifests: Iterable[Mapping[str, Any]]) -> dict[int, float | None]:
        """step -> value of the metric of each manifest, None where it has none that counts."""
        found: dict[int, float | None] = {}
        for values in manifests:
            step, score = values["step"], values.get("score") or {}
            counts = score.get("name") == self.metric and step >= self.first
            found[step] = score.get("value") if counts else None
        return found


def best_first(scores: Mapping[int, float | None], metric: str) -> list[int]:
    """The steps that have a value, best first; of equal values the earlier."""
    sign = 1.0 if lower_is_better(metric) else -1.0
    judged = {step: value for step, value in scores.items() if value is not None}
    return sorted(judged, key=lambda step: (sign * judged[step], step))
