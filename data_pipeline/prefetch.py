"""Batches copied to the accelerator while the step before them runs.

`DevicePrefetcher` goes around the raw deliveries, inside the loader and before anything is counted:
a batch that is on its way when the run ends was never handed out, so the state does not know it,
and it is planned again.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager
from typing import Any, Generic, Protocol, Self, TypeVar

import torch

__all__ = ["DevicePrefetcher", "Movable"]


class Movable(Protocol):
    """What can be prefetched: a batch, or what carries one."""

    def to(self, device: torch.device | str, non_blocking: bool = False) -> Self: ...

    def record_stream(self, stream: Any) -> None:
        """Tells the allocator that `stream` uses the memory."""
        ...


class Streams(Protocol):
    """The part of `torch.cuda` that is used; tests put a recording one in its place."""

    def Stream(self, device: torch.device) -> Any: ...  # noqa: N802 - torch's name

    def stream(self, stream: Any) -> AbstractContextManager: ...

    def current_stream(self, device: torch.device) -> Any: ...


T = TypeVar("T", bound=Movable)


class DevicePrefetcher(Generic[T]):
    """An iterator one item ahead: each item is on `device` when it is handed out.

    Copies run on a stream of their own and are asked for before the item at hand is returned, so
    that they run beside its step. They overlap only when the items lie in pinned memory. On a CPU
    items pass through, none is fetched early.

    An error of `items` (and their end) is held back until everything before it was handed out.

    Args:
        items: taken one ahead; closed by `close()` if they can be.
        streams: torch.cuda, but for tests.
    """

    def __init__(
        self, items: Iterator[T], device: torch.device | str, streams: Streams | None = None
    ) -> None:
        self._items = items
        self._device = torch.device(device)
        self._ahead = self._device.type != "cpu" or streams is not None
        self._streams: Any = torch.cuda if streams is None else streams
        self._side: Any = self._streams.Stream(self._device) if self._ahead else None
        self._staged: tuple[T, Any] | None = None
        self._stop: BaseException | None = None
        self._begun = False

    def _stage(self) -> None:
        """Takes the next item and starts its copy."""
        try:
            item = next(self._items)
        except BaseException as stop:  # noqa: BLE001 - raised when its turn comes
            self._stop = stop
            return
        with self._streams.stream(self._side):
            moved = item.to(self._device, non_blocking=True)
            self._staged = moved, self._side.record_event()

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> T:
        if not self._ahead:
            return next(self._items)
        if not self._begun:
            self._begun = True
            self._stage()
        if self._staged is None:
            raise self._stop or StopIteration
        (item, copied), self._staged = self._staged, None
        current = self._streams.current_stream(self._device)
        current.wait_event(copied)
        # The memory belongs to the side stream; it must not be given away while the step uses it.
        item.record_stream(current)
        self._stage()
        return item

    def close(self) -> None:
        """Drops what was not handed out and closes the items. Safe to call twice."""
        self._staged, self._stop, self._begun = None, None, True
        close = getattr(self._items, "close", None)
        self._items = iter(())
        if close is not None:
            close()
