"""Signals and exit codes: real processes in the roles of launcher, rank and data worker."""

import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from launchers.supervise import Plan, supervise
from tests.distributed.spawn import ROOT

# A launcher that ignores signals, like the inner half of DeepSpeed's, and reports its ranks' exit
# code.
LAUNCHER = """
import os, signal, subprocess, sys
signal.signal(signal.SIGTERM, signal.SIG_IGN)
ranks = [subprocess.Popen([sys.executable, sys.argv[1], *sys.argv[2:]], env=os.environ | {"RANK": str(r)})
         for r in range(2)]
sys.exit(max(rank.wait() for rank in ranks))
"""
# A rank with a child of its own: on SIGTERM it "saves" and leaves with 75. The child must not be
# signalled.
RANK = """
import os, signal, subprocess, sys
STOPS = {signal.SIGTERM, signal.SIGUSR1}
signal.signal(signal.SIGTERM, signal.SIG_DFL)  # the launcher ignores it, and that is inherited
worker = subprocess.Popen([sys.executable, "-c", "import sys; sys.stdin.read()"], stdin=subprocess.PIPE)
signal.pthread_sigmask(signal.SIG_BLOCK, STOPS)
with open(os.path.join(sys.argv[1], "ready"), "w") as pipe:
    pipe.write("x")
signal.sigwait(STOPS)
worker.communicate()
assert worker.returncode == 0, f"the worker ended with {worker.returncode}"
sys.exit(75)
"""


def plan(*words: str, **variables: str) -> Callable[[Path], Plan]:
    """A program that knows nothing of job folders."""
    return lambda folder: Plan([sys.executable, *words], variables, ranks_report=False)


def test_exit_codes_pass_through() -> None:
    for code in (0, 1, 2, 75):
        assert supervise(plan("-c", f"raise SystemExit({code})")) == code


def test_killed_is_128_plus_signal() -> None:
    assert supervise(plan("-c", "import os; os.kill(os.getpid(), 9)")) == 137


@pytest.mark.parametrize(("code", "starts"), [(1, 3), (75, 1), (2, 1), (0, 1)])
def test_only_crashes_are_restarted(tmp_path: Path, code: int, starts: int) -> None:
    log = tmp_path / "log"
    program = f"open({str(log)!r}, 'a').write('x'); raise SystemExit({code})"
    assert supervise(plan("-c", program), restarts=2) == code
    assert log.read_text() == "x" * starts


def test_environment_reaches_the_process() -> None:
    program = "import os; raise SystemExit(int(os.environ['ANSWER']))"
    assert supervise(plan("-c", program, ANSWER="42")) == 42


def test_own_process_group() -> None:
    assert supervise(plan("-c", "import os; raise SystemExit(os.getpgrp() != os.getpid())")) == 0


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1])
def test_signal_reaches_every_rank_and_75_comes_back(tmp_path: Path, number: int) -> None:
    launcher, rank, ready = tmp_path / "launcher.py", tmp_path / "rank.py", tmp_path / "ready"
    launcher.write_text(LAUNCHER)
    rank.write_text(RANK)
    os.mkfifo(ready)
    program = (
        "import sys; from launchers.supervise import Plan, supervise;"
        "plan = Plan([sys.executable, *sys.argv[1:]], ranks_report=False);"
        "sys.exit(supervise(lambda folder: plan))"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", program, str(launcher), str(rank), str(tmp_path)], cwd=ROOT
    )
    seen = ""
    while len(seen) < 2:  # both ranks have their handler
        seen += ready.read_text()
    process.send_signal(number)
    assert process.wait(timeout=60) == 75


def test_no_orphans(tmp_path: Path) -> None:
    pid_file = tmp_path / "pid"
    child = "import signal; signal.pause()"
    program = (
        "import subprocess, sys;"
        f"p = subprocess.Popen([sys.executable, '-c', {child!r}]);"
        f"open({str(pid_file)!r}, 'w').write(str(p.pid))"
    )
    assert supervise(plan("-c", program)) == 0
    stat = Path("/proc", pid_file.read_text(), "stat")
    assert not stat.exists() or stat.read_text().rpartition(")")[2].split()[0] == "Z"


@pytest.mark.parametrize(("begun", "code"), [(False, 75), (True, 143)])
def test_a_stop_before_any_rank_is_no_failure(tmp_path: Path, begun: bool, code: int) -> None:
    """The command sends us SIGTERM, as a scheduler would, before (or after) a rank has said where
    it is, and dies of ours.
    """
    place = "open(os.path.join(os.environ['ESPALIER_JOB'], 'rank_0000'), 'w').write('{}')"
    program = f"import os, signal, time; {place if begun else ''}\nos.kill(os.getppid(), 15)\n"
    program += "while True: signal.pause()"
    assert supervise(lambda folder: Plan([sys.executable, "-c", program])) == code
