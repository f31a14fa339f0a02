"""Runs a launcher in a session of its own, hands signals to the ranks, and judges by what they
report.

Why not simply call it: DeepSpeed 0.19's launcher dies at once of SIGTERM and leaves the ranks
running; its inner half passes the signal on to one rank after the other and kills each after 30 s;
mpirun kills the ranks a second after SIGTERM. Ranks save together, so all of them get the signal at
the same moment.
"""

from __future__ import annotations

import os
import shlex
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Literal

from launchers import job
from launchers.processes import end_session, leash, ranks_of, send, session_members

__all__ = ["Plan", "describe", "supervise"]

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1)


@dataclass(frozen=True)
class Plan:
    """A command and the environment variables it needs on top of ours.

    Attributes:
        stop: how a signal reaches the ranks: "ranks" sends it to those on this machine; "leader"
            sends SIGUSR1 to the command, which hands it on (mpirun, srun).
        stop_command: runs for a signal as well, for ranks on other machines.
        ranks_report: False for a program that knows nothing of job folders.
    """

    argv: list[str]
    environment: dict[str, str] = field(default_factory=dict)
    stop: Literal["ranks", "leader"] = "ranks"
    stop_command: list[str] | None = None
    ranks_report: bool = True


def describe(plan: Plan) -> str:
    """The plan as a line for a shell."""
    changes = [
        f"{key}={value}" for key, value in plan.environment.items() if os.environ.get(key) != value
    ]
    return shlex.join(changes + plan.argv)


def supervise(
    make: Callable[[Path], Plan],
    restarts: int = 0,
    jobs: Path | None = None,
    told: list[int] | None = None,
) -> int:
    """Runs a plan to its end and returns the job's exit code; starts again after a crash,
    `restarts` times.

    A wrong command (exit 2), a stop (75) and anything after a signal to us are not crashes.

    Args:
        make: the plan for a job folder; called again for each start, so that ports are fresh and
            lost machines left out.
        jobs: where job folders go; None: on this machine.
        told: gets the signals that reached us, if anybody wants to know.
    """
    while True:
        with job.job_folder(jobs) as folder:
            plan = make(folder)
            _say(describe(plan))
            code, signalled = _run_once(plan, folder)
            verdict = job.judge(folder, code, plan.ranks_report)
            begun = not plan.ranks_report or any(folder.glob("rank_*"))
            if signalled and not begun and verdict.code not in (0, job.EXIT_USAGE):
                note = "stopped before a rank had begun: nothing to save yet"
                verdict = job.Verdict(job.EXIT_STOPPED, [note])
        for line in verdict.lines:
            _say(line)
        if told is not None:
            told.extend(signalled)
        crashed = verdict.code not in (0, job.EXIT_USAGE, job.EXIT_STOPPED) and not signalled
        if not crashed or restarts <= 0:
            return verdict.code
        restarts -= 1
        _say(f"exit code {verdict.code}; starting again ({restarts} restarts left)")


def _say(text: str) -> None:
    print(f"espalier launch: {text}", file=sys.stderr, flush=True)


def _run_once(plan: Plan, folder: Path) -> tuple[int, list[int]]:
    """The command's exit code (negative: a signal), and the signals that told us to stop."""
    received: list[int] = []
    dying = signal.SIGUSR1 if plan.stop == "leader" else signal.SIGTERM
    environment = os.environ | job.variables(folder, plan.stop == "ranks") | plan.environment
    with ExitStack() as stack:
        # Handlers first: a signal may come as soon as the command runs.
        started = stack.enter_context(_forwarding(plan, folder, received))
        process = subprocess.Popen(
            plan.argv,
            env=environment,
            start_new_session=True,
            preexec_fn=lambda: _in_child(dying),
        )
        stack.callback(end_session, process.pid)  # signals are still forwarded meanwhile
        started(process.pid)
        code = process.wait()
    return code, received


def _in_child(dying: int) -> None:
    leash(dying)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)  # whoever started us may have blocked them


@contextmanager
def _forwarding(plan: Plan, folder: Path, received: list[int]) -> Iterator[Callable[[int], None]]:
    """First signal: every rank gets it (they save and stop). Second: the whole session is told to
    end. Third: killed.

    Yields what is to be told the leader's process; signals that came before are handed on then.
    """
    leader = 0
    early: list[int] = []

    def started(process: int) -> None:
        nonlocal leader
        leader = process
        while early:
            forward(early.pop(0), None)

    def forward(number: int, frame: FrameType | None) -> None:
        if not leader:
            early.append(number)
            return
        received.append(number)
        if len(received) > 1:
            hard = signal.SIGTERM if len(received) == 2 else signal.SIGKILL
            send(session_members(leader), hard)
            return
        _say(f"{signal.Signals(number).name}: telling the ranks to save and stop")
        polite = signal.SIGTERM if number == signal.SIGHUP else number
        if plan.stop_command is not None:
            # Not waited for: the ranks' leaving ends the command we wait for.
            subprocess.Popen(plan.stop_command, stdin=subprocess.DEVNULL, start_new_session=True)
            return
        if plan.stop == "leader":
            send([leader], signal.SIGUSR1)
        else:
            # Before there are ranks nothing can be saved: the launcher itself is told.
            send(ranks_of(folder) or session_members(leader), polite)

    before = {number: signal.signal(number, forward) for number in SIGNALS}
    try:
        yield started
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
