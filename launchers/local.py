"""One machine: the DeepSpeed launcher in a process group of its own, watched until its last rank is
gone.

Why not simply call it: DeepSpeed 0.19's launcher dies at once of SIGTERM and leaves the ranks
running, and its inner half passes the signal on to one rank after the other and kills each after 30
s. Ranks save together, so here all of them get the signal at the same moment, and the launcher
learns the outcome from their exit codes.
"""

from __future__ import annotations

import argparse
import glob
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType

__all__ = ["Plan", "plan", "supervise"]

PROJECT = Path(__file__).resolve().parents[1]
MODULE = "train.main"
DEFAULT_HOSTFILE = "/job/hostfile"  # DeepSpeed reads it unasked
EXIT_USAGE = 2
EXIT_STOPPED = 75
SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
LINGER_SECONDS = 30.0


@dataclass(frozen=True)
class Plan:
    """A command and the environment variables it needs on top of ours."""

    argv: list[str]
    environment: dict[str, str] = field(default_factory=dict)


def has_gpu() -> bool:
    """Whether the NVIDIA driver shows a device here (torch is not imported in the launcher)."""
    return bool(glob.glob("/dev/nvidia[0-9]*")) or os.path.exists("/dev/dxg")


def base_environment() -> dict[str, str]:
    """What every rank needs, whoever starts it."""
    path = os.environ.get("PYTHONPATH", "")
    if str(PROJECT) not in path.split(os.pathsep):
        path = os.pathsep.join(filter(None, [str(PROJECT), path]))
    environment = {"PYTHONPATH": path}
    if not has_gpu() or os.environ.get("CUDA_VISIBLE_DEVICES") == "":
        # torch with CUDA on a machine without a GPU: DeepSpeed's launcher would find no device and
        # refuse.
        environment["DS_ACCELERATOR"] = os.environ.get("DS_ACCELERATOR", "cpu")
    return environment


def deepspeed_command() -> list[str]:
    """The launcher that belongs to this interpreter.

    Raises:
        FileNotFoundError: DeepSpeed is not installed for it.
    """
    beside = Path(sys.executable).with_name("deepspeed")
    if beside.is_file():
        return [str(beside)]
    found = shutil.which("deepspeed")
    if found is None:
        raise FileNotFoundError(
            f"no `deepspeed` beside {sys.executable} nor on PATH: install espalier into this "
            "environment (pip install -e .)"
        )
    return [found]


def plan(options: argparse.Namespace, job: list[str]) -> Plan:
    """The DeepSpeed command for one machine."""
    processes = options.processes or 1
    environment = base_environment() | {"ESPALIER_DIE_WITH_PARENT": "1"}
    argv = deepspeed_command()
    visible = [part for part in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if part]
    if visible and "DS_ACCELERATOR" not in environment and all(part.isdigit() for part in visible):
        if processes > len(visible):
            raise ValueError(
                f"-n {processes}, but CUDA_VISIBLE_DEVICES shows {len(visible)} GPU: start fewer "
                "processes or show more"
            )
        # --num_accelerators would count from GPU 0 and ignore the choice.
        argv += ["--include", f"localhost:{','.join(visible[:processes])}"]
    else:
        argv += ["--num_accelerators", str(processes)]
    if (
        environment.get("DS_ACCELERATOR") == "cpu"
        and processes > 1
        and "OMP_NUM_THREADS" not in os.environ
    ):
        # Otherwise every rank starts as many threads as there are cores, and they fight.
        environment["OMP_NUM_THREADS"] = str(max(1, len(os.sched_getaffinity(0)) // processes))
    if os.path.isfile(DEFAULT_HOSTFILE):
        argv += ["--hostfile", os.devnull]
    port = options.port if options.port else _free_port()
    argv += ["--master_port", str(port), "--module", MODULE, *job]
    return Plan(argv, environment)


def _free_port() -> int:
    import socket

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def supervise(plan: Plan, restarts: int = 0) -> int:
    """Runs the plan to its end and returns its exit code; starts it again after a crash, `restarts`
    times.

    A wrong command (exit 2), a stop (75) and anything after a signal to us are not crashes.
    """
    while True:
        code, signalled = _run_once(plan)
        if code in (0, EXIT_USAGE, EXIT_STOPPED) or signalled or restarts <= 0:
            return code
        restarts -= 1
        print(
            f"espalier launch: exit code {code}; starting again ({restarts} restarts left)",
            file=sys.stderr,
        )


def _run_once(plan: Plan) -> tuple[int, bool]:
    received: list[int] = []
    process = subprocess.Popen(plan.argv, env=os.environ | plan.environment, start_new_session=True)
    with _forwarding(process.pid, received):
        try:
            code = process.wait()
        finally:
            _end_group(process.pid)
    if code < 0:
        code = 128 - code
    return code, bool(received)


@contextmanager
def _forwarding(group: int, received: list[int]) -> Iterator[None]:
    """First signal: every rank gets it (they save and stop). Second: the whole group is told to
    end. Third: killed.
    """

    def forward(number: int, frame: FrameType | None) -> None:
        received.append(number)
        if len(received) == 1:
            polite = signal.SIGTERM if number == signal.SIGHUP else number
            for target in rank_processes(group) or [-group]:
                _send(target, polite)
        else:
            _send(-group, signal.SIGTERM if len(received) == 2 else signal.SIGKILL)

    before = {number: signal.signal(number, forward) for number in SIGNALS}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _send(target: int, number: int) -> None:
    try:
        if target < 0:
            os.killpg(-target, number)
        else:
            os.kill(target, number)
    except ProcessLookupError:
        pass


def _members(group: int) -> dict[int, tuple[int, bool]]:
    """Living processes of the group: pid -> (parent, whether its environment says it is a rank)."""
    members = {}
    for entry in os.scandir("/proc"):
        if not entry.name.isdigit():
            continue
        try:
            fields = Path(entry.path, "stat").read_text().rpartition(")")[2].split()
            if int(fields[2]) != group or fields[0] == "Z":
                continue
            variables = Path(entry.path, "environ").read_bytes().split(b"\0")
        except (OSError, ValueError, IndexError):
            continue  # it ended while we looked, or it is not ours
        members[int(entry.name)] = (int(fields[1]), any(v.startswith(b"RANK=") for v in variables))
    return members


def rank_processes(group: int) -> list[int]:
    """Ranks of the group: processes with RANK in their environment whose parent has none.

    Their own children (data workers) inherit the variable; a signal would kill them under a rank
    that still saves.
    """
    members = _members(group)
    return [
        pid
        for pid, (parent, rank) in members.items()
        if rank and not members.get(parent, (0, False))[1]
    ]


def _end_group(group: int) -> None:
    """No orphans: what is left of the group when its leader is gone gets SIGTERM, and later
    SIGKILL.
    """
    if not _members(group):
        return
    _send(-group, signal.SIGTERM)
    deadline = time.monotonic() + LINGER_SECONDS
    while _members(group) and time.monotonic() < deadline:
        time.sleep(0.1)
    if _members(group):
        _send(-group, signal.SIGKILL)
