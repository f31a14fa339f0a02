"""Shards damaged after they were indexed: what is delivered is what was indexed, or the loss is
reported with shard and key. Never a wrong pair, never silence.

Both shards hold the same keys, as some published data sets do: a reader that loses its place would
pair a picture with the text of another shard.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import webdataset as wds

from data_pipeline.index import ShardError, load_index
from data_pipeline.manifest import load_manifest
from data_pipeline.manifest_writer import write_manifest
from data_pipeline.remote import RemoteOptions
from data_pipeline.storage import storage_for
from data_pipeline.stream import ShardReader

SHARDS, SAMPLES, BLOCK = 2, 4, 512


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    root = tmp_path / "pretrain"
    root.mkdir()
    for shard in range(SHARDS):
        with wds.TarWriter(str(root / f"shard-{shard:06d}.tar"), mtime=0) as writer:
            for number in range(SAMPLES):
                word = f"{shard}-{number}"
                writer.write(
                    {
                        "__key__": f"k{number}",
                        "jpg": word.encode() * (400 + number),
                        "json": json.dumps({"image_id": word, "captions": [word]}).encode(),
                    }
                )
    write_manifest(root, "pretrain", "train")
    return root


def read_all(folder: Path) -> tuple[dict, dict]:
    """(content by (shard, key), reason by (shard, key)) of everything a reader gives."""
    manifest = load_manifest(folder)
    reader = ShardReader([manifest], [storage_for(manifest, RemoteOptions())])
    given, reported = {}, {}
    for shard in range(SHARDS):
        for number in range(SAMPLES):
            sample = reader.read(0, shard, number)
            name = (Path(sample["__url__"]).name, sample["__key__"])
            if "__skip__" in sample:
                reported[name] = sample["__skip__"].reason
            else:
                given[name] = (sample["jpg"], sample["json"])
    reader.close()
    return given, reported


def check(folder: Path, original: dict, spoilt: set) -> None:
    """All samples are given unchanged but the spoilt ones, which are reported."""
    given, reported = read_all(folder)
    assert set(reported) == spoilt
    assert given == {name: content for name, content in original.items() if name not in spoilt}
    assert all("not those that were indexed" in reason for reason in reported.values())


def headers(path: Path) -> list[int]:
    """Where the header blocks of the members begin."""
    index = load_index(path)
    return [m.offset - BLOCK for number in range(len(index)) for m in index.members(number)]


def test_every_flipped_header_byte_delivers_the_same_samples(folder):
    original, _ = read_all(folder)
    path = folder / "shard-000000.tar"
    raw = bytearray(path.read_bytes())
    places = [start + byte for start in headers(path) for byte in range(BLOCK)]
    assert len(places) == 2 * SAMPLES * BLOCK
    with path.open("r+b") as file:
        for place in places:
            file.seek(place)
            file.write(bytes([raw[place] ^ 0xFF]))
            file.flush()
            if place % 16 == 0:  # a reader for each byte would be mostly opening files
                check(folder, original, set())
        # All of them flipped by now, one after the other: nothing of a header is ever believed.
    check(folder, original, set())


def test_every_zeroed_block_is_reported_where_it_hits(folder):
    original, _ = read_all(folder)
    path = folder / "shard-000001.tar"
    raw = path.read_bytes()
    index = load_index(path)
    hit = 0
    for start in range(0, len(raw), BLOCK):
        path.write_bytes(raw[:start] + bytes(BLOCK) + raw[start + BLOCK :])
        spoilt = {
            (path.name, index.key(number))
            for number in range(SAMPLES)
            for member in index.members(number)
            if member.offset < start + BLOCK and start < member.offset + member.size
        }
        check(folder, original, spoilt)
        hit += bool(spoilt)
    assert hit > 2 * SAMPLES


def test_every_flipped_data_byte_is_reported(folder):
    original, _ = read_all(folder)
    path = folder / "shard-000000.tar"
    raw = path.read_bytes()
    index = load_index(path)
    for number in range(SAMPLES):
        for member in index.members(number):
            for place in {
                member.offset,
                member.offset + member.size // 2,
                member.offset + member.size - 1,
            }:
                path.write_bytes(raw[:place] + bytes([raw[place] ^ 1]) + raw[place + 1 :])
                check(folder, original, {(path.name, index.key(number))})


def test_every_cut_is_reported_before_the_first_sample(folder):
    path = folder / "shard-000000.tar"
    raw = path.read_bytes()
    for end in range(0, len(raw), BLOCK):
        path.write_bytes(raw[:end])
        with pytest.raises(ShardError, match=r"shard-000000\.tar.*bytes"):
            read_all(folder)


def test_a_shard_cut_while_it_is_read_is_reported(folder):
    manifest = load_manifest(folder)
    reader = ShardReader([manifest], [storage_for(manifest, RemoteOptions())])
    reader.read(0, 0, 0)
    path = folder / "shard-000000.tar"
    with path.open("r+b") as file:
        file.truncate(BLOCK * 3)
    with pytest.raises(ShardError, match="became shorter"):
        reader.read(0, 0, SAMPLES - 1)
    reader.close()


def test_swapped_shards_are_reported(folder):
    one, two = (folder / f"shard-{n:06d}.tar" for n in range(2))
    one.rename(folder / "x")
    two.rename(one)
    (folder / "x").rename(two)
    given, reported = {}, {}
    try:
        given, reported = read_all(folder)
    except ShardError as error:
        assert "shard-00000" in str(error)
    assert not given and (not reported or len(reported) == SHARDS * SAMPLES)
