"""Batches travel between processes whole, with as few shared memory files as possible."""

from __future__ import annotations

import dataclasses
import io
import pickle
from multiprocessing.reduction import ForkingPickler

import torch

from data_pipeline.batches import PretrainBatch


def make(regions=False):
    generator = torch.Generator().manual_seed(3)
    images = torch.randint(0, 256, (4, 6, 5, 3), dtype=torch.uint8, generator=generator)
    extra = {"boxes": torch.rand(4, 4), "is_region": torch.ones(4, dtype=torch.bool)}
    return PretrainBatch(
        images=images.permute(0, 3, 1, 2),
        image_index=torch.arange(4),
        valid=torch.tensor([True, True, False, True]),
        keys=("a", "b", "c", "d"),
        text_ids=torch.arange(12).reshape(4, 3),
        text_mask=torch.ones(4, 3, dtype=torch.bool),
        mlm_ids=torch.arange(12).reshape(4, 3),
        mlm_positions=torch.zeros(4, 2, dtype=torch.int64),
        mlm_labels=torch.full((4, 2), -100),
        **(extra if regions else {}),
    )


def same(one, two):
    for field in dataclasses.fields(one):
        a, b = getattr(one, field.name), getattr(two, field.name)
        if isinstance(a, torch.Tensor):
            assert torch.equal(a, b) and a.dtype == b.dtype and a.stride() == b.stride()
        else:
            assert a == b


def test_a_copy_through_pickle_is_the_same():
    for regions in (False, True):
        batch = make(regions)
        copy = pickle.loads(pickle.dumps(batch))
        same(batch, copy)
        assert copy.images.is_contiguous(memory_format=torch.channels_last)
        copy.text_ids.zero_()  # writable, and its own


def test_only_the_images_take_a_shared_memory_file(monkeypatch):
    shared = []
    original = torch.UntypedStorage._share_fd_cpu_

    def count(storage, *arguments, **options):
        shared.append(len(storage))
        return original(storage, *arguments, **options)

    monkeypatch.setattr(torch.UntypedStorage, "_share_fd_cpu_", count)
    batch = make(regions=True)
    ForkingPickler(io.BytesIO()).dump(batch)
    assert shared == [batch.images.numel()]


def test_tensors_are_recorded_on_a_stream(monkeypatch):
    seen = []
    monkeypatch.setattr(torch.Tensor, "record_stream", lambda self, stream: seen.append(stream))
    make(regions=True).record_stream("step")
    assert seen == ["step"] * 10
