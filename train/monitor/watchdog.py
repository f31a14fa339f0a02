"""A rank that hangs says where: the stacks of all its threads go into its log, once a stall."""

from __future__ import annotations

import faulthandler
import logging
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Self

from train.runtime import report

__all__ = ["StallWatchdog"]

_LOG = logging.getLogger(__name__)


class StallWatchdog:
    """Watches that steps keep finishing; a thread of its own, so it sees what the main one waits for.

        with StallWatchdog(log, seconds) as watchdog:
            for ...:
                ...
                watchdog.beat()

    It only writes: the step may still end (a slow disk, a long validation), and where ranks wait for
    each other the collective's own timeout ends the run.

    Args:
        path: the rank's log, appended to.   seconds: without a `beat` that are a stall; 0 is off.
        clock: monotonic seconds.
    """

    def __init__(
        self, path: Path, seconds: float, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._path, self._seconds, self._clock = path, seconds, clock
        self._last, self._told = clock(), False
        self._closed = threading.Event()
        self._thread: threading.Thread | None = None

    def beat(self) -> None:
        """A step has finished."""
        if self._told:
            _LOG.warning("the stall is over after %.0f s", self._clock() - self._last)
        self._last, self._told = self._clock(), False

    def check(self) -> bool:
        """Dumps the stacks if this is a stall that has not been told yet; whether it did."""
        idle = self._clock() - self._last
        if self._told or idle < self._seconds:
            return False
        self._told = True
        _LOG.warning(
            "no step has finished for %.0f s (log.stall_minutes), this rank is at: %s; "
            "the stacks of all threads are in %s",
            idle,
            report.place(),
            self._path,
        )
        with self._path.open("a", encoding="utf-8") as file:
            faulthandler.dump_traceback(file, all_threads=True)
        return True

    def _watch(self) -> None:
        # Four looks a limit: a stall is told at most a quarter late.
        while not self._closed.wait(self._seconds / 4):
            try:
                self.check()
            except OSError as error:  # a full disk must not end the watch, nor the run
                _LOG.warning("the stall cannot be written down: %s", error)

    def __enter__(self) -> Self:
        self._last = self._clock()
        if self._seconds > 0:
            self._thread = threading.Thread(target=self._watch, name="stall", daemon=True)
            self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._closed.set()
        if self._thread is not None:
            self._thread.join()
