"""Manifest: what it lists, what its hashes depend on, and filters by one bit a sample."""

from __future__ import annotations

import json
import os
import pickle
from pathlib import Path

import numpy as np
import pytest
import xxhash
from hypothesis import given, settings
from hypothesis import strategies as st

from data_pipeline.index import ShardError, build_index, index_path
from data_pipeline.manifest import (
    KEEP_NAME,
    MANIFEST_NAME,
    Manifest,
    Shard,
    keep_name,
    load_manifest,
    parse_manifest,
)
from data_pipeline.manifest_writer import write_keep, write_manifest
from data_pipeline.shards import write_shard
from data_pipeline.survey import survey


def write_keys(folder: Path, *shards: list[str]) -> dict:
    for number, keys in enumerate(shards):
        write_shard(folder, number, [(key, {"json": b"{}"}) for key in keys])
    return write_manifest(folder, "vqa", "train")


def edit(folder: Path, **values) -> None:
    """Change values of manifest.json and sign it again."""
    path = folder / MANIFEST_NAME
    content = json.loads(path.read_bytes()) | values
    content.pop("hash")
    canonical = json.dumps(content, sort_keys=True, separators=(",", ":")).encode()
    path.write_text(json.dumps(content | {"hash": xxhash.xxh3_128_hexdigest(canonical)}))


def test_manifest_lists_what_is_there(write_shards):
    folder = write_shards("vqa", 25)
    manifest = load_manifest(folder)
    assert (manifest.samples, manifest.task, manifest.split) == (25, "vqa", "train")
    np.testing.assert_array_equal(manifest.shard_samples, [10, 10, 5])
    assert manifest.extra == {"schema": "vqa", "image_size": 24}
    assert manifest.members == {"jpg": 25, "json": 25}
    assert (manifest.filter, manifest.keep, manifest.remote) == (None, None, False)
    for number, shard in enumerate(manifest.shards):
        raw = manifest.path(number).read_bytes()
        assert (shard.bytes, shard.xxh3) == (len(raw), xxhash.xxh3_64_hexdigest(raw))
        assert manifest.url(number) == str(folder / shard.name)
    assert [manifest.sample_number(2, n) for n in range(5)] == [0, 1, 2, 3, 4]
    again = write_manifest(folder, "vqa", "train", {"image_size": 24})
    assert again["hash"] == manifest.hash
    assert write_manifest(folder, "vqa", "val", {"image_size": 24})["hash"] != manifest.hash
    assert not list(folder.glob(".*"))  # no temporary files stay


def test_the_hash_knows_neither_place_nor_time(tmp_path):
    one = write_keys(tmp_path / "one", ["a", "b"], ["c"])
    other = tmp_path / "deep" / "other"
    write_keys(other, ["a", "b"], ["c"])
    for path in other.glob("*.tar"):
        os.utime(path, ns=(10**18, 10**18))
    assert write_manifest(other, "vqa", "train")["hash"] == one["hash"]


def test_the_hash_follows_the_content(write_shards):
    folder = write_shards("vqa", 12)
    before = load_manifest(folder).hash
    shard = folder / "shard-000000.tar"
    raw = bytearray(shard.read_bytes())
    raw[600] ^= 1
    shard.write_bytes(raw)
    assert write_manifest(folder, "vqa", "train", {"image_size": 24})["hash"] != before


def test_keys_hash_is_that_of_the_keys_in_order(tmp_path):
    keys = ["a", "bc", "b", "ca"]
    expected = xxhash.xxh3_128_hexdigest("".join(key + "\0" for key in keys).encode())
    assert write_keys(tmp_path / "1", keys)["keys_hash"] == expected
    assert write_keys(tmp_path / "2", keys[:1], keys[1:])["keys_hash"] == expected
    assert write_keys(tmp_path / "3", ["ab", "c", "b", "ca"])["keys_hash"] != expected
    assert write_keys(tmp_path / "4", keys[::-1])["keys_hash"] != expected


def test_values_that_json_changes_do_not_spoil_the_hash(tmp_path):
    write_shard(tmp_path, 0, [("a", {"json": b"{}"})])
    write_manifest(tmp_path, "vqa", "train", {"pair": (1, 2), "by_number": {2: "b", 10: "a"}})
    assert load_manifest(tmp_path).extra["by_number"] == {"2": "b", "10": "a"}


def test_manifest_errors_name_file_and_remedy(write_shards, tmp_path):
    with pytest.raises(FileNotFoundError, match="no such data folder"):
        load_manifest(tmp_path / "none")
    folder = write_shards("vqa", 25)
    shard = folder / "shard-000001.tar"
    raw = shard.read_bytes()
    shard.write_bytes(raw[:-512])
    with pytest.raises(ShardError, match=r"shard-000001.tar.*espalier data index"):
        load_manifest(folder)
    shard.unlink()
    with pytest.raises(FileNotFoundError, match=r"shard-000001.tar.*espalier data index"):
        load_manifest(folder)
    shard.write_bytes(raw)
    path = folder / "manifest.json"
    whole = path.read_text()
    content = json.loads(whole)
    content["samples"] = 24
    path.write_text(json.dumps(content))
    with pytest.raises(ShardError, match="changed by hand"):
        load_manifest(folder)
    edit(folder, samples=24)
    with pytest.raises(ShardError, match="do not add up"):
        load_manifest(folder)
    for damaged in ("{", "[]", "null", '"text"'):
        path.write_text(damaged)
        with pytest.raises(ShardError, match="damaged"):
            load_manifest(folder)
    path.write_text('{"version": 1, "shards": []}')
    with pytest.raises(ShardError, match=rf"version 1, expected 2; .*data index {folder}"):
        load_manifest(folder)
    path.unlink()
    with pytest.raises(FileNotFoundError, match="no manifest"):
        load_manifest(folder)


@pytest.mark.parametrize("root", ["data", "data/vqa"])
def test_a_folder_of_splits_is_not_a_split(tmp_path, root):
    split = tmp_path / "data/vqa/train"
    split.mkdir(parents=True)
    write_keys(split, ["a"])
    with pytest.raises(FileNotFoundError, match=f"holds splits, name one: {split}$"):
        load_manifest(tmp_path / root)


@pytest.mark.parametrize("name", ["../x.tar", "/etc/x.tar", "a\\b.tar", "..", "", 7])
def test_shards_and_filters_stay_in_their_folder(tmp_path, name):
    write_keys(tmp_path, ["a"])
    raw = (tmp_path / MANIFEST_NAME).read_bytes()
    lines = json.loads(raw)["shards"]
    edit(tmp_path, shards=[lines[0] | {"name": name}])
    with pytest.raises(ShardError, match="no plain file name"):
        load_manifest(tmp_path)
    edit(tmp_path, shards=lines, filter={"file": name, "xxh3": "", "rules": {}, "dropped": {}})
    with pytest.raises(ShardError, match="no plain file name"):
        load_manifest(tmp_path)


def test_a_remote_manifest(tmp_path):
    write_keys(tmp_path, ["a", "b"], ["c"])
    raw = (tmp_path / MANIFEST_NAME).read_bytes()
    manifest = parse_manifest(raw, "https://host/data/")
    assert manifest.remote
    assert manifest.url(1) == "https://host/data/shard-000001.tar"
    with pytest.raises(ValueError, match=r"https://host/data/.*local data folder"):
        _ = manifest.folder
    with pytest.raises(ShardError, match=r"https://host/data/manifest.json.*a copy of the folder"):
        parse_manifest(raw[:-9], "https://host/data/")
    local = parse_manifest(raw, str(tmp_path))
    assert (local.hash, local.shards) == (manifest.hash, manifest.shards)
    assert local.folder == tmp_path


def numbered(manifest: Manifest) -> list[list[int]]:
    """The numbers of the kept samples of each shard."""
    return [
        [manifest.sample_number(number, n) for n in range(shard.kept)]
        for number, shard in enumerate(manifest.shards)
    ]


@settings(max_examples=60, deadline=None)
@given(st.lists(st.lists(st.booleans(), max_size=150), min_size=1, max_size=6))
def test_numbers_of_kept_samples(kept):
    """In memory, against numpy.flatnonzero, for shards of any size and filters of any pattern."""
    flat = np.asarray([bit for shard in kept for bit in shard], bool)
    packed = np.packbits(flat, bitorder="little").tobytes()
    shards = tuple(Shard(f"{n}.tar", 1, len(s), "", sum(s)) for n, s in enumerate(kept))
    bits = np.frombuffer(packed + bytes(-len(packed) % 8), np.uint8)
    manifest = Manifest("x", "vqa", "train", int(flat.sum()), shards, "", "", {}, {}, keep=bits)
    assert numbered(manifest) == [np.flatnonzero(s).tolist() for s in kept]
    assert [manifest.kept(n).tolist() for n in range(len(kept))] == kept
    for number, shard in enumerate(shards):
        with pytest.raises(IndexError, match=rf"{number}\.tar"):
            manifest.sample_number(number, shard.kept)
        with pytest.raises(IndexError):
            manifest.sample_number(number, -1)


@settings(max_examples=25, deadline=None)
@given(st.lists(st.booleans(), min_size=12, max_size=12).filter(any))
def test_a_filter_is_written_and_read(tmp_path_factory, bits):
    folder = tmp_path_factory.mktemp("keep")
    keys = [f"k{n}" for n in range(12)]
    before = write_keys(folder, keys[:5], keys[5:6], keys[6:])
    kept = np.asarray(bits, bool)
    content = write_keep(folder, kept, {"min_side": 64}, {"min_side": int((~kept).sum())})
    assert content["hash"] != before["hash"]
    assert content["keys_hash"] == before["keys_hash"]
    manifest = load_manifest(folder)
    assert manifest.samples == kept.sum() == manifest.shard_samples.sum()
    assert manifest.filter == {
        "file": KEEP_NAME,
        "xxh3": xxhash.xxh3_64_hexdigest((folder / KEEP_NAME).read_bytes()),
        "rules": {"min_side": 64},
        "dropped": {"min_side": int((~kept).sum())},
    }
    expected = [np.flatnonzero(part).tolist() for part in np.split(kept, [5, 6])]
    assert numbered(manifest) == expected
    assert numbered(pickle.loads(pickle.dumps(manifest))) == expected
    raw = (folder / MANIFEST_NAME).read_bytes()
    assert keep_name(raw, "s3://b/x") == KEEP_NAME
    remote = parse_manifest(raw, "s3://b/x", (folder / KEEP_NAME).read_bytes())
    assert numbered(remote) == expected


def test_filters_replace_each_other_and_go(tmp_path):
    plain = write_keys(tmp_path, ["a", "b", "c"])
    one = write_keep(tmp_path, np.array([True, False, True]), {"min_side": 9}, {"min_side": 1})
    two = write_keep(tmp_path, np.array([True, True, False]), {"min_side": 9}, {"min_side": 1})
    assert len({plain["hash"], one["hash"], two["hash"]}) == 3
    assert numbered(load_manifest(tmp_path)) == [[0, 1]]
    assert write_manifest(tmp_path, "vqa", "train")["hash"] == plain["hash"]
    assert not (tmp_path / KEEP_NAME).exists()
    assert keep_name((tmp_path / MANIFEST_NAME).read_bytes(), "x") is None


def test_filters_that_do_not_fit_are_refused(tmp_path):
    write_keys(tmp_path, ["a", "b", "c"])
    with pytest.raises(ValueError, match=r"shape \(2,\) of bool, the shards hold 3"):
        write_keep(tmp_path, np.ones(2, bool), {}, {})
    with pytest.raises(ValueError, match="leave no sample.*min_side"):
        write_keep(tmp_path, np.zeros(3, bool), {"min_side": 9}, {})
    write_keep(tmp_path, np.array([True, False, True]), {}, {})
    keep = tmp_path / KEEP_NAME
    for damaged in (b"\x07", b"\x05\x00", b""):
        keep.write_bytes(damaged)
        with pytest.raises(ShardError, match=r"keep\.bits: not the filter.*espalier data index"):
            load_manifest(tmp_path)
    keep.unlink()
    with pytest.raises(ShardError, match=r"keep\.bits: .*is missing"):
        load_manifest(tmp_path)


def test_a_survey_reads_a_shard_only_when_it_must(tmp_path):
    write_shard(tmp_path, 0, [(key, {"json": b"{}", "jpg": b"x"}) for key in "ab"])
    path = tmp_path / "shard-000000.tar"
    os.utime(path, ns=(10**18, 10**18))
    first = survey(path)
    assert first.was_read
    assert (first.samples, dict(first.members)) == (2, {"json": 2, "jpg": 2})
    hashes = [xxhash.xxh3_64_intdigest(key) for key in (b"a", b"b")]
    assert first.key_hashes.tolist() == hashes
    again = survey(path)
    assert (again.was_read, again.xxh3, again.key_hashes.tolist()) == (False, first.xxh3, hashes)
    assert not survey(path, force=True).rotten
    raw = bytearray(path.read_bytes())
    raw[512] ^= 1
    path.write_bytes(raw)
    os.utime(path, ns=(10**18, 10**18))  # as a failing disk would: nothing tells
    assert not survey(path).was_read
    found = survey(path, force=True)
    assert found.rotten
    assert found.xxh3 != first.xxh3


def test_old_indexes_are_built_again(tmp_path):
    write_shard(tmp_path, 0, [("a", {"json": b"{}"})])
    path = tmp_path / "shard-000000.tar"
    index_path(path).write_bytes(b"something else")
    assert survey(path).was_read
    assert build_index(path).key(0) == "a"
