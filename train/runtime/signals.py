"""Stopping politely: signals set a flag, the loop asks all ranks for it once a step and validation
once a batch; then all save and return 75.

DeepSpeed's launcher gives a rank about 30 s between SIGTERM and SIGKILL, and tells the ranks one
after the other; so no rank acts on its own flag, only on the flag of all. Data workers are forked
while the handlers stand and inherit them: a signal to a whole process group (Slurm, a terminal)
kills no worker under a rank that saves.
"""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

from train.runtime.distributed import all_reduce_flag

__all__ = ["EXIT_STOPPED", "StopFlag", "Stopped", "poll", "stop_on_signals"]

EXIT_STOPPED = 75  # EX_TEMPFAIL of sysexits.h: try again
SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
# One Ctrl-C may arrive twice: from the terminal, and passed on by a launcher or by `timeout`.
_SAME_PRESS_S = 2.0


class Stopped(Exception):
    """Validation was left because the run was told to stop. Raised on all ranks alike."""


class StopFlag:
    """Set by a signal, read by the loop. `name` is the signal's, for the log; `agreed` when all
    ranks know of it.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self.name: str | None = None
        self.agreed = False
        self._clock = clock
        self._interrupted: float | None = None

    def __bool__(self) -> bool:
        return self.name is not None

    def everywhere(self) -> bool:
        """True on all ranks when a signal came to any of them. Collective."""
        if not self.agreed:
            self.agreed = all_reduce_flag(bool(self))
        return self.agreed

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


_active: list[StopFlag] = []


def poll() -> bool:
    """`everywhere()` of the flag that stands; False outside `stop_on_signals`. Collective."""
    return bool(_active) and _active[-1].everywhere()


@contextmanager
def stop_on_signals() -> Iterator[StopFlag]:
    """A flag that SIGTERM, SIGUSR1 and SIGINT set while the context lasts; afterwards the old
    handlers are back.

    Outside the main thread Python allows no handlers: the flag then stays unset.
    """
    flag = StopFlag()
    here = threading.current_thread() is threading.main_thread()
    before: dict[int, Any] = {}
    if here:
        before = {number: signal.signal(number, flag) for number in SIGNALS}
    _active.append(flag)
    try:
        yield flag
    finally:
        _active.remove(flag)
        for number, handler in before.items():
            signal.signal(number, handler)
