"""Index of a tar shard: X.tar.idx. Needs numpy and xxhash only.

The index is made in one pass over the shard: tar headers (ustar, PAX path and size, GNU long
names, base-256 sizes, every checksum verified), a checksum of each member, and a hash of the whole
file. Nothing may end early without an error: a shard cut at any byte, and a header overwritten with
zeros in the middle, are both detected.

Layout of X.tar.idx: 8 magic bytes, u64 length of a JSON header, u64 XXH3-64 of everything that
follows, the header, then the arrays named in it, each aligned to 64 bytes, read by memory map.
"""

from __future__ import annotations

import json
import mmap
import os
import re
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import xxhash

from data_pipeline.compressed import refuse_compressed
from data_pipeline.files import write_atomically
from data_pipeline.tar_headers import REMEDY, Member, ShardError, walk

__all__ = [
    "INDEX_VERSION",
    "MAX_MEMBER_BYTES",
    "IndexedMember",
    "ShardError",
    "ShardIndex",
    "build_index",
    "checksum",
    "current_index",
    "index_path",
    "load_index",
    "open_index",
    "parse_index",
]

INDEX_VERSION = 2
# Larger members are no pictures or texts: a mistake, or an attack on the memory of the workers.
MAX_MEMBER_BYTES = 256 << 20
_MAGIC = b"ESPTARIX"
_HEAD = 24
_ALIGN = 64
_BLOCK = 512
# The same split as webdataset's: the extension starts at the first dot of the base name.
_NAME = re.compile(r"^((?:.*/|)[^.]+)[.]([^/]*)$")
_HASH_STEP = 1 << 18
# Clocks of file systems tick every few milliseconds: a file as young as this may change once more
# without a new time.
_SETTLED_NS = 20_000_000

_DTYPES = {
    "block": ("<u4",),
    "size": ("<u4",),
    "checksum": ("<u4",),
    "extension": ("|u1",),
    "first": ("<u4",),
    "key_start": ("<u4", "<u8"),
    "key_bytes": ("|u1",),
}


class IndexedMember(NamedTuple):
    """One file of a sample: extension, first byte in the shard, bytes, and their checksum."""

    extension: str
    offset: int
    size: int
    checksum: int


def checksum(data: bytes | memoryview) -> int:
    """The checksum that an index holds of a member: the low 32 bits of XXH3-64 of its bytes."""
    return xxhash.xxh3_64_intdigest(data) & 0xFFFFFFFF


@dataclass(frozen=True)
class ShardIndex:
    """Where every sample of a shard lies. Arrays are memory maps; S samples, M members.

    Attributes:
        name: path or URL of the tar.   tar_bytes: its size when indexed.
        xxh3: XXH3-64 of the whole tar, hexadecimal.   extensions: names by extension id.
        block: (M,) u32 first data byte / 512.   size: (M,) u32 bytes.
        checksum: (M,) u32, see `checksum`.      extension: (M,) u8 extension id.
        first: (S + 1,) u32, first member of each sample, and M.
        key_start: (S + 1,) u32 or u64 into `key_bytes`, the concatenated UTF-8 keys.
    """

    name: str
    tar_bytes: int
    xxh3: str
    extensions: tuple[str, ...]
    block: np.ndarray
    size: np.ndarray
    checksum: np.ndarray
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

    def members(self, sample: int) -> list[IndexedMember]:
        """The members of a sample, in file order."""
        rows = slice(int(self.first[sample]), int(self.first[sample + 1]))
        names = self.extensions
        return [
            IndexedMember(names[kind], block * _BLOCK, size, check)
            for kind, block, size, check in zip(
                self.extension[rows].tolist(),
                self.block[rows].tolist(),
                self.size[rows].tolist(),
                self.checksum[rows].tolist(),
                strict=True,
            )
        ]

    def member_counts(self) -> dict[str, int]:
        """Extension -> number of members in the shard."""
        counts = np.bincount(self.extension, minlength=len(self.extensions)).tolist()
        return dict(zip(self.extensions, counts, strict=True))


# -- making it ------------------------------------------------------------------------------------


@dataclass
class _Columns:
    """Growing columns of an index while a shard is walked."""

    extensions: dict[str, int] = field(default_factory=dict)
    block: list[int] = field(default_factory=list)
    size: list[int] = field(default_factory=list)
    checksum: list[int] = field(default_factory=list)
    extension: list[int] = field(default_factory=list)
    first: list[int] = field(default_factory=list)
    keys: list[bytes] = field(default_factory=list)

    def arrays(self) -> dict[str, np.ndarray]:
        ends = np.cumsum([0, *map(len, self.keys)])
        return {
            "block": np.asarray(self.block, "<u4"),
            "size": np.asarray(self.size, "<u4"),
            "checksum": np.asarray(self.checksum, "<u4"),
            "extension": np.asarray(self.extension, "|u1"),
            "first": np.asarray([*self.first, len(self.block)], "<u4"),
            "key_start": ends.astype("<u4" if ends[-1] < 1 << 32 else "<u8"),
            "key_bytes": np.frombuffer(b"".join(self.keys), "|u1"),
        }


def _check_member(member: Member, path: Path) -> None:
    name = member.name
    if name.startswith("/") or "\0" in name or (".." in name and ".." in name.split("/")):
        raise ShardError(
            f"{path}: member {name!r} has an absolute path or one that leaves the shard; "
            "write the shard again with plain names"
        )
    if member.size > MAX_MEMBER_BYTES:
        raise ShardError(
            f"{path}: member '{name}' has {member.size} bytes, the limit is {MAX_MEMBER_BYTES}; "
            "write the shard again without it"
        )


def _collect(data: mmap.mmap, view: memoryview, path: Path) -> tuple[_Columns, str]:
    """The columns of the index, and the hash of the whole file, made while it is in the cache.

    Slices of `view` are never given a name: a traceback would keep them, and the map open.
    """
    columns = _Columns()
    whole = xxhash.xxh3_64()
    hashed = 0
    seen: set[str] = set()
    in_sample: set[str] = set()
    previous: str | None = None
    for member in walk(data, path):
        _check_member(member, path)
        name, offset, size = member
        match = _NAME.match(name)
        base = name.rsplit("/", 1)[-1]
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
            columns.first.append(len(columns.block))
            columns.keys.append(key.encode("utf-8", "surrogateescape"))
        if extension in in_sample:
            raise ShardError(f"{path}: sample '{key}' has two members '.{extension}'. {REMEDY}")
        in_sample.add(extension)
        number = columns.extensions.setdefault(extension, len(columns.extensions))
        if number > 255:
            raise ShardError(f"{path}: more than 256 different extensions; are keys free of dots?")
        columns.block.append(offset // _BLOCK)
        columns.size.append(size)
        columns.checksum.append(checksum(view[offset : offset + size]))
        columns.extension.append(number)
        if offset + size - hashed >= _HASH_STEP:
            whole.update(view[hashed : offset + size])
            hashed = offset + size
    whole.update(view[hashed:])
    return columns, whole.hexdigest()


def index_path(tar_path: Path) -> Path:
    """Where the index of a shard lies: beside it, X.tar.idx."""
    return tar_path.with_name(tar_path.name + ".idx")


def _serialized(columns: _Columns, facts: dict[str, Any]) -> list[bytes]:
    arrays = columns.arrays()
    described = {name: [array.dtype.str, len(array)] for name, array in arrays.items()}
    header = json.dumps(facts | {"arrays": described}).encode()
    chunks = [header]
    position = _HEAD + len(header)
    for array in arrays.values():
        padding = -position % _ALIGN
        chunks += [bytes(padding), array.tobytes()]
        position += padding + array.nbytes
    digest = xxhash.xxh3_64()
    for chunk in chunks:
        digest.update(chunk)
    numbers = (len(header), digest.intdigest())
    return [_MAGIC, *(number.to_bytes(8, "little") for number in numbers), *chunks]


def build_index(tar_path: Path) -> ShardIndex:
    """Reads a shard once, writes X.tar.idx atomically, and returns it loaded.

    Raises:
        FileNotFoundError: no such shard.
        ShardError: the shard is compressed or cut, has a zeroed or damaged header, a member that is
            too large or leaves the folder, or its samples overlap.
    """
    if not tar_path.is_file():
        raise FileNotFoundError(f"{tar_path}: no such shard")
    with tar_path.open("rb") as file:
        found = os.fstat(file.fileno())
        if found.st_size == 0:
            raise ShardError(f"{tar_path}: the shard is empty (0 bytes). {REMEDY}")
        with mmap.mmap(file.fileno(), found.st_size, access=mmap.ACCESS_READ) as data:
            data.madvise(mmap.MADV_SEQUENTIAL)
            refuse_compressed(data, tar_path)
            with memoryview(data) as view:
                columns, xxh3 = _collect(data, view, tar_path)
        after = os.fstat(file.fileno())
    if (after.st_size, after.st_mtime_ns) != (found.st_size, found.st_mtime_ns):
        raise ShardError(f"{tar_path}: the shard changed while it was indexed; wait for its writer")
    facts = {
        "version": INDEX_VERSION,
        "tar_bytes": found.st_size,
        "xxh3": xxh3,
        "extensions": list(columns.extensions),
    }
    # The time of change of the shard is kept as that of the index: its bytes then depend on those
    # of the shard alone. One nanosecond less says that nothing can be told by it.
    settled = time.time_ns() - found.st_mtime_ns > _SETTLED_NS
    mtime = found.st_mtime_ns if settled else found.st_mtime_ns - 1
    write_atomically(index_path(tar_path), _serialized(columns, facts), mtime)
    return load_index(tar_path)


# -- reading it -----------------------------------------------------------------------------------


def open_index(idx_path: Path, name: str, tar_bytes: int) -> ShardIndex:
    """The index in `idx_path` of the shard `name` (a path or URL), as memory maps.

    Its own hash is verified, so the file is read once here; later only the pages in use stay.

    Raises:
        ShardError: no index, a damaged one, or one made for a shard of another size than
            `tar_bytes`.
    """
    if not idx_path.is_file():
        raise ShardError(f"{idx_path}: the shard has no index; {_remedy(name)}")
    with idx_path.open("rb") as file:
        if file.read(len(_MAGIC)) != _MAGIC:
            raise ShardError(f"{idx_path}: not an index; {_remedy(name)}")
        raw = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    return parse_index(raw, str(idx_path), name, tar_bytes)


def _remedy(name: str) -> str:
    return f"run: espalier data index {name.rpartition('/')[0] or '.'}"


def parse_index(raw: bytes | mmap.mmap, idx_path: str, name: str, tar_bytes: int) -> ShardIndex:
    """As `open_index`, from what `idx_path` holds."""
    remedy = _remedy(name)
    if raw[: len(_MAGIC)] != _MAGIC:
        raise ShardError(f"{idx_path}: not an index; {remedy}")
    length = int.from_bytes(raw[8:16], "little")
    try:
        header = json.loads(raw[_HEAD : _HEAD + length])
        version = header["version"]
    except (ValueError, KeyError, TypeError):
        # Version 1 had no hash: its header began 8 bytes earlier.
        old = raw[16:32].startswith(b'{"version": 1')
        what = "index version 1" if old else "the index is damaged (its header)"
        raise ShardError(f"{idx_path}: {what}; {remedy}") from None
    if version != INDEX_VERSION:
        raise ShardError(f"{idx_path}: index version {version}, not {INDEX_VERSION}; {remedy}")
    with memoryview(raw) as view:
        intact = xxhash.xxh3_64_intdigest(view[_HEAD:]) == int.from_bytes(raw[16:_HEAD], "little")
    if not intact:
        raise ShardError(f"{idx_path}: the index is damaged (its hash is wrong); {remedy}")
    if header["tar_bytes"] != tar_bytes:
        indexed = header["tar_bytes"]
        raise ShardError(f"{name}: {tar_bytes} bytes, but indexed at {indexed}; {remedy}")
    try:
        arrays = _arrays(raw, _HEAD + length, header["arrays"])
        xxh3, extensions = header["xxh3"], tuple(header["extensions"])
    except (ValueError, KeyError, TypeError) as error:
        raise ShardError(f"{idx_path}: the index is damaged ({error!r}); {remedy}") from None
    return ShardIndex(name, tar_bytes, xxh3, extensions, **arrays)


def _arrays(
    raw: bytes | mmap.mmap, position: int, described: dict[str, Any]
) -> dict[str, np.ndarray]:
    arrays = {}
    for name, (kind, count) in described.items():
        if kind not in _DTYPES[name]:
            raise ValueError(f"array '{name}' of type {kind}")
        position += -position % _ALIGN
        # numpy refuses an offset at the very end of the file.
        arrays[name] = (
            np.frombuffer(raw, kind, count, position) if count else np.empty(0, np.dtype(kind))
        )
        position += arrays[name].nbytes
    return arrays


def load_index(tar_path: Path) -> ShardIndex:
    """The index beside a shard, as memory maps; the shard must still have the size it had.

    Raises:
        FileNotFoundError: no such shard.
        ShardError: as open_index.
    """
    if not tar_path.is_file():
        raise FileNotFoundError(f"{tar_path}: no such shard")
    return open_index(index_path(tar_path), str(tar_path), tar_path.stat().st_size)


def current_index(tar_path: Path) -> ShardIndex | None:
    """The index beside a shard if size and time of change are those it was made at, else None."""
    try:
        index = load_index(tar_path)
    except ShardError:
        return None
    made_at = index_path(tar_path).stat().st_mtime_ns
    return index if made_at == tar_path.stat().st_mtime_ns else None
