"""Shards that were compressed as a whole: they cannot be read by position; what to do about it."""

from __future__ import annotations

import mmap
import shlex
from pathlib import Path

from data_pipeline.tar_headers import ShardError

__all__ = ["COMPRESSED", "decompress_command", "refuse_compressed"]

# Compressed shards: suffix -> (magic bytes, command that decompresses in place).
COMPRESSED = {
    ".tar.gz": (b"\x1f\x8b", "gunzip"),
    ".tgz": (b"\x1f\x8b", "gunzip"),
    ".tar.zst": (b"\x28\xb5\x2f\xfd", "zstd -d --rm"),
    ".tar.bz2": (b"BZh", "bunzip2"),
    ".tar.xz": (b"\xfd7zXZ\0", "unxz"),
}


def refuse_compressed(data: mmap.mmap, path: Path) -> None:
    """Raises ShardError, with the command that helps, when a shard begins like a compressed one."""
    for suffix, (magic, _) in COMPRESSED.items():
        if data[: len(magic)] == magic:
            named = path.with_name(path.name.removesuffix(".tar") + suffix)
            move = f"mv {shlex.quote(str(path))} {shlex.quote(str(named))}"
            raise ShardError(
                f"{path}: a compressed shard cannot be read by position; run: "
                f"{move} && {decompress_command(path.parent, named.name)}"
            )


def decompress_command(folder: Path, name: str) -> str:
    """The shell command that turns compressed shards into indexed tars.

    Args:
        name: of a shard in `folder`, or "*.tar.gz" and the like for all of them.
    """
    tool = next(tool for suffix, (_, tool) in COMPRESSED.items() if name.endswith(suffix))
    where = shlex.quote(str(folder))
    what = name if name.startswith("*") else shlex.quote(name)
    return f"{tool} {where}/{what} && espalier data index {where}"
