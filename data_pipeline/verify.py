"""`espalier data verify`: every sample of every shard, its structure, hashes, pictures and schema.

Nothing is repaired and nothing stops at the first problem: the result is the list of all of them.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import xxhash

from data_pipeline.decode import decode_image
from data_pipeline.faults import SkipSample
from data_pipeline.index import ShardError, ShardIndex, checksum, load_index
from data_pipeline.indexing import data_folders
from data_pipeline.manifest import MANIFEST_NAME, Shard, load_manifest
from data_pipeline.parallel import run_units
from data_pipeline.records import RecordError, image_members, parse_record, record_member

__all__ = ["Problem", "read_members", "verify"]


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


def _pair_problems(shard: str, key: str, members: dict[str, bytes]) -> Iterator[str]:
    """Problems of a sample in img2dataset's layout: one picture, and its text in a member txt."""
    pictures = [name for name in members if name not in ("txt", "json")]
    if len(pictures) != 1:
        yield f"needs exactly one picture; has {', '.join(pictures) or 'none'}"
    else:
        try:
            decode_image(members[pictures[0]])
        except SkipSample as error:
            yield f"{pictures[0]}: {error.reason}"
    try:
        if not members.get("txt", b"").decode().strip():
            yield "the txt member is missing or empty"
            return
    except UnicodeDecodeError as error:
        yield f"txt: not UTF-8 ({error})"
        return
    try:
        parse_record("pretrain", record_member("pretrain", members, key), shard, key)
    except (SkipSample, RecordError) as error:
        yield error.reason


@dataclass(frozen=True)
class _Unit:
    """One shard to check."""

    task: str
    layout: str
    path: Path
    shard: Shard


def _shard_problems(unit: _Unit) -> tuple[list[Problem], np.ndarray]:
    """Problems of one shard, and the (samples,) u64 hashes of its keys."""
    file, shard = str(unit.path), unit.shard
    data = unit.path.read_bytes()
    problems: list[Problem] = []
    actual = xxhash.xxh3_64_hexdigest(data)
    if actual != shard.xxh3:
        what = f"content hash {actual}, {MANIFEST_NAME} says {shard.xxh3}"
        problems.append(Problem(file, "", what))
    try:
        index = load_index(unit.path)
    except (ShardError, FileNotFoundError) as error:
        problems.append(Problem(file, "", str(error).removeprefix(f"{file}: ")))
        return problems, np.empty(0, np.uint64)
    if index.xxh3 != shard.xxh3:
        what = f"the index was made of a shard with hash {index.xxh3}"
        problems.append(Problem(file, "", f"{what}, {MANIFEST_NAME} says {shard.xxh3}"))
    if len(index) != shard.samples:
        what = f"{len(index)} samples, {MANIFEST_NAME} says {shard.samples}"
        problems.append(Problem(file, "", what))
    keys = np.empty(len(index), np.uint64)
    for sample in range(len(index)):
        key = index.key(sample)
        keys[sample] = xxhash.xxh3_64_intdigest(key.encode("utf-8", "surrogateescape"))
        wrong = _damaged_members(data, index, sample)
        members = read_members(data, index, sample)
        if not wrong and unit.layout == "img2dataset":
            wrong = list(_pair_problems(file, key, members))
        elif not wrong:
            wrong = list(_sample_problems(unit.task, file, key, members))
        problems += [Problem(file, key, what) for what in wrong]
    return problems, keys


def _damaged_members(data: bytes, index: ShardIndex, sample: int) -> list[str]:
    """What is wrong with the bytes of a sample, by the checksums of its members."""
    damaged = []
    for extension, offset, size, expected in index.members(sample):
        actual = checksum(data[offset : offset + size])
        if actual != expected:
            where = f"{size} bytes from byte {offset} on"
            damaged.append(
                f"member {extension} ({where}) is damaged: checksum {actual:08x}, "
                f"indexed {expected:08x}"
            )
    return damaged


def _repeated_keys(units: Sequence[_Unit], hashes: Sequence[np.ndarray]) -> Iterator[Problem]:
    """Samples whose key another shard of their folder has as well."""
    if not units:
        return
    together = np.concatenate(hashes)
    number = np.repeat(np.arange(len(units)), [len(found) for found in hashes])
    starts = np.cumsum([0, *map(len, hashes)])
    order = np.argsort(together, kind="stable")
    again = np.flatnonzero(together[order][1:] == together[order][:-1])
    first: dict[str, str] = {}
    for position in sorted({int(order[k + step]) for k in again for step in (0, 1)}):
        unit = units[number[position]]
        key = load_index(unit.path).key(position - int(starts[number[position]]))
        if key in first:
            yield Problem(str(unit.path), key, f"the key is also in {first[key]}")
        else:
            first[key] = unit.path.name


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


def verify(root: Path, processes: int | None = 1) -> tuple[dict[str, Any], list[Problem]]:
    """(counts, problems) of everything at or below `root`.

    Args:
        processes: at most this many (None: one per core).

    Raises: FileNotFoundError where there is nothing to verify.
    """
    problems: list[Problem] = []
    units: list[_Unit] = []
    ends: list[int] = []
    folders = data_folders(root)
    for folder in folders:
        try:
            manifest = load_manifest(folder)
        except (ShardError, FileNotFoundError) as error:
            problems.append(Problem(str(folder), "", str(error)))
            continue
        listed = {shard.name for shard in manifest.shards}
        for path in sorted(folder.glob("*.tar")):
            if path.name not in listed:
                problems.append(Problem(str(path), "", f"is not listed in {MANIFEST_NAME}"))
        layout = manifest.extra.get("layout", "")
        units += [
            _Unit(manifest.task, layout, folder / shard.name, shard) for shard in manifest.shards
        ]
        ends.append(len(units))
    found = run_units(_shard_problems, units, processes, "verify", "shards")
    for of_shard, _ in found:
        problems += of_shard
    hashes = [keys for _, keys in found]
    for start, end in zip([0, *ends[:-1]], ends, strict=True):
        problems.extend(_repeated_keys(units[start:end], hashes[start:end]))
    problems.extend(_dataset_problems(root))
    samples = sum(unit.shard.samples for unit in units)
    return {"folders": len(folders), "shards": len(units), "samples": samples}, problems
