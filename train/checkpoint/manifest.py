"""MANIFEST.json: what a complete checkpoint consists of. It is written last, so its presence means
completeness.

{"version": 1, "run_id", "step", "world_size", "zero_stage", "config": {...},
 "files": {NAME: {"bytes": n, "sha256": hex}}}
"""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import Any

__all__ = ["MANIFEST", "ManifestError", "describe", "read", "replace_text", "verify", "write"]

MANIFEST = "MANIFEST.json"
VERSION = 1


class ManifestError(ValueError):
    """A checkpoint folder is incomplete or damaged; the message says how."""


def describe(path: Path) -> dict[str, Any]:
    """Flushes a file to disk and returns {"bytes", "sha256"}."""
    with path.open("rb") as file:
        os.fsync(file.fileno())
        digest = hashlib.file_digest(file, "sha256").hexdigest()
        return {"bytes": os.fstat(file.fileno()).st_size, "sha256": digest}


def replace_text(path: Path, text: str) -> None:
    """Writes a file so that a crash leaves the old or the new one: temporary, fsync, rename, fsync
    of the folder.
    """
    temporary = path.with_name(f".{path.name}.tmp")
    with temporary.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def write(folder: Path, values: dict[str, Any]) -> None:
    """Commits the checkpoint in `folder`."""
    replace_text(
        folder / MANIFEST,
        json.dumps({"version": VERSION} | values, indent=1, sort_keys=True) + "\n",
    )


def read(folder: Path) -> dict[str, Any]:
    """The manifest, unverified. Raises ManifestError when there is none or it is no manifest of
    ours.
    """
    path = folder / MANIFEST
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ManifestError(f"{folder}: no {MANIFEST}: the save was not completed") from None
    except (OSError, ValueError) as error:
        raise ManifestError(f"{path}: not readable: {error}") from None
    if (
        not isinstance(values, dict)
        or values.get("version") != VERSION
        or not isinstance(values.get("files"), dict)
    ):
        raise ManifestError(f"{path}: not a manifest of version {VERSION}")
    return values


def verify(folder: Path) -> dict[str, Any]:
    """The manifest, after checking size and hash of every file it names. Raises ManifestError."""
    values = read(folder)
    for name, expected in values["files"].items():
        path = folder / name
        try:
            size = path.stat().st_size
        except OSError:
            raise ManifestError(f"{path}: missing") from None
        if size != expected["bytes"]:
            raise ManifestError(f"{path}: {size} bytes, the manifest says {expected['bytes']}")
        with path.open("rb") as file:
            if hashlib.file_digest(file, "sha256").hexdigest() != expected["sha256"]:
                raise ManifestError(f"{path}: its sha256 is not the manifest's")
    return values
