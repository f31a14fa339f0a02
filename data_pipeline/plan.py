"""The order of samples as a pure function of (manifest hash, seed, epoch, block, window). Needs
numpy only.

Shards are cut into blocks of neighbouring samples, blocks are permuted, and each run of
`window_blocks` permuted blocks is a window inside which samples are permuted. Training reads one
endless stream: position p lies in epoch p // N. A step takes `step_samples` consecutive positions
and rank r the r-th part of them, so the global batch does not depend on the number of ranks or
workers, and the whole resume state is one number.

Randomness is Philox raw bits (stable across numpy versions) and a permutation of our own;
`Generator.permutation` may change between versions. Memory: O(blocks + one window), never
O(samples).
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass, field

import numpy as np

__all__ = ["PLAN_VERSION", "EpochOrder", "Plan", "Window", "permutation", "rank_slots"]

PLAN_VERSION = 1
_WORD = (1 << 64) - 1
# Philox counter word 1: which question is being asked of the generator.
_BLOCKS, _WINDOW, _SUBSTITUTE = 1, 2, 3


def _bits(count: int, key: tuple[int, int], counter: tuple[int, int, int]) -> np.ndarray:
    """(count,) uint64 raw bits. Counter word 0 is the generator's own, so streams never meet."""
    generator = np.random.Philox(
        key=np.asarray(key, np.uint64), counter=np.asarray((0, *counter), np.uint64)
    )
    return generator.random_raw(count)


def permutation(count: int, key: tuple[int, int], counter: tuple[int, int, int]) -> np.ndarray:
    """(count,) int64 permutation of range(count): the stable order of raw bits."""
    return np.argsort(_bits(count, key, counter), kind="stable")


def rank_slots(start: int, step: int, step_samples: int, rank: int, ranks: int) -> tuple[int, int]:
    """[first, last) stream positions of a rank in a step, counted from position `start`.

    Raises:
        ValueError: the step cannot be cut into equal parts.
    """
    if step_samples % ranks:
        raise ValueError(f"global batch {step_samples} is not a multiple of {ranks} ranks")
    share = step_samples // ranks
    first = start + step * step_samples + rank * share
    return first, first + share


@dataclass(frozen=True)
class Window:
    """Samples that are mixed: positions [first, first + len) of an epoch's group."""

    first: int
    shard: np.ndarray
    sample: np.ndarray

    def __len__(self) -> int:
        return len(self.shard)


@dataclass(frozen=True)
class EpochOrder:
    """Blocks of one epoch in their permuted order.

    Attributes:
        shard, start: (blocks,) shard and first sample of each block.
        ends: (blocks + 1,) samples before each block, and the total.
        bounds: for each canonical group, the first sample of each window and the group's end.
    """

    epoch: int
    shard: np.ndarray
    start: np.ndarray
    ends: np.ndarray
    bounds: tuple[np.ndarray, ...]


@dataclass
class Plan:
    """Where each position of the stream lies.

    Args:
        shard_samples: (shards,) samples of each shard.   manifest_hash: hexadecimal, identifies
            the data.
        shuffle: False keeps shard order (evaluation).   limit: only the first `limit` samples; 0
            is all.
        groups: canonical groups of an epoch; positions refer to group 0 while there is one group.
    """

    shard_samples: np.ndarray
    manifest_hash: str
    seed: int
    block: int = 256
    window_blocks: int = 64
    shuffle: bool = True
    limit: int = 0
    groups: int = 1
    _orders: OrderedDict[int, EpochOrder] = field(default_factory=OrderedDict, repr=False)
    _windows: OrderedDict[tuple[int, int, int], Window] = field(
        default_factory=OrderedDict, repr=False
    )

    def __post_init__(self) -> None:
        if self.block < 1 or self.window_blocks < 1:
            raise ValueError("data.block and data.window_blocks must be at least 1")
        if self.groups != 1:
            raise ValueError(f"plan groups must be 1, is {self.groups}")
        counts = np.asarray(self.shard_samples, np.int64)
        if self.limit > 0:
            before = np.cumsum(counts) - counts
            counts = np.clip(self.limit - before, 0, counts)
        self.shard_samples = counts
        self.samples = int(counts.sum())
        if self.samples == 0:
            raise ValueError("the data folder has no samples")
        self._key = (int(self.manifest_hash[:16], 16), self.seed & _WORD)
        # Block table in shard order: every block but a shard's last is full.
        blocks = -(-counts // self.block)
        self._block_shard = np.repeat(np.arange(len(counts)), blocks)
        first = np.repeat(np.cumsum(blocks) - blocks, blocks)
        self._block_start = (np.arange(len(self._block_shard)) - first) * self.block
        left = counts[self._block_shard] - self._block_start
        self._block_length = np.minimum(left, self.block)

    @property
    def group_samples(self) -> int:
        """Samples of a group in an epoch: groups are equal, a remainder is left out."""
        return self.samples // self.groups

    def order(self, epoch: int) -> EpochOrder:
        """The permuted blocks of an epoch (kept for the two epochs used last)."""
        if epoch in self._orders:
            self._orders.move_to_end(epoch)
            return self._orders[epoch]
        blocks = len(self._block_shard)
        chosen = np.arange(blocks)
        if self.shuffle:
            chosen = permutation(blocks, self._key, (_BLOCKS, epoch & _WORD, 0))
        ends = np.concatenate([[0], np.cumsum(self._block_length[chosen])])
        bounds = []
        for group in range(self.groups):
            low, high = group * self.group_samples, (group + 1) * self.group_samples
            first = int(np.searchsorted(ends, low, "right")) - 1
            last = int(np.searchsorted(ends, high, "left"))
            starts = np.maximum(ends[first : last : self.window_blocks], low)
            bounds.append(np.append(starts, high))
        order = EpochOrder(
            epoch, self._block_shard[chosen], self._block_start[chosen], ends, tuple(bounds)
        )
        self._orders[epoch] = order
        while len(self._orders) > 2:
            self._orders.popitem(last=False)
        return order

    def window(self, epoch: int, group: int, number: int) -> Window:
        """One window, with its samples in the order of the stream (kept for the four used last)."""
        name = (epoch, group, number)
        if name in self._windows:
            self._windows.move_to_end(name)
            return self._windows[name]
        order = self.order(epoch)
        low, high = (int(value) for value in order.bounds[group][number : number + 2])
        linear = np.arange(low, high)
        if self.shuffle:
            counter = (_WINDOW, epoch & _WORD, (group << 40) | number)
            linear = low + permutation(high - low, self._key, counter)
        block = np.searchsorted(order.ends, linear, "right") - 1
        window = Window(
            low - int(order.bounds[group][0]),
            order.shard[block],
            order.start[block] + linear - order.ends[block],
        )
        self._windows[name] = window
        while len(self._windows) > 4:
            self._windows.popitem(last=False)
        return window

    def _find(self, position: int, group: int) -> tuple[Window, int]:
        """The window that holds a position of a group's stream, and the position in it."""
        epoch, inside = divmod(position, self.group_samples)
        bounds = self.order(epoch).bounds[group]
        number = int(np.searchsorted(bounds, bounds[0] + inside, "right")) - 1
        window = self.window(epoch, group, number)
        return window, inside - window.first

    def locate(self, position: int, group: int = 0) -> tuple[int, int]:
        """(shard, sample in the shard) at a position of the endless stream."""
        window, inside = self._find(position, group)
        return int(window.shard[inside]), int(window.sample[inside])

    def substitute(self, position: int, attempt: int, group: int = 0) -> tuple[int, int]:
        """(shard, sample) in the place of a bad one: of the same window, and the same at each
        replay.
        """
        window, inside = self._find(position, group)
        if len(window) == 1:
            return int(window.shard[0]), int(window.sample[0])
        bits = _bits(1, self._key, (_SUBSTITUTE, position & _WORD, (group << 40) | attempt))
        other = (inside + 1 + int(bits[0] % np.uint64(len(window) - 1))) % len(window)
        return int(window.shard[other]), int(window.sample[other])

    def __getstate__(self) -> dict:
        """Caches stay behind when a plan is sent to a worker."""
        return self.__dict__ | {"_orders": OrderedDict(), "_windows": OrderedDict()}
