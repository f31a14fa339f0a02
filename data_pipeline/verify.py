"""`espalier data verify`: every sample of every shard, its structure, hashes, pictures and schema.

Nothing is repaired and nothing stops at the first problem: the result is the list of all of them.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import xxhash

from data_pipeline.decode import decode_image
from data_pipeline.faults import SkipSample
from data_pipeline.index import ShardError, ShardIndex, load_index
from data_pipeline.manifest import MANIFEST_NAME, Manifest, Shard, load_manifest
from data_pipeline.records import RecordError, image_members, parse_record
from data_pipeline.shards import progress

__all__ = ["Problem", "data_folders", "read_members", "verify"]


@dataclass(frozen=True)
class Problem:
    """One finding. `sample` is empty where a whole shard or folder is meant."""

    file: str
    sample: str
    what: str

    def line(self) -> str:
        """One line for people."""
        where = f"{self.file}: sample '{self.sample}'" if self.sample else self.file
        return f"{where}: {self.what}"

    def as_dict(self) -> dict[str, str]:
        """For --json."""
        return asdict(self)


def data_folders(root: Path) -> list[Path]:
    """The folders of shards at or below `root`, with or without a manifest.

    Raises: FileNotFoundError where `root` is missing or holds no shards.
    """
    if not root.is_dir():
        raise FileNotFoundError(f"{root}: no such folder")
    found = {path.parent for name in (MANIFEST_NAME, "*.tar") for path in root.rglob(name)}
    if not found:
        raise FileNotFoundError(f"{root}: no shards (*.tar) and no {MANIFEST_NAME} in it or below")
    return sorted(found)


def read_members(data: bytes, index: ShardIndex, sample: int) -> dict[str, bytes]:
    """Extension -> bytes of one sample, from the whole shard's bytes."""
    return {
        extension: data[offset : offset + size]
        for extension, offset, size, _ in index.members(sample)
    }


def _sample_problems(task: str, shard: str, key: str, members: dict[str, bytes]) -> Iterator[str]:
    expected = {"json"}
    size: tuple[int, int] | None = None
    for names in image_members(task):
        present = [name for name in names if name in members]
        expected.update(present)
        if len(present) != 1:
            yield f"needs exactly one of {', '.join(names)}; has {', '.join(present) or 'none'}"
            continue
        try:
            picture = decode_image(members[present[0]])
        except SkipSample as error:
            yield f"{present[0]}: {error.reason}"
            continue
        size = (picture.shape[1], picture.shape[0])
    unexpected = sorted(set(members) - expected)
    if unexpected:
        yield f"unexpected members {', '.join(unexpected)}"
    if "json" not in members:
        yield "the json member is missing"
        return
    try:
        record = parse_record(task, members["json"], shard, key)
    except RecordError as error:
        yield str(error).removeprefix(f"{shard}: sample '{key}': ")
        return
    width, height = getattr(record, "width", 0), getattr(record, "height", 0)
    if size and width and (width, height) != size:
        yield f"the picture is {size[0]}x{size[1]}, the record says {width}x{height}"
    for where in (*getattr(record, "elements", ()), *getattr(record, "expressions", ())):
        x, y, w, h = where.box
        if width and (x < 0 or y < 0 or x + w > width or y + h > height):
            yield f"box {[x, y, w, h]} leaves the {width}x{height} picture"


def _shard_problems(
    manifest: Manifest, shard: Shard, path: Path, keys: dict[str, str]
) -> Iterator[Problem]:
    """Problems of one shard; `keys` collects key -> shard over the folder."""
    data = path.read_bytes()
    file = str(path)
    actual = xxhash.xxh3_64_hexdigest(data)
    if actual != shard.xxh3:
        yield Problem(file, "", f"content hash {actual}, {MANIFEST_NAME} says {shard.xxh3}")
    try:
        index = load_index(path)
    except (ShardError, FileNotFoundError) as error:
        yield Problem(file, "", str(error).removeprefix(f"{file}: "))
        return
    if len(index) != shard.samples:
        yield Problem(file, "", f"{len(index)} samples, {MANIFEST_NAME} says {shard.samples}")
    for sample in range(len(index)):
        key = index.key(sample)
        if key in keys:
            yield Problem(file, key, f"the key is also in {keys[key]}")
        keys[key] = path.name
        members = read_members(data, index, sample)
        for what in _sample_problems(manifest.task, file, key, members):
            yield Problem(file, key, what)


def _dataset_problems(root: Path) -> Iterator[Problem]:
    """Digest files of a blocksworld folder: unchanged, and no scene in two splits."""
    path = root / "dataset.json"
    if not path.is_file():
        return
    try:
        content = json.loads(path.read_bytes())
    except ValueError as error:
        yield Problem(str(path), "", f"not valid JSON: {error}")
        return
    seen: dict[str, np.ndarray] = {}
    for split, facts in content.get("digests", {}).items():
        file = root / facts["file"]
        try:
            digests = np.load(file, allow_pickle=False)
        except (OSError, ValueError) as error:
            yield Problem(str(file), "", f"cannot be read: {error}")
            continue
        found = hashlib.blake2b(digests.astype("<u8").tobytes(), digest_size=16).hexdigest()
        if found != facts["blake2b"]:
            yield Problem(str(file), "", "the scene digests are not those of dataset.json")
        for other, known in seen.items():
            shared = np.intersect1d(digests, known).size
            if shared:
                yield Problem(str(file), "", f"{shared} scenes are in {split} and in {other}")
        seen[split] = digests


def verify(root: Path) -> tuple[dict[str, Any], list[Problem]]:
    """(counts, problems) of everything at or below `root`.

    Raises: FileNotFoundError where there is nothing to verify.
    """
    problems: list[Problem] = []
    work: list[tuple[Manifest, Shard, Path, dict[str, str]]] = []
    folders = data_folders(root)
    for folder in folders:
        try:
            manifest = load_manifest(folder)
        except (ShardError, FileNotFoundError) as error:
            problems.append(Problem(str(folder), "", str(error)))
            continue
        keys: dict[str, str] = {}
        listed = {shard.name for shard in manifest.shards}
        for path in sorted(folder.glob("*.tar")):
            if path.name not in listed:
                problems.append(Problem(str(path), "", f"is not listed in {MANIFEST_NAME}"))
        for number, shard in enumerate(manifest.shards):
            work.append((manifest, shard, manifest.path(number), keys))
    for item in progress(work, len(work), "verify", "shards"):
        problems.extend(_shard_problems(*item))
    problems.extend(_dataset_problems(root))
    samples = sum(shard.samples for _, shard, _, _ in work)
    counts = {"folders": len(folders), "shards": len(work), "samples": samples}
    return counts, problems
