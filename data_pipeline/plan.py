"""The order of samples as a pure function of (manifest hash, seed, epoch, block, window, groups).
Needs numpy only.

Shards are cut into blocks of neighbouring samples and the blocks are permuted. The epoch is then
dealt to `groups` canonical groups of equally many samples; in a group, each run of `window_blocks`
permuted blocks is a window inside which samples are permuted. A group is an endless stream of its
own: place p lies in epoch p // n. `mixture.py` lays the groups of one or more data sets side by
side into the stream that training reads.

Groups bound what a machine has to hold: a rank reads only its groups' windows. They are a property
of the order, not of the machines, so another number of ranks changes who reads, never what.

Randomness is Philox raw bits (stable across numpy versions) and a permutation of our own;
`Generator.permutation` may change between versions. Memory: O(blocks + windows in use), never
O(samples).
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass, field

import numpy as np

__all__ = ["PLAN_VERSION", "EpochOrder", "Plan", "Window", "permutation"]

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
    """Where each place of each group's stream lies.

    Args:
        shard_samples: (shards,) samples of each shard.   manifest_hash: hexadecimal, identifies
            the data.
        shuffle: False keeps shard order (evaluation).   limit: only the first `limit` samples; 0
            is all.
        groups: canonical groups of an epoch. Fewer than `groups` samples, another set in each
            shuffled epoch, are left out of an epoch (`left_out`).

    Raises:
        ValueError: a setting below 1, no samples, or fewer samples than groups.
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
        if self.groups < 1:
            raise ValueError(f"data.groups must be at least 1, is {self.groups}")
        counts = np.asarray(self.shard_samples, np.int64)
        if self.limit > 0:
            before = np.cumsum(counts) - counts
            counts = np.clip(self.limit - before, 0, counts)
        self.shard_samples = counts
        self.samples = int(counts.sum())
        if self.samples == 0:
            raise ValueError("the data folder has no samples")
        if self.samples < self.groups:
            raise ValueError(
                f"{self.samples} samples cannot be dealt to {self.groups} groups (data.groups)"
            )
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

    @property
    def left_out(self) -> int:
        """Samples that an epoch leaves out."""
        return self.samples % self.groups

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
        """One window, with its samples in the order of the stream (the last used are kept)."""
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
            order.shard[block].astype(np.int32),
            (order.start[block] + linear - order.ends[block]).astype(np.int32),
        )
        self._windows[name] = window
        # A rank may serve every group, and each may stand at the border of two windows.
        while len(self._windows) > 2 * self.groups + 2:
            self._windows.popitem(last=False)
        return window

    def window_of(self, place: int, group: int = 0) -> tuple[int, int]:
        """(epoch, window number) of a place in a group's stream."""
        epoch, inside = divmod(place, self.group_samples)
        bounds = self.order(epoch).bounds[group]
        return epoch, int(np.searchsorted(bounds, bounds[0] + inside, "right")) - 1

    def window_shards(self, epoch: int, group: int, number: int) -> list[int]:
        """Shards of a window, in the order in which the stream first needs them. A number past the
        epoch's last window means the next epoch's first.
        """
        if number + 1 >= len(self.order(epoch).bounds[group]):
            epoch, number = epoch + 1, 0
        return list(dict.fromkeys(self.window(epoch, group, number).shard.tolist()))

    def _find(self, place: int, group: int) -> tuple[Window, int]:
        """The window that holds a place of a group's stream, and the place in it."""
        epoch, number = self.window_of(place, group)
        window = self.window(epoch, group, number)
        return window, place % self.group_samples - window.first

    def locate(self, place: int, group: int = 0) -> tuple[int, int]:
        """(shard, sample in the shard) at a place of a group's endless stream."""
        window, inside = self._find(place, group)
        return int(window.shard[inside]), int(window.sample[inside])

    def substitute(self, place: int, attempt: int, group: int = 0) -> tuple[int, int]:
        """(shard, sample) in the place of a bad one: of the same window, and the same at each
        replay.
        """
        window, inside = self._find(place, group)
        if len(window) == 1:
            return int(window.shard[0]), int(window.sample[0])
        bits = _bits(1, self._key, (_SUBSTITUTE, place & _WORD, (group << 40) | attempt))
        other = (inside + 1 + int(bits[0] % np.uint64(len(window) - 1))) % len(window)
        return int(window.shard[other]), int(window.sample[other])

    def __getstate__(self) -> dict:
        """Caches stay behind when a plan is sent to a worker."""
        return self.__dict__ | {"_orders": OrderedDict(), "_windows": OrderedDict()}
