"""The real DeepSpeed launcher under `espalier launch`'s supervision: a signal stops both ranks, 75
comes back; a killed launcher leaves nothing running; a hung collective names where the ranks were.
"""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.distributed.spawn import ROOT, run_ranks
from train.runtime import distributed, report

# On SIGTERM a rank tells that it "saved" and leaves as a stage does.
RANK = """
import os, signal, sys
# Before there is a second thread: one that does not block it would die of what comes before the wait.
signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
from train.runtime import distributed, report
distributed._stop_with_launcher()
with open(os.path.join(sys.argv[-1], "ready"), "w") as pipe:
    pipe.write("x")
while True:  # the watching thread sends it to the process
    if signal.sigtimedwait({signal.SIGTERM}, 60) is not None:
        break
open(os.path.join(sys.argv[-1], "saved" + os.environ["RANK"]), "w").close()
with open(os.path.join(sys.argv[-1], "saved"), "w") as pipe:
    pipe.write("x")
report.ended(75)
sys.exit(75)
"""
SUPERVISOR = """
import sys
from launchers.local import base_environment, deepspeed_command
from launchers.supervise import Plan, supervise
argv = [*deepspeed_command(), "--num_accelerators", "2", "--hostfile", "/dev/null", "--master_port", "29999"]
plan = Plan([*argv, *sys.argv[1:]], base_environment(), ranks_report=False)
sys.exit(supervise(lambda folder: plan))
"""


def start(folder: Path) -> subprocess.Popen[bytes]:
    """The supervised job, both ranks waiting for a signal."""
    (folder / "rank.py").write_text(RANK)
    for name in ("ready", "saved"):
        os.mkfifo(folder / name)
    process = subprocess.Popen(
        [sys.executable, "-c", SUPERVISOR, str(folder / "rank.py"), str(folder)],
        cwd=ROOT,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    wait_for_both(folder / "ready")
    return process


def wait_for_both(pipe: Path) -> None:
    """Both ranks wrote. Opened for writing too: reading ends when the last writer leaves, and a rank
    that comes between two readings would find nobody.
    """
    descriptor, seen = os.open(pipe, os.O_RDWR), b""
    try:
        while len(seen) < 2:
            seen += os.read(descriptor, 2)
    finally:
        os.close(descriptor)


@pytest.mark.world_size(2)
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_stop_saves_on_every_rank(tmp_path: Path, number: int) -> None:
    process = start(tmp_path)
    process.send_signal(number)
    wait_for_both(tmp_path / "saved")
    # DeepSpeed itself returns 1 after such a stop: the ranks' report counts.
    assert process.wait(timeout=100) == (75 if number == signal.SIGTERM else -signal.SIGKILL)
    assert (tmp_path / "saved0").exists()
    assert (tmp_path / "saved1").exists()


def hang(folder: str) -> str:
    """Rank 1 stays in a validation while rank 0 waits for it in a step."""
    try:
        return _hang(folder)
    finally:
        distributed.finish(failed=True)  # after a timeout gloo's connections are closed


def _hang(folder: str) -> str:
    rank = int(os.environ["RANK"])
    os.environ[report.FOLDER] = folder
    distributed.start(timeout_minutes=0.1)
    gate = os.path.join(folder, "gate")
    if rank == 1:
        report.at("the validation of step 100")
        with open(os.path.join(folder, "there"), "w") as pipe:
            pipe.write("x")
        with open(gate) as pipe:
            pipe.read()
        return "let go"
    report.at("general step 100")
    Path(folder, "there").read_text()
    try:
        distributed.all_reduce_flag(True)
    except RuntimeError as error:
        report.failed(error)
        Path(gate).write_text("x")
        return "\n".join(error.__notes__)
    return "no timeout"


@pytest.mark.world_size(2)
def test_a_hung_collective_says_where_the_ranks_were(tmp_path: Path) -> None:
    for name in ("gate", "there"):
        os.mkfifo(tmp_path / name)
    told, _ = run_ranks(hang, 2, str(tmp_path), init=False)
    assert "rank 0" in told and "at: general step 100" in told
    assert "rank 1" in told and "at: the validation of step 100" in told
    assert "engine.collective_timeout" in told
