"""MANIFEST.json: what a complete checkpoint consists of. It is written last, so its presence means
completeness.

{"version": 2, "run_id", "step", "world_size", "zero_stage", "layout", "config": {...},
 "config_hash", "score": null | {"name", "value"}, "provenance": {"commit", "versions": {...}, ...},
 "written", "files": {NAME: {"bytes": n, "xxh3": hex}}, "hash": hex of everything else}

The hashes find accidents: a flipped bit, a truncated or a swapped file. They are no signature; what
keeps a forged file from doing harm is that nothing is unpickled freely (train/checkpoint/scan.py).
"""

from __future__ import annotations

import json
import os
import re
import stat
from collections.abc import Iterable
from pathlib import Path, PurePosixPath
from typing import Any

import xxhash

__all__ = [
    "MANIFEST",
    "HashingFile",
    "ManifestError",
    "check_files",
    "describe",
    "hash_of",
    "read",
    "replace_text",
    "step_of",
    "sync_folder",
    "tag_of",
    "verify",
    "write",
]

MANIFEST = "MANIFEST.json"
VERSION = 2
_LIMIT = 256 * 2**20  # bytes of a manifest: 100 000 files have 15 MB
_CHUNK = 2**24
_TAG = re.compile(r"step_(\d{8,})")
# name -> types of the values that every manifest has
_FIELDS: dict[str, tuple[type, ...]] = {
    "run_id": (str,),
    "step": (int,),
    "world_size": (int,),
    "zero_stage": (int,),
    "config": (dict,),
    "files": (dict,),
}


class ManifestError(ValueError):
    """A checkpoint folder is incomplete or damaged; the message says how."""


def tag_of(step: int) -> str:
    """Folder name of a checkpoint."""
    return f"step_{step:08d}"


def step_of(name: str) -> int | None:
    """Step of a checkpoint's folder name; None for other names."""
    match = _TAG.fullmatch(name)
    return None if match is None else int(match[1])


def hash_of(values: Any) -> str:
    """Hash of JSON values, whatever the order of their keys."""
    text = json.dumps(values, sort_keys=True, separators=(",", ":"))
    return xxhash.xxh3_128_hexdigest(text.encode())


class HashingFile:
    """A file opened for writing that knows size and hash of what went through `write`."""

    def __init__(self, path: Path) -> None:
        self._file = path.open("wb")
        self._digest = xxhash.xxh3_128()
        self._bytes = 0

    def write(self, data: Any) -> int:
        self._digest.update(data)
        written = self._file.write(data)
        self._bytes += written
        return written

    def flush(self) -> None:
        self._file.flush()

    def __enter__(self) -> HashingFile:
        return self

    def __exit__(self, *error: Any) -> None:
        self._file.close()

    def synced(self) -> dict[str, Any]:
        """Flushes to disk; the manifest's entry."""
        self._file.flush()
        os.fsync(self._file.fileno())
        return {"bytes": self._bytes, "xxh3": self._digest.hexdigest()}


def describe(path: Path) -> dict[str, Any]:
    """The manifest's entry of an existing file, which is flushed to disk."""
    with path.open("rb") as file:
        os.fsync(file.fileno())
        size = os.fstat(file.fileno()).st_size
        return {"bytes": size, "xxh3": _digest(file)}


def _digest(file: Any) -> str:
    digest, buffer = xxhash.xxh3_128(), memoryview(bytearray(_CHUNK))
    while count := file.readinto(buffer):
        digest.update(buffer[:count])
    return digest.hexdigest()


def sync_folder(folder: Path) -> None:
    """Flushes a folder's names to disk."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


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
    sync_folder(path.parent)


def _text(values: dict[str, Any]) -> str:
    return json.dumps(values, indent=1, sort_keys=True) + "\n"


def write(folder: Path, values: dict[str, Any]) -> None:
    """Commits the checkpoint in `folder`."""
    values = {"version": VERSION} | values
    replace_text(folder / MANIFEST, _text(values | {"hash": hash_of(values)}))


def read(folder: Path) -> dict[str, Any]:
    """The manifest of `folder`, its own hash and its names checked, its files not.

    Raises ManifestError when there is none, it is damaged, it belongs to another folder, or there
    are .pt files that it does not name (DeepSpeed finds some of its files by pattern).
    """
    path = folder / MANIFEST
    try:
        if path.stat().st_size > _LIMIT:
            raise ManifestError(f"{path}: more than {_LIMIT} bytes: not a manifest")
        text = path.read_text(encoding="utf-8")
        values = json.loads(text)
    except FileNotFoundError:
        raise ManifestError(f"{folder}: no {MANIFEST}: the save was not completed") from None
    except (OSError, ValueError, RecursionError) as error:
        raise ManifestError(f"{path}: not readable: {error}") from None
    if not isinstance(values, dict) or values.get("version") != VERSION:
        raise ManifestError(f"{path}: not a manifest of version {VERSION}")
    # The text itself is compared, too: then there is no byte that may differ unseen.
    rest = {key: value for key, value in values.items() if key != "hash"}
    if values.get("hash") != hash_of(rest) or _text(values) != text:
        raise ManifestError(f"{path}: its content is not what its own hash says")
    _check_fields(path, values)
    step = step_of(folder.name)
    if step is not None and step != values["step"]:
        raise ManifestError(f"{path}: of step {values['step']}, but the folder is {folder.name}")
    named = {PurePosixPath(name) for name in values["files"]}
    for found in sorted(folder.rglob("*.pt")):
        if PurePosixPath(found.relative_to(folder).as_posix()) not in named:
            raise ManifestError(f"{found}: the manifest does not name it")
    return values


def _check_fields(path: Path, values: dict[str, Any]) -> None:
    for key, types in _FIELDS.items():
        if not isinstance(values.get(key), types):
            raise ManifestError(f"{path}: {key} is missing or of the wrong type")
    for name, entry in values["files"].items():
        parts = PurePosixPath(name).parts
        if not parts or name.startswith("/") or ".." in parts or "\\" in name:
            raise ManifestError(f"{path}: {name!r} is not a name inside the checkpoint")
        if not isinstance(entry, dict) or entry.keys() != {"bytes", "xxh3"}:
            raise ManifestError(f"{path}: {name}: no size and hash")


def check_files(folder: Path, values: dict[str, Any], names: Iterable[str] | None = None) -> None:
    """Compares files (`names`; None is all) with the manifest. Raises ManifestError at the first
    that differs.
    """
    for name in values["files"] if names is None else names:
        path, expected = folder / name, values["files"][name]
        try:
            found = path.lstat()
            if not stat.S_ISREG(found.st_mode):
                raise ManifestError(f"{path}: not a regular file")
            if found.st_size != expected["bytes"]:
                raise ManifestError(
                    f"{path}: {found.st_size} bytes, the manifest says {expected['bytes']}"
                )
            with path.open("rb") as file:
                if _digest(file) != expected["xxh3"]:
                    raise ManifestError(f"{path}: its hash is not the manifest's")
        except FileNotFoundError:
            raise ManifestError(f"{path}: missing") from None
        except OSError as error:
            raise ManifestError(f"{path}: not readable: {error.strerror}") from None


def verify(folder: Path) -> dict[str, Any]:
    """The manifest, after checking every file it names. Raises ManifestError."""
    values = read(folder)
    check_files(folder, values)
    return values
