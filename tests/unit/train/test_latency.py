"""Turns, quartiles and shapes of the latency measurement; no assertion on real time."""

from __future__ import annotations

import pytest
import torch

from train.evaluation import latency


def test_calls_take_turns_and_each_round_starts_with_another() -> None:
    order: list[str] = []
    calls = [(name, lambda name=name: order.append(name)) for name in "abc"]
    ticks = iter(range(1000))
    seconds = latency.interleave(calls, 4, warm_up=1, clock=lambda: float(next(ticks)))
    assert "".join(order) == "abc" + "abc" + "bca" + "cab" + "abc"
    assert seconds == {name: [1.0] * 4 for name in "abc"}


def test_the_device_is_waited_for_before_and_after_each_call() -> None:
    order: list[str] = []
    latency.interleave(
        [("a", lambda: order.append("call"))],
        1,
        0,
        synchronise=lambda: order.append("wait"),
        clock=lambda: float(order.append("clock") or 0),
    )
    assert order == ["wait", "clock", "call", "wait", "clock"]


def test_summary_is_median_and_quartiles_in_milliseconds() -> None:
    found = latency.summarise([0.004, 0.001, 0.002, 0.003, 0.005])
    assert found == pytest.approx({"median": 3.0, "q1": 2.0, "q3": 4.0, "repeats": 5.0})
    with pytest.raises(ValueError, match="two repeats"):
        latency.summarise([1.0])


def test_ratios_are_taken_round_by_round() -> None:
    """A machine that is ten times as slow in one round changes no ratio."""
    found = latency.ratios([2.0, 30.0, 4.0, 2.0], [1.0, 10.0, 1.0, 1.0])
    assert found == {"median": 2.5, "q1": 2.0, "q3": 3.25}
    with pytest.raises(ValueError, match="two at least"):
        latency.ratios([1.0], [1.0])


def test_threads_come_back() -> None:
    before = torch.get_num_threads()
    with latency.threads_of(before + 1):
        assert torch.get_num_threads() == before + 1
    assert torch.get_num_threads() == before
