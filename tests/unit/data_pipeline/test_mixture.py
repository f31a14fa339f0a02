"""The mixture against naive counting: exact shares, ranks that only slice, segments that go on."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_pipeline.mixture import (
    Mixture,
    Segment,
    choose_groups,
    period_counts,
    step_positions,
)
from data_pipeline.plan import Plan

HASHES = ["0123456789abcdef" * 2, "fedcba9876543210" * 2, "00112233445566ff" * 2]
relaxed = settings(max_examples=60, deadline=None)
counts_of = st.lists(st.integers(1, 6), min_size=1, max_size=3)


def plans(sizes, groups, seed=5):
    return [
        Plan(np.asarray([size]), HASHES[n], seed, 4, 2, groups=groups)
        for n, size in enumerate(sizes)
    ]


def make(counts, groups, sizes=(40, 60, 80)):
    return Mixture(plans(sizes[: len(counts)], groups), [Segment(0, tuple(counts))])


@relaxed
@given(counts=counts_of, groups=st.integers(1, 6), period=st.integers(0, 5))
def test_every_period_of_a_group_has_exact_counts(counts, groups, period):
    mixture = make(counts, groups)
    length = sum(counts)
    for group in range(groups):
        places = range(period * length, (period + 1) * length)
        drawn = Counter(mixture.slot(place * groups + group).dataset for place in places)
        assert [drawn[d] for d in range(len(counts))] == counts


@relaxed
@given(counts=counts_of, groups=st.integers(1, 6), length=st.integers(1, 300))
def test_each_data_set_is_read_in_its_own_order_without_gap(counts, groups, length):
    mixture = make(counts, groups)
    following: Counter = Counter()
    for position in range(length):
        slot = mixture.slot(position)
        assert slot.group == position % groups
        assert slot.place == following[slot.dataset, slot.group]
        following[slot.dataset, slot.group] += 1
        plan = mixture.plans[slot.dataset]
        assert mixture.locate(position)[1:] == plan.locate(slot.place, slot.group)
    done = length // groups * groups
    seen = Counter(mixture.slot(position).dataset for position in range(done))
    assert mixture.consumed(done) == tuple(seen[d] for d in range(len(counts)))


@relaxed
@given(
    groups=st.sampled_from([1, 2, 3, 4, 6, 12]),
    share=st.integers(1, 4),
    step=st.integers(0, 30),
)
def test_ranks_only_slice_the_step(groups, share, step):
    size = 12 * share
    whole = step_positions(step * size, size, groups, 0, size)
    assert sorted(whole) == list(range(step * size, (step + 1) * size))
    order = [(position % groups, position // groups) for position in whole]
    assert order == sorted(order)
    for ranks in (1, 2, 3, 4, 6, 12):
        part = size // ranks
        parts = [
            step_positions(step * size, size, groups, rank * part, (rank + 1) * part)
            for rank in range(ranks)
        ]
        assert sum(parts, ()) == whole


def test_a_step_is_mixed_in_proportion():
    mixture = make([3, 1], groups=8)
    for step in range(50):
        drawn = Counter(mixture.slot(p).dataset for p in step_positions(step * 8, 8, 8, 0, 8))
        assert drawn[0] == 6 and drawn[1] == 2


@relaxed
@given(
    counts=st.lists(st.tuples(st.integers(0, 5), st.integers(0, 5)), min_size=2, max_size=3).filter(
        lambda pairs: any(a for a, _ in pairs) and all(b for _, b in pairs)
    ),
    groups=st.integers(1, 5),
    steps=st.integers(0, 30),
    ragged=st.integers(0, 4),
)
def test_a_new_segment_goes_on_where_the_old_one_stood(counts, groups, steps, ragged):
    """Weights change at a position: each data set continues at its next place, in every group."""
    old, new = tuple(a for a, _ in counts), tuple(b for _, b in counts)
    sizes = (40, 60, 80)[: len(counts)]
    start = steps * groups + min(ragged, groups - 1)
    first = Mixture(
        [plan if n else None for plan, n in zip(plans(sizes, groups), old, strict=True)],
        [Segment(0, old)],
    )
    following: Counter = Counter()
    for position in range(start):
        slot = first.slot(position)
        following[slot.dataset, slot.group] += 1
    second = Mixture(plans(sizes, groups), [Segment(0, old), Segment(start, new)])
    for position in range(start, start + 60):
        slot = second.slot(position)
        assert slot.place == following[slot.dataset, slot.group]
        following[slot.dataset, slot.group] += 1


def test_a_changed_data_set_starts_at_its_beginning_and_one_that_left_is_not_read():
    first, second, third = plans((40, 60, 80), 2)
    segments = [Segment(0, (1, 1, 0)), Segment(20, (1, 0, 2))]
    mixture = Mixture([first, None, third], segments, since=[0, 0, 1])
    drawn = [mixture.slot(position) for position in range(20, 50)]
    assert {slot.dataset for slot in drawn} == {0, 2}
    assert min(slot.place for slot in drawn if slot.dataset == 0) == 5
    assert min(slot.place for slot in drawn if slot.dataset == 2) == 0
    assert mixture.samples == 120 and second.samples == 60
    with pytest.raises(ValueError, match="taken out"):
        mixture.plan(1)


@relaxed
@given(weights=st.lists(st.floats(0.01, 100), min_size=1, max_size=6), period=st.integers(6, 1000))
def test_period_counts_are_the_closest_whole_numbers(weights, period):
    counts = period_counts(weights, period)
    assert len(counts) == len(weights) and min(counts) >= 1
    assert period % sum(counts) == 0
    assert np.gcd.reduce(counts) == 1
    scale = period // sum(counts)
    exact = [weight / sum(weights) * period for weight in weights]
    raised = sum(max(0.0, 1 - share) for share in exact)
    for count, share in zip(counts, exact, strict=True):
        assert abs(count * scale - share) <= 1 + raised


def test_period_counts_of_plain_cases():
    assert period_counts([1, 1], 1000) == (1, 1)
    assert period_counts([0.25, 0.75], 1000) == (1, 3)
    assert period_counts([2_900_000, 860_000, 110_000, 100_000], 100) == (73, 22, 3, 2)
    with pytest.raises(ValueError, match="positive"):
        period_counts([1, 0], 10)
    with pytest.raises(ValueError, match=r"data\.mix_period"):
        period_counts([1, 1, 1], 2)


@relaxed
@given(step=st.integers(1, 2048), ranks=st.integers(1, 64), samples=st.integers(1, 10_000_000))
def test_default_groups_divide_the_step(step, ranks, samples):
    groups = choose_groups(step, ranks, samples, 16384)
    assert 1 <= groups <= 64 and step % groups == 0 and groups <= max(1, samples // 16384)
    better = [n for n in range(groups + 1, 65) if step % n == 0 and n <= samples // 16384]
    assert not better or (groups % ranks == 0 and all(n % ranks for n in better))


def test_default_groups_of_the_published_step():
    assert choose_groups(1024, 8, 4_000_000, 16384) == 64
    assert choose_groups(384, 8, 4_000_000, 16384) == 64
    assert choose_groups(1024, 8, 12_000, 16384) == 1


def test_what_does_not_fit_together_is_refused():
    with pytest.raises(ValueError, match="same number of groups"):
        Mixture([*plans((40,), 1), *plans((40,), 2)], [Segment(0, (1, 1))])
    with pytest.raises(ValueError, match="count for each"):
        Mixture(plans((40,), 1), [Segment(0, (1, 1))])
    with pytest.raises(ValueError, match="share"):
        Mixture(plans((40, 60), 1), [Segment(0, (1, 0))])
    with pytest.raises(ValueError, match="at least one"):
        Mixture([None], [Segment(0, (0,))])
