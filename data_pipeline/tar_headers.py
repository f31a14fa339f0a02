"""Walks tar headers: ustar, PAX path and size, GNU long names, base-256 sizes, every checksum
checked.

Unlike tarfile, nothing may end early without an error: a shard cut at any byte, and a header that
was overwritten with zeros, are both reported.
"""

from __future__ import annotations

import mmap
import shlex
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple
from zlib import adler32

__all__ = ["REMEDY", "Member", "ShardError", "walk"]

REMEDY = "write the shard again, or restore it from a good copy, then run: espalier data index DIR"
_BLOCK = 512
_ZERO = bytes(_BLOCK)
_EXTENDED = (b"x", b"g", b"L", b"K")
_REGULAR = (b"0", b"\0", b"7")
_WITHOUT_DATA = (b"1", b"2", b"3", b"4", b"5", b"6")  # links, devices, folders
# Extended headers hold names and times; a larger one is damage or an attack on memory.
_MAX_EXTENDED = 1 << 20
# Writers pad the end of an archive to 10 KiB, with unusual settings to 1 MiB.
_MAX_TAIL = (1 << 20) + 2 * _BLOCK


class ShardError(ValueError):
    """A shard, index or manifest that is damaged, missing or out of date."""


def _number(raw: bytes, where: str) -> int:
    """A tar number: octal digits, or base-256 when the top bit is set (GNU, from 8 GiB on)."""
    if raw[0] in (0x80, 0xFF):
        value = int.from_bytes(raw[1:], "big")
        return value if raw[0] == 0x80 else value - (1 << (8 * (len(raw) - 1)))
    text = raw.split(b"\0", 1)[0].strip()
    try:
        return int(text, 8) if text else 0
    except ValueError:
        raise ShardError(
            f"{where}: the tar header has a number that cannot be read. {REMEDY}"
        ) from None


def _sum(block: bytes) -> int:
    """Sum of the bytes of a header with spaces in the checksum field.

    The low half of Adler-32 is one plus the sum modulo 65521, which 256 bytes cannot reach: exact,
    and 20 times faster than `sum`.
    """
    both = (adler32(block[:256]) & 0xFFFF) + (adler32(block[256:]) & 0xFFFF) - 2
    return both - sum(block[148:156]) + 8 * 32


def _checksum_matches(block: bytes, where: str) -> bool:
    stated = _number(block[148:156], where)
    unsigned = _sum(block)
    if stated == unsigned:
        return True
    # Some old writers summed signed bytes.
    rest = block[:148] + block[156:]
    return stated == unsigned - 256 * sum(byte >= 128 for byte in rest)


def _string(raw: bytes) -> str:
    return raw.split(b"\0", 1)[0].decode("utf-8", "surrogateescape")


def _pax_records(raw: bytes, where: str) -> dict[str, str]:
    records = {}
    position = 0
    while position < len(raw) and raw[position] != 0:
        space = raw.find(b" ", position, position + 20)
        digits = raw[position:space] if space > 0 else b""
        length = int(digits) if digits.isdigit() else 0
        record = raw[space + 1 : position + length]
        if length <= space + 1 - position or not record.endswith(b"\n") or b"=" not in record:
            raise ShardError(f"{where}: malformed PAX header. {REMEDY}")
        name, value = record[:-1].split(b"=", 1)
        records[name.decode("utf-8", "replace")] = value.decode("utf-8", "surrogateescape")
        position += length
    return records


class Member(NamedTuple):
    """A regular file in a tar: name, first data byte (a multiple of 512), bytes."""

    name: str
    offset: int
    size: int


def _header_name(block: bytes) -> str:
    name = _string(block[:100])
    # A prefix field exists in POSIX ustar only; GNU tar keeps times in the same bytes.
    if block[345] != 0 and block[257:263] == b"ustar\0":
        return f"{_string(block[345:500])}/{name}"
    return name


def _check_end(data: mmap.mmap, position: int, path: Path) -> None:
    """Only zeros may follow the first zero block, and not too many: else headers were overwritten."""
    tail = len(data) - position
    step = 1 << 20
    for start in range(position, len(data), step):
        chunk = data[start : start + step]
        if chunk.count(0) != len(chunk):
            raise ShardError(
                f"{path}: a zeroed header at byte {position} hides the rest of the shard. {REMEDY}"
            )
    if tail > _MAX_TAIL:
        raise ShardError(
            f"{path}: {tail} zero bytes follow the last member (byte {position}), so the rest of "
            f"the shard was probably lost. {REMEDY}; if it is complete, cut the zeros off: "
            f"truncate -s {position + 2 * _BLOCK} {shlex.quote(str(path))}"
        )


@dataclass
class _Extended:
    """Extended headers that wait for the member they belong to."""

    shared: dict[str, str] = field(default_factory=dict)
    pax: dict[str, str] = field(default_factory=dict)
    long_name: str | None = None

    @property
    def waiting(self) -> bool:
        return bool(self.pax) or self.long_name is not None

    def take(self, kind: bytes, raw: bytes, where: str) -> None:
        """Keeps the content of one extended header."""
        if kind == b"x":
            self.pax = _pax_records(raw, where)
        elif kind == b"g":
            self.shared |= _pax_records(raw, where)
        elif kind == b"L":
            self.long_name = _string(raw)

    def apply(self, block: bytes, name: str, size: int, where: str) -> tuple[str, int]:
        """(name, data bytes) of the member with header `block`, which itself says `name` and
        `size`; what waited is used up.
        """
        merged = self.shared | self.pax
        if any(key.startswith("GNU.sparse") for key in merged):
            raise ShardError(f"{where}: sparse members are not supported. {REMEDY}")
        name = merged.get("path", self.long_name if self.long_name is not None else name)
        if "size" in merged and block[156:157] not in _WITHOUT_DATA:
            digits = merged["size"]
            if not (digits.isascii() and digits.isdigit() and len(digits) < 20):
                raise ShardError(f"{where}: malformed PAX size. {REMEDY}")
            size = int(digits)
        self.pax, self.long_name = {}, None
        return name, size


def _header_at(data: mmap.mmap, position: int, path: Path) -> bytes | None:
    """The verified header block at `position`; None at a clean end of the archive."""
    block = data[position : position + _BLOCK]
    if len(block) < _BLOCK:
        raise ShardError(
            f"{path}: the shard is cut at byte {len(data)}, no end-of-archive mark. {REMEDY}"
        )
    if block == _ZERO:
        _check_end(data, position, path)
        return None
    if not _checksum_matches(block, f"{path}: byte {position}"):
        raise ShardError(f"{path}: byte {position}: wrong tar header checksum. {REMEDY}")
    return block


def walk(data: mmap.mmap, path: Path) -> Iterator[Member]:
    """Regular members of a tar in file order.

    Raises:
        ShardError: on any damage, an early end of the file included.
    """
    position = 0
    end = len(data)
    extended = _Extended()
    while (block := _header_at(data, position, path)) is not None:
        where = f"{path}: byte {position}"
        kind = block[156:157]
        start = position + _BLOCK
        if kind in _EXTENDED:
            name, size = "extended header", _number(block[124:136], where)
            if size > _MAX_EXTENDED:
                raise ShardError(f"{where}: an extended header of {size} bytes. {REMEDY}")
        elif kind not in _REGULAR and kind not in _WITHOUT_DATA:
            raise ShardError(f"{where}: members of type {kind!r} are not supported. {REMEDY}")
        else:
            name = _header_name(block)
            size = 0 if kind in _WITHOUT_DATA else _number(block[124:136], where)
            if extended.pax or extended.shared or extended.long_name is not None:
                name, size = extended.apply(block, name, size, where)
        if size < 0 or start + size > end:
            raise ShardError(f"{path}: the shard is cut inside member '{name}'. {REMEDY}")
        if kind in _EXTENDED:
            extended.take(kind, data[start : start + size], where)
        elif kind in _REGULAR and not name.endswith("/"):
            yield Member(name, start, size)
        position = start + -(-size // _BLOCK) * _BLOCK
    if extended.waiting:
        raise ShardError(f"{path}: the shard ends after an extended header. {REMEDY}")
