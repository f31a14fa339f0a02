"""The stop flag: signals are remembered, one key press may arrive twice, a second press leaves."""

from __future__ import annotations

import os
import signal

import pytest

from train.runtime.signals import StopFlag, stop_on_signals


def test_any_of_the_signals_sets_the_flag_and_handlers_come_back():
    before = signal.getsignal(signal.SIGUSR1)
    with stop_on_signals() as stop:
        assert not stop
        os.kill(os.getpid(), signal.SIGUSR1)
        assert stop and stop.name == "SIGUSR1"
    assert signal.getsignal(signal.SIGUSR1) is before


def test_an_echo_of_the_same_press_does_not_leave():
    now = [0.0]
    stop = StopFlag(clock=lambda: now[0])
    for now[0] in (0.0, 0.3, 1.9):
        stop(signal.SIGINT, None)
    assert stop.name == "SIGINT"


@pytest.mark.parametrize("between", [(), (signal.SIGTERM,)])
def test_a_second_press_leaves(between):
    now = [0.0]
    stop = StopFlag(clock=lambda: now[0])
    for number in (signal.SIGINT, *between):
        stop(number, None)
    now[0] = 5.0
    with pytest.raises(KeyboardInterrupt, match="second Ctrl-C"):
        stop(signal.SIGINT, None)
