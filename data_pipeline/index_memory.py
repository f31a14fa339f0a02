"""Indexes of remote shards in memory, for folders that are read without a cache."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable

from data_pipeline.index import ShardIndex

__all__ = ["IndexMemory"]

# A sample takes about 50 bytes, so these are 10 M samples, in each data worker.
_MAX_BYTES = 512 << 20


class IndexMemory:
    """The indexes used last, up to a number of bytes. An order of many windows goes back and forth
    between hundreds of shards, and an index is larger than most samples: it must not come over the
    network once more for each of them.

    An index holds arrays over the bytes of its file: no objects for samples, and no descriptor.
    """

    def __init__(self, max_bytes: int | None = None) -> None:
        self.max_bytes = _MAX_BYTES if max_bytes is None else max_bytes
        self.bytes = 0
        self._held: OrderedDict[str, tuple[ShardIndex, int]] = OrderedDict()

    def __len__(self) -> int:
        return len(self._held)

    def get(self, name: str) -> ShardIndex | None:
        """The index of a shard, if it is held."""
        if name not in self._held:
            return None
        self._held.move_to_end(name)
        return self._held[name][0]

    def put(self, name: str, index: ShardIndex, size: int) -> None:
        """Holds an index of `size` bytes; those used longest ago make room."""
        self._drop(name)
        self._held[name] = index, size
        self.bytes += size
        while self.bytes > self.max_bytes:
            self._drop(next(iter(self._held)))

    def keep(self, names: Iterable[str]) -> None:
        """Drops all others: their windows are over."""
        for name in self._held.keys() - set(names):
            self._drop(name)

    def _drop(self, name: str) -> None:
        self.bytes -= self._held.pop(name, (None, 0))[1]
