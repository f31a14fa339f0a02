"""Stopping politely: signals set a flag, the loop asks all ranks for it once a step and validation
once a batch; then all save and return 75.

DeepSpeed's launcher gives a rank about 30 s between SIGTERM and SIGKILL, and tells the ranks one
after the other; so no rank acts on its own flag, only on the flag of all. Data workers are forked
while the handlers stand and inherit them: a signal to a whole process group (Slurm, a terminal)
kills no worker under a rank that saves.

The command line takes signals before it reads a stage's run file. While a stage builds, the ranks
ask one another between the parts (`leave_if_stopped`). Before they know one another nobody can be
asked, and the main thread may wait in a library where no handler of Python runs: there a thread
ends the process (`alone`).
"""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

from train.runtime import report

__all__ = [
    "EXIT_STOPPED",
    "StopFlag",
    "Stopped",
    "alone",
    "leave_if_stopped",
    "poll",
    "stop_on_signals",
]

EXIT_STOPPED = 75  # EX_TEMPFAIL of sysexits.h: try again
SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
# One Ctrl-C may arrive twice: from the terminal, and passed on by a launcher or by `timeout`.
_SAME_PRESS_S = 2.0


class Stopped(Exception):
    """Validation, or building the run, was left because of a signal. Raised on all ranks alike."""


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
        # Not above: handlers stand before anything that takes time is imported.
        from train.runtime.distributed import all_reduce_flag

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


def leave_if_stopped(where: str) -> None:
    """Raises Stopped when a signal came to any rank; outside `stop_on_signals` it does nothing.
    Collective.
    """
    if poll():
        raise Stopped(f"told to stop ({_active[-1].name or 'signal on another rank'}) {where}")


@contextmanager
def stop_on_signals() -> Iterator[StopFlag]:
    """A flag that SIGTERM, SIGUSR1 and SIGINT set while the context lasts; afterwards the old
    handlers are back. Inside another such context: that one's flag.

    Outside the main thread Python allows no handlers: the flag then stays unset.
    """
    if _active:
        yield _active[-1]
        return
    flag = StopFlag()
    before: dict[int, Any] = {}
    if _in_main_thread():
        before = {number: signal.signal(number, flag) for number in SIGNALS}
    _active.append(flag)
    try:
        yield flag
    finally:
        _active.remove(flag)
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def alone(where: str) -> Iterator[None]:
    """While the context lasts, a signal that `stop_on_signals` handles ends this process at once
    with 75: nothing is there to be saved, and no other rank waits for an answer.

    Python writes the signal's number into a pipe even while the main thread is inside a library;
    a thread reads it.
    """
    if not (_active and _in_main_thread()):
        yield
        return
    if _active[-1]:  # it came before
        _leave(_active[-1].name, where)
    reading, writing = os.pipe()
    os.set_blocking(writing, False)

    def watch() -> None:
        while numbers := os.read(reading, 64):
            if came := [number for number in numbers if number in SIGNALS]:
                _leave(signal.Signals(came[0]).name, where)

    watcher = threading.Thread(target=watch, name="espalier-signals", daemon=True)
    before = signal.set_wakeup_fd(writing, warn_on_full_buffer=False)
    watcher.start()
    try:
        yield
    finally:
        signal.set_wakeup_fd(before)
        os.close(writing)
        watcher.join()
        os.close(reading)


def _in_main_thread() -> bool:
    return threading.current_thread() is threading.main_thread()


def _leave(name: str | None, where: str) -> None:
    print(f"espalier: {name} {where}: nothing to save yet", file=sys.stderr, flush=True)
    report.ended(EXIT_STOPPED)
    report.left(EXIT_STOPPED)
    os._exit(EXIT_STOPPED)
