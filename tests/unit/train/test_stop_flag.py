"""The stop flag: signals are remembered, one key press may arrive twice, a second press leaves."""

from __future__ import annotations

import os
import signal
import subprocess
import sys

import pytest

from tests.distributed.spawn import ROOT
from train.runtime.signals import StopFlag, Stopped, leave_if_stopped, stop_on_signals


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


def test_a_context_inside_another_has_its_flag():
    with stop_on_signals() as outer:
        with stop_on_signals() as inner:
            os.kill(os.getpid(), signal.SIGTERM)
        assert inner is outer and outer.name == "SIGTERM"
        handler = signal.getsignal(signal.SIGTERM)
        assert handler is outer  # the inner one has not taken it away


def test_building_is_left_once_a_signal_came():
    leave_if_stopped("outside any context")
    with stop_on_signals() as stop:
        leave_if_stopped("early")
        os.kill(os.getpid(), signal.SIGUSR1)
        with pytest.raises(Stopped, match=r"\(SIGUSR1\) while the engine was built"):
            leave_if_stopped("while the engine was built")
        assert stop.agreed


ALONE = """
import ctypes, signal, sys, threading
from train.runtime import signals
lock = threading.Lock()
lock.acquire()
with signals.stop_on_signals():
    with signals.alone("before"):
        pass  # leaves nothing behind
    if sys.argv[1] == "early":
        signal.raise_signal(signal.SIGTERM)
    with signals.alone("before all ranks had come"):
        print("waiting", flush=True)
        if sys.argv[1] == "library":
            while True:  # as a library does that waits for others: no handler of Python runs
                ctypes.CDLL(None).sleep(60)
        lock.acquire()
"""


@pytest.mark.parametrize("moment", ["early", "library", "python"])
def test_before_the_ranks_know_one_another_a_signal_ends_the_process(moment, tmp_path):
    process = subprocess.Popen(
        [sys.executable, "-c", ALONE, moment],
        cwd=ROOT,
        env=os.environ | {"ESPALIER_JOB": str(tmp_path), "RANK": "0", "LOCAL_RANK": "0"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    if moment != "early":
        assert process.stdout is not None and process.stdout.readline() == "waiting\n"
        process.send_signal(signal.SIGTERM)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 75, said
    assert said == "espalier: SIGTERM before all ranks had come: nothing to save yet\n"
    assert (tmp_path / "outcome_0000").read_text() == "75"
