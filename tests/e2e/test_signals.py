"""Signals sent to a real process: a checkpoint, exit code 75, and a run that goes on."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from train.runtime.signals import stop_on_signals

ROOT = Path(__file__).resolve().parents[2]
PROGRAM = """
import os, sys
from pathlib import Path
from tests.distributed.stand_in import tiny_config, tiny_run
from train.runtime import distributed, loop
folder, steps, announce = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
run = tiny_run(tiny_config(folder, optim={"steps": steps, "schedule": "constant"}), distributed.start())
def after(position):
    if position == announce:
        print("ready", flush=True)
        sys.stdin.readline()  # until the signal has been sent
run.loader.after = after
code = loop.train(run)
distributed.finish()
sys.exit(code)
"""


def _start(folder: Path, steps: int, announce: int) -> subprocess.Popen[str]:
    environment = {
        k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")
    }
    return subprocess.Popen(
        [sys.executable, "-c", PROGRAM, str(folder), str(steps), str(announce)],
        cwd=ROOT,
        env=environment | {"PYTHONPATH": str(ROOT), "DS_ACCELERATOR": "cpu"},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1])
def test_a_signal_saves_and_exits_75(tmp_path: Path, number: int) -> None:
    with _start(tmp_path, 1000, 7) as process:
        assert process.stdout is not None
        assert any("ready" in line for line in process.stdout)
        process.send_signal(number)
        _, errors = process.communicate("go\n", timeout=120)
    assert process.returncode == 75, errors
    assert (tmp_path / "checkpoints/latest").read_text().strip() == "step_00000007"
    if number == signal.SIGTERM:
        with _start(tmp_path, 9, -1) as again:
            _, errors = again.communicate("", timeout=120)
        assert again.returncode == 0, errors
        assert "resumed at step 7" in (tmp_path / "events.log").read_text()


def test_old_handlers_come_back() -> None:
    before = [signal.getsignal(s) for s in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)]
    with stop_on_signals() as flag:
        signal.raise_signal(signal.SIGUSR1)
        assert flag.name == "SIGUSR1"
    assert [signal.getsignal(s) for s in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)] == before
