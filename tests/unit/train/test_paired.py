"""Paired bootstrap intervals against a loop over draws of pictures."""

from __future__ import annotations

import numpy as np
import pytest

from train.evaluation.items import Items
from train.evaluation.paired import difference, retention

UNITS = tuple(f"p{n}" for n in range(40))


def scored(seed: int, share: float, units: tuple[str, ...] = UNITS) -> Items:
    """Two metrics over pictures with 1 to 4 items each."""
    generator = np.random.default_rng(seed)
    counts = {name: generator.integers(1, 5, len(units)).astype(float) for name in "ab"}
    if seed:  # the same questions for every model
        counts = scored(0, share, units).counts
    sums = {
        name: generator.binomial(count.astype(int), share) * 1.0 for name, count in counts.items()
    }
    return Items(units, sums, counts)


def test_intervals_are_those_of_a_loop():
    teacher, students = scored(1, 0.9), [scored(2, 0.8), scored(3, 0.7)]
    found = retention(teacher, students, ("a", "b"), draws=300)
    generator, values = np.random.default_rng(0), []
    for start in range(0, 300, 200):
        for drawn in generator.multinomial(40, np.full(40, 1 / 40), min(200, 300 - start)):

            def score(items: Items, drawn=drawn) -> float:
                means = []
                for name in "ab":
                    total = asked = 0.0
                    for unit, times in enumerate(drawn):
                        total += times * items.sums[name][unit]
                        asked += times * items.counts[name][unit]
                    means.append(total / asked)
                return sum(means) / 2

            values.append(np.mean([score(student) / score(teacher) for student in students]))
    assert (found.low, found.high) == pytest.approx(tuple(np.quantile(values, (0.025, 0.975))))
    assert found.low < found.mean < found.high
    assert found.mean == pytest.approx(np.mean(found.seeds)) and len(found.seeds) == 2


def test_a_model_against_itself_has_no_spread():
    teacher = scored(1, 0.9)
    same = retention(teacher, [teacher], ("a",), draws=50)
    assert (same.mean, same.low, same.high) == (1.0, 1.0, 1.0)
    none = difference([teacher], [teacher], ("a",), draws=50)
    assert (none.mean, none.low, none.high) == (0.0, 0.0, 0.0)


def test_pairing_is_narrower_than_the_teachers_own_spread():
    teacher = scored(1, 0.6)
    near = Items(UNITS, {n: s * 0.95 for n, s in teacher.sums.items()}, teacher.counts)
    found = retention(teacher, [near], ("a",), draws=200)
    assert found.high - found.low < 1e-9 and found.mean == pytest.approx(0.95)


def test_only_what_can_be_compared_is():
    with pytest.raises(ValueError, match="at least one trained model"):
        retention(scored(1, 0.9), [], ("a",))
    other = scored(1, 0.9, (*UNITS[:-1], "elsewhere"))
    with pytest.raises(ValueError, match="the same pictures"):
        retention(scored(1, 0.9), [other], ("a",))
