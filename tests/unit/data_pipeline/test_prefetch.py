"""The prefetcher against a recording stand-in for torch.cuda: what happens, and in which order."""

from __future__ import annotations

from contextlib import contextmanager
from dataclasses import dataclass, field

import pytest
import torch

from data_pipeline.batches import Batch
from data_pipeline.prefetch import DevicePrefetcher


@dataclass
class FakeStream:
    name: str
    log: list
    copies: list = field(default_factory=list)

    def record_event(self):
        self.log.append(("event", self.name, tuple(self.copies)))
        return tuple(self.copies)

    def wait_event(self, event):
        self.log.append(("wait", self.name, event))


class FakeStreams:
    """A current stream and one side stream; copies are noted on the stream they run on."""

    def __init__(self):
        self.log = []
        self.main = FakeStream("main", self.log)
        self.active = self.main

    def Stream(self, device):  # noqa: N802 - torch's name
        return FakeStream("side", self.log)

    @contextmanager
    def stream(self, stream):
        before, self.active = self.active, stream
        yield
        self.active = before

    def current_stream(self, device):
        return self.active


@dataclass
class Item:
    number: int
    streams: FakeStreams
    moved: bool = False

    def to(self, device, non_blocking=False):
        assert non_blocking
        self.streams.active.copies.append(self.number)
        self.streams.log.append(("copy", self.streams.active.name, self.number))
        return Item(self.number, self.streams, moved=True)

    def record_stream(self, stream):
        self.streams.log.append(("record", stream.name, self.number))


def items(streams, count, error=None):
    for number in range(count):
        streams.log.append(("take", number))
        yield Item(number, streams)
    if error is not None:
        raise error


def test_the_next_copy_starts_before_an_item_is_handed_out():
    streams = FakeStreams()
    prefetcher = DevicePrefetcher(items(streams, 3), "cuda", streams)
    assert streams.log == []
    first = next(prefetcher)
    assert (first.number, first.moved) == (0, True)
    assert streams.log == [
        ("take", 0),
        ("copy", "side", 0),
        ("event", "side", (0,)),
        # Handed over only after its own copy, and without waiting for the next one.
        ("wait", "main", (0,)),
        ("record", "main", 0),
        ("take", 1),
        ("copy", "side", 1),
        ("event", "side", (0, 1)),
    ]
    streams.log.clear()
    assert [item.number for item in prefetcher] == [1, 2]
    assert streams.log[:2] == [("wait", "main", (0, 1)), ("record", "main", 1)]
    assert not [entry for entry in streams.log if entry[:2] == ("copy", "main")]
    with pytest.raises(StopIteration):
        next(prefetcher)


@pytest.mark.parametrize("error", [ValueError("bad shard"), KeyboardInterrupt()])
def test_an_error_comes_after_the_items_before_it(error):
    streams = FakeStreams()
    prefetcher = DevicePrefetcher(items(streams, 2, error), "cuda", streams)
    assert [next(prefetcher).number, next(prefetcher).number] == [0, 1]
    for _ in range(2):
        with pytest.raises(type(error)):
            next(prefetcher)


def test_counting_what_is_handed_out_is_exact():
    """As the loader does it: what is on its way when the run ends is not counted."""
    streams = FakeStreams()
    prefetcher = DevicePrefetcher(items(streams, 10), "cuda", streams)
    counted = [next(prefetcher).number for _ in range(4)]
    taken = [entry[1] for entry in streams.log if entry[0] == "take"]
    assert counted == [0, 1, 2, 3] and taken == [0, 1, 2, 3, 4]


def test_close_drops_the_rest_and_closes_the_source():
    streams = FakeStreams()
    closed = []

    def source():
        try:
            yield from items(streams, 10)
        finally:
            closed.append(True)

    prefetcher = DevicePrefetcher(source(), "cuda", streams)
    next(prefetcher)
    prefetcher.close()
    prefetcher.close()
    assert closed == [True]
    with pytest.raises(StopIteration):
        next(prefetcher)


def batch(number):
    return Batch(
        images=torch.full((2, 3, 4, 4), number, dtype=torch.uint8),
        image_index=torch.arange(2),
        valid=torch.ones(2, dtype=torch.bool),
        keys=("a", "b"),
    )


def test_on_a_cpu_items_pass_through_one_at_a_time():
    taken = []
    whole = [batch(number) for number in range(3)]

    def source():
        for number, item in enumerate(whole):
            taken.append(number)
            yield item

    prefetcher = DevicePrefetcher(source(), "cpu")
    assert next(prefetcher) is whole[0] and taken == [0]
    assert list(prefetcher) == whole[1:]
    prefetcher.close()
    empty = DevicePrefetcher(iter([batch(0)]), "cpu")
    empty.close()
    assert list(empty) == []


@pytest.mark.gpu
def test_batches_arrive_whole_on_a_gpu():
    source = iter([batch(number).pin_memory() for number in range(20)])
    for number, item in enumerate(DevicePrefetcher(source, "cuda")):
        assert item.images.device.type == "cuda" and item.valid.all()
        assert (item.images == number).all()
