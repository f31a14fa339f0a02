"""The resume state: what may change, what is refused with a way out, and what --rebase makes."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest

from data_pipeline.mixture import step_positions
from data_pipeline.position import DataSet, PlanSettings, Position, check_unit

HASHES = ["0123456789abcdef" * 2, "fedcba9876543210" * 2, "00112233445566ff" * 2]
SETTINGS = PlanSettings("pretrain", 3, 4, 2, 4, True)
COCO = DataSet("/data/4m/coco/pretrain/train", HASHES[0], np.asarray([50, 50]))
SBU = DataSet("s3://bucket/sbu/pretrain/train", HASHES[1], np.asarray([300]))


def make(datasets=(COCO, SBU), settings=SETTINGS, **options):
    return Position(settings, datasets, **{"step_samples": 12, "ranks": 2} | options)


def read(position, steps):
    """Keys of the next steps, and the position behind them."""
    keys = []
    for _ in range(steps):
        groups, size = position.settings.groups, position.step_samples
        for place in step_positions(position.consumed, size, groups, 0, size):
            dataset, shard, sample = position.mixture.locate(place)
            keys.append(
                (position.by_entry([d.hash for d in position.datasets])[dataset], shard, sample)
            )
        position.consumed += size
    return keys


def saved(position):
    text = json.dumps(position.state_dict())
    assert len(text) < 350 + 120 * len(position.state_dict()["datasets"])
    return json.loads(text)


def test_resume_gives_the_tail():
    whole = read(make(), 30)
    for stop in (0, 1, 7, 29):
        first = make()
        read(first, stop)
        second = make()
        assert second.load_state_dict(saved(first)) == []
        assert read(second, 30 - stop) == whole[stop * 12 :]


def test_another_place_of_the_data_is_the_same_data():
    first = make()
    whole = read(make(), 9)
    read(first, 4)
    moved = make([COCO._replace(location="/elsewhere/coco"), SBU._replace(location="/mnt/sbu")])
    moved.load_state_dict(saved(first))
    assert read(moved, 5) == whole[48:]


def test_another_step_size_reads_each_sample_once_and_says_so():
    first, whole = make(), make()
    read(first, 4)
    second = make(step_samples=24)
    (note,) = second.load_state_dict(saved(first))
    assert "24 images, it had 12" in note and "negatives" in note
    assert sorted(read(second, 2)) == sorted(read(whole, 8)[48:])


def test_the_groups_of_the_run_are_kept():
    first = make(settings=replace(SETTINGS, groups=6))
    whole = read(make(settings=replace(SETTINGS, groups=6)), 8)
    read(first, 3)
    second = make(settings=replace(SETTINGS, groups=2), auto_groups=True)
    second.load_state_dict(saved(first))
    assert read(second, 5) == whole[36:]


def test_an_impossible_step_says_what_would_work():
    first = make()
    with pytest.raises(ValueError, match=r"multiple of 2, such as 4, 6, 8") as refusal:
        make(step_samples=10).load_state_dict(saved(first))
    assert "data.batch" in str(refusal.value)
    with pytest.raises(ValueError, match="4 groups"):
        make(settings=replace(SETTINGS, groups=4), step_samples=6)


CHANGES = {
    "data changed": (
        [COCO._replace(hash=HASHES[2]), SBU],
        {},
        "coco/pretrain/train.*gone or changed",
    ),
    "data added": (
        [COCO, SBU, DataSet("/x/cc3m", HASHES[2], np.asarray([90]))],
        {},
        "cc3m.*is new",
    ),
    "data taken away": ([SBU], {}, "coco/pretrain/train.*gone"),
    "weights": ([COCO._replace(weight=1.0), SBU._replace(weight=1.0)], {}, "mixture shares"),
    "block": ([COCO, SBU], {"block": 8}, "data.block was 4, now 8"),
    "groups": ([COCO, SBU], {"groups": 3}, "data.groups was 4, now 3"),
}


@pytest.mark.parametrize("name", CHANGES)
def test_changes_are_refused_and_rebase_begins_a_new_segment(name):
    datasets, plan, told = CHANGES[name]
    first = make()
    before = read(first, 5)
    second = make(datasets, replace(SETTINGS, **plan))
    with pytest.raises(ValueError, match=told) as refusal:
        second.load_state_dict(saved(first))
    assert "--rebase" in str(refusal.value) and "--resume none" in str(refusal.value)

    second = make(datasets, replace(SETTINGS, **plan))
    (note,) = second.load_state_dict(saved(first), rebase=True)
    assert "new order begins at sample 60" in note
    after = read(second, 5)
    unchanged = [] if plan else [d.hash for d in datasets if d.hash in (COCO.hash, SBU.hash)]
    for data_hash in unchanged:
        # Data sets that stay go on: nothing twice before their epoch is over.
        mine = [key for key in before + after if key[0] == data_hash]
        size = next(int(d.samples.sum()) for d in datasets if d.hash == data_hash)
        assert len(set(mine[:size])) == len(mine[:size])
    # The rebased run resumes as any other, and its state is no longer a difference.
    state = saved(second)
    third = make(datasets, replace(SETTINGS, **plan))
    assert third.load_state_dict(state) == []
    assert read(third, 4) == read(second, 4)


def test_a_data_set_may_leave_and_come_back():
    first = make()
    read(first, 5)
    second = make([SBU])
    second.load_state_dict(saved(first), rebase=True)
    read(second, 5)
    third = make()
    third.load_state_dict(saved(second), rebase=True)
    places = {d.hash for d in (COCO, SBU)}
    assert {key[0] for key in read(third, 5)} == places
    entries = third.state_dict()["datasets"]
    assert [entry["left"] for entry in entries] == [True, False, False]


def test_rebase_without_a_change_changes_nothing():
    first, whole = make(), read(make(), 8)
    read(first, 3)
    second = make()
    assert second.load_state_dict(saved(first), rebase=True) == []
    assert read(second, 5) == whole[36:]


@pytest.mark.parametrize(("key", "value"), [("seed", 4), ("task", "vqa"), ("version", 1)])
def test_another_run_is_refused(key, value):
    state = saved(make()) | {key: value}
    with pytest.raises(ValueError, match=f"'{key}' was"):
        make().load_state_dict(state, rebase=True)


def test_another_plan_version_is_refused_with_its_number():
    state = saved(make())
    state["plan"]["version"] = 99
    with pytest.raises(ValueError, match="plan version 99"):
        make().load_state_dict(state)


def test_units_of_region_rows():
    check_unit((6, 16), 48, 128)
    check_unit((6, 16), 96, 256)
    for images, rows in ((48, 120), (45, 120), (48, 256)):
        with pytest.raises(ValueError, match="whole units of 6 images and 16 rows"):
            check_unit((6, 16), images, rows)
