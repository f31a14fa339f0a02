"""Writing shards: atomic, numbered, plain, and read back by webdataset itself."""

import pytest

from data_pipeline.index import load_index
from data_pipeline.manifest import load_manifest
from data_pipeline.progress import progress
from data_pipeline.shards import ShardSet, check_key, clear_shards, write_shard


def test_samples_are_cut_into_indexed_shards(tmp_path):
    import webdataset as wds

    with ShardSet(tmp_path / "100%d", per_shard=2) as out:
        for n in range(5):
            out.write(f"k{n}", {"json": b"{}", "jpg": bytes([n])})
    out.manifest("captioning", "train", {"image_size": 8})
    manifest = load_manifest(tmp_path / "100%d")
    assert [shard.samples for shard in manifest.shards] == [2, 2, 1]
    assert manifest.extra["image_size"] == 8
    assert load_index(manifest.path(2)).key(0) == "k4"
    urls = [str(manifest.path(n)) for n in range(3)]
    read = list(wds.WebDataset(urls, shardshuffle=False, empty_check=False))
    assert [(s["__key__"], s["jpg"]) for s in read] == [(f"k{n}", bytes([n])) for n in range(5)]


def test_an_exception_leaves_no_half_shard(tmp_path):
    with pytest.raises(RuntimeError), ShardSet(tmp_path, per_shard=2) as out:
        for n in range(3):
            out.write(f"k{n}", {"json": b"{}"})
        raise RuntimeError("stop")
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "shard-000000.tar",
        "shard-000000.tar.idx",
    ]


def test_bytes_are_reproducible(tmp_path):
    for name in "ab":
        assert write_shard(tmp_path / name, 7, [("k", {"json": b"{}", "jpg": b"x"})]) == 1
    one, other = (tmp_path / name / "shard-000007.tar" for name in "ab")
    assert one.read_bytes() == other.read_bytes()


def test_no_samples_no_shard(tmp_path):
    assert write_shard(tmp_path, 0, []) == 0
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("key", ["", "a.b", "a/b", "a\nb", "x" * 81])
def test_keys_that_a_reader_would_change_are_refused(key):
    with pytest.raises(ValueError, match="sample key"):
        check_key(key)


def test_clear_removes_shards_only(tmp_path):
    for name in ("shard-000000.tar", "shard-000001.tar.partial", "manifest.json", "notes.txt"):
        (tmp_path / name).write_text("x")
    clear_shards(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]
    clear_shards(tmp_path / "missing")


def test_progress_passes_items_on(capsys):
    assert list(progress(iter([3, 4]), 7, "work", "things", lambda n: n)) == [3, 4]
    assert "work: 7/7 things" in capsys.readouterr().err


def test_progress_says_what_is_left(capsys, monkeypatch):
    clock = iter([0.0, 4.0, 8.0, 12.0])
    monkeypatch.setattr("data_pipeline.progress.time.monotonic", lambda: next(clock))
    assert list(progress("abc", 3, "work", "things", interval=0)) == ["a", "b", "c"]
    first, second, last = capsys.readouterr().err.splitlines()
    assert first == "work: 1/3 things (0.25/s, 0:00:08 left)"
    assert second == "work: 2/3 things (0.25/s, 0:00:04 left)"
    assert last == "work: 3/3 things (0.25/s)"
