"""The plan against a naive oracle: a bijection per epoch over its groups, pinned for ever."""

from __future__ import annotations

import json
import pickle
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_pipeline.mixture import Mixture, Segment, step_positions
from data_pipeline.plan import Plan, permutation

HASH = "0123456789abcdef0123456789abcdef"
PINNED = [(1, 0), (1, 4), (0, 8), (0, 15), (0, 10), (1, 1), (1, 3), (0, 12), (0, 13), (0, 14)]
shards = st.lists(st.integers(0, 40), min_size=1, max_size=6).filter(lambda counts: sum(counts) > 0)


def make(counts, **options) -> Plan:
    values = {"seed": 3, "block": 8, "window_blocks": 2} | options
    return Plan(np.asarray(counts), options.pop("hash", HASH), **values)


@settings(max_examples=60, deadline=None)
@given(
    counts=shards,
    block=st.integers(1, 50),
    window=st.integers(1, 5),
    epoch=st.integers(0, 3),
    groups=st.integers(1, 7),
)
def test_each_epoch_holds_every_sample_once(counts, block, window, epoch, groups):
    total = sum(counts)
    groups = min(groups, total)
    plan = make(counts, block=block, window_blocks=window, groups=groups)
    share = total // groups
    places = range(epoch * share, (epoch + 1) * share)
    seen = [plan.locate(place, group) for group in range(groups) for place in places]
    every = {(s, n) for s, count in enumerate(counts) for n in range(count)}
    assert len(seen) == len(set(seen)) == total - plan.left_out
    assert set(seen) <= every
    assert plan.left_out == total % groups < groups


def test_other_samples_are_left_out_each_epoch():
    plan = make([100], block=4, groups=7)
    every = {(0, n) for n in range(100)}
    left = []
    for epoch in range(6):
        places = range(epoch * 14, (epoch + 1) * 14)
        left.append(frozenset(every - {plan.locate(p, g) for g in range(7) for p in places}))
    assert len(set(left)) > 1 and all(len(rest) == 2 for rest in left)


def naive_epoch(counts, seed, block, window, epoch, groups):
    """The documented order of each group, spelled out with lists."""
    blocks = [
        [(s, n) for n in range(first, min(first + block, count))]
        for s, count in enumerate(counts)
        for first in range(0, count, block)
    ]
    key = (int(HASH[:16], 16), seed)
    blocks = [blocks[n] for n in permutation(len(blocks), key, (1, epoch, 0))]
    dealt = [(b, sample) for b, part in enumerate(blocks) for sample in part]
    share = len(dealt) // groups
    result = []
    for group in range(groups):
        mine = dealt[group * share : (group + 1) * share]
        first = mine[0][0]
        order = []
        for number in range((mine[-1][0] - first) // window + 1):
            samples = [sample for b, sample in mine if (b - first) // window == number]
            shuffled = permutation(len(samples), key, (2, epoch, (group << 40) | number))
            order += [samples[n] for n in shuffled]
        result.append(order)
    return result


@settings(max_examples=60, deadline=None)
@given(
    counts=shards,
    block=st.integers(1, 20),
    window=st.integers(1, 4),
    epoch=st.integers(0, 2),
    groups=st.integers(1, 5),
)
def test_order_is_the_documented_one(counts, block, window, epoch, groups):
    total = sum(counts)
    groups = min(groups, total)
    plan = make(counts, block=block, window_blocks=window, groups=groups)
    share = total // groups
    found = [[plan.locate(epoch * share + n, g) for n in range(share)] for g in range(groups)]
    assert found == naive_epoch(counts, 3, block, window, epoch, groups)


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


@pytest.mark.parametrize("groups", [1, 12])
def test_the_golden_file_holds_the_order(groups):
    """The first 1,000 keys of a data set of 12,345 samples in 13 shards."""
    golden = json.loads((Path(__file__).parent / "golden_order.json").read_text())
    counts = [1000] * 12 + [345]
    plan = Plan(np.asarray(counts), HASH, 7, 64, 8, groups=groups)
    mixture = Mixture([plan], [Segment(0, (1,))])
    positions = [
        p for start in range(0, 1008, 24) for p in step_positions(start, 24, groups, 0, 24)
    ]
    found = ["{1:02d}-{2:04d}".format(*mixture.locate(position)) for position in positions[:1000]]
    assert found == golden[str(groups)]


@settings(max_examples=40, deadline=None)
@given(counts=shards, groups=st.integers(1, 4), place=st.integers(0, 60), ahead=st.integers(0, 1))
def test_window_shards_are_those_that_are_read(counts, groups, place, ahead):
    groups = min(groups, sum(counts))
    plan = make(counts, groups=groups)
    group = place % groups
    epoch, number = plan.window_of(place, group)
    now = [
        n
        for n in range(place, place + plan.group_samples)
        if plan.window_of(n, group) == (epoch, number)
    ]
    if ahead:
        following = plan.window_of(now[-1] + 1, group)
        now = [
            n
            for n in range(now[-1] + 1, now[-1] + 1 + plan.group_samples)
            if plan.window_of(n, group) == following
        ]
        read = [plan.locate(n, group)[0] for n in now]
        assert plan.window_shards(epoch, group, number + 1) == list(dict.fromkeys(read))
    else:
        assert {plan.locate(n, group)[0] for n in now} <= set(
            plan.window_shards(epoch, group, number)
        )


def test_neighbours_are_mixed():
    plan = Plan(np.full(40, 256), HASH, 0, block=256, window_blocks=8)
    places = np.asarray([plan.locate(position) for position in range(2048)])
    assert len(set(places[:64, 0].tolist())) == 8


@pytest.mark.parametrize("bad", [{"block": 0}, {"window_blocks": 0}, {"groups": 0}, {"groups": 11}])
def test_bad_settings(bad):
    with pytest.raises(ValueError):
        make([10], **bad)
    with pytest.raises(ValueError, match="no samples"):
        make([0, 0])
