"""The loader: exact resume, the same global batches for any number of ranks, complete evaluation."""

from __future__ import annotations

import dataclasses
import errno
import json
import os
import subprocess
import sys
import textwrap
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from data_pipeline.loader import build_loader, evaluation_workers

ROOT = Path(__file__).resolve().parents[3]
REGION = SimpleNamespace(images=4, rows=10, max_regions=4, min_fraction_in_crop=0.5, unit_images=0)
relaxed = settings(
    max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


def make(task, folder, tokenizer, **options):
    values = {"batch": 4, "train": True, "image_size": 24, "patch_size": 8, "max_tokens": 12}
    values |= {"block": 4, "window_blocks": 2, "seed": 5, "region": REGION, "rows_per_image": 2}
    values |= {"augment": "blocksworld"} | options
    return build_loader(task, folder, tokenizer=tokenizer, **values)


def same(one, two):
    for field in dataclasses.fields(one):
        a, b = getattr(one, field.name), getattr(two, field.name)
        if isinstance(a, torch.Tensor):
            assert torch.equal(a, b), field.name
        else:
            assert a == b, field.name


def take(loader, count):
    stream = iter(loader)
    return [next(stream) for _ in range(count)]


@pytest.mark.parametrize("task", ["pretrain", "region", "vqa"])
@pytest.mark.parametrize("augment", ["blocksworld", "pretrain", "finetune"])
def test_resume_gives_the_tail(write_shards, tokenizer, task, augment):
    folder = write_shards("vqa" if task == "vqa" else "pretrain", 22)
    whole = take(make(task, folder, tokenizer, augment=augment), 12)
    for stop in (0, 1, 5, 6, 11):
        first = make(task, folder, tokenizer, augment=augment, workers=2 if stop == 5 else 0)
        take(first, stop)
        state = json.loads(json.dumps(first.state_dict()))
        second = make(task, folder, tokenizer, augment=augment)
        second.load_state_dict(state)
        for one, two in zip(take(second, 12 - stop), whole[stop:], strict=True):
            same(one, two)
        assert second.state_dict()["samples_consumed"] == 12 * 4


def test_iterating_again_goes_on(write_shards, tokenizer):
    folder = write_shards("vqa", 22)
    whole = take(make("vqa", folder, tokenizer), 6)
    loader = make("vqa", folder, tokenizer)
    for one, two in zip(take(loader, 2) + take(loader, 4), whole, strict=True):
        same(one, two)


def keys_and_pixels(batches):
    return [
        (key, question, batch.images[index].sum().item())
        for batch in batches
        for key, question, index in zip(
            batch.keys, batch.questions, batch.image_index.tolist(), strict=True
        )
    ]


@relaxed
@given(before=st.sampled_from([1, 2, 4]), after=st.sampled_from([1, 2, 4]), stop=st.integers(0, 7))
def test_global_batches_do_not_depend_on_ranks(write_shards, tokenizer, before, after, stop):
    import shutil

    folder = write_shards("vqa", 22)
    try:
        whole = [keys_and_pixels([b]) for b in take(make("vqa", folder, tokenizer, batch=8), 9)]
        first = make("vqa", folder, tokenizer, batch=8 // before, world_size=before)
        take(first, stop)
        state = first.state_dict()
        parts = []
        for rank in range(after):
            loader = make("vqa", folder, tokenizer, batch=8 // after, rank=rank, world_size=after)
            loader.load_state_dict(state)
            parts.append(take(loader, 9 - stop))
            assert loader.state_dict()["samples_consumed"] == 9 * 8
        for step in range(9 - stop):
            assert keys_and_pixels([part[step] for part in parts]) == whole[stop + step]
    finally:
        shutil.rmtree(folder)


def test_another_batch_size_goes_on_without_gap(write_shards, tokenizer):
    folder = write_shards("vqa", 24)
    first = make("vqa", folder, tokenizer, batch=4, rows_per_image=1)
    keys = [key for batch in take(first, 3) for key in batch.keys]
    second = make("vqa", folder, tokenizer, batch=6, rows_per_image=1)
    second.load_state_dict(first.state_dict())
    keys += [key for batch in take(second, 2) for key in batch.keys]
    assert sorted(keys) == [f"s{n:05d}" for n in range(24)]


@pytest.mark.parametrize("ranks", [1, 2, 3])
@pytest.mark.parametrize("workers", [0, 2])
def test_evaluation_is_complete_and_equal(write_shards, tokenizer, ranks, workers):
    folder = write_shards("vqa", 23)
    loaders = [
        make("vqa", folder, tokenizer, train=False, rank=r, world_size=ranks, workers=workers)
        for r in range(ranks)
    ]
    parts = [list(loader) for loader in loaders]
    assert len({len(part) for part in parts}) == 1 and len(parts[0]) == len(loaders[0])
    counted = [
        (key, question)
        for part in parts
        for batch in part
        for key, question, valid in zip(batch.keys, batch.questions, batch.valid, strict=True)
        if valid
    ]
    assert len(counted) == 23 * 3
    assert {key for key, _ in counted} == {f"s{n:05d}" for n in range(23)}
    again = list(loaders[0])
    assert len(again) == len(parts[0])
    same(again[0], parts[0][0])
    assert loaders[0].state_dict()["samples_consumed"] == 0


@pytest.mark.parametrize("task", ["pretrain", "region"])
def test_evaluation_of_pretraining(write_shards, tokenizer, task):
    folder = write_shards("pretrain", 10)
    batches = list(make(task, folder, tokenizer, train=False, world_size=2, rank=1))
    assert len(batches) == 2
    assert {batch.rows for batch in batches} == {4 if task == "pretrain" else 10}
    valid = {k for b in batches for k, v in zip(b.keys, b.valid.tolist(), strict=True) if v}
    assert valid == {f"s{n:05d}" for n in (4, 5, 6, 7)}


def test_limit(write_shards, tokenizer):
    folder = write_shards("vqa", 23)
    loader = make("vqa", folder, tokenizer, train=False, limit=7)
    assert loader.samples_per_epoch == 7 and len(loader) == 2
    assert sum(int(batch.valid.sum()) for batch in loader) == 21


def test_more_samples_in_a_batch_than_in_the_data(write_shards, tokenizer):
    folder = write_shards("vqa", 3)
    batch = take(make("vqa", folder, tokenizer, batch=8), 1)[0]
    assert len(batch.images) == 8 and batch.valid.all()
    only = list(make("vqa", folder, tokenizer, batch=8, train=False))
    assert len(only) == 1 and int(only[0].valid.sum()) == 9


def test_the_log_counts_once_what_an_epoch_leaves_out(write_shards, tokenizer, caplog):
    caplog.set_level("INFO", logger="data_pipeline")
    folder = write_shards("vqa", 23)
    loader = make("vqa", folder, tokenizer, groups=4)
    take(loader, 8)
    take(loader, 1)
    list(make("vqa", folder, tokenizer, train=False))  # every sample, in order
    (line,) = [record.getMessage() for record in caplog.records if "leaves out" in record.msg]
    assert "leaves out 3 of the 23 samples (3 shards)" in line and "4 equal groups" in line


def test_foreign_states_are_refused(write_shards, tokenizer):
    folder = write_shards("vqa", 12)
    loader = make("vqa", folder, tokenizer)
    state = loader.state_dict()
    assert len(json.dumps(state)) < 500
    for name, value in {"seed": 6, "version": 0, "task": "pretrain"}.items():
        with pytest.raises(ValueError, match=f"'{name}'"):
            loader.load_state_dict(state | {name: value})
    with pytest.raises(ValueError, match="gone or changed.*--rebase"):
        loader.load_state_dict(state | {"datasets": [state["datasets"][0] | {"hash": "0" * 32}]})


@dataclasses.dataclass(frozen=True)
class Source:
    path: str
    weight: float | None = None


def two_folders(write_shards):
    """Two data sets of 20 and 12 images, with keys and content of their own."""
    folders = []
    for name, first, count in (("one", 0, 20), ("two", 500, 12)):

        def change(number, sample, name=name, first=first):
            sample["__key__"] = f"{name}{number:05d}"

        folder = write_shards("pretrain", count, change=change)
        folders.append(folder.rename(folder.parent / name))
    return folders


def rows_of(batch):
    """What a row is: its key, its picture, its masked text, its box."""
    boxes = batch.boxes if batch.boxes is not None else batch.mlm_positions
    return [
        (key, int(batch.images[image].long().sum()), ids.tolist(), box.tolist())
        for key, image, ids, box in zip(
            batch.keys, batch.image_index.tolist(), batch.mlm_ids, boxes, strict=True
        )
    ]


@pytest.mark.parametrize("task", ["pretrain", "region"])
def test_a_mixture_over_any_ranks_and_workers_is_one_stream(write_shards, tokenizer, task):
    """N to M ranks, W to W' workers, groups, two data sets: the same global batches, in order."""
    sources = [
        Source(str(path), weight)
        for path, weight in zip(two_folders(write_shards), (3, 1), strict=True)
    ]

    def loaders(ranks, workers=0):
        region = SimpleNamespace(
            images=24 // ranks,
            rows=60 // ranks,
            max_regions=4,
            min_fraction_in_crop=0.5,
            unit_images=0,
        )
        return [
            make(
                task, sources, tokenizer, batch=24 // ranks, rank=rank, world_size=ranks,
                workers=workers, groups=4, region=region, augment="pretrain",
            )
            for rank in range(ranks)
        ]  # fmt: skip

    whole = [rows_of(batch) for batch in take(loaders(1)[0], 6)]
    assert {key[:3] for step in whole for key, *_ in step} == {"one", "two"}
    stands = 0
    state = loaders(1)[0].state_dict()
    for ranks, workers, steps in ((2, 0, 1), (4, 1, 2), (1, 2, 1), (2, 1, 2)):
        parts = []
        for loader in loaders(ranks, workers):
            loader.load_state_dict(state)
            parts.append([rows_of(batch) for batch in take(loader, steps)])
            after = loader.state_dict()
        for step in range(steps):
            assert sum((part[step] for part in parts), []) == whole[stands + step]
        stands, state = stands + steps, json.loads(json.dumps(after))
    consumed = [entry["consumed"] for entry in state["datasets"]]
    assert sum(consumed) == 6 * 24 and consumed == [108, 36]


def test_region_units_say_what_would_work(write_shards, tokenizer):
    folder = write_shards("pretrain", 22)

    def build(images, rows):
        region = SimpleNamespace(
            images=images, rows=rows, max_regions=4, min_fraction_in_crop=0.5, unit_images=0
        )
        return make("region", folder, tokenizer, region=region)

    state = build(12, 30).state_dict()
    assert state["unit"] == [6, 15]
    build(24, 60).load_state_dict(state)
    with pytest.raises(ValueError, match="whole units of 6 images and 15 rows"):
        build(8, 20).load_state_dict(state)
    with pytest.raises(
        ValueError, match="unit_images: 5 does not cut 12 images.*one of 2, 4, 6, 12"
    ):
        region = SimpleNamespace(
            images=12, rows=30, max_regions=4, min_fraction_in_crop=0.5, unit_images=5
        )
        make("region", folder, tokenizer, region=region)
    rebased = build(8, 20)
    rebased.load_state_dict(state, rebase=True)
    assert rebased.state_dict()["unit"] == [8, 20]


def test_captions_of_a_txt_member(write_shards, tokenizer):
    """img2dataset keeps the caption beside the picture; its JSON describes the download."""

    def change(number, sample):
        sample["txt"] = f" a {'red' if number % 2 else 'blue'}\n circle ".encode()
        sample["json"] = json.dumps({"url": "x", "status": "success", "key": "1"}).encode()

    folder = write_shards("pretrain", 6, change=change)
    loader = make("pretrain", folder, tokenizer, train=False)
    batch = next(iter(loader))
    red, blue = tokenizer.convert_tokens_to_ids(["red", "blue"])
    for key, ids in zip(batch.keys, batch.text_ids.tolist(), strict=True):
        assert (red if int(key[1:]) % 2 else blue) in ids


def test_settings_that_cannot_work(write_shards, tokenizer, tmp_path):
    folder = write_shards("vqa", 12)
    for options, named in (
        ({"batch": 0}, "data.batch"),
        ({"workers": -1}, "data.workers"),
        ({"rank": 2, "world_size": 2}, "rank 2"),
        ({"augment": "x"}, "data.augment"),
        ({"faults": "x"}, "data.faults"),
        ({"rows_per_image": 0}, "rows_per_image"),
    ):
        with pytest.raises(ValueError, match=named):
            make("vqa", folder, tokenizer, **options)
    with pytest.raises(ValueError, match="holds 'vqa' samples"):
        make("pretrain", folder, tokenizer)
    with pytest.raises(ValueError, match="unknown loader task"):
        make("nlvr3", folder, tokenizer)
    with pytest.raises(FileNotFoundError, match="espalier data"):
        make("vqa", tmp_path / "none", tokenizer)


def test_a_shard_that_vanishes_is_one_clear_error_from_workers_too(write_shards, tokenizer):
    folder = write_shards("vqa", 12)
    loader = make("vqa", folder, tokenizer, workers=1)
    (folder / "shard-000001.tar.idx").unlink()
    with pytest.raises(ValueError, match="espalier data index") as caught:
        take(loader, 3)
    assert "Traceback" not in str(caught.value)


@pytest.mark.parametrize("cached", [True, False])
@pytest.mark.parametrize("workers", [0, 1])
def test_a_web_server_that_breaks_delivers_the_same_batches(
    write_shards, tokenizer, tmp_path, monkeypatch, cached, workers
):
    """Resets, 503, 429 and short bodies in the middle of training: nothing changes but a count."""
    from data_pipeline.remote import RemoteOptions
    from tests.loopback import Cut, Loopback, Status

    folder = write_shards("pretrain", 30)
    whole = [rows_of(batch) for batch in take(make("pretrain", folder, tokenizer), 9)]
    monkeypatch.setattr("data_pipeline.remote._FIRST_WAIT_S", 0.0)
    files = {path.name: path.read_bytes() for path in folder.iterdir()}
    with Loopback(files) as server:
        for name in files:
            if name.endswith(".tar"):
                server.script(name, Status(503), Cut(700, reset=True), Status(429), Cut(0))
        remote = RemoteOptions(cache_dir=tmp_path / "cache" if cached else None, cache_gb=0.1)
        loader = make("pretrain", server.url, tokenizer, remote=remote, workers=workers)
        assert [rows_of(batch) for batch in take(loader, 9)] == whole
        assert loader.transfers["requests"] > 0 and loader.transfers["retries"] > 0
        assert loader.faults == {}
        local = make("pretrain", folder, tokenizer)
        local.load_state_dict(loader.state_dict())


@pytest.mark.parametrize("workers", [0, 1])
def test_a_network_that_gives_out_is_no_bad_input(write_shards, tokenizer, monkeypatch, workers):
    """A launcher starts a run again after an OSError, not after a ValueError (a wrong command)."""
    from data_pipeline.remote import RemoteOptions, TransientError
    from tests.loopback import Loopback, Status

    monkeypatch.setattr("data_pipeline.remote._FIRST_WAIT_S", 0.0)
    folder = write_shards("vqa", 12)
    files = {path.name: path.read_bytes() for path in folder.iterdir()}
    with Loopback(files) as server:
        loader = make(
            "vqa", server.url, tokenizer, remote=RemoteOptions(retries=0), workers=workers
        )
        for name in files:
            if name.endswith(".tar"):
                server.script(name, *[Status(503)] * 20)
        with pytest.raises(TransientError, match="gave up after 1 try"):
            take(loader, 3)


@pytest.mark.parametrize("workers", [0, 1])
def test_a_disk_that_gives_out_is_no_bad_input(write_shards, tokenizer, monkeypatch, workers):
    def broken(descriptor, offset, length):
        raise OSError(errno.ESTALE, "Stale file handle")

    loader = make("vqa", write_shards("vqa", 12), tokenizer, workers=workers)
    monkeypatch.setattr("data_pipeline.storage._pread", broken)
    with pytest.raises(OSError, match="Stale file handle"):
        take(loader, 3)


def test_held_out_data_in_a_bucket_have_one_worker():
    bucket, folder = Source("s3://bucket/val"), Source("data/val")
    assert [evaluation_workers(bucket.path, n) for n in (0, 1, 8)] == [0, 1, 1]
    assert evaluation_workers([folder, bucket], 8) == 1
    assert evaluation_workers("https://host/val", 8) == evaluation_workers([folder], 8) == 0


def test_workers_start_after_a_validation_from_a_bucket(write_shards, tokenizer_folder):
    """obstore in the main process would end every worker forked later, as after a late validation."""
    pytest.importorskip("obstore")
    from tests.loopback import Loopback

    folder = write_shards("vqa", 12)
    code = """
        import sys
        from data_pipeline.loader import build_loader, evaluation_workers
        from data_pipeline.text import load_tokenizer
        tokenizer, url = load_tokenizer(sys.argv[1]), "s3://bucket/set"
        def loader(train):
            workers = 1 if train else evaluation_workers(url, 1)
            return build_loader("vqa", url, tokenizer=tokenizer, batch=4, train=train,
                                image_size=24, workers=workers, block=4, window_blocks=2)
        print(len([batch for batch in loader(False)]), len(next(iter(loader(True))).images))
    """
    files = {f"bucket/set/{path.name}": path.read_bytes() for path in folder.iterdir()}
    with Loopback(files) as server:
        env = {"AWS_ENDPOINT_URL": server.url, "AWS_ALLOW_HTTP": "1", "AWS_SKIP_SIGNATURE": "1"}
        done = subprocess.run(
            [sys.executable, "-c", textwrap.dedent(code), str(tokenizer_folder)],
            env=os.environ | env, cwd=ROOT, capture_output=True, text=True, timeout=100,
        )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["3", "4"]
