"""Stopping politely: signals set a flag, the loop asks all ranks for it once a step, saves, and
returns 75.

DeepSpeed's launcher gives a rank about 30 s between SIGTERM and SIGKILL, and tells the ranks one
after the other; so no rank acts on its own flag, only on the flag of all.
"""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

__all__ = ["EXIT_STOPPED", "StopFlag", "stop_on_signals"]

EXIT_STOPPED = 75  # EX_TEMPFAIL of sysexits.h: try again
SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
# One Ctrl-C may arrive twice: from the terminal, and passed on by a launcher or by `timeout`.
_SAME_PRESS_S = 2.0


class StopFlag:
    """Set by a signal, read by the loop. `name` is the signal's, for the log."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self.name: str | None = None
        self._clock = clock
        self._interrupted: float | None = None

    def __bool__(self) -> bool:
        return self.name is not None

    def __call__(self, number: int, frame: FrameType | None) -> None:
        """The signal handler. Only remembers; a second Ctrl-C, later than the echo of the first,
        raises KeyboardInterrupt.
        """
        if number == signal.SIGINT:
            now = self._clock()
            if self._interrupted is None:
                self._interrupted = now
            elif now - self._interrupted > _SAME_PRESS_S:
                raise KeyboardInterrupt("second Ctrl-C: leaving without a checkpoint")
        self.name = signal.Signals(number).name


@contextmanager
def stop_on_signals() -> Iterator[StopFlag]:
    """A flag that SIGTERM, SIGUSR1 and SIGINT set while the context lasts; afterwards the old
    handlers are back.

    Outside the main thread Python allows no handlers: the flag then stays unset.
    """
    flag = StopFlag()
    if threading.current_thread() is not threading.main_thread():
        yield flag
        return
    before: dict[int, Any] = {number: signal.signal(number, flag) for number in SIGNALS}
    try:
        yield flag
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
