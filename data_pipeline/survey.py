"""What a manifest needs to know of one shard, from its index or by reading it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import xxhash

from data_pipeline.index import build_index, current_index

__all__ = ["ShardFacts", "survey"]


@dataclass(frozen=True)
class ShardFacts:
    """What the manifest needs to know of a shard, and what is worth telling about it.

    Attributes:
        members: extension -> count.   key_hashes: (samples,) u64 XXH3-64 of the keys.
        was_read: the shard was read for this; else its index told.
        rotten: the content changed although size and time of change did not.
    """

    name: str
    bytes: int
    samples: int
    xxh3: str
    members: Mapping[str, int]
    key_hashes: np.ndarray
    was_read: bool
    rotten: bool


def survey(tar_path: Path, force: bool = False) -> ShardFacts:
    """The facts of a shard, from its index if that is current, else from reading the shard.

    Args:
        force: read the shard whatever its index says, and compare.

    Raises: as build_index.
    """
    known = current_index(tar_path) if tar_path.is_file() else None
    was_read = force or known is None
    index = build_index(tar_path) if was_read or known is None else known
    ends = index.key_start.tolist()
    raw = index.key_bytes.tobytes()
    hashes = [xxhash.xxh3_64_intdigest(raw[a:b]) for a, b in zip(ends[:-1], ends[1:], strict=True)]
    return ShardFacts(
        tar_path.name,
        index.tar_bytes,
        len(index),
        index.xxh3,
        index.member_counts(),
        np.asarray(hashes, np.uint64),
        was_read,
        rotten=known is not None and known.xxh3 != index.xxh3,
    )
