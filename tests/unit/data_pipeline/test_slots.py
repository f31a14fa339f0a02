"""Slots are used again when, and only when, nobody looks at the batch in them any more."""

from __future__ import annotations

import gc
import io
import os
import pickle
from multiprocessing.reduction import ForkingPickler

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import DataLoader, IterableDataset

from data_pipeline import slots
from data_pipeline.batches import Batch, PretrainBatch
from data_pipeline.collate import ImageRows

SHAPE = (2, 4, 5, 3)


class SameProcess:
    """Hands a descriptor over within this process (the real one needs a sender and a receiver)."""

    def __init__(self, file):
        self.file = file

    def detach(self):
        return os.dup(self.file)


def as_worker(patch):
    """This process as a worker that sends to itself: its pool."""
    pool = slots.SlotPool()
    patch.setattr(slots, "_pool", lambda process: pool)
    patch.setattr(slots, "get_worker_info", lambda: object())
    patch.setattr(slots.multiprocessing.reduction, "DupFd", SameProcess)
    return pool


@pytest.fixture
def pool(monkeypatch):
    return as_worker(monkeypatch)


def filled(value):
    array = slots.allocate(SHAPE)
    array[...] = value
    return torch.from_numpy(array).permute(0, 3, 1, 2)


def sent(tensor):
    place = slots.share(tensor)
    assert place is not None
    return slots.receive(*place)


def test_memory_is_shared_and_used_again_after_the_last_view(pool):
    tensor = filled(7)
    received = sent(tensor)
    assert received.shape == tensor.shape and received.stride() == tensor.stride()
    assert received.is_contiguous(memory_format=torch.channels_last)
    tensor[0, 0, 0, 0] = 9
    assert received[0, 0, 0, 0] == 9 and (received.flatten()[1:] == 7).sum() > 100
    del tensor
    row = received[1].numpy()  # a view of a view, in numpy
    del received
    gc.collect()
    filled(1)
    assert len(pool._slots) == 2 and (row == 7).all()
    del row
    filled(2)
    assert len(pool._slots) == 2


@settings(max_examples=40, deadline=None)
@given(steps=st.lists(st.integers(0, 6), min_size=1, max_size=40))
def test_batches_that_are_kept_never_change(steps):
    """0 makes and sends a batch; k drops the k-th oldest that is kept."""
    with pytest.MonkeyPatch.context() as patch:
        pool = as_worker(patch)
        kept, made, most = [], 0, 0
        for step in steps:
            if step == 0:
                kept.append((made % 251, sent(filled(made % 251))))
                made += 1
            elif step <= len(kept):
                kept.pop(step - 1)
            most = max(most, len(kept))
            assert all((tensor == value).all() for value, tensor in kept)
        assert len(pool._slots) <= most + 1


def test_what_is_never_sent_is_free_again(pool):
    for _ in range(5):
        filled(3)
    assert len(pool._slots) == 1


def test_the_senders_own_array_may_outlive_the_receivers(pool):
    first = filled(1)
    received = sent(first)
    del received
    second = filled(2)  # the same slot, while `first` still stands
    assert len(pool._slots) == 1
    del first
    gc.collect()
    filled(3)
    assert (second == 2).all() and len(pool._slots) == 2


def test_a_tensor_is_sent_once_and_only_whole(pool):
    tensor = filled(1)
    assert slots.share(tensor[:1]) is None
    assert slots.share(torch.zeros(3, dtype=torch.uint8)) is None
    assert slots.share(torch.zeros(3)) is None
    received = sent(tensor)
    assert slots.share(tensor) is None
    assert (received == 1).all()


def test_a_fork_does_not_release_what_its_parent_holds(pool):
    received = sent(filled(4))
    child = os.fork()
    if child == 0:
        del received
        gc.collect()
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0
    assert not pool._slots[0].free and (received == 4).all()
    del received
    assert pool._slots[0].free


def test_too_many_in_use_get_ordinary_memory(pool, monkeypatch):
    monkeypatch.setattr(slots, "_MOST_SLOTS", 2)
    kept = [filled(n) for n in range(3)]
    assert len(pool._slots) == 2 and slots.share(kept[2]) is None
    assert [int(tensor[0, 0, 0, 0]) for tensor in kept] == [0, 1, 2]


def test_slots_of_another_size_are_let_go(pool):
    filled(1)
    slots.allocate((7, 3))
    assert [slot.size for slot in pool._slots] == [21]


def test_only_workers_use_slots(monkeypatch):
    pool = slots.SlotPool()
    monkeypatch.setattr(slots, "_pool", lambda process: pool)
    assert slots.allocate(SHAPE).shape == SHAPE and pool._slots == []
    monkeypatch.setattr(slots, "get_worker_info", lambda: object())
    monkeypatch.delattr(os, "memfd_create")
    assert slots.allocate(SHAPE).shape == SHAPE and pool._slots == []


def batch_of(images):
    return Batch(
        images=images, image_index=torch.arange(2), valid=torch.ones(2, dtype=torch.bool),
        keys=("a", "b"),
    )  # fmt: skip


def test_batches_go_by_slot_to_processes_and_as_values_into_files(pool):
    batch = batch_of(filled(5))
    copy = pickle.loads(pickle.dumps(batch))
    assert not np.shares_memory(copy.images.numpy(), batch.images.numpy())
    buffer = io.BytesIO()
    ForkingPickler(buffer).dump({"batch": batch})
    assert buffer.tell() < 2000  # the pictures are not in it
    monkey = pickle.loads(buffer.getvalue())["batch"]
    batch.images[0, 0, 0, 0] = 6
    assert monkey.images[0, 0, 0, 0] == 6 and monkey.keys == ("a", "b")
    assert torch.equal(monkey.image_index, batch.image_index)
    assert PretrainBatch in ForkingPickler._extra_reducers


class Numbers(IterableDataset):
    """Batches whose pictures all show their number."""

    def __iter__(self):
        rows = ImageRows()
        worker = torch.utils.data.get_worker_info()
        for number in range(worker.id, 30, worker.num_workers):
            pictures = [np.full(SHAPE[1:], number, np.uint8) for _ in range(2)]
            yield batch_of(rows.collect([rows.put(picture) for picture in pictures]))


@pytest.mark.parametrize(
    ("context", "keep"), [("fork", 0), ("fork", 2), ("fork", 30), ("spawn", 1)]
)
def test_workers_deliver_whole_batches(context, keep):
    kept = []
    loader = DataLoader(Numbers(), batch_size=None, num_workers=2, multiprocessing_context=context)
    for number, batch in enumerate(loader):
        assert (batch.images == number).all()
        kept.append((number, batch))
        kept = kept[max(0, len(kept) - keep) :]
        assert all((old.images == n).all() for n, old in kept)
    assert number == 29
