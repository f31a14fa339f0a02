"""What training iterates: batches of one rank, with an exact resume state.

The state counts samples of delivered global batches and is the same on every rank. Prefetched
batches that were not delivered are planned again after a restart, so resuming repeats nothing and
skips nothing; the number of ranks and workers may change, and the batch size as far as the
canonical groups divide it.
"""

from __future__ import annotations

import dataclasses
import logging
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol, cast

import torch
from torch.utils.data import DataLoader, IterableDataset

from data_pipeline.batches import Batch
from data_pipeline.collate import Assembler, RegionAssembler
from data_pipeline.delivery import Delivery
from data_pipeline.faults import FaultError, FaultLedger
from data_pipeline.manifest import Manifest
from data_pipeline.mixture import choose_groups
from data_pipeline.position import DataSet, PlanSettings, Position, check_unit
from data_pipeline.prefetch import DevicePrefetcher
from data_pipeline.remote import RemoteOptions
from data_pipeline.sources import in_cloud
from data_pipeline.storage import Storage, open_manifest, storage_for
from data_pipeline.stream import PlannedSource, ShardReader, build_pipeline
from data_pipeline.tasks import SCHEMAS, RegionOptions, check_task, make_assembler
from data_pipeline.worker import start_worker

__all__ = ["DataSource", "Loader", "build_loader", "evaluation_workers"]

_LOG = logging.getLogger(__name__)
# Region rows are drawn within units of at least this many images, so that few rows are copies.
_UNIT_IMAGES = 6


class DataSource(Protocol):
    """One data set of a mixture: a folder or URL with manifest.json, and its weight (None: as many
    shares as it has samples).
    """

    @property
    def path(self) -> str: ...
    @property
    def weight(self) -> float | None: ...


class Loader:
    """Batches of one rank. Made by `build_loader`.

    Training is endless: each `iter()` goes on at the current position. Evaluation is one pass from
    the start, with the same number of batches on every rank.

    Attributes:
        samples_per_epoch: images of one pass over all ranks.   steps_per_epoch: batches of one
            pass on a rank (rounded up).   position: where the stream stands.
    """

    def __init__(
        self, manifests: Sequence[Manifest], storages: Sequence[Storage], where: Position,
        assembler: Assembler, ledger: FaultLedger, *, task: str, batch: int, rank: int,
        world_size: int, train: bool, workers: int, device: torch.device,
    ) -> None:  # fmt: skip
        self.manifests = tuple(manifests)
        self.global_batch = batch * world_size
        self.position = where
        self._storages = tuple(storages)
        self._assembler, self._ledger = assembler, ledger
        self._task, self._batch, self._train = task, batch, train
        self._rank, self._world_size = rank, world_size
        self._workers, self._device = workers, device
        self._transfers: dict[int, dict[str, int]] = {}
        self._told = False

    @property
    def samples_per_epoch(self) -> int:
        """Images of one pass over all data sets and ranks."""
        return self.position.mixture.samples

    @property
    def steps_per_epoch(self) -> int:
        """Batches of one pass on a rank, rounded up."""
        return -(-self.samples_per_epoch // self.global_batch)

    @property
    def faults(self) -> dict[str, int]:
        """Skipped samples of this rank by kind, since the start of this process."""
        return dict(self._ledger.counts)

    @property
    def transfers(self) -> dict[str, int]:
        """What this rank's processes fetched over networks (`remote.COUNTERS`); empty for local
        data.
        """
        total: Counter[str] = Counter()
        for counted in self._transfers.values():
            total.update(counted)
        return dict(total)

    @property
    def epoch(self) -> float:
        """Passes over the data that were delivered."""
        return self.position.consumed / self.samples_per_epoch

    def __len__(self) -> int:
        """Batches of one pass on this rank."""
        return self.steps_per_epoch

    def _local_assembler(self) -> Assembler:
        """Region rows are drawn within the state's units, of which a rank holds several."""
        if self.position.unit is None or not isinstance(self._assembler, RegionAssembler):
            return self._assembler
        return dataclasses.replace(self._assembler, units=self._batch // self.position.unit[0])

    def _schema(self) -> str:
        """Which record the samples are read as: any folder of captions can be read as pre-training
        data, where captions may be missing, but not the other way round.
        """
        held = {manifest.task for manifest in self.manifests}
        return "pretrain" if "pretrain" in held else SCHEMAS[self._task]

    def _deliveries(self) -> Iterator[Delivery]:
        manifests = self.position.by_entry(self.manifests)
        source = PlannedSource(
            ShardReader(manifests, self.position.by_entry(self._storages)),
            self.position.mixture,
            batch=self._batch,
            rank=self._rank,
            ranks=self._world_size,
            start=self.position.consumed if self._train else 0,
            steps=None if self._train else self.steps_per_epoch,
        )
        pipeline = build_pipeline(
            source, self._local_assembler(), self._schema(), self._ledger.policy
        )
        return iter(
            DataLoader(
                cast(IterableDataset, pipeline),
                batch_size=None,
                # More workers than batches would start for nothing.
                num_workers=self._workers if self._train else min(self._workers, len(self)),
                pin_memory=self._device.type == "cuda",
                worker_init_fn=start_worker,
                # Its own: every iter() draws from it, and a resumed run has one more than one that
                # was not stopped. The global generator must not notice (dropout draws from it).
                generator=torch.Generator().manual_seed(0),
            )
        )

    def _tell_left_out(self) -> None:
        """Says once how many samples an epoch leaves out, and why."""
        if self._told:
            return
        self._told = True
        for manifest, plan in zip(
            self.position.by_entry(self.manifests), self.position.mixture.plans, strict=True
        ):
            if manifest is not None and plan is not None and plan.left_out:
                _LOG.info(
                    "%s data: each epoch leaves out %d of the %d samples (%d shards) of %s, others "
                    "each time: they do not fill %d equal groups (data.groups)",
                    self._task, plan.left_out, plan.samples, len(plan.shard_samples),
                    manifest.location, plan.groups,
                )  # fmt: skip

    def __iter__(self) -> Iterator[Batch]:
        if self._train:
            self._tell_left_out()
        # What waits on the device was not delivered: only batches that are handed out count.
        ahead = DevicePrefetcher(self._deliveries(), self._device)
        try:
            for delivery in ahead:
                yield self._accounted(delivery)
        finally:
            ahead.close()

    def _accounted(self, delivery: Delivery) -> Batch:
        """The batch of a delivery that is handed out now.

        Raises:
            ShardError, FaultError: what its worker met.
            TransientError, OSError: network or disk failed it; the same run may go on later.
        """
        if delivery.error is not None:
            raise delivery.error
        self._ledger.deliver(delivery.positions, delivery.faults)
        if delivery.counters:
            self._transfers[delivery.process] = delivery.counters
        if delivery.batch is None:
            raise FaultError(delivery.faults[-1].message())
        if self._train:
            self.position.consumed += self.global_batch
        return delivery.batch

    def state_dict(self) -> dict[str, Any]:
        """The position as JSON values, the same on all ranks. A yielded batch counts."""
        return self.position.state_dict()

    def load_state_dict(self, state: dict[str, Any], rebase: bool = False) -> None:
        """Goes on where `state` was taken; it takes effect at the next `iter()`.

        Args:
            rebase: accept changed data sets, weights and order settings: a new order begins at this
                position, and the state records it.

        Raises:
            ValueError: the state does not fit these data and settings; the message says what
                differs and what would work.
        """
        mine = self.position.unit
        for line in self.position.load_state_dict(state, rebase):
            _LOG.warning("%s data: %s", self._task, line)
        if self.position.unit is not None and isinstance(self._assembler, RegionAssembler):
            try:
                check_unit(self.position.unit, self._batch, self._assembler.rows)
            except ValueError:
                if not rebase:
                    raise
                self.position.unit = mine


def _unit(region: RegionOptions) -> tuple[int, int]:
    """(images, rows) of a region unit: the wanted one, or the smallest of at least _UNIT_IMAGES
    images that cuts a rank's batch evenly. A small one lets more rank counts share a global batch.
    """
    images, rows, wanted = region.images, region.rows, region.unit_images
    sizes = [n for n in range(1, images + 1) if images % n == 0 and rows % (images // n) == 0]
    if wanted and wanted not in sizes:
        raise ValueError(
            f"data.region.unit_images: {wanted} does not cut {images} images and {rows} rows of a "
            f"rank evenly; use one of {', '.join(map(str, sizes))}"
        )
    size = wanted or min((n for n in sizes if n >= _UNIT_IMAGES), default=images)
    return size, rows * size // images


def _check_sizes(task: str, rank: int, world_size: int, size: int, workers: int) -> None:
    if task not in SCHEMAS:
        raise ValueError(f"unknown loader task '{task}': expected one of {', '.join(SCHEMAS)}")
    if not 0 <= rank < world_size:
        raise ValueError(f"rank {rank} is not in 0..{world_size - 1}")
    if size < 1:
        raise ValueError(f"data.batch must be at least 1, is {size}")
    if workers < 0:
        raise ValueError(f"data.workers must not be negative, is {workers}")


_Sources = list[tuple[str, float | None]]


def _sources(data: Path | str | Sequence[DataSource], train: bool) -> _Sources:
    """(folder or URL, weight) of each data set."""
    if isinstance(data, str | Path):
        return [(str(data), None)]
    if not data or (len(data) > 1 and not train):
        raise ValueError("evaluation reads one data set, training at least one (data.train)")
    return [(source.path, source.weight) for source in data]


def _manifest(path: str, remote: RemoteOptions, task: str) -> Manifest:
    manifest = open_manifest(path, remote)
    check_task(manifest, task)
    return manifest


def _storages(
    manifests: Sequence[Manifest], sources: _Sources, remote: RemoteOptions
) -> list[Storage]:
    return [
        storage_for(manifest, remote, path)
        for manifest, (path, _) in zip(manifests, sources, strict=True)
    ]


def _data_sets(manifests: Sequence[Manifest], sources: _Sources) -> list[DataSet]:
    return [
        DataSet(manifest.location, manifest.hash, manifest.shard_samples, weight)
        for manifest, (_, weight) in zip(manifests, sources, strict=True)
    ]


def evaluation_workers(data: Path | str | Sequence[DataSource], workers: int) -> int:
    """Workers for passes over held-out data in a process whose training data have `workers`.

    One where a bucket is read: once this process had used obstore, which does not survive a fork,
    no later worker could. Otherwise none: a start costs more than a short pass gains.
    """
    cloud = any(in_cloud(path) for path, _ in _sources(data, train=True))
    return min(1, workers) if cloud else 0


def build_loader(
    task: str, data: Path | str | Sequence[DataSource], *, tokenizer, batch: int, rank: int = 0,
    world_size: int = 1, seed: int = 0, train: bool, image_size: int, patch_size: int = 16,
    max_tokens: int = 40, max_words: int = 0, max_answer_tokens: int = 8,
    mlm_probability: float = 0.25, mlm_max: int = 8, rows_per_image: int = 1,
    augment: str = "none", prompt: str = "a picture of", workers: int = 0,
    block: int = 256, window_blocks: int = 64, groups: int = 0, mix_period: int = 1000,
    faults: str = "raise", max_fault_rate: float = 0.001, region: RegionOptions | None = None,
    limit: int = 0, quarantine: Path | None = None, device: torch.device | str = "cpu",
    remote: RemoteOptions | None = None,
) -> Loader:  # fmt: skip
    """The loader of one rank.

    Args:
        task: "pretrain", "region" (batches of data.region), "vqa", "nlvr2_pretrain" (images with
            captions, as for retrieval), "nlvr2", "retrieval", "captioning" or "grounding".
        data: a folder or URL with manifest.json, or several with weights (training only).
        tokenizer: from `data_pipeline.text.load_tokenizer`.   image_size, patch_size: pixels.
        batch: images per rank and micro-batch, for nlvr2 pairs of them (region batches take
            region.images instead).
        train: endless, shuffled, augmented; else one pass in order with every text, padded rows not
            valid.
        max_tokens, max_answer_tokens: padded lengths.   max_words: words of a text that are kept; 0:
            as many as max_tokens.
        rows_per_image: texts drawn per image in training (not "pretrain").   prompt: in front of
            captions (captioning).   limit: only the first `limit` images; 0 is all.
        groups: canonical groups of the order; 0 chooses (see `mixture.choose_groups`).
        mix_period: places in which a mixture's shares are exact.   remote: cache, retries of URLs.
        faults: "raise" or "skip".   max_fault_rate: largest share of skipped samples, listed in the
            JSONL file `quarantine`.   device: where batches go; on CUDA pinned and copied ahead.

    Raises:
        FileNotFoundError: no folder, manifest or shard.
        ValueError: bad setting or damaged data, with file, key and remedy.
    """
    by_region = region if task == "region" else None
    size = batch if by_region is None else by_region.images
    _check_sizes(task, rank, world_size, size, workers)
    remote = remote or RemoteOptions()
    sources = _sources(data, train)
    manifests = [_manifest(path, remote, task) for path, _ in sources]
    auto = train and not groups
    if auto:
        samples, window = min(manifest.samples for manifest in manifests), block * window_blocks
        groups = choose_groups(size * world_size, world_size, samples, window)
    where = Position(
        PlanSettings(task, seed, block, window_blocks, groups if train else 1, train, limit),
        _data_sets(manifests, sources),
        step_samples=size * world_size, ranks=world_size, mix_period=mix_period,
        unit=None if by_region is None else _unit(by_region), auto_groups=auto,
    )  # fmt: skip
    ledger = FaultLedger(faults, max_fault_rate, where.mixture.samples // world_size, quarantine)
    assembler = make_assembler(
        task, tokenizer=tokenizer, seed=seed, train=train, image_size=image_size,
        patch_size=patch_size, max_tokens=max_tokens, max_words=max_words,
        max_answer_tokens=max_answer_tokens, mlm_probability=mlm_probability, mlm_max=mlm_max,
        rows_per_image=rows_per_image, augment=augment, prompt=prompt, region=region,
    )  # fmt: skip
    return Loader(
        manifests, _storages(manifests, sources, remote), where, assembler, ledger,
        task=task, batch=size, rank=rank, world_size=world_size, train=train, workers=workers,
        device=torch.device(device),
    )  # fmt: skip
