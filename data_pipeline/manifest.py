"""Manifest of a data folder (manifest.json) and the filter beside it (keep.bits).

The manifest lists the shards of one task and split with sizes, counts and content hashes. Its total
hash identifies the data, wherever the folder lies and whenever it was indexed: the order of
training is a function of it. A filter leaves samples out without touching a shard: one bit a
sample, in manifest order, whose hash is part of the total hash.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import xxhash

from data_pipeline.index import ShardError

__all__ = [
    "KEEP_NAME",
    "MANIFEST_NAME",
    "MANIFEST_VERSION",
    "OWN_VALUES",
    "Manifest",
    "Shard",
    "keep_name",
    "load_manifest",
    "parse_manifest",
    "total_hash",
]

MANIFEST_NAME = "manifest.json"
KEEP_NAME = "keep.bits"
MANIFEST_VERSION = 2
# The values of manifest.json that are ours; all others are `extra`.
OWN_VALUES = (
    "version",
    "task",
    "split",
    "samples",
    "members",
    "shards",
    "hash",
    "keys_hash",
    "filter",
)
_WORD = 64


@dataclass(frozen=True)
class Shard:
    """One line of the manifest. `xxh3`: XXH3-64 of the file, hexadecimal. `kept`: samples that the
    filter leaves, all of them without one.
    """

    name: str
    bytes: int
    samples: int
    xxh3: str
    kept: int


@dataclass(frozen=True)
class Manifest:
    """The shards of one task and split.

    Attributes:
        location: folder or URL of the shards.   samples: kept samples of all shards.
        hash: covers everything in manifest.json.
        keys_hash: XXH3-128 over all keys in order, each followed by a zero byte: the same for the
            same samples cut into other shards.
        filter: file, hash and rules of what was left out; None when nothing was.
        extra: what the maker of the shards recorded, such as image_size.
        members: extension -> number of members in all shards, filtered or not.
        keep: (bytes,) u8, the bits of the filter, least significant first, padded to whole words.
    """

    location: str
    task: str
    split: str
    samples: int
    shards: tuple[Shard, ...]
    hash: str
    keys_hash: str
    filter: dict[str, Any] | None
    extra: dict[str, Any]
    members: dict[str, int] = field(default_factory=dict)
    keep: np.ndarray | None = field(default=None, repr=False, compare=False)

    @property
    def remote(self) -> bool:
        """Whether `location` is a URL."""
        return "://" in self.location

    @property
    def folder(self) -> Path:
        """The folder of the shards.

        Raises: ValueError where they are remote.
        """
        if self.remote:
            raise ValueError(f"{self.location}: a URL, where a local data folder is needed")
        return Path(self.location)

    def path(self, shard: int) -> Path:
        """The tar file of a shard. Raises: ValueError where it is remote."""
        return self.folder / self.shards[shard].name

    def url(self, shard: int) -> str:
        """URL of a shard, or its path where the folder is local."""
        name = self.shards[shard].name
        return f"{self.location.rstrip('/')}/{name}" if self.remote else str(self.path(shard))

    @cached_property
    def shard_samples(self) -> np.ndarray:
        """(shards,) int64 kept samples in each shard: what a plan is made of."""
        return np.asarray([shard.kept for shard in self.shards], np.int64)

    @cached_property
    def _starts(self) -> tuple[np.ndarray, np.ndarray]:
        """(shards,) int64 samples, and kept samples, of all shards before each."""
        samples = np.asarray([shard.samples for shard in self.shards], np.int64)
        kept = self.shard_samples
        return np.cumsum(samples) - samples, np.cumsum(kept) - kept

    @cached_property
    def _kept_before(self) -> np.ndarray:
        """(words,) int64 kept samples before each 64-bit word of `keep`."""
        assert self.keep is not None
        counts = np.bitwise_count(self.keep.view("<u8")).astype(np.int64)
        return np.cumsum(counts) - counts

    def sample_number(self, shard: int, ordinal: int) -> int:
        """The number, in its shard, of the kept sample number `ordinal` of that shard."""
        if not 0 <= ordinal < self.shards[shard].kept:
            raise IndexError(
                f"{self.url(shard)}: sample {ordinal} of {self.shards[shard].kept} kept"
            )
        if self.keep is None:
            return ordinal
        samples, kept = self._starts
        wanted = int(kept[shard]) + ordinal
        word = int(np.searchsorted(self._kept_before, wanted, side="right")) - 1
        rest = wanted - int(self._kept_before[word])
        bits = np.unpackbits(self.keep[8 * word : 8 * word + 8], bitorder="little")
        return _WORD * word + int(np.flatnonzero(bits)[rest]) - int(samples[shard])

    def kept(self, shard: int) -> np.ndarray:
        """(samples of the shard,) bool: which of them the filter leaves."""
        count = self.shards[shard].samples
        if self.keep is None:
            return np.ones(count, bool)
        start = int(self._starts[0][shard])
        first = start // 8
        bits = np.unpackbits(self.keep[first : (start + count + 7) // 8], bitorder="little")
        return bits[start - 8 * first :][:count].astype(bool)


def total_hash(content: Mapping[str, Any]) -> str:
    """XXH3-128 of everything else in manifest.json."""
    canonical = json.dumps(
        {name: value for name, value in content.items() if name != "hash"},
        sort_keys=True,
        separators=(",", ":"),
    )
    return xxhash.xxh3_128_hexdigest(canonical.encode())


def _content(raw: bytes, where: str, remedy: str) -> dict[str, Any]:
    try:
        content = json.loads(raw)
        version = content["version"]
    except (ValueError, KeyError, TypeError) as error:
        raise ShardError(f"{where}: the manifest is damaged ({error!r}); {remedy}") from None
    if version != MANIFEST_VERSION:
        raise ShardError(
            f"{where}: manifest version {version}, expected {MANIFEST_VERSION}; {remedy}"
        )
    if content.get("hash") != total_hash(content):
        raise ShardError(f"{where}: the manifest was changed by hand (key 'hash'); {remedy}")
    return content


def _remedy(location: str) -> str:
    if "://" in location:
        return "run espalier data index on a copy of the folder and upload its manifest and indexes"
    return f"if the shards are right, run: espalier data index {location}"


def _joined(location: str, name: str) -> str:
    return f"{location.rstrip('/')}/{name}"


def keep_name(raw: bytes, location: str) -> str | None:
    """The file with the filter that this manifest.json needs beside it; None if it has no filter.

    Raises: ShardError as parse_manifest.
    """
    where, remedy = _joined(location, MANIFEST_NAME), _remedy(location)
    content = _content(raw, where, remedy)
    try:
        return None if content["filter"] is None else _plain(content["filter"]["file"])
    except (ValueError, KeyError, TypeError) as error:
        raise ShardError(f"{where}: the manifest is damaged ({error!r}); {remedy}") from None


def _plain(name: Any) -> str:
    """A file name that stays in its folder; a remote manifest might say anything."""
    if not isinstance(name, str) or name in ("", ".", "..") or {"/", "\\", "\0"} & set(name):
        raise ValueError(f"{name!r} is no plain file name")
    return name


def _keep_bits(
    keep: bytes | None, described: Mapping[str, Any], samples: int, location: str, remedy: str
) -> np.ndarray:
    where = _joined(location, described["file"])
    if keep is None:
        raise ShardError(f"{where}: the filter of {MANIFEST_NAME} is missing; {remedy}")
    if xxhash.xxh3_64_hexdigest(keep) != described["xxh3"] or len(keep) != (samples + 7) // 8:
        raise ShardError(f"{where}: not the filter that {MANIFEST_NAME} was made with; {remedy}")
    return np.frombuffer(keep + bytes(-len(keep) % 8), np.uint8)


def parse_manifest(raw: bytes, location: str, keep: bytes | None = None) -> Manifest:
    """A manifest from the bytes of manifest.json, and of its filter if it has one (`keep_name`).

    Raises:
        ShardError: the manifest is damaged, of another version, or the filter is not its own.
    """
    where, remedy = _joined(location, MANIFEST_NAME), _remedy(location)
    content = _content(raw, where, remedy)
    try:
        shards = tuple(
            Shard(
                name=_plain(line["name"]),
                bytes=int(line["bytes"]),
                samples=int(line["samples"]),
                xxh3=str(line["xxh3"]),
                kept=int(line.get("kept", line["samples"])),
            )
            for line in content["shards"]
        )
        described = content["filter"]
        bits = None
        if described is not None:
            total = sum(shard.samples for shard in shards)
            bits = _keep_bits(keep, described, total, location, remedy)
        manifest = Manifest(
            location=location,
            task=content["task"],
            split=content["split"],
            samples=content["samples"],
            shards=shards,
            hash=content["hash"],
            keys_hash=content["keys_hash"],
            filter=described,
            extra={name: value for name, value in content.items() if name not in OWN_VALUES},
            members=content["members"],
            keep=bits,
        )
        if manifest.samples != sum(shard.kept for shard in shards):
            raise ValueError("the counts of the shards do not add up")
    except ShardError:
        raise
    except (ValueError, KeyError, TypeError) as error:
        raise ShardError(f"{where}: the manifest is damaged ({error!r}); {remedy}") from None
    return manifest


def load_manifest(folder: Path) -> Manifest:
    """Reads manifest.json and checks it against the files beside it (names and sizes, not content).

    Raises:
        FileNotFoundError: no folder, no manifest, or a shard that it lists is missing.
        ShardError: the manifest is damaged or of another version, a shard has another size, or the
            filter is not that of the manifest.
    """
    path = folder / MANIFEST_NAME
    remedy = _remedy(str(folder))
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder}: no such data folder; make one with: espalier data ...")
    if not path.is_file():
        below = sorted(folder.glob(f"*/{MANIFEST_NAME}")) or sorted(
            folder.glob(f"*/*/{MANIFEST_NAME}")
        )
        if below:
            raise FileNotFoundError(
                f"{path}: no manifest; this folder holds splits, name one: {below[0].parent}"
            )
        raise FileNotFoundError(f"{path}: no manifest; {remedy}")
    raw = path.read_bytes()
    name = keep_name(raw, str(folder))
    bits = (folder / name).read_bytes() if name and (folder / name).is_file() else None
    manifest = parse_manifest(raw, str(folder), bits)
    for shard in manifest.shards:
        file = folder / shard.name
        if not file.is_file():
            raise FileNotFoundError(
                f"{file}: shard listed in {MANIFEST_NAME} is missing; restore it, or {remedy}"
            )
        actual = file.stat().st_size
        if actual != shard.bytes:
            raise ShardError(
                f"{file}: {actual} bytes, {MANIFEST_NAME} says {shard.bytes}: "
                f"restore the shard, or {remedy}"
            )
    return manifest
