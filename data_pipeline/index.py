"""Index of a tar shard (X.tar.idx) and manifest of a data folder (manifest.json). Needs numpy and
xxhash only.

The index is made by walking tar headers once (ustar, PAX path and size, GNU long names, base-256
sizes, every checksum verified). Nothing may end early without an error: a shard cut at any byte,
and a header overwritten with zeros in the middle, are both detected. Layout of X.tar.idx: 8 magic
bytes, u64 length of a JSON header, the header, then the arrays named in it, each aligned to 64
bytes, read by memory map.

The manifest lists the shards of one task and split with sizes and content hashes. Its total hash
identifies the data: the order of training is a function of it.
"""

from __future__ import annotations

import json
import mmap
import os
import re
import tempfile
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import xxhash

from data_pipeline.tar_headers import REMEDY, ShardError, walk

__all__ = [
    "INDEX_VERSION",
    "MANIFEST_NAME",
    "Manifest",
    "Shard",
    "ShardError",
    "ShardIndex",
    "build_index",
    "index_path",
    "load_index",
    "load_manifest",
    "write_manifest",
]

MANIFEST_NAME = "manifest.json"
INDEX_VERSION = 1
MANIFEST_VERSION = 1
_MAGIC = b"ESPTARIX"
_ALIGN = 64
# The same split as webdataset's: the extension starts at the first dot of the base name.
_NAME = re.compile(r"^((?:.*/|)[^.]+)[.]([^/]*)$")


# -- the index of one shard -----------------------------------------------------------------------


@dataclass(frozen=True)
class ShardIndex:
    """Where every sample of a shard lies. Arrays are memory maps; S samples, M members.

    Attributes:
        path: the tar.   tar_bytes: its size when indexed.   extensions: names by extension id.
        offset: (M,) u64 first data byte.   size: (M,) u32 bytes.   extension: (M,) u8 extension id.
        first: (S + 1,) u32, first member of each sample, and M.
        key_start: (S + 1,) u64 into `key_bytes`, the concatenated UTF-8 keys.
    """

    path: Path
    tar_bytes: int
    extensions: tuple[str, ...]
    offset: np.ndarray
    size: np.ndarray
    extension: np.ndarray
    first: np.ndarray
    key_start: np.ndarray
    key_bytes: np.ndarray

    def __len__(self) -> int:
        """Number of samples."""
        return len(self.first) - 1

    def key(self, sample: int) -> str:
        """The webdataset key of a sample."""
        raw = self.key_bytes[int(self.key_start[sample]) : int(self.key_start[sample + 1])]
        return raw.tobytes().decode("utf-8", "surrogateescape")

    def members(self, sample: int) -> list[tuple[str, int, int]]:
        """(extension, offset, size) of each member of a sample, in file order."""
        rows = slice(int(self.first[sample]), int(self.first[sample + 1]))
        names = self.extensions
        return [
            (names[kind], offset, size)
            for kind, offset, size in zip(
                self.extension[rows].tolist(),
                self.offset[rows].tolist(),
                self.size[rows].tolist(),
                strict=True,
            )
        ]


@dataclass
class _Columns:
    """Growing columns of an index while a shard is walked."""

    extensions: dict[str, int] = field(default_factory=dict)
    offset: list[int] = field(default_factory=list)
    size: list[int] = field(default_factory=list)
    extension: list[int] = field(default_factory=list)
    first: list[int] = field(default_factory=list)
    keys: list[bytes] = field(default_factory=list)

    def arrays(self) -> dict[str, np.ndarray]:
        ends = np.cumsum([0, *map(len, self.keys)])
        return {
            "offset": np.asarray(self.offset, "<u8"),
            "size": np.asarray(self.size, "<u4"),
            "extension": np.asarray(self.extension, "u1"),
            "first": np.asarray([*self.first, len(self.offset)], "<u4"),
            "key_start": ends.astype("<u8"),
            "key_bytes": np.frombuffer(b"".join(self.keys), "u1"),
        }


def _collect(data: mmap.mmap, path: Path) -> _Columns:
    columns = _Columns()
    seen: set[str] = set()
    in_sample: set[str] = set()
    previous: str | None = None
    for member in walk(data, path):
        match = _NAME.match(member.name)
        base = member.name.rsplit("/", 1)[-1]
        if match is None or (base.startswith("__") and base.endswith("__")):
            continue  # webdataset ignores such members as well
        key, extension = match[1], match[2].lower()
        if key != previous:
            if key in seen:
                raise ShardError(
                    f"{path}: the members of sample '{key}' are not adjacent. {REMEDY}"
                )
            seen.add(key)
            in_sample.clear()
            previous = key
            columns.first.append(len(columns.offset))
            columns.keys.append(key.encode("utf-8", "surrogateescape"))
        if extension in in_sample:
            raise ShardError(f"{path}: sample '{key}' has two members '.{extension}'. {REMEDY}")
        in_sample.add(extension)
        number = columns.extensions.setdefault(extension, len(columns.extensions))
        if number > 255:
            raise ShardError(f"{path}: more than 256 different extensions; are keys free of dots?")
        if member.size >= 1 << 32:
            raise ShardError(f"{path}: member '{member.name}' is 4 GiB or larger")
        columns.offset.append(member.offset)
        columns.size.append(member.size)
        columns.extension.append(number)
    return columns


def index_path(tar_path: Path) -> Path:
    """Where the index of a shard lies: beside it, X.tar.idx."""
    return tar_path.with_name(tar_path.name + ".idx")


def _write_atomically(path: Path, chunks: list[bytes]) -> None:
    """Writes beside `path`, syncs, then renames: a reader sees the old file or the new one."""
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    temporary = Path(name)
    try:
        with os.fdopen(handle, "wb") as file:
            for chunk in chunks:
                file.write(chunk)
            file.flush()
            os.fsync(file.fileno())
        temporary.chmod(0o644)
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def _index_chunks(columns: _Columns, tar_bytes: int) -> list[bytes]:
    arrays = columns.arrays()
    described = {name: [array.dtype.str, len(array)] for name, array in arrays.items()}
    header = json.dumps(
        {
            "version": INDEX_VERSION,
            "tar_bytes": tar_bytes,
            "extensions": list(columns.extensions),
            "arrays": described,
        }
    ).encode()
    chunks = [_MAGIC, len(header).to_bytes(8, "little"), header]
    position = sum(map(len, chunks))
    for array in arrays.values():
        padding = -position % _ALIGN
        chunks += [bytes(padding), array.tobytes()]
        position += padding + array.nbytes
    return chunks


def build_index(tar_path: Path) -> ShardIndex:
    """Walks the headers of a shard, writes X.tar.idx atomically, and returns it loaded.

    Raises:
        FileNotFoundError: no such shard.
        ShardError: the shard is cut, has a zeroed or damaged header, or its samples overlap.
    """
    if not tar_path.is_file():
        raise FileNotFoundError(f"{tar_path}: no such shard")
    tar_bytes = tar_path.stat().st_size
    if tar_bytes == 0:
        raise ShardError(f"{tar_path}: the shard is empty (0 bytes). {REMEDY}")
    with (
        tar_path.open("rb") as file,
        mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data,
    ):
        if data[:2] == b"\x1f\x8b":
            raise ShardError(
                f"{tar_path}: compressed shards cannot be read by position; decompress it"
            )
        columns = _collect(data, tar_path)
    _write_atomically(index_path(tar_path), _index_chunks(columns, tar_bytes))
    return load_index(tar_path)


def load_index(tar_path: Path) -> ShardIndex:
    """The index of a shard as memory maps.

    Raises:
        ShardError: no index, an unreadable one, or one made for another version of the shard.
    """
    path = index_path(tar_path)
    remedy = f"run: espalier data index {tar_path.parent}"
    if not path.is_file():
        raise ShardError(f"{path}: the shard has no index; {remedy}")
    raw = np.memmap(path, dtype="u1", mode="r") if path.stat().st_size else np.zeros(0, "u1")
    if raw[:8].tobytes() != _MAGIC:
        raise ShardError(f"{path}: not an index; {remedy}")
    length = int.from_bytes(raw[8:16].tobytes(), "little")
    try:
        header = json.loads(raw[16 : 16 + length].tobytes())
        arrays: dict[str, np.ndarray] = {}
        position = 16 + length
        for name, (kind, count) in header["arrays"].items():
            position += -position % _ALIGN
            end = position + count * np.dtype(kind).itemsize
            arrays[name] = raw[position:end].view(kind)
            if len(arrays[name]) != count:
                raise ValueError("the file is cut")
            position = end
        version, tar_bytes = header["version"], header["tar_bytes"]
        extensions = tuple(header["extensions"])
    except (ValueError, KeyError, TypeError) as error:
        raise ShardError(f"{path}: the index is damaged ({error}); {remedy}") from None
    if version != INDEX_VERSION:
        raise ShardError(f"{path}: index version {version}, expected {INDEX_VERSION}; {remedy}")
    actual = tar_path.stat().st_size
    if actual != tar_bytes:
        raise ShardError(f"{tar_path}: {actual} bytes, but indexed at {tar_bytes}; {remedy}")
    return ShardIndex(tar_path, tar_bytes, extensions, **arrays)


# -- the manifest of a folder ---------------------------------------------------------------------


@dataclass(frozen=True)
class Shard:
    """One line of the manifest. `xxh3`: XXH3-64 of the file, hexadecimal."""

    name: str
    bytes: int
    samples: int
    xxh3: str


@dataclass(frozen=True)
class Manifest:
    """The shards of one task and split. `hash` covers everything in manifest.json."""

    folder: Path
    task: str
    split: str
    samples: int
    shards: tuple[Shard, ...]
    hash: str
    extra: dict[str, Any]

    @cached_property
    def shard_samples(self) -> np.ndarray:
        """(shards,) int64 samples in each shard."""
        return np.asarray([shard.samples for shard in self.shards], np.int64)

    def path(self, shard: int) -> Path:
        """The tar file of a shard."""
        return self.folder / self.shards[shard].name


def _file_hash(path: Path) -> str:
    digest = xxhash.xxh3_64()
    with path.open("rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


def _total_hash(content: dict[str, Any]) -> str:
    canonical = json.dumps(
        {name: value for name, value in content.items() if name != "hash"},
        sort_keys=True,
        separators=(",", ":"),
    )
    return xxhash.xxh3_128_hexdigest(canonical.encode())


def write_manifest(
    folder: Path, task: str, split: str, extra: dict[str, Any] | None = None
) -> dict[str, Any]:
    """Writes manifest.json for the shards (*.tar) in `folder`, atomically, and returns its content.

    Indexes that are missing or out of date are built on the way.

    Args:
        extra: further values to record, such as image_size; they may not replace ours.
    """
    paths = sorted(folder.glob("*.tar"))
    if not paths:
        raise FileNotFoundError(f"{folder}: no shards (*.tar) to list in a manifest")
    shards = []
    for path in paths:
        try:
            index = load_index(path)
        except ShardError:
            index = build_index(path)
        shards.append(
            {
                "name": path.name,
                "bytes": path.stat().st_size,
                "samples": len(index),
                "xxh3": _file_hash(path),
            }
        )
    content: dict[str, Any] = {"schema": task} | (extra or {})
    content |= {
        "version": MANIFEST_VERSION,
        "task": task,
        "split": split,
        "samples": sum(shard["samples"] for shard in shards),
        "shards": shards,
    }
    content["hash"] = _total_hash(content)
    _write_atomically(folder / MANIFEST_NAME, [json.dumps(content, indent=1).encode() + b"\n"])
    return content


def load_manifest(folder: Path) -> Manifest:
    """Reads manifest.json and checks it against the files beside it (names and sizes, not content).

    Raises:
        FileNotFoundError: no folder, no manifest, or a shard that it lists is missing.
        ShardError: the manifest is damaged or a shard has another size.
    """
    path = folder / MANIFEST_NAME
    remedy = f"if the shards are right, run: espalier data index {folder}"
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder}: no such data folder; make one with: espalier data ...")
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no manifest; {remedy}")
    try:
        content = json.loads(path.read_bytes())
        if content["version"] != MANIFEST_VERSION:
            raise ShardError(
                f"{path}: manifest version {content['version']}, expected "
                f"{MANIFEST_VERSION}; {remedy}"
            )
        if content["hash"] != _total_hash(content):
            raise ShardError(f"{path}: the manifest was changed by hand (key 'hash'); {remedy}")
        shards = tuple(Shard(**shard) for shard in content["shards"])
        known = ("version", "task", "split", "samples", "shards", "hash")
        manifest = Manifest(
            folder=folder,
            task=content["task"],
            split=content["split"],
            samples=content["samples"],
            shards=shards,
            hash=content["hash"],
            extra={name: value for name, value in content.items() if name not in known},
        )
    except ShardError:
        raise
    except (ValueError, KeyError, TypeError) as error:
        raise ShardError(f"{path}: the manifest is damaged ({error!r}); {remedy}") from None
    for shard in shards:
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
