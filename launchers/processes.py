"""Processes of a job on this machine, found in /proc: the ranks, and whatever the launcher started."""

from __future__ import annotations

import ctypes
import os
import signal
import sys
import time
from pathlib import Path
from typing import NamedTuple

__all__ = ["end_session", "leash", "ranks_of", "send", "start_time"]

JOB = "ESPALIER_JOB"
# What launch.py, mpirun and srun put into a rank's environment; srun last, since a batch shell of
# Slurm has its variable too and everything below it inherits that.
_RANK_VARIABLES = (b"RANK=", b"OMPI_COMM_WORLD_RANK=", b"PMI_RANK=", b"SLURM_PROCID=")
LINGER_SECONDS = 30.0
_PR_SET_PDEATHSIG = 1  # <linux/prctl.h>


class _Entry(NamedTuple):
    parent: int
    session: int
    variables: list[bytes]


def _table() -> dict[int, _Entry]:
    """Living processes whose environment we may read."""
    table = {}
    for entry in os.scandir("/proc"):
        if not entry.name.isdigit():
            continue
        try:
            fields = Path(entry.path, "stat").read_text().rpartition(")")[2].split()
            if fields[0] == "Z":
                continue
            variables = Path(entry.path, "environ").read_bytes().split(b"\0")
            table[int(entry.name)] = _Entry(int(fields[1]), int(fields[3]), variables)
        except (OSError, ValueError, IndexError):
            continue  # it ended while we looked, or it is not ours
    return table


def ranks_of(job: str | Path) -> list[int]:
    """Ranks of the job on this machine: processes with its folder and a rank in their environment,
    whose parent is no rank of it.

    A rank's own children (data workers) inherit the variables; a signal would kill them under a
    rank that still saves.
    """
    mark = f"{JOB}={job}".encode()
    table = _table()
    found = {
        pid: entry.parent
        for pid, entry in table.items()
        if mark in entry.variables
        and any(variable.startswith(_RANK_VARIABLES) for variable in entry.variables)
        # A launcher inside a Slurm allocation has SLURM_PROCID as well, but no rank is a leader.
        and pid != entry.session
    }
    return [pid for pid, parent in found.items() if parent not in found]


def send(pids: list[int], number: int) -> None:
    """The signal to each process that is still there."""
    for pid in pids:
        try:
            os.kill(pid, number)
        except (ProcessLookupError, PermissionError):
            continue


def session_members(session: int) -> list[int]:
    """Living processes of the session. Not of the process group: mpirun gives each rank its own."""
    return [pid for pid, entry in _table().items() if entry.session == session]


def end_session(session: int) -> None:
    """No orphans: what is left when the leader is gone gets SIGTERM, and later SIGKILL."""
    members = session_members(session)
    if not members:
        return
    send(members, signal.SIGTERM)
    deadline = time.monotonic() + LINGER_SECONDS
    while members and time.monotonic() < deadline:
        time.sleep(0.1)
        members = session_members(session)
    send(members, signal.SIGKILL)


def start_time(pid: int) -> str:
    """Clock ticks since boot at which the process began: with the number it names a process for
    good.
    """
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19]


def leash(number: int) -> None:
    """Called in a new child before it becomes another program: the kernel sends it `number` when
    this launcher dies, however it dies.
    """
    if sys.platform.startswith("linux"):
        ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, number, 0, 0, 0)
