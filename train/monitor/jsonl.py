"""metrics.jsonl: one JSON object a line, readable during the run, cut back when it resumes."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

__all__ = ["JsonlWriter", "read_jsonl"]


def _plain(value: Any) -> Any:
    """JSON has no NaN and no infinity: they become null."""
    if isinstance(value, dict):
        return {str(key): _plain(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(inner) for inner in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def read_jsonl(path: Path) -> Iterator[dict[str, Any]]:
    """The objects of a file, in order; a torn last line (a run killed while writing) ends it
    quietly.

    Raises:
        ValueError: a line before the last is not a JSON object, with file and line number.
    """
    lines = path.read_text(encoding="utf-8").splitlines()
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            value = json.loads(line)
            if not isinstance(value, dict):
                raise ValueError("not an object")
        except ValueError as error:
            if number == len(lines):
                return
            raise ValueError(f"{path}:{number}: {error}; remove the line to go on") from error
        yield value


class JsonlWriter:
    """Appends lines; what is written stays in memory until `flush`.

    Args:
        path: the file; its folder must exist.
        resume_step: lines of later steps, written by a run that was cut off after its last
            checkpoint, are removed.
    """

    def __init__(self, path: Path, resume_step: int = 0) -> None:
        self._path = path
        if path.exists():
            kept = [line for line in read_jsonl(path) if line.get("step", 0) <= resume_step]
            self._replace(kept if resume_step else [])
        self._file = path.open("a", encoding="utf-8", newline="\n")

    def _replace(self, lines: Iterable[dict[str, Any]]) -> None:
        fresh = self._path.with_suffix(".jsonl.new")
        with fresh.open("w", encoding="utf-8", newline="\n") as file:
            file.writelines(self._line(line) for line in lines)
            file.flush()
            os.fsync(file.fileno())
        os.replace(fresh, self._path)

    @staticmethod
    def _line(record: dict[str, Any]) -> str:
        return json.dumps(_plain(record), allow_nan=False) + "\n"

    def write(self, record: dict[str, Any]) -> None:
        """Adds one line."""
        self._file.write(self._line(record))

    def flush(self) -> None:
        """Hands the lines to the operating system."""
        self._file.flush()

    def close(self) -> None:
        """Flushes and closes."""
        self._file.close()
