"""How fast a run goes: samples a second, time spent waiting for data, time left."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager

__all__ = ["Throughput", "duration"]


def duration(seconds: float) -> str:
    """Seconds as h:mm:ss, with days in front when there are any."""
    whole = max(0, round(seconds))
    days, rest = divmod(whole, 86400)
    clock = f"{rest // 3600}:{rest // 60 % 60:02d}:{rest % 60:02d}"
    return f"{days}d {clock}" if days else clock


class Throughput:
    """Rates over a sliding window of steps, so that they follow the run and not its start-up.

    Args:
        total_steps: steps of the whole run.
        window: steps the rates are taken over.
        clock: seconds; monotonic.
    """

    def __init__(
        self, total_steps: int, window: int = 50, clock: Callable[[], float] = time.perf_counter
    ) -> None:
        self.total_steps = total_steps
        self._clock = clock
        self._points: deque[tuple[float, int, int, float]] = deque(maxlen=window + 1)
        self._waited = 0.0

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """Counts the time inside as waiting: `with throughput.waiting(): batch = next(it)`."""
        begin = self._clock()
        try:
            yield
        finally:
            self._waited += self._clock() - begin

    def update(self, step: int, samples: int) -> dict[str, float]:
        """Notes that `step` steps and `samples` samples are done; returns what can be logged.

        Returns:
            samples_per_s, seconds_per_step, data_wait (seconds a step) and eta
            (seconds); empty on the first call, which has nothing to measure against.
        """
        now = self._clock()
        if self._points and step == self._points[-1][1]:
            return {}
        self._points.append((now, step, samples, self._waited))
        began, first_step, first_samples, first_waited = self._points[0]
        seconds, steps = now - began, step - first_step
        if seconds <= 0 or steps <= 0:
            return {}
        pace = seconds / steps
        return {
            "samples_per_s": (samples - first_samples) / seconds,
            "seconds_per_step": pace,
            "data_wait": (self._waited - first_waited) / steps,
            "eta": max(0, self.total_steps - step) * pace,
        }
