"""Whole shards fetched into the cache in the background, while samples are read by range."""

from __future__ import annotations

import threading
import time
import weakref
from collections import deque
from collections.abc import Callable, Iterator, Sequence

from data_pipeline.cache import Entry, Filled, ShardCache
from data_pipeline.remote import Counters, Fetcher, RemoteOptions, TransientError
from data_pipeline.sources import Source

__all__ = ["Downloads"]

_THREADS = 2
# Read errors never wait for these: what is dropped is asked for again by the next read.
_MOST_DEMANDED = 16
_JOIN_S = 5.0


class _Stopped(Exception):
    pass


Wanted = tuple[str, Entry]


class Downloads:
    """The queue of one process and the threads that work it off.

    Shards that were missed come first, then the planned ones in order. A shard that another process
    is downloading is left to it.

    Args:
        sleep: between tries; None waits for the time, or for `close`.
    """

    def __init__(
        self, cache: ShardCache, source: Source, options: RemoteOptions, counters: Counters,
        sleep: Callable[[float], object] | None = None, clock: Callable[[], float] = time.monotonic,
    ) -> None:  # fmt: skip
        self._cache = cache
        self._counters = counters
        self._sleep = sleep
        self._fetcher = Fetcher(source, options, counters, sleep=self._pause, clock=clock)
        self._demanded: deque[Wanted] = deque(maxlen=_MOST_DEMANDED)
        self._planned: deque[Wanted] = deque()
        self._keep: frozenset[str] = frozenset()
        self._active: set[str] = set()
        self._fatal: Exception | None = None
        self._changed = threading.Condition()
        self._stop = threading.Event()
        self._threads: list[threading.Thread] = []
        # A run that ends without close(): no download goes on in a dying interpreter.
        self._at_exit = weakref.finalize(self, self._stop.set)

    def demand(self, name: str, entry: Entry) -> None:
        """Asks for a shard from which a sample was just missed.

        Raises:
            Exception: what ended a download for good (ShardError, OSError ...).
        """
        with self._changed:
            if self._fatal is not None:
                raise self._fatal
            if entry.name not in self._active and (name, entry) not in self._demanded:
                self._demanded.append((name, entry))
                self._wake()

    def plan(self, wanted: Sequence[Wanted]) -> None:
        """Replaces the plan: shards in the order of need, those in use now first.

        As many as the cache can hold at once; they do not make room for one another.
        """
        room, chosen = self._cache.limit, []
        for name, entry in wanted:
            room -= entry.bytes
            if room < 0:
                break
            chosen.append((name, entry))
        with self._changed:
            self._planned = deque(chosen)
            self._keep = frozenset(entry.name for _, entry in chosen)
            if chosen:
                self._wake()

    def idle(self, timeout_s: float | None = None) -> bool:
        """Waits until there is nothing left to do; whether that came true."""
        with self._changed:
            return self._changed.wait_for(
                lambda: not (self._demanded or self._planned or self._active), timeout_s
            )

    def close(self) -> None:
        """Ends the threads. A thread that waits for a dead server ends by itself, soon after."""
        with self._changed:
            self._stop.set()
            self._demanded.clear()
            self._planned.clear()
            self._changed.notify_all()
        for thread in self._threads:
            thread.join(_JOIN_S)

    # -- threads

    def _wake(self) -> None:
        if len(self._threads) < _THREADS and not self._stop.is_set():
            thread = threading.Thread(
                target=self._work, name=f"shards-{len(self._threads)}", daemon=True
            )
            self._threads.append(thread)
            thread.start()
        self._changed.notify_all()

    def _pause(self, seconds: float) -> None:
        if self._sleep is None:
            self._stop.wait(seconds)
        else:
            self._sleep(seconds)
        if self._stop.is_set():
            raise _Stopped

    def _take(self) -> Wanted | None:
        """The next shard that no other thread is at; None when stopped."""
        with self._changed:
            while True:
                self._changed.wait_for(
                    lambda: self._stop.is_set() or self._demanded or self._planned
                )
                if self._stop.is_set():
                    return None
                queue = self._demanded or self._planned
                name, entry = queue.popleft()
                if entry.name not in self._active:
                    self._active.add(entry.name)
                    return name, entry

    def _work(self) -> None:
        while (wanted := self._take()) is not None:
            name, entry = wanted
            outcome = None
            try:
                outcome = self._cache.fill(entry, self._streamer(name, entry), self._keep)
            except _Stopped:
                return
            except TransientError:
                self._counters.add("downloads_failed")
            except Exception as error:
                with self._changed:
                    self._fatal = self._fatal or error
            finally:
                with self._changed:
                    self._active.discard(entry.name)
                    if outcome is Filled.FULL:
                        self._planned.clear()  # the rest has no room either, until the next plan
                    self._changed.notify_all()

    def _streamer(self, name: str, entry: Entry) -> Callable[[int], Iterator[bytes]]:
        def stream(start: int) -> Iterator[bytes]:
            for chunk in self._fetcher.stream(name, start, entry.bytes, entry.version()):
                if self._stop.is_set():
                    raise _Stopped
                yield chunk

        return stream
