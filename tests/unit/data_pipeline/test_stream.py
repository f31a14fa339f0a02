"""The source as a webdataset stage, workers, and substitutes for bad samples."""

from __future__ import annotations

import json
import pickle

import numpy as np
import pytest
import webdataset as wds
from torch.utils.data import DataLoader

from data_pipeline.faults import MAX_CONSECUTIVE, Fault, FaultError, FaultLedger
from data_pipeline.index import ShardError
from data_pipeline.loader import build_loader
from data_pipeline.manifest import load_manifest
from data_pipeline.manifest_writer import write_manifest
from data_pipeline.mixture import Mixture, Segment
from data_pipeline.plan import Plan
from data_pipeline.remote import RemoteOptions
from data_pipeline.storage import storage_for
from data_pipeline.stream import PlannedSource, ShardReader


def make_reader(folder):
    manifest = load_manifest(folder)
    return ShardReader([manifest], [storage_for(manifest, RemoteOptions())])


def make_source(folder, *, shuffle=True, seed=1, groups=1, **options):
    manifest = load_manifest(folder)
    plan = Plan(manifest.shard_samples, manifest.hash, seed, 4, 2, shuffle=shuffle, groups=groups)
    values = {"batch": 3, "rank": 0, "ranks": 1, "steps": 5} | options
    return PlannedSource(make_reader(folder), Mixture([plan], [Segment(0, (1,))]), **values)


def test_samples_are_webdataset_samples(write_shards):
    folder = write_shards("vqa", 15)
    pipeline = wds.DataPipeline(make_source(folder), wds.map(dict), wds.to_tuple("__key__", "jpg"))
    assert len(list(pipeline)) == 15
    sample = next(iter(make_source(folder)))
    assert sample["__url__"].endswith(".tar") and isinstance(sample["jpg"], bytes)
    assert json.loads(sample["json"])["image_id"] == str(int(sample["__key__"][1:]))


def test_ranks_share_the_stream(write_shards):
    folder = write_shards("vqa", 25)
    whole = [s["__key__"] for s in make_source(folder, batch=12, steps=4)]
    for ranks in (2, 3, 4):
        parts = [
            [
                s["__key__"]
                for s in make_source(folder, batch=12 // ranks, rank=r, ranks=ranks, steps=4)
            ]
            for r in range(ranks)
        ]
        share = 12 // ranks
        joined = [
            key
            for step in range(4)
            for part in parts
            for key in part[step * share : (step + 1) * share]
        ]
        assert joined == whole


@pytest.mark.parametrize("workers", [1, 2])
def test_workers_do_not_change_the_stream(write_shards, tokenizer, workers):
    folder = write_shards("vqa", 25)

    def keys(count):
        loader = build_loader(
            "vqa", folder, tokenizer=tokenizer, batch=4, train=True, image_size=24, seed=3,
            block=4, window_blocks=2, workers=count,
        )  # fmt: skip
        stream = iter(loader)
        return [next(stream).keys for _ in range(9)]

    assert keys(workers) == keys(0)


def test_pickled_readers_open_their_own_files(write_shards):
    source = make_source(write_shards("vqa", 15))
    keys = [sample["__key__"] for sample in source]
    copy = pickle.loads(pickle.dumps(source))
    assert not copy.reader._open
    assert [sample["__key__"] for sample in copy] == keys
    assert len(list(DataLoader(copy, batch_size=None))) == 15


def test_few_files_stay_open(write_shards, monkeypatch):
    monkeypatch.setattr("data_pipeline.stream._OPEN_SHARDS", 2)
    folder = write_shards("vqa", 30, per_shard=3)
    source = make_source(folder, steps=10)
    assert len(list(source)) == 30 and len(source.reader._open) == 2
    source.reader.close()


def test_a_stale_index_is_an_error(write_shards):
    folder = write_shards("vqa", 15)
    index = folder / "shard-000000.tar.idx"
    index.write_bytes((folder / "shard-000001.tar.idx").read_bytes())
    with pytest.raises(ShardError, match="espalier data index"):
        list(make_source(folder))


BAD = 7


def spoil(kind):
    def change(number, sample):
        if number != BAD:
            return
        if kind == "cut":
            sample["jpg"] = sample["jpg"][: len(sample["jpg"]) // 2]
        elif kind == "no json":
            del sample["json"]
        elif kind == "no image":
            del sample["jpg"]
        elif kind == "record":
            sample["json"] = b'{"image_id": "7"}'

    return change


def loader_of(folder, tokenizer, **options):
    values = {"batch": 5, "train": True, "image_size": 24, "block": 4, "window_blocks": 2}
    return build_loader("vqa", folder, tokenizer=tokenizer, **values | options)


KINDS = {"cut": "decode", "no json": "missing", "no image": "missing", "record": "record"}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("workers", [0, 2])
def test_raise_names_shard_key_and_reason(write_shards, tokenizer, kind, workers):
    folder = write_shards("vqa", 20, change=spoil(kind))
    stream = iter(loader_of(folder, tokenizer, workers=workers))
    with pytest.raises(FaultError, match=r"shard-000000.tar.*'s00007'.*data.faults=skip"):
        for _ in range(4):
            next(stream)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("workers", [0, 2])
def test_skip_counts_records_and_substitutes(write_shards, tokenizer, kind, workers, tmp_path):
    folder = write_shards("vqa", 20, change=spoil(kind))
    quarantine = tmp_path / "lists" / "bad.jsonl"
    options = {"faults": "skip", "max_fault_rate": 0.2, "workers": workers}
    loader = loader_of(folder, tokenizer, quarantine=quarantine, **options)
    stream = iter(loader)
    batches = [next(stream) for _ in range(12)]  # three epochs
    assert loader.faults[KINDS[kind]] >= 3 and len(loader.faults) == 1
    assert all(len(batch.images) == 5 for batch in batches)
    keys = [key for batch in batches for key in batch.keys]
    assert "s00007" not in keys and len(keys) == 60
    lines = [json.loads(line) for line in quarantine.read_text().splitlines()]
    assert len(lines) == 1 and lines[0]["key"] == "s00007" and lines[0]["kind"] == KINDS[kind]
    again = iter(loader_of(folder, tokenizer, **options))
    assert [next(again).keys for _ in range(12)] == [batch.keys for batch in batches]


ODD = {
    "surrogate": {"json": b'{"image_id": "7", "captions": ["half \\ud83d"]}'},
    "number": {
        "json": b'{"image_id": "7", "captions": ["a"], "width": 9, "height": 9, "elems": '
        b'[{"caption": "a", "bb": [0, 0, 1, 1%s]}]}' % (b"0" * 400)
    },
    "depth": {"txt": b"a caption", "json": b"[" * 100_000},
    "key": {"__key__": "s\udcff7", "json": b"{"},
}


@pytest.mark.parametrize("kind", ODD)
def test_odd_records_are_skipped_not_fatal(write_shards, tokenizer, kind, tmp_path):
    """These ended the run at the same place at every resume."""

    def change(number, sample):
        if number == BAD:
            sample.update(ODD[kind])

    quarantine = tmp_path / "bad.jsonl"
    options = {"batch": 5, "train": True, "image_size": 24, "block": 4, "window_blocks": 2}
    options |= {"faults": "skip", "max_fault_rate": 0.2, "quarantine": quarantine}
    folder = write_shards("pretrain", 20, change=change)
    loader = build_loader("pretrain", folder, tokenizer=tokenizer, **options)
    stream = iter(loader)
    assert len([key for _ in range(4) for key in next(stream).keys]) == 20
    assert loader.faults == {"record": 1}
    (line,) = map(json.loads, quarantine.read_text().splitlines())
    assert line["key"] == ODD[kind].get("__key__", "s00007")


def test_only_the_bad_sample_is_replaced(write_shards, tokenizer, tmp_path):
    """The stream with a bad sample differs from the plan in its place only."""
    folder = write_shards("vqa", 20, change=spoil("cut"))
    options = {"faults": "skip", "max_fault_rate": 0.2}
    stream = iter(loader_of(folder, tokenizer, **options))
    keys = [key for _ in range(4) for key in next(stream).keys]
    source = make_source(folder, seed=0, batch=20, steps=1)
    planned = [sample["__key__"] for sample in source]
    differing = [old for old, new in zip(planned, keys, strict=True) if old != new]
    assert differing == ["s00007"]


def test_evaluation_counts_no_substitute(write_shards, tokenizer):
    folder = write_shards("vqa", 20, change=spoil("cut"))
    loader = loader_of(folder, tokenizer, train=False, faults="skip", max_fault_rate=0.2)
    counted = [k for b in loader for k, v in zip(b.keys, b.valid.tolist(), strict=True) if v]
    assert sorted(set(counted)) == [f"s{n:05d}" for n in range(20) if n != BAD]
    assert len(counted) == 19 * 3


def test_too_many_faults_stop_the_run(write_shards, tokenizer):
    folder = write_shards("vqa", 20, change=spoil("cut"))
    with pytest.raises(FaultError, match="data.max_fault_rate"):
        list(loader_of(folder, tokenizer, train=False, faults="skip"))


def test_an_all_bad_shard_stops_the_run(write_shards, tokenizer):
    def every(number, sample):
        sample["jpg"] = b"nothing"

    folder = write_shards("vqa", 20, change=every)
    with pytest.raises(FaultError, match="in a row"):
        list(loader_of(folder, tokenizer, train=False, faults="skip", max_fault_rate=1.0))


def test_runs_of_faults_across_batches():
    ledger = FaultLedger("skip", 1.0, 1000)

    def faults(positions):
        return tuple(Fault("decode", "s", str(p), "bad", p, 0) for p in positions)

    for first in range(0, MAX_CONSECUTIVE - 10, 10):
        ledger.deliver(range(first, first + 10), faults(range(first, first + 10)))
    ledger.deliver(range(90, 100), faults(range(90, 99)))  # the last one is good
    ledger.deliver(range(100, 110), faults(range(100, 110)))
    assert ledger.counts["decode"] == 109 and ledger.consecutive == 10
    with pytest.raises(ValueError, match="data.faults"):
        FaultLedger("ignore", 0.1, 10)


def test_manifest_and_index_must_agree(write_shards):
    folder = write_shards("vqa", 15)
    content = json.loads((folder / "manifest.json").read_text())
    assert np.sum([shard["samples"] for shard in content["shards"]]) == 15
    (folder / "shard-000000.tar.idx").unlink()
    with pytest.raises(ShardError, match="no index"):
        list(make_source(folder))
    write_manifest(folder, "vqa", "train")
    assert len(list(make_source(folder))) == 15
