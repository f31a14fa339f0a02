"""Data folders wherever they lie give the same samples; processes, forks and threads included."""

from __future__ import annotations

import json
import multiprocessing
import os
import pickle
import shlex
import subprocess
import sys
import textwrap
import threading
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from data_pipeline.index import ShardError, build_index, index_path
from data_pipeline.manifest import Manifest, load_manifest
from data_pipeline.manifest_writer import write_keep
from data_pipeline.remote import TransientError
from data_pipeline.sources.web import HttpSource
from data_pipeline.storage import (
    LocalStorage,
    RemoteOptions,
    RemoteStorage,
    Storage,
    open_manifest,
    storage_for,
)
from tests.loopback import Cut, Loopback, Status

ROOT = Path(__file__).resolve().parents[3]
SHARDS = 4
WAIT_S = 30.0


@pytest.fixture
def folder(write_shards: Callable[..., Path]) -> Path:
    return write_shards("vqa", 5 * SHARDS, per_shard=5)


def publish(folder: Path) -> dict[str, bytes]:
    return {f"set/{path.name}": path.read_bytes() for path in folder.iterdir()}


@pytest.fixture
def server(folder: Path) -> Iterator[Loopback]:
    with Loopback(publish(folder)) as server:
        yield server


@pytest.fixture
def cached(tmp_path: Path) -> RemoteOptions:
    return RemoteOptions(cache_dir=tmp_path / "cache", cache_gb=1)


@pytest.fixture
def opened() -> Iterator[Callable[..., tuple[Manifest, RemoteStorage]]]:
    """opened(location, options) -> manifest and storage that never sleeps; closed at the end."""
    storages: list[Storage] = []

    def opened(location: str, options: RemoteOptions) -> tuple[Manifest, RemoteStorage]:
        manifest = open_manifest(location, options, sleep=lambda seconds: None)
        storage = storage_for(manifest, options, location)
        assert isinstance(storage, RemoteStorage)
        storage._sleep = lambda seconds: None
        storages.append(storage)
        return manifest, storage

    yield opened
    for storage in storages:
        storage.close()
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("shards-")]


def sample(storage: Storage, manifest: Manifest, shard: int, number: int) -> bytes:
    file = storage.open(manifest, shard)
    try:
        members = file.index.members(number)
        start, end = members[0].offset, members[-1].offset + members[-1].size
        return file.read(start, end - start)
    finally:
        file.close()


def settle(storage: RemoteStorage) -> None:
    downloads = storage.process().downloads
    assert downloads is not None and downloads.idle(WAIT_S)


def in_cache(options: RemoteOptions) -> int:
    assert options.cache_dir is not None
    return len(list(options.cache_dir.glob("*.tar")))


# -- the same everywhere ----------------------------------------------------------------------------


def test_local_and_remote_give_the_same_bytes(
    folder: Path, server: Loopback, cached: RemoteOptions, opened
) -> None:
    local = load_manifest(folder)
    truth = {
        (shard, number): sample(LocalStorage(), local, shard, number)
        for shard in range(SHARDS)
        for number in range(5)
    }
    for options in (RemoteOptions(), cached, cached):
        manifest, storage = opened(f"{server.url}/set", options)
        assert manifest.hash == local.hash and manifest.location == f"{server.url}/set"
        for (shard, number), data in truth.items():
            assert sample(storage, manifest, shard, number) == data
        if options.cache_dir:
            settle(storage)
    assert {request.name for request in server.requests} == {
        "set/manifest.json",
        *(f"set/{line.name}{end}" for line in local.shards for end in ("", ".idx")),
    }


def test_a_path_stays_a_path(folder: Path) -> None:
    for location in (folder, str(folder)):
        manifest = open_manifest(location, RemoteOptions())
        storage = storage_for(manifest, RemoteOptions(), location)
        assert isinstance(storage, LocalStorage)
        assert storage.open(manifest, 0).name == str(manifest.path(0))
        storage.prefetch(manifest, [0, 1])
        assert storage.counters() == {}


def test_the_filter_comes_along(folder: Path, cached: RemoteOptions) -> None:
    kept = np.arange(5 * SHARDS) % 3 != 0
    write_keep(folder, kept, {"min_side": 1}, {"min_side": 7})
    with Loopback(publish(folder)) as server:
        manifest = open_manifest(f"{server.url}/set", cached)
        assert manifest.shard_samples.tolist() == load_manifest(folder).shard_samples.tolist()
        del server.files["set/keep.bits"]
        with pytest.raises(FileNotFoundError, match="keep.bits"):
            open_manifest(f"{server.url}/set", cached)


def test_a_folder_without_manifest_or_index(server: Loopback, opened) -> None:
    with pytest.raises(FileNotFoundError, match=r"other/manifest.json.*espalier data index"):
        open_manifest(f"{server.url}/other", RemoteOptions())
    manifest, storage = opened(f"{server.url}/set", RemoteOptions())
    del server.files[f"set/{manifest.shards[0].name}.idx"]
    with pytest.raises(FileNotFoundError, match=r"\.tar\.idx: .*needs its index"):
        storage.open(manifest, 0)


def test_a_manifest_is_fetched_through_faults(server: Loopback) -> None:
    server.script("set/manifest.json", Status(503), Cut(100), Cut(10, reset=True))
    slept: list[float] = []
    assert open_manifest(f"{server.url}/set", RemoteOptions(), sleep=slept.append).task == "vqa"
    assert len(slept) == 3


# -- local ------------------------------------------------------------------------------------------


def test_a_local_shard_that_shrinks_is_an_error(folder: Path) -> None:
    manifest = load_manifest(folder)
    file = LocalStorage().open(manifest, 0)
    os.truncate(manifest.path(0), 600)
    with pytest.raises(ShardError, match="became shorter"):
        file.read(512, 1000)
    file.close()
    file.close()


def test_an_index_of_another_version_is_an_error(folder: Path) -> None:
    manifest = load_manifest(folder)
    # Same size, same number of samples, other content.
    with manifest.path(0).open("r+b") as file:
        file.seek(520)
        file.write(b"????")
    build_index(manifest.path(0))
    with pytest.raises(ShardError, match="another version of the shard"):
        LocalStorage().open(manifest, 0)


# -- cache ------------------------------------------------------------------------------------------


def test_the_first_read_is_a_range_then_the_cache_answers(
    server: Loopback, cached: RemoteOptions, opened
) -> None:
    manifest, storage = opened(f"{server.url}/set", cached)
    name = f"set/{manifest.shards[0].name}"
    first = sample(storage, manifest, 0, 2)
    settle(storage)
    ranges = {request.range for request in server.asked(name)}  # either may come first
    members = storage.open(manifest, 0).index.members(2)
    start = members[0].offset
    assert ranges == {(0, manifest.shards[0].bytes), (start, start + len(first))}
    assert sample(storage, manifest, 0, 2) == first
    assert len(server.asked(name)) == 2 and len(server.asked(f"{name}.idx")) == 1
    counts = storage.counters()
    assert (counts["cache_hits"], counts["cache_misses"], counts["downloads"]) == (1, 1, 1)


def test_without_a_cache_nothing_is_left_behind(
    server: Loopback, opened, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "temporary"))
    (tmp_path / "temporary").mkdir()
    manifest, storage = opened(f"{server.url}/set", RemoteOptions())
    file = storage.open(manifest, 0)
    assert not list((tmp_path / "temporary").iterdir())
    assert file.read(0, 262)[257:] == b"ustar"
    assert [request.range for request in server.asked(f"set/{manifest.shards[0].name}")] == [
        (0, 262)
    ]


def test_prefetch_keeps_the_order_and_the_limit(
    server: Loopback, cached: RemoteOptions, opened, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("data_pipeline.downloads._THREADS", 1)
    manifest, storage = opened(f"{server.url}/set", cached)
    assert len({line.bytes for line in manifest.shards}) == 1
    storage._options = replace(cached, cache_gb=(3 * manifest.shards[0].bytes + 100) / 1e9)

    def prefetch(*shards: int) -> list[int]:
        before = len(server.requests)
        storage.prefetch(manifest, shards)
        settle(storage)
        numbers = {f"set/{line.name}": number for number, line in enumerate(manifest.shards)}
        return [numbers[request.name] for request in server.requests[before:]]

    assert prefetch(2) == [2]
    # 2 is planned last and does not fit: it must not keep out 0, which is needed earlier.
    assert prefetch(3, 1, 0, 2) == [3, 1, 0]
    # 3 is the oldest but planned, so that 1 makes room for 2.
    assert prefetch(2, 3) == [2]
    assert prefetch(0, 2, 3) == [] and storage.counters()["downloads_again"] == 1


def test_a_cache_for_less_than_a_shard_is_refused(server: Loopback, cached: RemoteOptions) -> None:
    manifest = open_manifest(f"{server.url}/set", cached)
    tiny = replace(cached, cache_gb=1e-6)
    with pytest.raises(ValueError, match=r"data.remote.cache_gb=1e-06 is too small .*\.tar"):
        storage_for(manifest, tiny)
    file = cached.cache_dir
    assert file is not None
    file.write_text("not a folder")
    with pytest.raises(OSError):
        storage_for(manifest, cached)


def test_a_full_cache_is_no_error(server: Loopback, cached: RemoteOptions, opened) -> None:
    manifest, storage = opened(f"{server.url}/set", cached)
    size = max(line.bytes for line in manifest.shards)
    storage._options = replace(cached, cache_gb=1.5 * size / 1e9)
    sample(storage, manifest, 0, 0)
    settle(storage)
    cache = storage.process().cache
    assert cache is not None
    with cache.opened(storage._entry(manifest, 0)[1]):
        assert sample(storage, manifest, 1, 0) == sample(storage, manifest, 1, 0)
        settle(storage)
    assert storage.counters()["cache_full"] >= 1 and in_cache(cached) == 1


def test_an_index_in_the_cache_that_cannot_be_used_is_fetched_again(
    server: Loopback, cached: RemoteOptions, opened
) -> None:
    manifest, storage = opened(f"{server.url}/set", cached)
    storage.open(manifest, 0)
    assert cached.cache_dir is not None
    (path,) = cached.cache_dir.glob("*.idx")
    path.write_bytes(b"an older format")
    assert len(storage.open(manifest, 0).index) == 5
    server.files[f"set/{manifest.shards[1].name}.idx"] = b"never any good"
    with pytest.raises(ShardError, match="not an index"):
        storage.open(manifest, 1)


# -- faults -----------------------------------------------------------------------------------------


def test_a_shard_that_was_replaced_ends_the_run(
    folder: Path, server: Loopback, cached: RemoteOptions, opened
) -> None:
    manifest, storage = opened(f"{server.url}/set", cached)
    name = f"set/{manifest.shards[0].name}"
    server.files[name] += bytes(512)
    with pytest.raises(ShardError, match=f"{name}: stale index.*espalier data index"):
        sample(storage, manifest, 0, 0)
    # The same size and another content: only the whole shows it.
    name = f"set/{manifest.shards[1].name}"
    server.files[name] = server.files[name][:600] + b"?" + server.files[name][601:]
    manifest, storage = opened(f"{server.url}/set", cached)
    sample(storage, manifest, 1, 4)
    settle(storage)
    with pytest.raises(ShardError, match=f"{name}: stale index: its content hash"):
        sample(storage, manifest, 1, 4)
    assert in_cache(cached) == 0


def test_index_and_manifest_must_agree(folder: Path, opened, tmp_path: Path) -> None:
    with Loopback(publish(folder)) as server:
        manifest, storage = opened(f"{server.url}/set", RemoteOptions())
        path = load_manifest(folder).path(0)
        with path.open("r+b") as file:
            file.seek(520)
            file.write(b"????")
        build_index(path)
        server.files[f"set/{path.name}.idx"] = index_path(path).read_bytes()
        with pytest.raises(ShardError, match="another version of the shard"):
            storage.open(manifest, 0)


def test_a_download_that_fails_for_now_is_tried_again(
    server: Loopback, cached: RemoteOptions, opened, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("data_pipeline.downloads._THREADS", 1)
    manifest, storage = opened(f"{server.url}/set", replace(cached, retries=0))
    server.script(f"set/{manifest.shards[0].name}", Cut(700))
    storage.prefetch(manifest, [0])
    settle(storage)
    assert storage.counters()["downloads_failed"] == 1 and in_cache(cached) == 0
    sample(storage, manifest, 0, 0)
    settle(storage)
    assert in_cache(cached) == 1
    assert (700, manifest.shards[0].bytes) in [request.range for request in server.requests]


def test_transient_errors_reach_the_reader(server: Loopback, opened) -> None:
    manifest, storage = opened(f"{server.url}/set", RemoteOptions(retries=2))
    file = storage.open(manifest, 0)
    server.script(f"set/{manifest.shards[0].name}", *[Status(503)] * 3)
    with pytest.raises(TransientError, match=f"{manifest.shards[0].name}: gave up after 3 tries"):
        file.read(0, 10)


# -- processes --------------------------------------------------------------------------------------


def test_a_forked_child_opens_its_own(server: Loopback, cached: RemoteOptions, opened) -> None:
    manifest, storage = opened(f"{server.url}/set", cached)
    file = storage.open(manifest, 0)
    truth = file.read(512, 300)  # connections and threads are alive at the fork
    receive, send = multiprocessing.Pipe(duplex=False)
    pid = os.fork()
    if pid == 0:
        try:
            inherited = file.read(512, 300)
            sample(storage, manifest, 1, 0)
            settle(storage)
            send.send((inherited, storage.counters()["downloads"], len(threading.enumerate())))
            storage.close()
        finally:
            os._exit(0)
    assert receive.poll(WAIT_S)
    inherited, downloads, _ = receive.recv()
    os.waitpid(pid, 0)
    assert inherited == truth and downloads >= 1
    assert file.read(512, 300) == truth


def test_a_storage_travels_by_pickle(server: Loopback, cached: RemoteOptions, opened) -> None:
    location = f"{server.url.replace('http://', 'http://me:pw@')}/set"
    manifest, storage = opened(location, cached)
    sample(storage, manifest, 0, 0)
    storage._sleep = None  # a lambda does not travel
    copy = pickle.loads(pickle.dumps((manifest, storage)))[1]
    assert "pw" not in manifest.location and copy._process is None
    assert sample(copy, manifest, 0, 0) == sample(storage, manifest, 0, 0)
    copy.close()


def test_nothing_stays_open(server: Loopback, cached: RemoteOptions) -> None:
    def run() -> HttpSource:
        manifest = open_manifest(f"{server.url}/set", cached)
        storage = storage_for(manifest, cached)
        assert isinstance(storage, RemoteStorage)
        for shard in range(SHARDS):
            sample(storage, manifest, shard, 0)
        settle(storage)
        source = storage.process().source
        assert isinstance(source, HttpSource) and any(source._idle.values())
        storage.close()
        storage.close()
        return source

    assert not run()._idle
    links = []
    for number in os.listdir("/proc/self/fd"):
        with suppress(FileNotFoundError):
            links.append(os.readlink(f"/proc/self/fd/{number}"))
    assert not [link for link in links if str(cached.cache_dir) in link]
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("shards-")]


def test_a_storage_that_is_forgotten_ends_its_threads(
    server: Loopback, cached: RemoteOptions
) -> None:
    manifest = open_manifest(f"{server.url}/set", cached)
    storage = storage_for(manifest, cached)
    storage.prefetch(manifest, range(SHARDS))
    assert [thread for thread in threading.enumerate() if thread.name.startswith("shards-")]
    del storage
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("shards-")]


def test_a_command_as_a_folder(folder: Path, cached: RemoteOptions, opened) -> None:
    location = f"pipe:cat {shlex.quote(str(folder))}/{{name}}"
    options = replace(cached, allow_pipe=True)
    manifest, storage = opened(location, options)
    local = load_manifest(folder)
    for shard in (1, 0, 1):
        assert sample(storage, manifest, shard, 3) == sample(LocalStorage(), local, shard, 3)
    assert storage.counters()["downloads"] == 2 and in_cache(cached) == 2
    with pytest.raises(ValueError, match="set data.remote.cache"):
        storage_for(manifest, replace(options, cache_dir=None), location)


def test_a_bucket_leaves_the_parent_fit_to_fork(folder: Path, tmp_path: Path) -> None:
    """The parent opens the manifest, forked workers read: as torch's DataLoader does it."""
    pytest.importorskip("obstore")
    code = """
        import os, sys, json
        from pathlib import Path
        from data_pipeline.storage import *
        options = RemoteOptions(cache_dir=Path(sys.argv[1]), cache_gb=1)
        manifest = open_manifest("s3://bucket/set", options)
        storage = storage_for(manifest, options)
        for shard in (0, 1):
            pid = os.fork()
            if pid == 0:
                data = storage.open(manifest, shard).read(0, 262)
                storage.process().downloads.idle(30)
                print(data[257:] == b"ustar", storage.counters()["downloads"], flush=True)
                os._exit(0)
            assert os.waitpid(pid, 0)[1] == 0
    """
    files = {f"bucket/{name}": data for name, data in publish(folder).items()}
    with Loopback(files) as server:
        env = os.environ | {
            "AWS_ENDPOINT_URL": server.url,
            "AWS_ALLOW_HTTP": "true",
            "AWS_SKIP_SIGNATURE": "true",
        }
        done = subprocess.run(
            [sys.executable, "-c", textwrap.dedent(code), str(tmp_path / "cache")],
            env=env, cwd=ROOT, capture_output=True, text=True, timeout=100,
        )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["True", "1"] * 2


def test_a_remote_manifest_is_checked_like_a_local_one(server: Loopback) -> None:
    content = json.loads(server.files["set/manifest.json"])
    content["samples"] = 3
    server.files["set/manifest.json"] = json.dumps(content).encode()
    with pytest.raises(ShardError, match="changed by hand"):
        open_manifest(f"{server.url}/set", RemoteOptions())
