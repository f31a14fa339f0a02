"""The ranks that save and load together."""

from __future__ import annotations

from collections.abc import Callable
from datetime import timedelta
from typing import Any

import torch.distributed as dist

__all__ = ["Peers"]

# How long the first rank that has written its files waits for the slowest; a rank that died is
# noticed at once.
_PATIENCE = timedelta(hours=2)


class Peers:
    """Agreement among ranks on a gloo group of its own, so that it may be used by a writer thread
    while training uses the others. One thread at a time; every method is collective.
    """

    def __init__(self) -> None:
        self._group: Any = None

    @property
    def rank(self) -> int:
        return dist.get_rank() if dist.is_initialized() else 0

    @property
    def world(self) -> int:
        return dist.get_world_size() if dist.is_initialized() else 1

    def connect(self) -> None:
        """Makes the group, if there is none. To be called by the main thread of every rank."""
        if self._group is None and self.world > 1:
            self._group = dist.new_group(backend="gloo", timeout=_PATIENCE)

    def gather(self, value: Any) -> list[Any]:
        """Every rank's value, by rank, on every rank."""
        if self.world == 1:
            return [value]
        self.connect()
        values: list[Any] = [None] * self.world
        dist.all_gather_object(values, value, group=self._group)
        return values

    def from_rank_0(self, make: Callable[[], Any]) -> Any:
        """`make()` of rank 0 on every rank; an error there is raised on every rank, so none is left
        waiting.
        """
        box: list[Any] = [None, None]
        if self.rank == 0:
            try:
                box[0] = make()
            except Exception as error:
                box[1] = error
        if self.world > 1:
            self.connect()
            dist.broadcast_object_list(box, src=0, group=self._group)
        if box[1] is not None:
            raise box[1]
        return box[0]

    def barrier(self) -> None:
        """Returns when every rank has called it."""
        if self.world > 1:
            self.connect()
            dist.barrier(group=self._group)
