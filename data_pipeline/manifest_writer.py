"""Writing manifest.json and keep.bits; `data_pipeline.manifest` says what they are, and reads them."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import xxhash

from data_pipeline.files import write_atomically
from data_pipeline.index import ShardIndex, load_index
from data_pipeline.manifest import (
    KEEP_NAME,
    MANIFEST_NAME,
    MANIFEST_VERSION,
    Manifest,
    load_manifest,
    total_hash,
)
from data_pipeline.survey import ShardFacts, survey

__all__ = ["write_keep", "write_manifest"]


def _keys_with_ends(index: ShardIndex) -> bytes:
    return np.insert(index.key_bytes, index.key_start[1:].astype(np.int64), 0).tobytes()


def _write(folder: Path, content: dict[str, Any]) -> None:
    # Through JSON and back, so that the hash is that of what a reader sees.
    content |= json.loads(json.dumps(content))
    content["hash"] = total_hash(content)
    write_atomically(folder / MANIFEST_NAME, [json.dumps(content, indent=1).encode() + b"\n"])


def write_manifest(
    folder: Path,
    task: str,
    split: str,
    extra: Mapping[str, Any] | None = None,
    facts: Sequence[ShardFacts] | None = None,
    filtered_as: Manifest | None = None,
) -> dict[str, Any]:
    """Writes manifest.json for the shards (*.tar) in `folder`, atomically, and returns its content.

    Indexes that are missing or out of date are built on the way. Without `filtered_as` the manifest
    has no filter, and an old keep.bits is removed once the new manifest stands.

    Args:
        extra: further values to record, such as image_size; they may not replace ours.
        facts: of all shards in the folder, where they are known already.
        filtered_as: the old manifest of the same shards, whose filter stays.

    Raises: FileNotFoundError without shards; as build_index.
    """
    if facts is None:
        facts = [survey(path) for path in sorted(folder.glob("*.tar"))]
    if not facts:
        raise FileNotFoundError(f"{folder}: no shards (*.tar) to list in a manifest")
    keys = xxhash.xxh3_128()
    members: Counter[str] = Counter()
    lines: list[dict[str, Any]] = []
    for fact in facts:
        line = {"name": fact.name, "bytes": fact.bytes, "samples": fact.samples, "xxh3": fact.xxh3}
        lines.append(line)
        keys.update(_keys_with_ends(load_index(folder / fact.name)))
        members.update(fact.members)
    if filtered_as is not None and filtered_as.filter is not None:
        for line, shard in zip(lines, filtered_as.shards, strict=True):
            line["kept"] = shard.kept
    content: dict[str, Any] = {"schema": task} | dict(extra or {})
    content |= {
        "version": MANIFEST_VERSION,
        "task": task,
        "split": split,
        "samples": sum(line.get("kept", line["samples"]) for line in lines),
        "members": dict(sorted(members.items())),
        "keys_hash": keys.hexdigest(),
        "filter": filtered_as and filtered_as.filter,
        "shards": lines,
    }
    _write(folder, content)
    if content["filter"] is None:
        (folder / KEEP_NAME).unlink(missing_ok=True)
    return content


def write_keep(
    folder: Path, kept: np.ndarray, rules: Mapping[str, Any], dropped: Mapping[str, int]
) -> dict[str, Any]:
    """Sets the filter of a folder: writes keep.bits, then manifest.json, each atomically.

    Args:
        kept: (samples of all shards,) bool in manifest order.   rules: what was asked for.
        dropped: samples that each rule left out.

    Returns: the content of the new manifest.   Raises: ValueError for another number of samples, or
        where none would be left; as load_manifest.
    """
    manifest = load_manifest(folder)
    counts = [shard.samples for shard in manifest.shards]
    if kept.shape != (sum(counts),) or kept.dtype != np.bool_:
        raise ValueError(
            f"{folder}: the filter has shape {kept.shape} of {kept.dtype}, "
            f"the shards hold {sum(counts)} samples"
        )
    if not kept.any():
        raise ValueError(f"{folder}: these filters would leave no sample: {dict(rules)}")
    packed = np.packbits(kept, bitorder="little").tobytes()
    content = json.loads((folder / MANIFEST_NAME).read_bytes())
    starts = np.cumsum([0, *counts])
    for number, line in enumerate(content["shards"]):
        line["kept"] = int(np.count_nonzero(kept[starts[number] : starts[number + 1]]))
    content["samples"] = int(np.count_nonzero(kept))
    content["filter"] = {
        "file": KEEP_NAME,
        "xxh3": xxhash.xxh3_64_hexdigest(packed),
        "rules": dict(rules),
        "dropped": dict(dropped),
    }
    write_atomically(folder / KEEP_NAME, [packed])
    _write(folder, content)
    return content
