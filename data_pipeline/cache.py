"""Whole shards on the local disk, shared by all processes of a machine, within a size limit.

Files are named by content, <xxh3>-<bytes>.tar, so an old version of a shard is never taken for the
new one, and two manifests share what they have in common. States of a shard:

    X.tar.part  being downloaded; locked exclusively (flock) by the process that does. Unlocked, it
                is what a killed download left behind, and the next download goes on from there.
    X.tar       whole: size and hash were checked and the data synced before the rename. Readers
                hold a shared lock, eviction needs an exclusive one: a file in use is never removed.
    X.tar.idx   the shard's index.

The size limit is kept under one more lock (`lock` in the folder); names change only under it. A
part counts with its full size, which its name tells: no other record is needed, and nothing is left
to repair after kill -9. The least recently used goes first; use is recorded by os.utime, which
works where noatime is set. Locks belong to open files and end with the process. The folder must be
on a local disk.
"""

from __future__ import annotations

import errno
import fcntl
import os
import re
import time
from collections.abc import Callable, Container, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from enum import Enum
from pathlib import Path

import xxhash

from data_pipeline.locks import Held, flock, locked
from data_pipeline.remote import Counters, Version, stale
from data_pipeline.tar_headers import ShardError

__all__ = ["Entry", "Filled", "ShardCache"]

_OURS = re.compile(r"([0-9a-f]{16}-(\d+))\.tar(\.idx|\.part|\.idx\.part|)")
_CHUNK = 1 << 20
_POLL_S = 0.05


class Filled(Enum):
    """How an attempt to bring a shard into the cache ended."""

    READY = "ready"  # it is there: by this call, or it was already
    BUSY = "busy"  # another process or thread is at it
    FULL = "full"  # everything else is in use or wanted


@dataclass(frozen=True)
class Entry:
    """A shard as the manifest describes it. `label`: what messages call it."""

    xxh3: str
    bytes: int
    label: str

    def __post_init__(self) -> None:
        # It becomes a file name, and it comes from a file that was downloaded.
        if not re.fullmatch(r"[0-9a-f]{16}", self.xxh3) or self.bytes < 0:
            raise ShardError(f"{self.label}: the manifest has a damaged hash or size for it")

    @property
    def name(self) -> str:
        """Its file in the cache folder."""
        return f"{self.xxh3}-{self.bytes}.tar"

    def version(self) -> Version:
        """What a server must send."""
        return Version(self.bytes)


def _write_all(descriptor: int, chunk: bytes) -> None:
    view = memoryview(chunk)
    while view:
        view = view[os.write(descriptor, view) :]


class ShardCache:
    """The cache folder, as one process sees it.

    Args:
        limit: bytes of everything in the folder, downloads in progress included.

    Raises:
        OSError: the folder cannot be made or written.
    """

    def __init__(
        self, folder: Path, limit: int, counters: Counters,
        sleep: Callable[[float], object] = time.sleep,
    ) -> None:  # fmt: skip
        folder.mkdir(parents=True, exist_ok=True)
        if not os.access(folder, os.W_OK):
            raise PermissionError(
                f"{folder}: the cache folder (data.remote.cache) cannot be written"
            )
        self.folder = folder
        self.limit = limit
        self.counters = counters
        self._sleep = sleep
        self._downloaded: set[str] = set()

    # -- reading

    @contextmanager
    def opened(self, entry: Entry) -> Iterator[int | None]:
        """A descriptor of the shard, safe from eviction while open; None if it is not there."""
        held = self._open(entry)
        self.counters.add("cache_misses" if held is None else "cache_hits")
        try:
            yield None if held is None else held.descriptor
        finally:
            if held is not None:
                held.close()

    def _open(self, entry: Entry) -> Held | None:
        path = self.folder / entry.name
        try:
            held = Held(os.open(path, os.O_RDONLY | os.O_CLOEXEC))
        except FileNotFoundError:
            return None
        # Taken exclusively means: being removed.
        if flock(held.descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB):
            if os.fstat(held.descriptor).st_size == entry.bytes:
                os.utime(held.descriptor)
                return held
            path.unlink(missing_ok=True)  # cut by other hands; a download brings it back
        held.close()
        return None

    # -- filling

    def fill(
        self,
        entry: Entry,
        stream: Callable[[int], Iterator[bytes]],
        keep: Container[str] = (),
    ) -> Filled:
        """Downloads a shard unless it is there, a download is under way, or there is no room.

        Args:
            stream: gives the shard's bytes from a position to its end.
            keep: names (`Entry.name`) that must not make room.

        Raises:
            ShardError: size or hash are not the manifest's.
            OSError: the disk is full. And what `stream` raises; a later call then goes on.
        """
        with suppress(FileNotFoundError):
            os.utime(self.folder / entry.name)  # wanted again: it stays
            return Filled.READY
        part = self.folder / f"{entry.name}.part"
        with self._reserve(entry, part, keep) as held:
            if not isinstance(held, Held):
                return held
            self._download(entry, stream, part, held.descriptor)
            self.counters.add("downloads")
            if entry.name in self._downloaded:
                self.counters.add("downloads_again")
            self._downloaded.add(entry.name)
            self._publish(part, self.folder / entry.name)
        return Filled.READY

    @contextmanager
    def filled(
        self, entry: Entry, stream: Callable[[int], Iterator[bytes]], patience_s: float
    ) -> Iterator[int]:
        """Like `opened`, but waits until the shard is there. Errors as in `fill`, and

        Raises:
            OSError: no room for `patience_s`.
        """
        waited = 0.0
        while True:
            with self.opened(entry) as descriptor:
                if descriptor is not None:
                    yield descriptor
                    return
            outcome = self.fill(entry, stream)
            if outcome is Filled.READY:
                continue
            if waited > patience_s:
                raise OSError(
                    f"{self.folder}: no room for {entry.label} for {patience_s:.0f} s: "
                    "everything else is in use; raise data.remote.cache_gb"
                )
            self._sleep(_POLL_S)
            waited += _POLL_S if outcome is Filled.FULL else 0.0

    @contextmanager
    def _reserve(self, entry: Entry, part: Path, keep: Container[str]) -> Iterator[Held | Filled]:
        """The locked part file with room for all of the shard; or why not."""
        with ExitStack() as stack:
            with locked(self.folder / "lock"):
                held = stack.enter_context(locked(part, fcntl.LOCK_EX | fcntl.LOCK_NB))
                outcome = self._prepare(entry, held, keep)
                if outcome is Filled.READY or (outcome is Filled.FULL and not part.stat().st_size):
                    part.unlink()
            # The folder is free for others while this shard is downloaded.
            yield outcome or held or Filled.BUSY

    def _prepare(self, entry: Entry, held: Held | None, keep: Container[str]) -> Filled | None:
        if held is None:
            return Filled.BUSY
        if (self.folder / entry.name).exists():
            return Filled.READY
        if self._make_room(entry, keep):
            return None
        self.counters.add("cache_full")
        return Filled.FULL

    def _make_room(self, entry: Entry, keep: Container[str]) -> bool:
        """Removes the least recently used until `entry` fits. Under the folder's lock."""
        total, files = 0, []
        for item in os.scandir(self.folder):
            match = _OURS.fullmatch(item.name)
            if match is None:
                continue
            try:
                status = item.stat()
            except FileNotFoundError:
                continue  # a reader found it damaged
            kind = match[3]
            size = int(match[2]) if kind == ".part" else status.st_size
            total += size
            if match[1] + ".tar" != entry.name:
                # Shards before indexes: those are small, and needed to read without the shard.
                files.append((kind == ".idx", status.st_mtime_ns, size, item.name))
        for _, _, size, name in sorted(files):
            if total <= self.limit:
                break
            if name not in keep and self._remove(name):
                total -= size
        return total <= self.limit

    def _remove(self, name: str) -> bool:
        """Removes a file unless it is in use (parts: being downloaded)."""
        path = self.folder / name
        try:
            held = Held(os.open(path, os.O_RDONLY | os.O_CLOEXEC))
        except FileNotFoundError:
            return True
        try:
            if not flock(held.descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB):
                return False
            path.unlink(missing_ok=True)
        finally:
            held.close()
        if name.endswith(".tar"):
            self.counters.add("evictions")
        return True

    def _download(
        self, entry: Entry, stream: Callable[[int], Iterator[bytes]], part: Path, descriptor: int
    ) -> None:
        """Fills the part file, beginning with what it has, and checks it."""
        resumed = os.fstat(descriptor).st_size > 0
        with self._disk_full(part):
            found = self._write(entry, stream, descriptor)
            if found != entry.xxh3 and resumed:
                # The beginning is of an earlier run: it may be what is wrong.
                os.ftruncate(descriptor, 0)
                found = self._write(entry, stream, descriptor)
            os.fsync(descriptor)
        if found != entry.xxh3:
            part.unlink(missing_ok=True)
            raise stale(entry.label, f"its content hash is {found}, expected {entry.xxh3}")

    @contextmanager
    def _disk_full(self, part: Path) -> Iterator[None]:
        """Says what to do when the disk is full, and leaves it less full."""
        try:
            yield
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EDQUOT):
                raise
            part.unlink(missing_ok=True)
            raise OSError(
                error.errno,
                f"{self.folder}: the disk of the cache is full; lower data.remote.cache_gb, "
                "or set data.remote.cache to another disk",
            ) from None

    def _write(
        self, entry: Entry, stream: Callable[[int], Iterator[bytes]], descriptor: int
    ) -> str:
        """Appends what is missing; the hash of the whole, or of too much."""
        digest = xxhash.xxh3_64()
        have = 0
        while chunk := os.pread(descriptor, _CHUNK, have):
            digest.update(chunk)
            have += len(chunk)
        os.lseek(descriptor, have, os.SEEK_SET)
        if have < entry.bytes:
            for chunk in stream(have):
                have += len(chunk)
                if have > entry.bytes:
                    raise stale(entry.label, f"more than {entry.bytes} bytes")
                digest.update(chunk)
                _write_all(descriptor, chunk)
            if have < entry.bytes:
                raise stale(entry.label, f"{have} bytes, expected {entry.bytes}")
        return digest.hexdigest()

    # -- indexes

    def index(self, entry: Entry, fetch: Callable[[], bytes]) -> Path:
        """The index file of a shard, fetched when it is not there; one process does, others wait.

        It is not checked: see `drop_index`.
        """
        path = self.folder / f"{entry.name}.idx"
        if not path.exists():
            part = self.folder / f"{entry.name}.idx.part"
            with locked(part) as held:
                assert held is not None  # it waits
                if path.exists():
                    part.unlink()
                else:
                    content = fetch()
                    with self._disk_full(part):
                        os.ftruncate(held.descriptor, 0)
                        _write_all(held.descriptor, content)
                        os.fsync(held.descriptor)
                    self._publish(part, path)
        return path

    def drop_index(self, entry: Entry) -> None:
        """Removes an index that cannot be used."""
        (self.folder / f"{entry.name}.idx").unlink(missing_ok=True)

    def _publish(self, part: Path, path: Path) -> None:
        """Gives a complete file its name, for good."""
        # Under the folder's lock: a listing may miss a file that is renamed meanwhile, and what is
        # not counted would let the cache grow beyond its limit.
        with locked(self.folder / "lock"):
            part.rename(path)
        descriptor = os.open(self.folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
