"""Reading remote files through faults: patient, exact, and never silent.

`Fetcher.stream` gives the bytes of a file in order, whatever happens on the way: after a fault it
waits (exponential back-off with jitter, or as long as Retry-After says) and goes on at the byte
where it was cut off. What may pass is tried again (connection, reset, 5xx, 429, short body,
time-out); when patience ends, TransientError ends the run, which resumes exactly. It must never
lead to a substitute sample: the order of training would depend on the weather. A file that is not
the one the manifest describes is a ShardError at once.
"""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

from data_pipeline.sources import Answer, Changed, Source, TransientFault
from data_pipeline.tar_headers import ShardError

__all__ = ["COUNTERS", "Counters", "Fetcher", "RemoteOptions", "TransientError", "Version"]

# Patience starts anew with every such amount of bytes: a long download may meet many faults.
_PROGRESS = 1 << 20
_FIRST_WAIT_S = 0.5
_LONGEST_WAIT_S = 30.0

COUNTERS: tuple[str, ...] = (
    "requests",
    "retries",
    "bytes",
    "cache_hits",
    "cache_misses",
    "downloads",
    "downloads_again",
    "downloads_failed",
    "cache_full",
    "evictions",
)


class TransientError(OSError):
    """Trying again did not help. Never answered by a substitute sample."""


@dataclass(frozen=True)
class RemoteOptions:
    """How remote data are read.

    Attributes:
        cache_dir: folder on a local disk for whole shards, shared by all processes of the machine;
            None reads every sample by a range request.
        cache_gb: size limit of that folder, in 10^9 bytes.
        retries: further tries after a fault, without a MiB of progress.
        timeout_s: of a connection, and of each wait for data.
        deadline_s: longest time without a MiB of progress.
        allow_pipe: whether a data folder may be a command (pipe:COMMAND {name}).
    """

    cache_dir: Path | None = None
    cache_gb: float = 50.0
    retries: int = 8
    timeout_s: float = 30.0
    deadline_s: float = 600.0
    allow_pipe: bool = False

    def __post_init__(self) -> None:
        for name in ("cache_gb", "timeout_s", "deadline_s"):
            if not getattr(self, name) > 0:
                raise ValueError(f"data.remote.{name} must be positive, is {getattr(self, name)}")
        if self.retries < 0:
            raise ValueError(f"data.remote.retries must not be negative, is {self.retries}")


class Counters:
    """What this process did. Threads may add at once.

    requests, retries, bytes (received); cache_hits, cache_misses (reads from the cache, and by
    range request); downloads, downloads_again (of a shard that was evicted since: the cache is too
    small for the window of the order), downloads_failed (transient, tried again at the next miss),
    cache_full (no room for a download), evictions.
    """

    def __init__(self) -> None:
        self._values: dict[str, int] = dict.fromkeys(COUNTERS, 0)
        self._lock = threading.Lock()

    def add(self, name: str, amount: int = 1) -> None:
        """Adds to a counter."""
        with self._lock:
            self._values[name] += amount

    def as_dict(self) -> dict[str, int]:
        """A copy."""
        with self._lock:
            return dict(self._values)


@dataclass
class Version:
    """Which file is meant. Filled in by the first answer; a later one must agree.

    Attributes:
        size: bytes, None while unknown.   etag: "" while unknown.
    """

    size: int | None = None
    etag: str = ""


class _Patience:
    """Counts the tries of one stream and waits between them."""

    def __init__(self, fetcher: Fetcher, url: str) -> None:
        self._fetcher = fetcher
        self._url = url
        self._restart()

    def _restart(self) -> None:
        self._tries = 0
        self._fresh = 0
        self._began = self._fetcher.clock()

    def progress(self, received: int) -> None:
        """Bytes came. Patience is new with every MiB; less than that must not take for ever."""
        self._fresh += received
        if self._fresh >= _PROGRESS:
            self._restart()
        elif self._fetcher.clock() - self._began > self._fetcher.options.deadline_s:
            raise TransientFault("too slow")

    def failed(self, fault: TransientFault) -> None:
        """Waits before the next try.

        Raises:
            TransientError: there is none.
        """
        self._tries += 1
        options = self._fetcher.options
        spent = self._fetcher.clock() - self._began
        longest = min(_LONGEST_WAIT_S, _FIRST_WAIT_S * 2 ** min(self._tries - 1, 10))
        wait = max(longest * random.uniform(0.5, 1.0), fault.retry_after)
        if self._tries > options.retries or spent + wait > options.deadline_s:
            asked = f", which asks to wait {fault.retry_after:.0f} s" if fault.retry_after else ""
            tries = "1 try" if self._tries == 1 else f"{self._tries} tries"
            raise TransientError(
                f"{self._url}: gave up after {tries} in {spent:.0f} s; last cause: {fault.cause}"
                f"{asked}. When the server and the network are well, start the run again: it "
                "resumes where it was (keys data.remote.retries, data.remote.deadline_s)"
            )
        self._fetcher.counters.add("retries")
        self._fetcher.sleep(wait)


class Fetcher:
    """Reads files of a source, going on at the byte offset after a fault.

    Args:
        sleep, clock: replaced in tests, and by background threads that can be stopped.
    """

    def __init__(
        self, source: Source, options: RemoteOptions, counters: Counters, *,
        sleep: Callable[[float], object] = time.sleep, clock: Callable[[], float] = time.monotonic,
    ) -> None:  # fmt: skip
        self.source = source
        self.options = options
        self.counters = counters
        self.sleep = sleep
        self.clock = clock

    def read(
        self, name: str, start: int = 0, stop: int | None = None, version: Version | None = None
    ) -> bytes:
        """Bytes start..stop of a file as one object. Errors as in `stream`."""
        return b"".join(self.stream(name, start, stop, version))

    def stream(
        self, name: str, start: int = 0, stop: int | None = None, version: Version | None = None
    ) -> Iterator[bytes]:
        """Bytes start..stop of a file (to its end without stop) in order, each once.

        Args:
            version: what is known of the file; filled in and compared.

        Raises:
            TransientError: faults that did not pass.
            ShardError: the file has another size or tag than `version`.
            FileNotFoundError, PermissionError, OSError: not worth another try.
        """
        version = version or Version()
        self._check_end(name, stop, version)
        patience = _Patience(self, self.source.url(name))
        position = start
        while stop is None or position < stop:
            try:
                for chunk in self._once(name, position, stop, version):
                    position += len(chunk)
                    self.counters.add("bytes", len(chunk))
                    patience.progress(len(chunk))
                    yield chunk
                end = version.size if stop is None else stop
                if end is None or position >= end:
                    return
                raise TransientFault(f"short body: ended at byte {position} of {end}")
            except TransientFault as fault:
                patience.failed(fault)

    def _once(self, name: str, start: int, stop: int | None, version: Version) -> Iterator[bytes]:
        """What one request gives of start..stop."""
        self.counters.add("requests")
        try:
            answer = self.source.get(name, start, stop, version.etag)
        except Changed as error:
            raise self._stale(name, str(error)) from None
        with closing(answer):
            self._compare(name, answer, version)
            self._check_end(name, stop, version)
            position = answer.start
            for chunk in answer.chunks:
                begin, position = position, position + len(chunk)
                if begin < start:  # the range was ignored
                    chunk = chunk[start - begin :]
                if stop is not None and position > stop:
                    chunk = chunk[: len(chunk) - (position - stop)]
                if chunk:
                    yield chunk
                if stop is not None and position >= stop:
                    return

    def _check_end(self, name: str, stop: int | None, version: Version) -> None:
        if stop is not None and version.size is not None and stop > version.size:
            raise self._stale(name, f"byte {stop} is wanted of a file of {version.size} bytes")

    def _compare(self, name: str, answer: Answer, version: Version) -> None:
        """Is it still the same file?"""
        if answer.total is not None:
            if version.size not in (None, answer.total):
                raise self._stale(name, f"{answer.total} bytes, expected {version.size}")
            version.size = answer.total
        if answer.etag:
            if version.etag not in ("", answer.etag):
                raise self._stale(name, "its entity tag changed while it was read")
            version.etag = answer.etag

    def _stale(self, name: str, what: str) -> ShardError:
        return stale(self.source.url(name), what)


def stale(url: str, what: str) -> ShardError:
    """The error for a remote file that is not the one the manifest and the index describe."""
    return ShardError(
        f"{url}: stale index: {what}. The file was changed after the folder was indexed: restore "
        "it, or run 'espalier data index' on the folder and copy it whole"
    )
