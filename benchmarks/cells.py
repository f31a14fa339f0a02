"""Cells of a table, and what is written down of each: one folder, one marker, one lock for all."""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

__all__ = ["Cell", "alone", "finished", "hours", "read_json", "write_json"]


@dataclass(frozen=True)
class Cell:
    """One trained model.

    Attributes:
        name: its folder below --work.   task: what it is scored on, None: it is only built on.
        argv: the training command; () for a model that is there already.   model: its folder.
        after: names of the cells whose models it needs.   seconds: estimate.
    """

    name: str
    task: str | None
    kind: str
    seed: int
    argv: tuple[str, ...]
    model: Path
    after: tuple[str, ...] = ()
    seconds: float = 0.0


def read_json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, json.JSONDecodeError):
        return {}
    return value if isinstance(value, dict) else {}


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(value, indent=1) + "\n", encoding="utf-8")
    os.replace(partial, path)


def finished(cell: Cell, work: Path, identity: str) -> bool:
    return read_json(work / cell.name / "finished.json").get("identity") == identity


@contextmanager
def alone(work: Path) -> Iterator[int]:
    """One table in a folder at a time: the lock's file descriptor, for processes that it starts.

    Raises:
        ValueError: another one runs, or a training that a killed one has left.
    """
    work.mkdir(parents=True, exist_ok=True)
    with (work / "lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(
                f"{work}: another table, or a training that one has left, runs in this folder"
            ) from None
        yield file.fileno()


def hours(seconds: float) -> str:
    return f"{seconds / 3600:.1f} h" if seconds >= 5400 else f"{seconds / 60:.0f} min"
