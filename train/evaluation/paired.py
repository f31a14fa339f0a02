"""Paired bootstrap: models that saw the same pictures are compared on the same draws of them.

Efron and Tibshirani 1993, section 16; the picture is the unit, so items about one picture stay
together (cluster bootstrap). Draws say how far a number depends on the test pictures; how far it
depends on the training seed is what several seeds show.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from train.evaluation.items import Items

__all__ = ["Interval", "difference", "retention"]

_AT_ONCE = 200  # draws in memory


@dataclass(frozen=True)
class Interval:
    """A number, its 95 % interval over draws of pictures, and its value for each seed."""

    mean: float
    low: float
    high: float
    seeds: tuple[float, ...]

    def to_dict(self) -> dict[str, float | list[float]]:
        return {"mean": self.mean, "low": self.low, "high": self.high, "seeds": list(self.seeds)}


def retention(
    teacher: Items, students: Sequence[Items], headline: Sequence[str], draws: int = 2000
) -> Interval:
    """Mean over seeds of student score / teacher score.

    Args:
        students: one for each training seed, on the teacher's pictures.

    Raises:
        ValueError: no student, or one that was scored on other pictures.
    """
    pairs = [(student, teacher) for student in students]
    return _interval(pairs, headline, draws, np.divide)


def difference(
    ours: Sequence[Items], theirs: Sequence[Items], headline: Sequence[str], draws: int = 2000
) -> Interval:
    """Mean over seeds of one model's score minus another's of the same seed. Raises as `retention`."""
    return _interval(list(zip(ours, theirs, strict=True)), headline, draws, np.subtract)


def _interval(
    pairs: Sequence[tuple[Items, Items]],
    headline: Sequence[str],
    draws: int,
    compare: Callable[[np.ndarray, np.ndarray], np.ndarray],
) -> Interval:
    if not pairs:
        raise ValueError("a comparison needs at least one trained model")
    units = pairs[0][0].units
    if any(items.units != units for pair in pairs for items in pair):
        raise ValueError("models that are compared must be scored on the same pictures")
    seeds = tuple(float(compare(a.score(headline), b.score(headline))) for a, b in pairs)
    generator, found = np.random.default_rng(0), []
    for start in range(0, draws, _AT_ONCE):
        count = min(_AT_ONCE, draws - start)
        weights = generator.multinomial(len(units), np.full(len(units), 1 / len(units)), count)
        values = [compare(a.score(headline, weights), b.score(headline, weights)) for a, b in pairs]
        found.append(np.mean(values, axis=0))
    low, high = np.quantile(np.concatenate(found), (0.025, 0.975))
    return Interval(float(np.mean(seeds)), float(low), float(high), seeds)
