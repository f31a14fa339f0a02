"""Indexes of remote shards stay in memory as long as their windows are in use, within a limit."""

from __future__ import annotations

from pathlib import Path

import pytest

from data_pipeline.index import ShardError, index_path, load_index, parse_index
from data_pipeline.index_memory import IndexMemory
from data_pipeline.loader import build_loader
from tests.loopback import Loopback


def test_a_parsed_index_is_the_one_on_disk(write_shards) -> None:
    shard = write_shards("vqa", 10) / "shard-000000.tar"
    on_disk, raw = load_index(shard), index_path(shard).read_bytes()
    parsed = parse_index(raw, "x.idx", str(shard), shard.stat().st_size)
    for number in range(10):
        assert parsed.key(number) == on_disk.key(number)
        assert parsed.members(number) == on_disk.members(number)
    for damaged in (b"", raw[:5], raw[:200], raw[:-1] + b"x"):
        with pytest.raises(ShardError, match=r"x\.idx: .*espalier data index"):
            parse_index(damaged, "x.idx", str(shard), shard.stat().st_size)


def test_the_indexes_used_last_stay_within_the_limit(write_shards) -> None:
    index = load_index(write_shards("vqa", 10) / "shard-000000.tar")
    memory = IndexMemory(max_bytes=25)
    for name in "ab":
        memory.put(name, index, 10)
    assert memory.get("a") is index
    memory.put("c", index, 10)  # for which b, used longest ago, makes room
    assert [memory.get(name) for name in "abc"] == [index, None, index]
    memory.put("a", index, 5)
    assert (len(memory), memory.bytes) == (2, 15)
    memory.keep(["a", "z"])
    assert (len(memory), memory.bytes, memory.get("c")) == (1, 5, None)
    memory.put("large", index, 26)
    assert (len(memory), memory.bytes) == (0, 0)


def indexes_asked_for(folder: Path, tokenizer, epochs: int, **options) -> list[int]:
    """How often each shard's index was asked for while a loader without a cache read epochs."""
    files = {path.name: path.read_bytes() for path in folder.iterdir()}
    with Loopback(files) as server:
        loader = build_loader(
            "vqa", server.url, tokenizer=tokenizer, batch=6, train=True, image_size=24, **options
        )
        stream = iter(loader)
        for _ in range(epochs * 5):
            next(stream)
        return [len(server.asked(name)) for name in files if name.endswith(".idx")]


def test_an_index_is_fetched_once_however_many_shards_a_window_has(
    write_shards, tokenizer, monkeypatch
) -> None:
    monkeypatch.setattr("data_pipeline.stream._OPEN_SHARDS", 2)
    folder = write_shards("vqa", 30, per_shard=3)
    whole = {"block": 3, "window_blocks": 10, "groups": 1}
    assert indexes_asked_for(folder, tokenizer, epochs=3, **whole) == [1] * 10


def test_windows_that_are_over_leave_memory(write_shards, tokenizer, monkeypatch) -> None:
    """Two windows of one shard each at a time, of ten: an index is back when its window is."""
    held: list[int] = []
    put = IndexMemory.put

    def noted(memory: IndexMemory, *args) -> None:
        put(memory, *args)
        held.append(len(memory))

    monkeypatch.setattr(IndexMemory, "put", noted)
    folder = write_shards("vqa", 30, per_shard=3)
    indexes_asked_for(folder, tokenizer, epochs=2, block=3, window_blocks=1, groups=1)
    assert held and max(held) <= 2
