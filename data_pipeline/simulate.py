"""`espalier data plan --simulate`: what an order costs and how well it mixes, without reading data.

Walks the plan of one epoch window by window, as the nodes would: which shards each node needs at a
time (the cache it wants), what it fetches in an epoch with a cache of a given size, and how far
apart in the shards the samples of one step lie.
"""

from __future__ import annotations

import argparse
import json
import math
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from data_pipeline.manifest import Manifest
from data_pipeline.mixture import Mixture, Segment, choose_groups, period_counts, step_positions
from data_pipeline.plan import Plan

__all__ = ["Simulation", "add_plan_parser", "report_lines", "run_plan", "simulate"]

_STEPS_LOOKED_AT = 50
_MOMENTS = 64
# Batches that torch's DataLoader has each worker make ahead.
_PREFETCH = 2


@dataclass(frozen=True)
class Simulation:
    """Costs and mixing of one epoch. Bytes are of whole shards, the unit of the local cache.

    Attributes:
        pool: samples that are mixed at any time.   left_out: samples that an epoch skips.
        cache_bytes: per node, the most that current windows need at once; with the windows after
            them, which are fetched ahead, in `cache_ahead_bytes`.
        fetched_bytes: per node, what one epoch transfers with a cache of `cache_limit` bytes (least
            recently used shard dropped first).   shared_groups: groups that more than one node
            reads.
        shards_per_step: distinct shards in a step, mean.   distance: median distance in samples
            between two samples of a step, as they lie in the shards, as a share of what a uniform
            shuffle gives.
        prefetch_bytes: per node, pictures of the batches that its workers hold ready.
    """

    samples: int
    left_out: int
    groups: int
    steps: int
    pool: int
    windows: int
    nodes: int
    cache_limit: int
    cache_bytes: list[int]
    cache_ahead_bytes: list[int]
    fetched_bytes: list[int]
    data_bytes: int
    shared_groups: int
    shards_per_step: float
    distance: float
    prefetch_bytes: int


def _node_groups(groups: int, step: int, ranks: int, per_node: int) -> list[list[int]]:
    """The groups that each node reads: those of its ranks' slots."""
    share, part = step // groups, step // ranks
    nodes = []
    for first in range(0, ranks, per_node):
        low, high = first * part, min(first + per_node, ranks) * part
        nodes.append(sorted({slot // share for slot in range(low, high)}))
    return nodes


class _Cache:
    """Least recently used shards of one node; counts what it fetches."""

    def __init__(self, limit: int, sizes: Sequence[np.ndarray]) -> None:
        self.limit, self.sizes = limit, sizes
        self.held: OrderedDict[tuple[int, int], int] = OrderedDict()
        self.bytes = self.fetched = 0

    def want(self, dataset: int, shard: int) -> None:
        name = (dataset, shard)
        if name in self.held:
            self.held.move_to_end(name)
            return
        size = int(self.sizes[dataset][shard])
        self.fetched += size
        self.held[name] = size
        self.bytes += size
        while self.bytes > self.limit and len(self.held) > 1:
            self.bytes -= self.held.popitem(last=False)[1]


def _moments(
    mixture: Mixture, groups: Sequence[int]
) -> list[list[tuple[int, list[int], list[int]]]]:
    """At moments spread over the epoch: (data set, shards of the window, of the next) per group."""
    moments = []
    longest = max(plan.group_samples for plan in mixture.plans if plan is not None)
    for moment in range(min(_MOMENTS, longest)):
        now = []
        for dataset, plan in enumerate(mixture.plans):
            if plan is None:
                continue
            place = plan.group_samples * moment // min(_MOMENTS, longest)
            for group in groups:
                epoch, number = plan.window_of(place, group)
                now.append(
                    (
                        dataset,
                        plan.window_shards(epoch, group, number),
                        plan.window_shards(epoch, group, number + 1),
                    )
                )
        moments.append(now)
    return moments


def _node(
    mixture: Mixture, groups: Sequence[int], sizes: Sequence[np.ndarray], limit: int
) -> tuple[int, int, int]:
    """(bytes the current windows need at most, with the next ones, fetched in an epoch)."""
    cache = _Cache(limit, sizes)
    current = ahead = 0
    for moment in _moments(mixture, groups):
        needed = {(d, shard) for d, now, _ in moment for shard in now}
        coming = needed | {(d, shard) for d, _, after in moment for shard in after}
        current = max(current, sum(int(sizes[d][shard]) for d, shard in needed))
        ahead = max(ahead, sum(int(sizes[d][shard]) for d, shard in coming))
    for dataset, plan in enumerate(mixture.plans):
        if plan is None:
            continue
        counts = [len(bounds) - 1 for bounds in plan.order(0).bounds]
        for number in range(max(counts)):
            for group in groups:
                if number < counts[group]:
                    for shard in plan.window_shards(0, group, number):
                        cache.want(dataset, shard)
    return current, ahead, cache.fetched


def _mixing(mixture: Mixture, step: int, starts: Sequence[np.ndarray]) -> tuple[float, float]:
    """(distinct shards per step, median distance in a step over that of a uniform shuffle)."""
    shards, distances = [], []
    steps = max(1, mixture.samples // step)
    for number in range(0, steps, max(1, steps // _STEPS_LOOKED_AT)):
        places = [
            mixture.locate(p) for p in step_positions(number * step, step, mixture.groups, 0, step)
        ]
        shards.append(len({(d, shard) for d, shard, _ in places}))
        linear = np.asarray([starts[d][shard] + sample for d, shard, sample in places])
        if len(linear) > 1:
            distances.append(np.median(np.abs(np.diff(linear))))
    # The median distance of two uniform points on a line of length 1 is 1 - sqrt(1/2).
    uniform = mixture.samples * (1 - math.sqrt(0.5))
    return float(np.mean(shards)), float(np.mean(distances) / uniform) if distances else 1.0


def simulate(
    manifests: Sequence[Manifest], *, step_samples: int, ranks: int = 8, per_node: int = 8,
    workers: int = 8, image_size: int = 224, seed: int = 0, block: int = 256, window_blocks: int = 64, groups: int = 0,
    cache_limit: int = 100 << 30, weights: Sequence[float] | None = None,
) -> Simulation:  # fmt: skip
    """One epoch of the order, as `ranks` ranks on nodes of `per_node` would read it.

    Args:
        step_samples: images of a step over all ranks.   groups: 0 is the default of training.
        weights: of a mixture; None is as many shares as samples.

    Raises:
        ValueError: numbers that do not divide, as in training.
    """
    if ranks < 1 or per_node < 1 or step_samples % ranks:
        raise ValueError(f"a step of {step_samples} images cannot be shared by {ranks} ranks")
    smallest = min(manifest.samples for manifest in manifests)
    groups = groups or choose_groups(step_samples, ranks, smallest, block * window_blocks)
    if step_samples % groups:
        raise ValueError(f"a step of {step_samples} images cannot be cut into {groups} groups")
    plans = [
        Plan(m.shard_samples, m.hash, seed, block, window_blocks, groups=groups) for m in manifests
    ]
    counts = period_counts(weights or [m.samples for m in manifests], 1000)
    mixture = Mixture(plans, [Segment(0, counts)])
    sizes = [np.asarray([shard.bytes for shard in m.shards]) for m in manifests]
    ends = np.cumsum([0, *(m.samples for m in manifests)])
    starts = [
        ends[n] + np.cumsum(m.shard_samples) - m.shard_samples for n, m in enumerate(manifests)
    ]
    served = _node_groups(groups, step_samples, ranks, per_node)
    nodes = [_node(mixture, mine, sizes, cache_limit) for mine in served]
    shards_per_step, distance = _mixing(mixture, step_samples, starts)
    readers = [group for mine in served for group in mine]
    window = min(block * window_blocks, max(plan.group_samples for plan in plans))
    return Simulation(
        samples=mixture.samples, left_out=mixture.left_out, groups=groups,
        steps=mixture.samples // step_samples, pool=min(mixture.samples, groups * window),
        windows=sum(len(b) - 1 for plan in plans for b in plan.order(0).bounds),
        nodes=len(served), cache_limit=cache_limit,
        cache_bytes=[node[0] for node in nodes], cache_ahead_bytes=[node[1] for node in nodes],
        fetched_bytes=[node[2] for node in nodes],
        data_bytes=sum(int(size.sum()) for size in sizes),
        shared_groups=sum(readers.count(group) > 1 for group in range(groups)),
        shards_per_step=shards_per_step, distance=distance,
        prefetch_bytes=min(per_node, ranks) * workers * _PREFETCH * step_samples // ranks
        * 3 * image_size**2,
    )  # fmt: skip


def _size(count: float) -> str:
    for unit in ("B", "KiB", "MiB", "GiB", "TiB"):
        if count < 1024 or unit == "TiB":
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    raise AssertionError


def report_lines(found: Simulation) -> list[str]:
    """For people."""
    need, ahead = max(found.cache_bytes), max(found.cache_ahead_bytes)
    fetched = max(found.fetched_bytes)
    lines = [
        f"order       {found.samples:,} samples in {found.groups} groups and {found.windows:,} "
        f"windows; {found.steps:,} steps an epoch, {found.left_out} samples left out of each",
        f"mixing      {found.pool:,} samples mixed at any time; {found.shards_per_step:.1f} shards "
        f"in a step; distance {found.distance:.0%} of a uniform shuffle",
        f"cache       {_size(need)} a node for the current windows, {_size(ahead)} with the next "
        f"ones (limit {_size(found.cache_limit)})",
        f"transfer    {_size(fetched)} a node and epoch, {fetched / found.data_bytes:.2f} times "
        f"the data ({_size(found.data_bytes)}) over {found.nodes} nodes",
    ]
    lines.append(f"memory      {_size(found.prefetch_bytes)} a node for batches made ahead")
    if found.cache_limit < ahead:
        lines.append(
            "            the cache is smaller than that: shards are fetched again; raise "
            "data.remote.cache_gb, or lower data.window_blocks or data.groups"
        )
    if found.shared_groups:
        lines.append(
            f"            {found.shared_groups} groups are read by two nodes and fetched by both: "
            "a number of groups that the nodes divide avoids it (data.groups)"
        )
    return lines


def add_plan_parser(verbs: Any) -> None:
    """Adds `plan` to the verbs of `espalier data`."""
    verb = verbs.add_parser(
        "plan",
        help="what an order costs and how well it mixes, before anything is read",
        description="Walks one epoch of the order from the manifests alone: groups and windows, the "
        "local cache that remote data need, bytes fetched per node, and how far apart the samples "
        "of a step lie. Training uses the same plan.",
        epilog="example: espalier data plan data/4m/*/pretrain/train --simulate --ranks 64 "
        "--per-node 8 --step 8192 --cache-gb 200",
    )
    verb.add_argument(
        "folders", nargs="+", metavar="DIR", help="data set, or several of a mixture; URLs too"
    )
    verb.add_argument("--simulate", action="store_true", help="walk the epoch (default: the same)")
    verb.add_argument("--ranks", type=int, default=8, metavar="R")
    verb.add_argument("--per-node", type=int, default=8, metavar="K", help="ranks on a node")
    verb.add_argument("--workers", type=int, default=8, metavar="W", help="loader workers a rank")
    verb.add_argument(
        "--step",
        type=int,
        metavar="S",
        help="images of a step over all ranks (default: 128 a rank)",
    )
    verb.add_argument("--image-size", type=int, default=224, metavar="PX")
    verb.add_argument("--seed", type=int, default=0, metavar="K")
    verb.add_argument("--block", type=int, default=256, help="data.block")
    verb.add_argument("--window-blocks", type=int, default=64, help="data.window_blocks")
    verb.add_argument("--groups", type=int, default=0, help="data.groups (0: chosen)")
    verb.add_argument("--cache-gb", type=float, default=100.0, help="data.remote.cache_gb")
    verb.add_argument("--json", action="store_true", help="print one JSON object")


def run_plan(args: argparse.Namespace) -> int:
    """`espalier data plan`. Raises ValueError / FileNotFoundError on bad input."""
    from data_pipeline.storage import RemoteOptions, open_manifest

    manifests = [open_manifest(folder, RemoteOptions()) for folder in args.folders]
    found = simulate(
        manifests, step_samples=args.step or 128 * args.ranks, ranks=args.ranks,
        per_node=args.per_node, workers=args.workers, image_size=args.image_size, seed=args.seed, block=args.block,
        window_blocks=args.window_blocks, groups=args.groups,
        cache_limit=int(args.cache_gb * 2**30),
    )  # fmt: skip
    if args.json:
        print(json.dumps(asdict(found), indent=1))
    else:
        print("\n".join(report_lines(found)))
    return 0
