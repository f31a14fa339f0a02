"""What a rank tells the others and the launcher: where it is, what killed it, how it ended.

A launcher names a folder in ESPALIER_JOB (`launchers/job.py` lists the files and reads them). Without
one, or where it cannot be written, a rank still knows its own place, and errors name it.
"""

from __future__ import annotations

import json
import os
import re
import socket
import sys
import time
import traceback
from pathlib import Path
from types import TracebackType
from typing import Any

__all__ = ["at", "ended", "failed", "left", "place", "places"]

FOLDER = "ESPALIER_JOB"
_WIDTH = 400  # bytes of a place file, always overwritten whole
_TIMEOUT = re.compile(r"timed? ?out|timeout", re.I)


class _Place:
    """This rank's last word about where it is."""

    def __init__(self) -> None:
        self.text = "starting"
        self.since = time.time()
        self.file: int | None = None
        self.opened = False


_PLACE = _Place()


def _folder() -> Path | None:
    folder = os.environ.get(FOLDER)
    return Path(folder) if folder and os.path.isdir(folder) else None


def _rank() -> int:
    """Verbs that join no group have their launcher's variable only."""
    names = ("RANK", "OMPI_COMM_WORLD_RANK", "SLURM_PROCID")
    return int(next((os.environ[name] for name in names if name in os.environ), "0"))


def place() -> str:
    """Where this rank is: the text of the last `at`."""
    return _PLACE.text


def at(text: str) -> None:
    """Says what this rank does from now on ("general step 12"). Cheap enough for every step: one
    small write to a file that stays open, never flushed.
    """
    _PLACE.text, _PLACE.since = text, time.time()
    if not _PLACE.opened:
        _PLACE.opened = True
        if (folder := _folder()) is not None:
            try:
                path = folder / f"rank_{_rank():04d}"
                _PLACE.file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o644)
            except OSError:
                _PLACE.file = None  # a full or foreign disk must not stop training
    if _PLACE.file is not None:
        line = json.dumps(
            {
                "host": socket.gethostname(),
                "pid": os.getpid(),
                "since": _PLACE.since,
                "at": text[:200],
            }
        )
        try:
            os.pwrite(_PLACE.file, line.encode()[:_WIDTH].ljust(_WIDTH), 0)
        except OSError:
            _PLACE.file = None


def places() -> list[str]:
    """Where each rank of the job was last seen, one line a rank; this rank alone without a
    launcher.
    """
    now, lines = time.time(), []
    folder = _folder()
    for path in sorted(folder.glob("rank_*")) if folder is not None else []:
        try:
            seen = json.loads(path.read_text())
        except (OSError, ValueError):
            continue
        rank, seconds = int(path.name.removeprefix("rank_")), max(0, now - seen["since"])
        lines.append(f"rank {rank} ({seen['host']}) for {seconds:.0f} s at: {seen['at']}")
    return lines or [f"rank {_rank()} for {now - _PLACE.since:.0f} s at: {_PLACE.text}"]


def failed(error: BaseException) -> bool:
    """Tells that this rank ends with an error. True when it is the first of the job.

    Call it before the process group goes down: what the others then see is an echo, and they say so
    instead of printing a traceback each. The error is told where it happened, and after a timeout
    where every rank was.
    """
    if getattr(error, "_espalier_told", False):
        return False
    error._espalier_told = True  # type: ignore[attr-defined]
    if _TIMEOUT.search(str(error)):
        error.add_note(
            "where the ranks were:\n  "
            + "\n  ".join(places())
            + "\nthe rank that is somewhere else "
            "is the one to look at; engine.collective_timeout says how many minutes to wait for it"
        )
    else:
        error.add_note(f"rank {_rank()} was at: {place()}")
    folder = _folder()
    if folder is None:
        return True
    story = {
        "rank": _rank(),
        "host": socket.gethostname(),
        "at": place(),
        "error": f"{type(error).__name__}: {error}",
        "traceback": "".join(traceback.format_exception(error)),
    }
    try:
        first = _create(folder / "failure.json", story)
        if not first:
            _create(folder / f"failed_{_rank():04d}.json", story)
    except OSError:
        return True
    if not first:
        _quiet(error)
    elif not isinstance(error, (ValueError, FileNotFoundError)):
        # Now, not when Python unwinds: the others get to know by then, and print theirs.
        print(f"espalier (rank {_rank()}):\n{story['traceback']}", file=sys.stderr, flush=True)
        _quiet(error, silent=True)
    return first


def _create(path: Path, story: dict[str, Any]) -> bool:
    """Writes the file unless it exists; whole or not at all, on shared file systems too."""
    partial = path.with_name(f"{path.name}.{_rank()}.partial")
    partial.write_text(json.dumps(story))
    try:
        os.link(partial, path)
    except FileExistsError:
        return False
    finally:
        partial.unlink()
    return True


def _quiet(told: BaseException, silent: bool = False) -> None:
    """Python's own report of this error becomes one line, or none."""
    before = sys.excepthook

    def hook(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
        if error is not told:
            before(kind, error, trace)
        elif not silent:
            print(
                f"espalier (rank {_rank()}): ended because another rank failed, at: {place()} "
                f"({kind.__name__}: {str(error).splitlines()[0] if str(error) else ''})",
                file=sys.stderr,
                flush=True,
            )

    sys.excepthook = hook


def ended(code: int) -> None:
    """Tells the launcher that the job is through, with this exit code: its DONE marker.

    The first rank of each machine writes it. Only call it when every rank is through.
    """
    if os.environ.get("LOCAL_RANK", "0") == "0":
        _mark(f"outcome_{_rank():04d}", code)


def left(code: int) -> None:
    """Tells that this rank left in order, which says nothing of the others."""
    _mark(f"left_{_rank():04d}", code)


def _mark(name: str, code: int) -> None:
    folder = _folder()
    if folder is None:
        return
    partial = folder / f"{name}.partial"
    try:
        partial.write_text(str(code))
        os.replace(partial, folder / name)
    except OSError as error:
        print(f"espalier: cannot report to the launcher: {error}", file=sys.stderr)
