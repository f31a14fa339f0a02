"""The plan as a webdataset source, and the stages behind it.

`PlannedSource` is stage 0 of a `wds.DataPipeline`: it yields ordinary sample dicts (`__key__`,
`__url__`, extension -> bytes) in the order of the mixture, each read at once and checked against
the index. Workers hold no state: micro-batch m goes to worker m mod W, and torch's DataLoader
returns batches in that order, so the stream does not depend on W.
"""

from __future__ import annotations

import os
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from torch.utils.data import IterableDataset, get_worker_info
from webdataset.filters import map as map_stage
from webdataset.pipeline import DataPipeline

from data_pipeline.collate import Assembler
from data_pipeline.decode import Picture
from data_pipeline.delivery import Delivery, portable
from data_pipeline.faults import MAX_CONSECUTIVE, Fault, SkipSample
from data_pipeline.index import checksum
from data_pipeline.manifest import Manifest
from data_pipeline.mixture import Mixture, step_positions
from data_pipeline.records import RecordError, image_members, parse_record, record_member
from data_pipeline.storage import LocalStorage, ShardFile, Storage
from data_pipeline.tar_headers import ShardError

__all__ = ["PlannedSource", "ShardReader", "build_pipeline"]

Sample = dict[str, Any]
_OPEN_SHARDS = 64  # of local ones each holds two descriptors


class ShardReader:
    """Reads samples by (data set, shard, number). Shards are opened when first used, in each
    process.

    Args:
        manifests: one per data set of the mixture; None for one that is never read.
        storages: where the files of each lie.
    """

    def __init__(
        self, manifests: Sequence[Manifest | None], storages: Sequence[Storage | None]
    ) -> None:
        self.manifests = tuple(manifests)
        self.storages = tuple(storages)
        self._open: OrderedDict[tuple[int, int], ShardFile] = OrderedDict()

    def _place(self, dataset: int) -> tuple[Manifest, Storage]:
        manifest, storage = self.manifests[dataset], self.storages[dataset]
        if manifest is None or storage is None:
            raise ValueError(f"data set number {dataset} was taken out of the mixture")
        return manifest, storage

    def _shard(self, dataset: int, shard: int) -> ShardFile:
        name = (dataset, shard)
        if name in self._open:
            self._open.move_to_end(name)
            return self._open[name]
        manifest, storage = self._place(dataset)
        file = storage.open(manifest, shard)
        self._open[name] = file
        while len(self._open) > _OPEN_SHARDS:
            self._open.popitem(last=False)[1].close()
        return file

    def read(self, dataset: int, shard: int, ordinal: int) -> Sample:
        """One sample as webdataset gives it: `__key__`, `__url__`, and its members by extension.

        A member whose bytes are not those that were indexed is marked (`__skip__`), so that damage
        is reported instead of trained on.

        Args:
            ordinal: counts the samples that the folder's filter keeps.

        Raises:
            ShardError: the shard or its index is missing, cut or out of date.
            TransientError: the network failed for longer than the retries last.
        """
        file = self._shard(dataset, shard)
        number = self._place(dataset)[0].sample_number(shard, ordinal)
        members = file.index.members(number)
        start = members[0].offset
        raw = memoryview(file.read(start, members[-1].offset + members[-1].size - start))
        sample: Sample = {"__key__": file.index.key(number), "__url__": file.name}
        for extension, offset, size, indexed in members:
            data = raw[offset - start : offset - start + size]
            if checksum(data) != indexed:
                reason = f"the bytes of member '.{extension}' are not those that were indexed"
                sample["__skip__"] = SkipSample("hash", reason)
            sample[extension] = bytes(data)
        return sample

    def remote(self, dataset: int) -> bool:
        """True where shards come over a network."""
        return not isinstance(self._place(dataset)[1], LocalStorage)

    def counters(self) -> dict[str, int]:
        """What the storages did in this process: requests, retries, bytes, cache hits ..."""
        total: Counter[str] = Counter()
        for storage in self.storages:
            if storage is not None:
                total.update(storage.counters())
        return dict(total)

    def announce(self, dataset: int, shards: Sequence[int]) -> None:
        """Says which shards are needed, in order, so that a remote storage can fetch them."""
        manifest, storage = self._place(dataset)
        storage.prefetch(manifest, shards)

    def close(self) -> None:
        """Closes the shards of this process."""
        while self._open:
            self._open.popitem()[1].close()

    def __getstate__(self) -> dict:
        return self.__dict__ | {"_open": OrderedDict()}

    def __del__(self) -> None:
        self.close()


class PlannedSource(IterableDataset):
    """Samples of one rank in the order of a mixture.

    Each sample also has `__position__` (in the endless stream), `__attempt__` (0; substitutes
    count up) and `__valid__` (False where an evaluation pass is over and the step is only filled
    up).

    Args:
        batch: samples per micro-batch of a rank.   start: first stream position of this run.
        steps: micro-batches to give; None is endless.
    """

    def __init__(
        self, reader: ShardReader, mixture: Mixture, *, batch: int, rank: int, ranks: int,
        start: int = 0, steps: int | None = None,
    ) -> None:  # fmt: skip
        super().__init__()
        self.reader = reader
        self.mixture = mixture
        self.batch = batch
        self.rank = rank
        self.step_samples = batch * ranks
        self.start = start
        self.steps = steps
        # By data set and group: the window in use, its shards, and those of the next one.
        self._announced: dict[int, dict[int, tuple[tuple[int, int], list[int], list[int]]]] = {}

    def positions(self, step: int) -> tuple[int, ...]:
        """Stream positions of this rank in micro-batch `step` of this run."""
        first = self.rank * self.batch
        begin = self.start + step * self.step_samples
        return step_positions(
            begin, self.step_samples, self.mixture.groups, first, first + self.batch
        )

    def planned(self, position: int) -> Sample:
        """The sample at a position."""
        self._announce(position)
        sample = self.reader.read(*self.mixture.locate(position))
        valid = self.steps is None or position < self.mixture.samples
        return sample | {"__position__": position, "__attempt__": 0, "__valid__": valid}

    def _announce(self, position: int) -> None:
        """On entering a window, the shards of all windows in use and of those after them are
        announced.
        """
        slot = self.mixture.slot(position)
        if not self.reader.remote(slot.dataset):
            return
        plan = self.mixture.plan(slot.dataset)
        epoch, number = window = plan.window_of(slot.place, slot.group)
        known = self._announced.setdefault(slot.dataset, {})
        if slot.group in known and known[slot.group][0] == window:
            return
        known[slot.group] = (
            window,
            plan.window_shards(epoch, slot.group, number),
            plan.window_shards(epoch, slot.group, number + 1),
        )
        near = [shard for _, now, _ in known.values() for shard in now]
        far = [shard for _, _, coming in known.values() for shard in coming]
        self.reader.announce(slot.dataset, list(dict.fromkeys(near + far)))

    def substitute(self, sample: Sample) -> Sample:
        """What takes the place of a bad sample. In an evaluation pass it does not count."""
        position, attempt = sample["__position__"], sample["__attempt__"] + 1
        other = self.reader.read(*self.mixture.substitute(position, attempt))
        valid = sample["__valid__"] and self.steps is None
        return other | {"__position__": position, "__attempt__": attempt, "__valid__": valid}

    def __iter__(self) -> Iterator[Sample]:
        worker = get_worker_info()
        step, stride = (0, 1) if worker is None else (worker.id, worker.num_workers)
        while self.steps is None or step < self.steps:
            # A micro-batch is read in one go: reading between decodings finds cold caches.
            yield from [self.planned(position) for position in self.positions(step)]
            step += stride


# -- stages ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ToRecord:
    """Parses the JSON member into `record`, and finds the image member (`raw`), or members where
    the task has several images: then `raw` is a tuple.
    """

    task: str

    def __call__(self, sample: Sample) -> Sample:
        raw = record_member(self.task, sample, sample["__key__"])
        images = []
        for names in image_members(self.task):
            name = next((name for name in names if name in sample), None)
            if name is None:
                expected = f".{', .'.join(names)}"
                raise SkipSample("missing", f"the sample has no image member ({expected})")
            images.append(sample[name])
        try:
            record = parse_record(self.task, raw, sample["__url__"], sample["__key__"])
        except RecordError as error:
            raise SkipSample("record", error.reason) from None
        return sample | {"record": record, "raw": images[0] if len(images) == 1 else tuple(images)}


def decode(sample: Sample) -> Sample:
    """Checks `raw` and makes `image` of it, a `Picture` or a tuple of them: its pixels are decoded
    when the crop is known, so that a large one need not be decoded in full.
    """
    raw = sample["raw"]
    sample["image"] = tuple(map(Picture, raw)) if isinstance(raw, tuple) else Picture(raw)
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
class Batcher:
    """Collects a micro-batch and collates it."""

    assembler: Assembler
    batch: int
    reader: ShardReader

    def __call__(self, samples: Iterable[Sample]) -> Iterator[Delivery]:
        waiting: list[Sample] = []
        try:
            for sample in samples:
                waiting.append(sample)
                if len(waiting) == self.batch or "__skip__" in sample:
                    yield self._deliver(waiting)
                    waiting = []
        except (ShardError, OSError) as error:
            # A worker's exception would reach the user as a nested traceback.
            yield Delivery(None, error=portable(error))

    def _deliver(self, samples: list[Sample]) -> Delivery:
        faults = tuple(fault for sample in samples for fault in sample["__faults__"])
        positions = tuple(sample["__position__"] for sample in samples)
        if "__skip__" in samples[-1]:
            return Delivery(None, positions, faults)
        batch = self.assembler.collate([sample["item"] for sample in samples])
        return Delivery(
            batch, positions, faults, counters=self.reader.counters(), process=os.getpid()
        )


def build_pipeline(
    source: PlannedSource, assembler: Assembler, task: str, policy: str
) -> DataPipeline:
    """The stages of one rank: plan, record, decode, draw, repair, batch. Yields `Delivery`."""
    stages = [Guard(ToRecord(task)), Guard(decode), Guard(Draw(assembler))]
    return DataPipeline(
        source,
        *(map_stage(stage) for stage in stages),
        Repair(source, stages, policy),
        Batcher(assembler, source.batch, source.reader),
    )
