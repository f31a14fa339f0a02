"""Data folders wherever they lie: on a local disk, on a web server, in a bucket, behind a command.

A folder is opened once (`open_manifest`), its shards are read by position (`storage_for(...).open`
gives a `ShardFile`). Local shards are read by pread. Remote ones too, once they are in the local
cache; until then a sample is read by a range request, at once, while the whole shard is downloaded
in the background. Nothing is listed: a manifest, its shards and their indexes are all it takes.

A `Storage` may be pickled and may cross a fork; each process opens its own connections, threads
and cache when it first reads.
"""

from __future__ import annotations

import multiprocessing
import os
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from data_pipeline.cache import Entry, ShardCache
from data_pipeline.downloads import Downloads
from data_pipeline.index import ShardError, ShardIndex, load_index, open_index, parse_index
from data_pipeline.index_memory import IndexMemory
from data_pipeline.manifest import (
    MANIFEST_NAME,
    Manifest,
    keep_name,
    load_manifest,
    parse_manifest,
)
from data_pipeline.remote import Counters, Fetcher, RemoteOptions, TransientError, stale
from data_pipeline.sources import Source, in_cloud, is_remote, open_source, printable

__all__ = [
    "LocalStorage",
    "RemoteOptions",
    "RemoteStorage",
    "ShardFile",
    "Storage",
    "TransientError",
    "open_manifest",
    "storage_for",
]


class ShardFile(Protocol):
    """One shard, open for reading by position."""

    @property
    def name(self) -> str:
        """Path or URL, for messages; without credentials."""
        ...

    @property
    def index(self) -> ShardIndex:
        """Where its samples lie."""
        ...

    def read(self, offset: int, length: int) -> bytes:
        """Exactly `length` bytes.

        Raises:
            ShardError: the shard is not the one that was indexed.
            TransientError: the network gave out for good.
            FileNotFoundError, PermissionError, OSError: the shard is gone, or not ours to read.
        """
        ...

    def close(self) -> None:
        """Gives the file back. Closing twice is harmless."""
        ...


class Storage(Protocol):
    """Opens the shards of data folders. Picklable; may cross a fork."""

    def open(self, manifest: Manifest, shard: int) -> ShardFile:
        """A shard with its index, checked against the manifest. Errors as `ShardFile.read`."""
        ...

    def prefetch(self, manifest: Manifest, shards: Sequence[int]) -> None:
        """Says which shards will be read, in order, those in use now first.

        Replaces what was said before. Returns at once; for local shards it does nothing.
        """
        ...

    def counters(self) -> dict[str, int]:
        """What this process did (data_pipeline.remote.Counters); empty for local shards."""
        ...

    def close(self) -> None:
        """Ends threads and connections of this process; reading on opens them again."""
        ...


def _checked(index: ShardIndex, manifest: Manifest, shard: int) -> ShardIndex:
    """The index, if it is of the shard that the manifest lists."""
    line = manifest.shards[shard]
    if len(index) != line.samples or index.xxh3 != line.xxh3:
        raise ShardError(
            f"{index.name}: the index is of another version of the shard ({len(index)} samples, "
            f"the manifest says {line.samples}; hash {index.xxh3}, {line.xxh3}); "
            f"run: espalier data index {index.name.rpartition('/')[0] or '.'}"
        )
    return index


def _pread(descriptor: int, offset: int, length: int) -> bytes:
    """`length` bytes, or fewer at the end of the file."""
    raw = os.pread(descriptor, length, offset)
    if 0 < len(raw) < length:  # one call gives at most 2 GiB
        raw += _pread(descriptor, offset + len(raw), length - len(raw))
    return raw


# -- local ----------------------------------------------------------------------------------------


class _LocalShard:
    def __init__(self, path: Path, index: ShardIndex) -> None:
        self.name = str(path)
        self.index = index
        self._descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)

    def read(self, offset: int, length: int) -> bytes:
        raw = _pread(self._descriptor, offset, length)
        if len(raw) != length:
            raise ShardError(
                f"{self.name}: the shard became shorter while it was read; restore it, or run: "
                f"espalier data index {Path(self.name).parent}"
            )
        return raw

    def close(self) -> None:
        if self._descriptor >= 0:
            os.close(self._descriptor)
        self._descriptor = -1

    def __del__(self) -> None:
        if hasattr(self, "_descriptor"):
            self.close()


class LocalStorage:
    """Shards in folders of this machine."""

    def open(self, manifest: Manifest, shard: int) -> ShardFile:
        path = manifest.path(shard)
        return _LocalShard(path, _checked(load_index(path), manifest, shard))

    def prefetch(self, manifest: Manifest, shards: Sequence[int]) -> None:
        pass

    def counters(self) -> dict[str, int]:
        return {}

    def close(self) -> None:
        pass


# -- remote ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Process:
    """What one process has open. Never used by its children: they make their own."""

    pid: int
    source: Source
    counters: Counters
    fetcher: Fetcher
    cache: ShardCache | None
    downloads: Downloads | None
    indexes: IndexMemory = field(default_factory=IndexMemory)  # where there is no cache


class RemoteStorage:
    """Shards behind a URL or command. Made by `storage_for`.

    Args:
        location: with its credentials.   sleep: between tries (tests).
    """

    def __init__(
        self, location: str, options: RemoteOptions,
        sleep: Callable[[float], object] | None = None,
    ) -> None:  # fmt: skip
        self._location = location
        self._options = options
        self._sleep = sleep
        self._process: _Process | None = None

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_process": None}

    def process(self) -> _Process:
        """What this process has open, opened now if need be."""
        # After a fork the parent's things are left alone: their threads are not here, and their
        # connections and locks are the parent's.
        if self._process is None or self._process.pid != os.getpid():
            options, counters = self._options, Counters()
            source = open_source(self._location, options.timeout_s, options.allow_pipe)
            fetcher = Fetcher(source, options, counters, sleep=self._sleep or time.sleep)
            cache = downloads = None
            if options.cache_dir is not None:
                cache = ShardCache(options.cache_dir, _limit(options), counters)
                downloads = Downloads(cache, source, options, counters, self._sleep)
            self._process = _Process(os.getpid(), source, counters, fetcher, cache, downloads)
        return self._process

    def _entry(self, manifest: Manifest, shard: int) -> tuple[str, Entry]:
        line = manifest.shards[shard]
        url = self.process().source.url(line.name)
        return line.name, Entry(line.xxh3, line.bytes, url)

    def open(self, manifest: Manifest, shard: int) -> ShardFile:
        name, entry = self._entry(manifest, shard)
        return _RemoteShard(self, name, entry, self._index(manifest, shard, name, entry))

    def _index(self, manifest: Manifest, shard: int, name: str, entry: Entry) -> ShardIndex:
        process = self.process()

        def fetch() -> bytes:
            try:
                return process.fetcher.read(f"{name}.idx")
            except FileNotFoundError as error:
                raise FileNotFoundError(
                    f"{error}: a remote shard needs its index beside it; run 'espalier data index' "
                    "on the folder and copy it whole"
                ) from None

        def load(path: Path) -> ShardIndex:
            return _checked(open_index(path, entry.label, entry.bytes), manifest, shard)

        if process.cache is None:
            index = process.indexes.get(name)
            if index is None:
                raw = fetch()
                parsed = parse_index(raw, f"{entry.label}.idx", entry.label, entry.bytes)
                index = _checked(parsed, manifest, shard)
                process.indexes.put(name, index, len(raw))
            return index
        try:
            return load(process.cache.index(entry, fetch))
        except ShardError:
            # The cached one may be of an older version of this program: once more, from the source.
            process.cache.drop_index(entry)
            return load(process.cache.index(entry, fetch))

    def prefetch(self, manifest: Manifest, shards: Sequence[int]) -> None:
        process = self.process()
        if process.downloads is not None:
            process.downloads.plan([self._entry(manifest, shard) for shard in shards])
        process.indexes.keep(manifest.shards[shard].name for shard in shards)

    def counters(self) -> dict[str, int]:
        return self.process().counters.as_dict()

    def close(self) -> None:
        process, self._process = self._process, None
        if process is not None and process.pid == os.getpid():
            if process.downloads is not None:
                process.downloads.close()
            process.source.close()

    def __del__(self) -> None:
        if getattr(self, "_process", None) is not None:
            self.close()


class _RemoteShard:
    def __init__(self, storage: RemoteStorage, name: str, entry: Entry, index: ShardIndex) -> None:
        self.name = entry.label
        self.index = index
        self._storage = storage
        self._file = name
        self._entry = entry
        self._version = entry.version()

    def read(self, offset: int, length: int) -> bytes:
        if offset + length > self._entry.bytes:
            raise stale(self.name, f"a sample ends at {offset + length} of {self._entry.bytes}")
        if length == 0:
            return b""
        process = self._storage.process()
        if process.cache is not None and process.downloads is not None:
            if not process.source.ranges:
                # A command prints a shard from its beginning: nothing but the whole will do.
                deadline = process.fetcher.options.deadline_s
                with process.cache.filled(self._entry, self._whole, deadline) as descriptor:
                    return _pread(descriptor, offset, length)
            with process.cache.opened(self._entry) as descriptor:
                if descriptor is not None:
                    return _pread(descriptor, offset, length)
            process.downloads.demand(self._file, self._entry)
        return process.fetcher.read(self._file, offset, offset + length, self._version)

    def _whole(self, start: int) -> Iterator[bytes]:
        fetcher = self._storage.process().fetcher
        return fetcher.stream(self._file, start, None, self._version)

    def close(self) -> None:
        pass  # nothing is held between reads: an idle reader must not keep a shard from eviction


def _limit(options: RemoteOptions) -> int:
    return int(options.cache_gb * 1e9)


# -- opening --------------------------------------------------------------------------------------


def _read_manifest(
    location: str, options: RemoteOptions, sleep: Callable[[float], object] = time.sleep
) -> tuple[bytes, bytes | None]:
    """manifest.json and its filter, as bytes."""
    source = open_source(location, options.timeout_s, options.allow_pipe)
    fetcher = Fetcher(source, options, Counters(), sleep=sleep)
    try:
        raw = fetcher.read(MANIFEST_NAME)
        name = keep_name(raw, printable(location))
        return raw, None if name is None else fetcher.read(name)
    except FileNotFoundError as error:
        raise FileNotFoundError(
            f"{error}: a data folder needs its {MANIFEST_NAME}; run 'espalier data index' on the "
            "folder and copy it whole"
        ) from None
    finally:
        source.close()


def open_manifest(
    location: str | Path, options: RemoteOptions, sleep: Callable[[float], object] = time.sleep
) -> Manifest:
    """The manifest of a data folder given as a path, URL or command (see data_pipeline.sources).

    The location that a remote manifest carries is without credentials: it appears in messages.

    Raises:
        FileNotFoundError: no folder or manifest.
        ValueError: unknown scheme, or a command without data.remote.allow_pipe.
        ShardError: the manifest is damaged, or of another version.
        TransientError: the server cannot be reached.   PermissionError: it refuses.
    """
    if isinstance(location, Path) or not is_remote(location):
        return load_manifest(Path(location))
    open_source(location, options.timeout_s, options.allow_pipe)  # bad settings, before the rest
    if in_cloud(location):
        # Here obstore would leave threads behind that make it hang in forked data workers.
        context = multiprocessing.get_context("spawn")
        with ProcessPoolExecutor(1, mp_context=context) as pool:
            raw, keep = pool.submit(_read_manifest, location, options).result()
    else:
        raw, keep = _read_manifest(location, options, sleep)
    return parse_manifest(raw, printable(location), keep)


def storage_for(
    manifest: Manifest, options: RemoteOptions, location: str | Path | None = None
) -> Storage:
    """What reads the shards of a manifest.

    Args:
        location: as given to `open_manifest`; needed where it carries credentials or is a command.

    Raises:
        ValueError: the cache cannot hold the largest shard, or a command has no cache.
        OSError: the cache folder cannot be made or written.
    """
    place = str(manifest.location if location is None else location)
    if not is_remote(place):
        return LocalStorage()
    source = open_source(place, options.timeout_s, options.allow_pipe)
    if options.cache_dir is None:
        if not source.ranges:
            raise ValueError(
                f"{printable(place)}: a command gives whole shards; set data.remote.cache to a folder "
                "on a local disk"
            )
        return RemoteStorage(place, options)
    largest = max(manifest.shards, key=lambda shard: shard.bytes)
    if largest.bytes > _limit(options):
        raise ValueError(
            f"data.remote.cache_gb={options.cache_gb:g} is too small for one shard: {largest.name} of "
            f"{printable(place)} has {largest.bytes / 1e9:.3g} GB; raise it, or set "
            "data.remote.cache to none"
        )
    ShardCache(options.cache_dir, _limit(options), Counters())  # its folder, before a worker does
    return RemoteStorage(place, options)
