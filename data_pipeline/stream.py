"""The plan as a webdataset source, and the stages behind it.

`PlannedSource` is stage 0 of a `wds.DataPipeline`: it yields ordinary sample dicts (`__key__`,
`__url__`, extension -> bytes) in the order of the plan, each read with one pread. Workers hold no
state: micro-batch m goes to worker m mod W, and torch's DataLoader returns batches in that order,
    so the stream does not depend on W.
"""

from __future__ import annotations

import os
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch.utils.data import IterableDataset, get_worker_info
from webdataset.filters import map as map_stage
from webdataset.pipeline import DataPipeline

from data_pipeline.batches import Batch
from data_pipeline.collate import Assembler
from data_pipeline.decode import decode_image
from data_pipeline.faults import MAX_CONSECUTIVE, Fault, SkipSample
from data_pipeline.index import ShardError, ShardIndex, load_index
from data_pipeline.manifest import Manifest
from data_pipeline.plan import Plan, rank_slots
from data_pipeline.records import RecordError, image_members, parse_record

__all__ = ["Delivery", "PlannedSource", "ShardReader", "build_pipeline"]

Sample = dict[str, Any]
_OPEN_SHARDS = 64


class ShardReader:
    """Reads samples by (shard, number). Files are opened when first used, in each process."""

    def __init__(self, manifest: Manifest) -> None:
        self.manifest = manifest
        self._open: OrderedDict[int, tuple[int, ShardIndex]] = OrderedDict()

    def _shard(self, shard: int) -> tuple[int, ShardIndex]:
        if shard in self._open:
            self._open.move_to_end(shard)
            return self._open[shard]
        path = self.manifest.path(shard)
        index = load_index(path)
        if len(index) != self.manifest.shards[shard].samples:
            raise ShardError(
                f"{path}: the index has {len(index)} samples, the manifest "
                f"{self.manifest.shards[shard].samples}; run: espalier data index {path.parent}"
            )
        self._open[shard] = (os.open(path, os.O_RDONLY | os.O_CLOEXEC), index)
        while len(self._open) > _OPEN_SHARDS:
            _, (descriptor, _) = self._open.popitem(last=False)
            os.close(descriptor)
        return self._open[shard]

    def read(self, shard: int, number: int) -> Sample:
        """One sample as webdataset gives it: `__key__`, `__url__`, and its members by extension."""
        descriptor, index = self._shard(shard)
        members = index.members(number)
        start = members[0][1]
        length = members[-1][1] + members[-1][2] - start
        raw = os.pread(descriptor, length, start)
        if len(raw) != length:
            raise ShardError(
                f"{index.name}: the shard became shorter while it was read; restore it, or run: "
                f"espalier data index {self.manifest.location}"
            )
        sample: Sample = {"__key__": index.key(number), "__url__": index.name}
        for extension, offset, size, _ in members:
            sample[extension] = raw[offset - start : offset - start + size]
        return sample

    def close(self) -> None:
        """Closes the shards of this process."""
        while self._open:
            _, (descriptor, _) = self._open.popitem()
            os.close(descriptor)

    def __getstate__(self) -> dict:
        return {"manifest": self.manifest, "_open": OrderedDict()}

    def __del__(self) -> None:
        self.close()


class PlannedSource(IterableDataset):
    """Samples of one rank in plan order.

    Each sample also has `__position__` (in the endless stream), `__attempt__` (0; substitutes
    count up) and `__valid__` (False where an evaluation pass is over and the step is only filled
    up).

    Args:
        batch: samples per micro-batch of a rank.   start: first stream position of this run.
        steps: micro-batches to give; None is endless.
    """

    def __init__(
        self, reader: ShardReader, plan: Plan, *, batch: int, rank: int, ranks: int,
        start: int = 0, steps: int | None = None,
    ) -> None:  # fmt: skip
        super().__init__()
        self.reader = reader
        self.plan = plan
        self.batch = batch
        self.rank = rank
        self.ranks = ranks
        self.start = start
        self.steps = steps

    def positions(self, step: int) -> range:
        """Stream positions of this rank in micro-batch `step` of this run."""
        return range(*rank_slots(self.start, step, self.batch * self.ranks, self.rank, self.ranks))

    def planned(self, position: int) -> Sample:
        """The sample at a position."""
        sample = self.reader.read(*self.plan.locate(position))
        valid = self.steps is None or position < self.plan.samples
        return sample | {"__position__": position, "__attempt__": 0, "__valid__": valid}

    def substitute(self, sample: Sample) -> Sample:
        """What takes the place of a bad sample. In an evaluation pass it does not count."""
        position, attempt = sample["__position__"], sample["__attempt__"] + 1
        other = self.reader.read(*self.plan.substitute(position, attempt))
        valid = sample["__valid__"] and self.steps is None
        return other | {"__position__": position, "__attempt__": attempt, "__valid__": valid}

    def __iter__(self) -> Iterator[Sample]:
        worker = get_worker_info()
        step, stride = (0, 1) if worker is None else (worker.id, worker.num_workers)
        while self.steps is None or step < self.steps:
            for position in self.positions(step):
                yield self.planned(position)
            step += stride


# -- stages ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ToRecord:
    """Parses the JSON member into `record`, and finds the image member (`raw`)."""

    task: str

    def __call__(self, sample: Sample) -> Sample:
        if "json" not in sample:
            raise SkipSample("missing", "the sample has no .json member (captions or questions)")
        names = image_members(self.task)[0]
        name = next((name for name in names if name in sample), None)
        if name is None:
            raise SkipSample("missing", f"the sample has no image member (.{', .'.join(names)})")
        try:
            record = parse_record(self.task, sample["json"], sample["__url__"], sample["__key__"])
        except RecordError as error:
            raise SkipSample("record", error.reason) from None
        return sample | {"record": record, "raw": sample[name]}


def decode(sample: Sample) -> Sample:
    """Decodes `raw` into `image`, (H, W, 3) uint8."""
    sample["image"] = decode_image(sample["raw"])
    return sample


@dataclass(frozen=True)
class Draw:
    """Augments and picks texts: `item`."""

    assembler: Assembler

    def __call__(self, sample: Sample) -> Sample:
        sample["item"] = self.assembler.draw(sample)
        return sample


@dataclass(frozen=True)
class Guard:
    """Runs a stage; a sample to be skipped is marked and passes the later stages untouched."""

    stage: Callable[[Sample], Sample]

    def __call__(self, sample: Sample) -> Sample:
        if "__skip__" in sample:
            return sample
        try:
            return self.stage(sample)
        except SkipSample as skip:
            return sample | {"__skip__": skip}


@dataclass(frozen=True)
class Repair:
    """Puts a substitute in the place of each marked sample, through the same stages."""

    source: PlannedSource
    stages: Sequence[Guard]
    policy: str

    def __call__(self, samples: Iterable[Sample]) -> Iterator[Sample]:
        for sample in samples:
            faults: list[Fault] = []
            while (skip := sample.get("__skip__")) is not None:
                position, attempt = sample["__position__"], sample["__attempt__"]
                faults.append(
                    Fault(skip.kind, sample["__url__"], sample["__key__"], skip.reason,
                          position, attempt)
                )  # fmt: skip
                if self.policy == "raise" or len(faults) >= MAX_CONSECUTIVE:
                    break
                sample = self.source.substitute(sample)
                for stage in self.stages:
                    sample = stage(sample)
            sample["__faults__"] = faults
            yield sample


@dataclass(frozen=True)
class Delivery:
    """What a worker sends: a batch and the faults met on the way; or no batch when they end the
    run.

    `error`: message of a shard problem, to be raised in the main process.
    """

    batch: Batch | None
    positions: range = range(0)
    faults: tuple[Fault, ...] = ()
    error: str = ""

    def pin_memory(self) -> Delivery:
        """Called by torch's DataLoader."""
        return self if self.batch is None else replace(self, batch=self.batch.pin_memory())


@dataclass(frozen=True)
class Batcher:
    """Collects a micro-batch and collates it."""

    assembler: Assembler
    batch: int

    def __call__(self, samples: Iterable[Sample]) -> Iterator[Delivery]:
        waiting: list[Sample] = []
        try:
            for sample in samples:
                waiting.append(sample)
                if len(waiting) == self.batch or "__skip__" in sample:
                    yield self._deliver(waiting)
                    waiting = []
        except (ShardError, FileNotFoundError) as error:
            # A worker's exception would reach the user as a nested traceback.
            yield Delivery(None, error=str(error))

    def _deliver(self, samples: list[Sample]) -> Delivery:
        faults = tuple(fault for sample in samples for fault in sample["__faults__"])
        positions = range(samples[0]["__position__"], samples[-1]["__position__"] + 1)
        if "__skip__" in samples[-1]:
            return Delivery(None, positions, faults)
        batch = self.assembler.collate([sample["item"] for sample in samples])
        return Delivery(batch, positions, faults)


def build_pipeline(
    source: PlannedSource, assembler: Assembler, task: str, policy: str
) -> DataPipeline:
    """The stages of one rank: plan, record, decode, draw, repair, batch. Yields `Delivery`."""
    stages = [Guard(ToRecord(task)), Guard(decode), Guard(Draw(assembler))]
    return DataPipeline(
        source,
        *(map_stage(stage) for stage in stages),
        Repair(source, stages, policy),
        Batcher(assembler, source.batch),
    )
