"""Fields of published annotation files: every complaint names file, place and key.

Files of hundreds of megabytes are read by `json_stream`; what is here reads small ones and lines.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

__all__ = ["coco_names", "field", "one_line", "read_json", "read_lines"]

_WORDS = {int: "a whole number", str: "a string", list: "a list", dict: "an object"}


def one_line(text: str) -> str:
    """The text with every run of white space as one space."""
    return " ".join(text.split())


def read_json(file: Path, what: str) -> dict[str, Any]:
    """The object in a JSON file.

    Args:
        what: what the file should be, for the error, such as "VQA questions file".

    Raises: FileNotFoundError, or ValueError for another content.
    """
    if not file.is_file():
        raise FileNotFoundError(f"{file}: no such {what}")
    try:
        content = json.loads(file.read_bytes())
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{file}: not valid JSON: {error}") from None
    if not isinstance(content, dict):
        raise ValueError(f"{file}: not a {what}: it must hold an object")
    return content


def read_lines(file: Path, what: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """(place for errors, object) of each line of a JSON lines file; empty lines are passed over.

    Raises: FileNotFoundError, or ValueError for another content.
    """
    if not file.is_file():
        raise FileNotFoundError(f"{file}: no such {what}")
    with file.open("rb") as lines:
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            try:
                content = json.loads(line)
            except (ValueError, RecursionError) as error:
                raise ValueError(f"{file}: line {number} is not valid JSON: {error}") from None
            if not isinstance(content, dict):
                raise ValueError(f"{file}: line {number} is not an object ({what})")
            yield f"{file}: line {number}", content


def field(entry: Any, name: str, kind: type, where: str) -> Any:
    """`entry[name]`, checked.

    Raises: ValueError with `where` for a missing key or another type.
    """
    value = entry.get(name) if isinstance(entry, dict) else None
    if not isinstance(value, kind) or isinstance(value, bool):
        raise ValueError(f"{where} needs '{name}' ({_WORDS[kind]})")
    return value


def coco_names(name: str) -> tuple[str, ...]:
    """Where a COCO picture, "COCO_train2014_000000000009.jpg", may lie below a folder of images.

    As it is, in a folder train2014, or under its name of 2017, "000000000009.jpg".
    """
    stem, _, number = name.rpartition("_")
    return (name, f"{stem.removeprefix('COCO_')}/{name}", number) if stem else (name,)
