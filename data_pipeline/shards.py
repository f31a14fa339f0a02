"""Writing tar shards: webdataset's ShardWriter, made atomic, indexed and reproducible.

A shard is written under a temporary name, flushed to disk, renamed and indexed; a shard with its
final name is therefore always complete. `mtime=0` keeps the format plain ustar (a float time would
add a PAX header to every member) and the bytes independent of the clock.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, BinaryIO

from data_pipeline.index import build_index
from data_pipeline.manifest_writer import write_manifest

__all__ = ["ShardSet", "check_key", "clear_shards", "dump_json", "write_shard"]

_PARTIAL = ".partial"


def dump_json(content: Any) -> bytes:
    """Compact UTF-8 JSON."""
    return json.dumps(content, separators=(",", ":"), ensure_ascii=False).encode()


def check_key(key: str) -> str:
    """The key, if a tar reader will give it back unchanged.

    Raises: ValueError for a key with a dot or slash (webdataset cuts names there), a control
        character, or too many bytes for a plain ustar header together with its extension.
    """
    if not key or any(mark in key for mark in "./\\") or not key.isprintable():
        raise ValueError(f"sample key {key!r}: use letters, digits, '-' and '_' only, at least one")
    if len(key.encode()) > 80:
        raise ValueError(f"sample key {key!r} is longer than 80 bytes")
    return key


def clear_shards(folder: Path) -> None:
    """Remove the shards, indexes and manifest that an earlier, interrupted run left in `folder`."""
    if not folder.is_dir():
        return
    for path in folder.iterdir():
        ours = path.name.startswith("shard-") or path.name == "manifest.json"
        if ours and path.is_file():
            path.unlink()


class ShardSet:
    """Writes samples to FOLDER/shard-%06d.tar; use it as a context manager.

    Args:
        folder: made if missing.
        per_shard: samples in a shard.
        start: number of the first shard, so that several processes can fill one folder.

    When the block is left by an exception the shard being written is removed.
    """

    def __init__(self, folder: Path, per_shard: int = 1000, start: int = 0) -> None:
        # Imported here: webdataset imports torch, which the readers of a folder need not wait for.
        from webdataset.writer import ShardWriter

        folder.mkdir(parents=True, exist_ok=True)
        self.folder = folder
        self.samples = 0
        self._file: BinaryIO | None = None
        pattern = str(folder).replace("%", "%%") + f"/shard-%06d.tar{_PARTIAL}"
        self._writer = ShardWriter(
            pattern,
            maxcount=per_shard,
            start_shard=start,
            verbose=0,
            opener=self._open,
            post=self._finish,
            encoder=False,
            mtime=0,
        )

    def _open(self, name: str) -> BinaryIO:
        self._file = open(name, "wb")  # noqa: SIM115 - closed by _finish, when the shard is full
        return self._file

    def _finish(self, name: str) -> None:
        """Make the written shard durable and give it its name and index."""
        assert self._file is not None
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()
        final = Path(name.removesuffix(_PARTIAL))
        os.replace(name, final)
        build_index(final)

    def write(self, key: str, members: Mapping[str, bytes]) -> None:
        """Add one sample: extension (without leading dot) -> bytes."""
        self._writer.write({"__key__": check_key(key), **members})
        self.samples += 1

    def __enter__(self) -> ShardSet:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is None and self._writer.count:
            self._writer.close()
        elif self._file is not None:
            # Closed in order: a tar stream that is left open would write to the closed file later.
            if self._writer.tarstream is not None:
                self._writer.tarstream.close()
            self._file.close()
            Path(self._file.name).unlink(missing_ok=True)

    def manifest(self, task: str, split: str, extra: dict[str, Any] | None = None) -> dict:
        """Write manifest.json over everything in the folder."""
        return write_manifest(self.folder, task, split, extra or {})


def write_shard(
    folder: Path, number: int, samples: Iterable[tuple[str, Mapping[str, bytes]]]
) -> int:
    """Write one shard of all `samples` (none: no shard) and return their number."""
    with ShardSet(folder, per_shard=sys.maxsize, start=number) as out:
        for key, members in samples:
            out.write(key, members)
    return out.samples
