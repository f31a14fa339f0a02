"""Signals sent to a real process: a checkpoint, exit code 75, and a run that goes on."""

from __future__ import annotations

import json
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

# The second batch of the first validation brings the signal; the second run makes up for it.
IN_VALIDATION = """
import itertools, json, signal, sys
from pathlib import Path
from tests.distributed.stand_in import TinyLoader, tiny_config, tiny_run
from train.evaluation.runner import evaluate
from train.runtime import distributed, loop
folder, told = Path(sys.argv[1]), []
place = distributed.start()
def go():
    run = tiny_run(tiny_config(folder, optim={"steps": 6}, eval={"every": 3}), place)
    batches = []
    def held_out():
        for batch in itertools.islice(TinyLoader(0, "held out"), 5):
            batches.append(batch)
            if not told and len(batches) == 2:
                told.append(signal.SIGUSR1)
                signal.raise_signal(signal.SIGUSR1)
            yield batch
    steps = []
    run.validate = lambda step: steps.append(step) or evaluate(run.student, run.task, held_out(), place)
    code = loop.train(run)
    validated = [record["step"] for record in run.monitor.records if "validation" in record]
    return {"code": code, "begun": steps, "validated": validated, "batches": len(batches)}
print("RESULT", json.dumps([go(), go()]))
distributed.finish()
"""

# The command line stops in front of the first import of the module named first.
EARLY = """
import sys
wanted, out = sys.argv[1:]
class Wait:
    def find_spec(self, name, path=None, target=None):
        if name == wanted:
            print("ready", flush=True)
            sys.stdin.readline()  # until the signal has been sent
sys.meta_path.insert(0, Wait())
from train.main import main
sys.exit(main(["pretrain", "blocksworld-pretrain-teacher", f"out={out}", "data.train=/nowhere"]))
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


@pytest.mark.slow
def test_a_stop_in_validation_saves_and_the_next_run_validates(tmp_path: Path) -> None:
    environment = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE")}
    done = subprocess.run(
        [sys.executable, "-c", IN_VALIDATION, str(tmp_path)],
        cwd=ROOT,
        env=environment | {"PYTHONPATH": str(ROOT), "DS_ACCELERATOR": "cpu"},
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    [line] = [line for line in done.stdout.splitlines() if line.startswith("RESULT")]
    first, second = json.loads(line.removeprefix("RESULT"))
    assert first == {"code": 75, "begun": [3], "validated": [], "batches": 2}
    assert second == {"code": 0, "begun": [3, 6], "validated": [3, 6], "batches": 10}
    assert "resumed at step 3" in (tmp_path / "events.log").read_text()


@pytest.mark.parametrize("module", ["yaml", "torch", "deepspeed"])
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_a_signal_while_libraries_load_is_no_failure(
    tmp_path: Path, module: str, number: int
) -> None:
    environment = {
        k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")
    }
    with subprocess.Popen(
        [sys.executable, "-c", EARLY, module, str(tmp_path / "run")],
        cwd=ROOT,
        env=environment | {"PYTHONPATH": str(ROOT), "DS_ACCELERATOR": "cpu"},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        process.send_signal(number)
        _, errors = process.communicate("go\n", timeout=120)
    assert process.returncode == 75, errors
    assert f"{signal.Signals(number).name} " in errors and "nothing to save yet" in errors
    assert not (tmp_path / "run").exists()


def test_old_handlers_come_back() -> None:
    before = [signal.getsignal(s) for s in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)]
    with stop_on_signals() as flag:
        signal.raise_signal(signal.SIGUSR1)
        assert flag.name == "SIGUSR1"
    assert [signal.getsignal(s) for s in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)] == before
