"""A second CUDA stream for work that only reads what the main stream has already been told to make.

The order of events is the whole safety argument:

- the side stream waits for the point at which its inputs were enqueued (`inputs_ready`, or the
  moment of entry), so it never reads early;
- the main stream waits for the side stream at the end, so it never reads results early, and what it
  frees afterwards is not read any more;
- results live in the side stream's pool. They are freed on the host while the main stream may still
  be reading them, and the pool may hand their memory out again; but only to the side stream, within
  the next block, which waits for a point of the main stream that lies behind those reads.

So no result may outlive the next block.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

__all__ = ["SideStream"]


class SideStream:
    """Runs a block on a stream of its own.

    Args:
        api: `torch.cuda`, or what stands in for it in a test: Stream(), Event(), stream(s) and
            current_stream().
    """

    def __init__(self, api: Any) -> None:
        self._api = api
        self._stream = api.Stream()
        self._ready: Any = None

    def inputs_ready(self) -> None:
        """Everything the coming block reads has been enqueued on the current stream.

        What the main stream enqueues from here to the block runs beside it. Without this call the
        block waits for all of that too.
        """
        self._ready = self._api.Event()
        self._ready.record(self._api.current_stream())

    @contextmanager
    def running(self) -> Iterator[None]:
        """The block's kernels go to the side stream; afterwards the main stream waits for them."""
        main, ready = self._api.current_stream(), self._ready
        self._ready = None
        if ready is None:
            self._stream.wait_stream(main)
        else:
            self._stream.wait_event(ready)
        try:
            with self._api.stream(self._stream):
                yield
        finally:  # also when the block raised: its kernels may be under way
            main.wait_stream(self._stream)
