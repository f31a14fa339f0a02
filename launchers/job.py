"""The job folder: what ranks leave there for the launcher, and the verdict drawn from it.

    outcome_0000        exit code of the stage, written by the first rank of each machine when all
                        ranks are through (the DONE marker)
    left_0000           that rank left in order, with this exit code
    failure.json        the first rank that failed, with its traceback; created exclusively, before
                        the others can notice
    failed_0001.json    ranks that failed after it
    rank_0001           where that rank is, one line of JSON

Exit codes of launchers lie: DeepSpeed's returns 0 when its inner half was killed, 1 after a stop
that saved, and 250 when a finished rank aborts at exit. The ranks' own words count.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

from launchers.processes import JOB, start_time

__all__ = ["Verdict", "job_folder", "judge", "variables"]

SHARED = ".espalier"
LAUNCHER = "ESPALIER_LAUNCHER"
DIE_WITH_PARENT = "ESPALIER_DIE_WITH_PARENT"
EXIT_FAILED, EXIT_USAGE, EXIT_STOPPED = 1, 2, 75
# Errors of ranks that only noticed that another one was gone.
_ECHO = re.compile(
    r"gloo|nccl|connection (closed|reset|refused)|timed out|process ?group|broken pipe", re.I
)


@dataclass
class Verdict:
    """The job's exit code, and what to tell about it."""

    code: int
    lines: list[str] = field(default_factory=list)


@contextmanager
def job_folder(parent: Path | None) -> Iterator[Path]:
    """A new job folder, gone afterwards. `parent` None: on this machine; else a folder that all
    machines share.
    """
    if parent is not None:
        parent.mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(prefix="espalier-job-", dir=parent)).resolve()
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        if parent is not None:
            with suppress(OSError):  # another job is in it
                parent.rmdir()


def variables(folder: Path, watched: bool) -> dict[str, str]:
    """What the ranks must find in their environment; `watched` on the launcher's machine only: they
    stop when it is gone.
    """
    found = {JOB: str(folder), DIE_WITH_PARENT: "1"}
    if watched:
        found[LAUNCHER] = f"{os.getpid()}:{start_time(os.getpid())}"
    return found


def judge(folder: Path, code: int, ranks_report: bool = True) -> Verdict:
    """The job's real outcome.

    Args:
        code: the launcher's exit code, negative for a signal.
        ranks_report: False for a program that knows nothing of job folders.
    """
    if code < 0:
        code = 128 - code
    outcomes = sorted(folder.glob("outcome_[0-9][0-9][0-9][0-9]"))
    if code == 0 and any(folder.glob("left_[0-9][0-9][0-9][0-9]")) and not outcomes:
        return Verdict(0)
    if outcomes:
        told = int(outcomes[0].read_text())
        note = f"the ranks report exit code {told}; the launcher itself ended with {code}"
        return Verdict(told, [note] if told != code else [])
    if code == 0 and ranks_report:
        code = EXIT_FAILED
        line = (
            "the launcher ended with 0 but no rank reported the end of the job: it was killed, or "
            f"{folder.parent} is not shared by all machines (see --job-folder)"
        )
        return Verdict(code, [*_causes(folder), line])
    return Verdict(code, _causes(folder) if code not in (0, EXIT_USAGE, EXIT_STOPPED) else [])


def _causes(folder: Path) -> list[str]:
    """What ended the job, the likeliest cause first."""
    silent = [_silent(path) for path in sorted(folder.glob("rank_*")) if not _spoke(folder, path)]
    first = _read(folder / "failure.json")
    if not first:
        return silent
    if silent and _ECHO.search(first["error"]):
        # A killed rank leaves no word; the first error told is then only its echo.
        reason = first["error"].splitlines()[0]
        return [*silent, f"rank {first['rank']} on {first['host']} noticed it first: {reason}"]
    story = [
        f"rank {first['rank']} on {first['host']} failed first, at: {first['at']}",
        first["traceback"].rstrip(),
    ]
    return [*story, *silent]


def _spoke(folder: Path, path: Path) -> bool:
    rank = path.name.removeprefix("rank_")
    first = _read(folder / "failure.json")
    if (folder / f"left_{rank}").exists():
        return True
    return (folder / f"failed_{rank}.json").exists() or first.get("rank") == int(rank)


def _silent(path: Path) -> str:
    where = _read(path)
    return (
        f"rank {int(path.name.removeprefix('rank_'))} (pid {where.get('pid')} on "
        f"{where.get('host')}) ended without a word, last seen at: {where.get('at')}; it was "
        f"killed ({signal.SIGKILL.name}, out of memory?) or crashed outside Python"
    )


def _read(path: Path) -> dict:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}
