"""benchmarks/kernels.py: its time is the device's, and the host's is told apart."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from benchmarks import kernels

LAUNCH, KERNEL = 0.03, 0.1  # milliseconds


class FakeDevice:
    """A queue in front of one device, on a clock that the calls move."""

    def __init__(self) -> None:
        self.host = self.free = 0.0

    def enqueue(self, spent: float) -> float:
        """When what is enqueued now will be done."""
        self.free = max(self.free, self.host) + spent
        return self.free

    def call(self) -> None:
        self.host += LAUNCH
        self.enqueue(KERNEL)

    def event(self, enable_timing: bool) -> Any:
        device = self

        class Event:
            def record(self) -> None:
                self.at = device.enqueue(0.0)

            def synchronize(self) -> None:
                device.host = max(device.host, self.at)

            def elapsed_time(self, end: Any) -> float:
                return end.at - self.at

        return Event()


def test_launching_is_not_in_the_time_of_a_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    device = FakeDevice()
    monkeypatch.setattr(torch.cuda, "Event", device.event)
    monkeypatch.setattr(torch.cuda, "_sleep", lambda cycles: device.enqueue(cycles / 2e6))
    monkeypatch.setattr(kernels.time, "perf_counter", lambda: device.host / 1e3)
    spent = kernels.milliseconds(kernels.forever([device.call]), "cuda", 9)
    assert spent == pytest.approx((KERNEL, LAUNCH))
