"""The plan against a naive oracle: a bijection per epoch, the same for every number of ranks, at
any start.
"""

from __future__ import annotations

import pickle

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_pipeline.plan import Plan, permutation, rank_slots

HASH = "0123456789abcdef0123456789abcdef"
PINNED = [(1, 0), (1, 4), (0, 8), (0, 15), (0, 10), (1, 1), (1, 3), (0, 12), (0, 13), (0, 14)]
shards = st.lists(st.integers(0, 40), min_size=1, max_size=6).filter(lambda counts: sum(counts) > 0)


def make(counts, **options) -> Plan:
    values = {"seed": 3, "block": 8, "window_blocks": 2} | options
    return Plan(np.asarray(counts), options.pop("hash", HASH), **values)


@settings(max_examples=60, deadline=None)
@given(counts=shards, block=st.integers(1, 50), window=st.integers(1, 5), epoch=st.integers(0, 3))
def test_each_epoch_holds_every_sample_once(counts, block, window, epoch):
    plan = make(counts, block=block, window_blocks=window)
    total = sum(counts)
    start = epoch * total
    seen = [plan.locate(position) for position in range(start, start + total)]
    assert sorted(seen) == [(s, n) for s, count in enumerate(counts) for n in range(count)]


def naive_epoch(counts, seed, block, window, epoch):
    """The documented order, spelled out with lists."""
    blocks = [
        [(s, n) for n in range(first, min(first + block, count))]
        for s, count in enumerate(counts)
        for first in range(0, count, block)
    ]
    key = (int(HASH[:16], 16), seed)
    blocks = [blocks[n] for n in permutation(len(blocks), key, (1, epoch, 0))]
    result = []
    for number, first in enumerate(range(0, len(blocks), window)):
        samples = [sample for part in blocks[first : first + window] for sample in part]
        order = permutation(len(samples), key, (2, epoch, number))
        result += [samples[n] for n in order]
    return result


@settings(max_examples=40, deadline=None)
@given(counts=shards, block=st.integers(1, 20), window=st.integers(1, 4), epoch=st.integers(0, 2))
def test_order_is_the_documented_one(counts, block, window, epoch):
    plan = make(counts, block=block, window_blocks=window)
    total = sum(counts)
    found = [plan.locate(epoch * total + n) for n in range(total)]
    assert found == naive_epoch(counts, 3, block, window, epoch)


@settings(max_examples=40, deadline=None)
@given(step=st.integers(0, 50), share=st.integers(1, 5), start=st.integers(0, 1000))
def test_ranks_only_slice_the_global_batch(step, share, start):
    size = 12 * share
    whole = list(range(start + step * size, start + (step + 1) * size))
    for ranks in (1, 2, 3, 4, 6, 12):
        parts = [range(*rank_slots(start, step, size, rank, ranks)) for rank in range(ranks)]
        assert [position for part in parts for position in part] == whole


def test_unequal_ranks_are_refused():
    with pytest.raises(ValueError, match="not a multiple"):
        rank_slots(0, 0, 10, 0, 3)


def test_seed_epoch_and_data_change_the_order():
    def first(plan, start=0):
        return [plan.locate(start + n) for n in range(200)]

    base = make([100, 100])
    assert first(base) == first(make([100, 100]))
    assert first(base) != first(base, start=200)
    assert first(base) != first(make([100, 100], seed=4))
    other = Plan(np.asarray([100, 100]), HASH[::-1], 3, 8, 2)
    assert first(base) != first(other)


def test_random_access_equals_reading_in_order():
    plan = make([37, 5, 61])
    in_order = [plan.locate(position) for position in range(309)]
    fresh = pickle.loads(pickle.dumps(plan))
    for position in np.random.default_rng(0).permutation(309):
        assert fresh.locate(int(position)) == in_order[position]


def test_unshuffled_is_shard_order_and_limit_cuts():
    plan = make([3, 0, 4], shuffle=False, limit=5)
    assert plan.samples == 5
    expected = [(0, 0), (0, 1), (0, 2), (2, 0), (2, 1)]
    assert [plan.locate(position) for position in range(5)] == expected
    assert plan.locate(5) == (0, 0)


@settings(max_examples=30, deadline=None)
@given(counts=shards, position=st.integers(0, 500), attempt=st.integers(1, 100))
def test_a_substitute_is_another_sample_of_the_window(counts, position, attempt):
    plan = make(counts)
    own = plan.locate(position)
    other = plan.substitute(position, attempt)
    assert other == make(counts).substitute(position, attempt)
    window, _ = plan._find(position, 0)
    members = set(zip(window.shard.tolist(), window.sample.tolist(), strict=True))
    assert other in members
    assert other != own or len(members) == 1


def test_order_is_pinned():
    """A change of numpy or of this code must not change the order of old runs unnoticed."""
    plan = make([20, 20])
    found = [plan.locate(position) for position in range(10)]
    assert found == PINNED


def test_neighbours_are_mixed():
    plan = Plan(np.full(40, 256), HASH, 0, block=256, window_blocks=8)
    places = np.asarray([plan.locate(position) for position in range(2048)])
    assert len(set(places[:64, 0].tolist())) == 8


@pytest.mark.parametrize("bad", [{"block": 0}, {"window_blocks": 0}, {"groups": 2}])
def test_bad_settings(bad):
    with pytest.raises(ValueError):
        make([10], **bad)
    with pytest.raises(ValueError, match="no samples"):
        make([0, 0])
