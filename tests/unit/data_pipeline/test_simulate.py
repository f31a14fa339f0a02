"""The simulation against what a literal walk over the epoch counts."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_pipeline.mixture import Mixture, Segment, step_positions
from data_pipeline.plan import Plan
from data_pipeline.simulate import report_lines, simulate

HASH = "0123456789abcdef" * 2


def manifest(counts, bytes_each=10):
    shards = [SimpleNamespace(bytes=count * bytes_each) for count in counts]
    return SimpleNamespace(
        samples=sum(counts), shard_samples=np.asarray(counts), shards=shards, hash=HASH
    )


@settings(max_examples=25, deadline=None)
@given(
    counts=st.lists(st.integers(1, 40), min_size=2, max_size=8).filter(lambda c: sum(c) > 12),
    groups=st.sampled_from([1, 2, 4]),
    nodes=st.sampled_from([1, 2, 4]),
)
def test_a_node_without_a_limit_fetches_each_shard_it_reads_once(counts, groups, nodes):
    found = simulate(
        [manifest(counts)], step_samples=4, ranks=4, per_node=4 // nodes, block=4,
        window_blocks=2, groups=groups, cache_limit=1 << 40,
    )  # fmt: skip
    plan = Plan(np.asarray(counts), HASH, 0, 4, 2, groups=groups)
    mixture = Mixture([plan], [Segment(0, (1,))])
    epoch = plan.group_samples * groups
    for node in range(nodes):
        read = set()
        for start in range(0, epoch, groups):
            share = 4 // nodes
            for slot in range(node * share, (node + 1) * share):
                group = slot * groups // 4
                read.add(mixture.locate(start + group)[1])
        assert found.fetched_bytes[node] == sum(counts[shard] * 10 for shard in read)
        assert found.cache_bytes[node] <= found.cache_ahead_bytes[node] <= sum(counts) * 10
    assert found.left_out == sum(counts) % groups and found.nodes == nodes


def test_a_small_cache_fetches_again_and_says_so():
    # Blocks of one shard come in many windows.
    data = manifest([64] * 8)
    large = simulate([data], step_samples=8, ranks=8, block=4, window_blocks=8, groups=1)
    small = simulate(
        [data], step_samples=8, ranks=8, block=4, window_blocks=8, groups=1, cache_limit=1300
    )
    assert large.fetched_bytes == [8 * 640]
    assert small.fetched_bytes[0] > 3 * large.fetched_bytes[0]
    assert any("raise data.remote.cache_gb" in line for line in report_lines(small))
    assert not any("raise data.remote.cache_gb" in line for line in report_lines(large))


def test_a_window_larger_than_the_data_mixes_as_a_uniform_shuffle():
    data = manifest([500] * 8)
    found = simulate([data], step_samples=64, ranks=8, block=16, window_blocks=1000, groups=1)
    assert found.pool == 4000 and 0.8 < found.distance < 1.2
    near = simulate([data], step_samples=64, ranks=8, block=500, window_blocks=1, groups=1)
    assert near.distance < 0.2 and near.shards_per_step < 1.5 < found.shards_per_step


def test_a_step_counts_its_shards():
    counts = [50] * 6
    found = simulate(
        [manifest(counts)], step_samples=12, ranks=2, block=8, window_blocks=3, groups=4
    )
    plan = Plan(np.asarray(counts), HASH, 0, 8, 3, groups=4)
    mixture = Mixture([plan], [Segment(0, (1,))])
    shards = [
        len({mixture.locate(p)[1] for p in step_positions(n * 12, 12, 4, 0, 12)}) for n in range(25)
    ]
    assert found.shards_per_step == pytest.approx(np.mean(shards))
    assert found.steps == 25


def test_groups_that_nodes_share_are_told():
    found = simulate([manifest([400])], step_samples=12, ranks=4, per_node=1, groups=3)
    assert found.shared_groups == 3
    assert any("read by two nodes" in line for line in report_lines(found))
    with pytest.raises(ValueError, match="4 ranks"):
        simulate([manifest([400])], step_samples=10, ranks=4)
    with pytest.raises(ValueError, match="5 groups"):
        simulate([manifest([400])], step_samples=12, ranks=4, groups=5)
