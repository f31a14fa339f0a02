"""The shared cache: nothing half done is ever read, nothing in use is ever removed."""

from __future__ import annotations

import errno
import fcntl
import json
import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterator
from multiprocessing.process import BaseProcess
from pathlib import Path

import pytest
import xxhash

from data_pipeline.cache import Entry, Filled, ShardCache
from data_pipeline.remote import Counters, Fetcher, RemoteOptions, TransientError
from data_pipeline.sources import open_source
from data_pipeline.tar_headers import ShardError
from tests.loopback import Drip, Loopback

SIZE = 40_000
FORK = multiprocessing.get_context("fork")


def content(number: int, size: int = SIZE) -> bytes:
    return xxhash.xxh3_128_digest(bytes([number])) * (size // 16)


def entry(number: int, size: int = SIZE) -> Entry:
    data = content(number, size)
    return Entry(xxhash.xxh3_64_hexdigest(data), len(data), f"http://host/{number}.tar")


class Stream:
    """Gives a shard's bytes from a position, in small chunks; records the positions."""

    def __init__(self, data: bytes, stop: int | None = None, error: Exception | None = None):
        self.data, self.stop, self.error = data, stop, error
        self.starts: list[int] = []

    def __call__(self, start: int) -> Iterator[bytes]:
        self.starts.append(start)
        end = len(self.data) if self.stop is None else self.stop
        for at in range(start, end, 1000):
            yield self.data[at : min(at + 1000, end)]
        if self.error is not None:
            raise self.error


@pytest.fixture
def make(tmp_path: Path) -> Callable[..., ShardCache]:
    """make(shards) -> a cache with room for so many, in one folder."""

    def make(shards: float = 2.0) -> ShardCache:
        return ShardCache(tmp_path / "cache", int(shards * SIZE), Counters())

    return make


def names(cache: ShardCache) -> set[str]:
    return {path.name for path in cache.folder.iterdir()} - {"lock"}


def read(cache: ShardCache, wanted: Entry) -> bytes | None:
    with cache.opened(wanted) as descriptor:
        return None if descriptor is None else os.pread(descriptor, wanted.bytes + 1, 0)


def age(cache: ShardCache, number: int, seconds: int) -> None:
    os.utime(cache.folder / entry(number).name, (seconds, seconds))


def test_a_shard_is_fetched_once_and_read_whole(make) -> None:
    cache, stream = make(), Stream(content(1))
    assert read(cache, entry(1)) is None
    assert cache.fill(entry(1), stream) is Filled.READY
    assert cache.fill(entry(1), stream) is Filled.READY
    assert read(cache, entry(1)) == content(1)
    assert stream.starts == [0] and names(cache) == {entry(1).name}
    counts = cache.counters.as_dict()
    assert (counts["downloads"], counts["cache_hits"], counts["cache_misses"]) == (1, 1, 1)


def test_what_an_interrupted_download_left_is_used(make) -> None:
    cache = make()
    with pytest.raises(TransientError):
        cache.fill(entry(1), Stream(content(1), stop=7500, error=TransientError("gone")))
    assert names(cache) == {entry(1).name + ".part"}
    assert read(cache, entry(1)) is None
    stream = Stream(content(1))
    assert make().fill(entry(1), stream) is Filled.READY
    assert stream.starts == [7500] and read(cache, entry(1)) == content(1)


def test_a_damaged_left_over_is_thrown_away(make) -> None:
    cache, stream = make(), Stream(content(1))
    (cache.folder / f"{entry(1).name}.part").write_bytes(b"x" * 5000)
    cache.fill(entry(1), stream)
    assert stream.starts == [5000, 0] and read(cache, entry(1)) == content(1)
    cache, stream = make(), Stream(content(2))
    (cache.folder / f"{entry(2).name}.part").write_bytes(b"x" * (SIZE + 5000))
    cache.fill(entry(2), stream)
    assert stream.starts == [0] and read(cache, entry(2)) == content(2)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (content(2), "content hash is .* expected"),
        (content(1)[:-16], f"{SIZE - 16} bytes, expected {SIZE}"),
        (content(1) + b"more", f"more than {SIZE} bytes"),
    ],
)
def test_another_content_is_a_stale_index(make, data: bytes, message: str) -> None:
    cache = make()
    with pytest.raises(ShardError, match=f"http://host/1.tar: stale index: .*{message}"):
        cache.fill(entry(1), Stream(data))
    assert read(cache, entry(1)) is None and entry(1).name not in names(cache)


def test_a_shard_that_was_cut_on_disk_is_fetched_again(make) -> None:
    cache, stream = make(), Stream(content(1))
    cache.fill(entry(1), stream)
    os.truncate(cache.folder / entry(1).name, 100)
    assert read(cache, entry(1)) is None
    cache.fill(entry(1), stream)
    assert stream.starts == [0, 0] and read(cache, entry(1)) == content(1)


# -- room -------------------------------------------------------------------------------------------


def test_the_least_recently_used_makes_room(make) -> None:
    cache = make(2.5)
    (cache.folder / "notes.txt").write_bytes(b"x" * SIZE)  # not ours: neither counted nor removed
    for number in (1, 2):
        cache.fill(entry(number), Stream(content(number)))
        age(cache, number, 1000 + number)
    assert read(cache, entry(1)) is not None  # 2 is the older one now
    cache.fill(entry(3), Stream(content(3)))
    assert names(cache) == {entry(1).name, entry(3).name, "notes.txt"}
    assert cache.counters.as_dict()["evictions"] == 1


def test_asking_for_a_cached_shard_counts_as_use(make) -> None:
    cache = make(2)
    for number in (1, 2):
        cache.fill(entry(number), Stream(content(number)))
        age(cache, number, 1000 + number)
    cache.fill(entry(1), Stream(b""))
    cache.fill(entry(3), Stream(content(3)))
    assert names(cache) == {entry(1).name, entry(3).name}


def test_a_shard_in_use_stays(make) -> None:
    cache = make(1)
    cache.fill(entry(1), Stream(content(1)))
    with cache.opened(entry(1)) as descriptor:
        assert make(1).fill(entry(2), Stream(content(2))) is Filled.FULL
        assert os.pread(descriptor, 10, 0) == content(1)[:10]
    assert names(cache) == {entry(1).name}
    assert make(1).fill(entry(2), Stream(content(2))) is Filled.READY
    assert names(cache) == {entry(2).name}


def test_what_is_planned_stays(make) -> None:
    cache = make(2)
    for number in (1, 2):
        cache.fill(entry(number), Stream(content(number)))
        age(cache, number, 1000 + number)
    cache.fill(entry(3), Stream(content(3)), keep={entry(1).name})
    assert names(cache) == {entry(1).name, entry(3).name}
    kept = {entry(1).name, entry(3).name}
    assert cache.fill(entry(4), Stream(content(4)), keep=kept) is Filled.FULL


def test_left_overs_make_room_and_indexes_last(make) -> None:
    cache = make(2)
    dead = cache.folder / f"{entry(1).name}.part"
    dead.write_bytes(b"x")
    os.utime(dead, (1, 1))
    index = cache.index(entry(2), lambda: b"i" * 100)
    os.utime(index, (0, 0))
    assert cache.fill(entry(2), Stream(content(2))) is Filled.READY
    assert names(cache) == {entry(2).name, index.name}
    cache.fill(entry(3), Stream(content(3)))
    assert names(cache) == {entry(3).name, index.name}


def test_a_download_in_progress_counts_in_full(make) -> None:
    cache, other = make(1.5), make(1.5)
    outcomes = []

    def stream(start: int) -> Iterator[bytes]:
        yield content(1)[:1000]
        outcomes.append(other.fill(entry(1), Stream(content(1))))
        outcomes.append(other.fill(entry(2), Stream(content(2))))
        yield content(1)[1000:]

    assert cache.fill(entry(1), stream) is Filled.READY
    assert outcomes == [Filled.BUSY, Filled.FULL]
    assert names(cache) == {entry(1).name}


def test_a_full_disk_is_named(make) -> None:
    cache = make()
    with pytest.raises(OSError, match="data.remote.cache_gb") as caught:
        cache.fill(entry(1), Stream(content(1), 5000, OSError(errno.ENOSPC, "No space")))
    assert caught.value.errno == errno.ENOSPC and names(cache) == set()


def test_waiting_for_room_ends(make) -> None:
    cache = ShardCache(make(1).folder, SIZE, Counters(), sleep=lambda seconds: None)
    cache.fill(entry(1), Stream(content(1)))
    with (
        cache.opened(entry(1)),
        pytest.raises(OSError, match="no room for http://host/2.tar for 3 s"),
        cache.filled(entry(2), Stream(content(2)), 3.0),
    ):
        pass
    with cache.filled(entry(2), Stream(content(2)), 3.0) as descriptor:
        assert os.pread(descriptor, SIZE, 0) == content(2)


@pytest.mark.parametrize("xxh3", ["../../etc/passwd", "ABCDEF0123456789", ""])
def test_a_manifest_cannot_name_files_elsewhere(xxh3: str) -> None:
    with pytest.raises(ShardError, match="damaged hash"):
        Entry(xxh3, 10, "http://host/1.tar")


# -- indexes ----------------------------------------------------------------------------------------


def test_an_index_is_fetched_once(make) -> None:
    cache = make()
    calls = []

    def fetch() -> bytes:
        calls.append(1)
        return b"index"

    for _ in range(2):
        assert cache.index(entry(1), fetch).read_bytes() == b"index"
    cache.drop_index(entry(1))
    cache.index(entry(1), fetch)
    assert len(calls) == 2 and names(cache) == {f"{entry(1).name}.idx"}


# -- processes --------------------------------------------------------------------------------------


def spawn(function: Callable[..., object], *arguments: object) -> BaseProcess:
    def run() -> None:
        try:
            function(*arguments)
            os._exit(0)
        except BaseException:
            import traceback

            traceback.print_exc()
            os._exit(1)

    process = FORK.Process(target=run)
    process.start()
    return process


def downloader(url: str, options: RemoteOptions, counters: Counters):
    source = open_source(url, options.timeout_s)
    fetch = Fetcher(source, options, counters)
    return lambda number: (
        lambda start: fetch.stream(f"{number}.tar", start, None, entry(number).version())
    )


def test_kill_9_in_a_download_loses_nothing(make) -> None:
    cache = make()
    arrived, release = threading.Event(), threading.Event()

    def between() -> None:
        arrived.set()
        release.wait(30)

    with Loopback({"1.tar": content(1)}) as server:
        server.script("1.tar", Drip(SIZE // 2, between))
        streams = downloader(server.url, RemoteOptions(), Counters())
        part = cache.folder / f"{entry(1).name}.part"
        process = spawn(lambda: cache.fill(entry(1), streams(1)))
        assert arrived.wait(30)
        while not part.exists() or part.stat().st_size < SIZE // 2:
            assert process.is_alive()
        # Not only busy for this process: the lock is the other one's.
        assert cache.fill(entry(1), streams(1)) is Filled.BUSY
        os.kill(process.pid or 0, signal.SIGKILL)
        process.join()
        release.set()
        assert cache.fill(entry(1), streams(1)) is Filled.READY
        assert read(cache, entry(1)) == content(1)
        assert [request.range for request in server.requests] == [None, (SIZE // 2, None)]


def test_a_child_does_not_inherit_locks(make) -> None:
    cache = make(1)
    cache.fill(entry(1), Stream(content(1)))
    gate, done = FORK.Event(), FORK.Event()
    with cache.opened(entry(1)):
        process = spawn(lambda: (gate.set(), done.wait(30)))
        assert gate.wait(30)
    try:
        assert cache.fill(entry(2), Stream(content(2))) is Filled.READY
    finally:
        done.set()
        process.join()
    assert process.exitcode == 0


@pytest.mark.parametrize("room", [6, 2])
def test_eight_processes_share_a_cache(make, tmp_path: Path, room: int) -> None:
    """Every read is right, the limit holds at any moment, and what is there is not fetched again."""
    shards, processes = 6, 8

    def work(url: str, number: int) -> None:
        cache = make(room)
        streams = downloader(url, RemoteOptions(), cache.counters)
        outcomes = dict.fromkeys(Filled, 0)
        for turn in range(3 * shards):
            wanted = (number + turn) % shards
            with cache.opened(entry(wanted)) as descriptor:
                if descriptor is not None:
                    assert os.pread(descriptor, SIZE, 0) == content(wanted)
                    continue
            outcomes[cache.fill(entry(wanted), streams(wanted))] += 1
            with (cache.folder / "lock").open() as lock:
                fcntl.flock(lock, fcntl.LOCK_EX)
                # A part may be renamed while we look: one shard all the same.
                assert len({name.split(".")[0] for name in names(cache)}) <= room
        report = {kind.value: count for kind, count in outcomes.items()}
        (tmp_path / f"{number}.json").write_text(json.dumps(report | cache.counters.as_dict()))

    with Loopback({f"{number}.tar": content(number) for number in range(shards)}) as server:
        started = [spawn(work, server.url, number) for number in range(processes)]
        for process in started:
            process.join(60)
        assert [process.exitcode for process in started] == [0] * processes
        reports = [json.loads(path.read_bytes()) for path in tmp_path.glob("*.json")]
        cache = make(room)
        assert len(names(cache)) <= room and all(name.endswith(".tar") for name in names(cache))
        for number in range(shards):
            assert read(cache, entry(number)) in (None, content(number))
        # Each download was one request, and only an eviction makes another one necessary.
        downloads = sum(report["downloads"] for report in reports)
        evictions = sum(report["evictions"] for report in reports)
        assert len(server.requests) == downloads == len(names(cache)) + evictions
        assert evictions == 0 if room == shards else evictions > 0
