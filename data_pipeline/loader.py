"""The loader: batches of one rank, and the position of the stream as a small JSON state.

The state counts samples of delivered global batches and is the same on every rank. Prefetched
batches that were not delivered are planned again after a restart, so resuming repeats nothing and
skips nothing; the number of ranks, workers and the batch size may all change.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Protocol, cast

import torch
from torch.utils.data import DataLoader, IterableDataset

from data_pipeline.batches import Batch
from data_pipeline.collate import Assembler, PretrainAssembler, RegionAssembler, VqaAssembler
from data_pipeline.faults import FaultError, FaultLedger
from data_pipeline.index import ShardError
from data_pipeline.manifest import Manifest, load_manifest
from data_pipeline.plan import PLAN_VERSION, Plan
from data_pipeline.stream import Delivery, PlannedSource, ShardReader, build_pipeline
from data_pipeline.text import Masking, TextEncoder
from data_pipeline.transforms import Augmentation

__all__ = ["STATE_VERSION", "Loader", "RegionOptions", "build_loader"]

STATE_VERSION = 1
# Which record a loader task reads.
_SCHEMAS = {"pretrain": "pretrain", "region": "pretrain", "vqa": "vqa"}


class RegionOptions(Protocol):
    """Settings of region batches (the run file's data.region)."""

    @property
    def images(self) -> int: ...
    @property
    def rows(self) -> int: ...
    @property
    def max_regions(self) -> int: ...
    @property
    def min_fraction_in_crop(self) -> float: ...


def _start_worker(number: int) -> None:
    """Workers share the cores with training: one thread each."""
    torch.set_num_threads(1)
    os.environ["TOKENIZERS_PARALLELISM"] = "false"


class Loader:
    """Batches of one rank. Made by `build_loader`.

    Training is endless: each `iter()` goes on at the current position. Evaluation is one pass from
    the start, with the same number of batches on every rank.

    Attributes:
        samples_per_epoch: images of one pass over all ranks.   steps_per_epoch: batches of one
            pass on a rank (rounded up).   manifest: the shards.
    """

    def __init__(
        self, manifest: Manifest, plan: Plan, assembler: Assembler, ledger: FaultLedger, *,
        task: str, batch: int, rank: int, world_size: int, train: bool, workers: int,
        pin_memory: bool,
    ) -> None:  # fmt: skip
        self.manifest = manifest
        self.samples_per_epoch = plan.samples
        self.global_batch = batch * world_size
        self.steps_per_epoch = -(-plan.samples // self.global_batch)
        self._plan, self._assembler, self._ledger = plan, assembler, ledger
        self._task, self._batch, self._train = task, batch, train
        self._rank, self._world_size = rank, world_size
        self._workers, self._pin_memory = workers, pin_memory
        self._consumed = 0

    @property
    def faults(self) -> dict[str, int]:
        """Skipped samples of this rank by kind, since the start of this process."""
        return dict(self._ledger.counts)

    @property
    def epoch(self) -> float:
        """Passes over the data that were delivered."""
        return self._consumed / self.samples_per_epoch

    def __len__(self) -> int:
        """Batches of one pass on this rank."""
        return self.steps_per_epoch

    def _deliveries(self) -> Iterator[Delivery]:
        source = PlannedSource(
            ShardReader(self.manifest),
            self._plan,
            batch=self._batch,
            rank=self._rank,
            ranks=self._world_size,
            start=self._consumed if self._train else 0,
            steps=None if self._train else self.steps_per_epoch,
        )
        pipeline = build_pipeline(
            source, self._assembler, _SCHEMAS[self._task], self._ledger.policy
        )
        return iter(
            DataLoader(
                cast(IterableDataset, pipeline),
                batch_size=None,
                # More workers than batches would start for nothing.
                num_workers=self._workers if self._train else min(self._workers, len(self)),
                pin_memory=self._pin_memory,
                worker_init_fn=_start_worker,
            )
        )

    def __iter__(self) -> Iterator[Batch]:
        for delivery in self._deliveries():
            if delivery.error:
                raise ShardError(delivery.error)
            self._ledger.deliver(delivery.positions, delivery.faults)
            if delivery.batch is None:
                raise FaultError(delivery.faults[-1].message())
            if self._train:
                self._consumed += self.global_batch
            yield delivery.batch

    def state_dict(self) -> dict[str, Any]:
        """The position as JSON values, the same on all ranks. A yielded batch counts."""
        return {
            "version": STATE_VERSION,
            "task": self._task,
            "seed": self._plan.seed,
            "samples_consumed": self._consumed,
            "global_batch": self.global_batch,
            "manifest_hash": self.manifest.hash,
            "plan": {
                "version": PLAN_VERSION,
                "block": self._plan.block,
                "window_blocks": self._plan.window_blocks,
                "groups": self._plan.groups,
                "shuffle": self._plan.shuffle,
                "limit": self._plan.limit,
            },
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes on where `state` was taken; it takes effect at the next `iter()`.

        Raises:
            ValueError: the state belongs to other data, another seed or another order.
        """
        mine = self.state_dict()
        for name in ("version", "task", "seed", "manifest_hash", "plan"):
            if state.get(name) != mine[name]:
                raise ValueError(
                    f"{self.manifest.folder}: cannot resume the data position: '{name}' was "
                    f"{state.get(name)!r}, now {mine[name]!r}; restore the data and settings, or "
                    "start again with --resume none"
                )
        self._consumed = int(state["samples_consumed"])


def _assembler(
    task: str, *, tokenizer, seed: int, train: bool, image_size: int, patch_size: int,
    max_tokens: int, max_answer_tokens: int, mlm_probability: float, mlm_max: int,
    rows_per_image: int, augment: str, region: RegionOptions | None,
) -> Assembler:  # fmt: skip
    text = TextEncoder(tokenizer, max_tokens)
    # Evaluation looks at whole, unchanged pictures whatever training does.
    augmentation = Augmentation(augment if train else "none", image_size)
    if task == "vqa":
        answers = TextEncoder(tokenizer, max_answer_tokens)
        return VqaAssembler(text, augmentation, seed, train, answers, rows_per_image)
    masking = Masking(tokenizer, mlm_probability, mlm_max)
    if task == "pretrain":
        return PretrainAssembler(text, augmentation, seed, train, masking)
    if region is None:
        raise ValueError("region batches need data.region")
    return RegionAssembler(
        text, augmentation, seed, train, masking,
        region.rows, region.max_regions, region.min_fraction_in_crop, patch_size,
    )  # fmt: skip


def build_loader(
    task: str, folder: Path | str, *, tokenizer, batch: int, rank: int = 0, world_size: int = 1,
    seed: int = 0, train: bool, image_size: int, patch_size: int = 16, max_tokens: int = 40,
    max_answer_tokens: int = 8, mlm_probability: float = 0.25, mlm_max: int = 8,
    rows_per_image: int = 1, augment: str = "none", workers: int = 0, block: int = 256,
    window_blocks: int = 64, faults: str = "raise", max_fault_rate: float = 0.001,
    region: RegionOptions | None = None, limit: int = 0, pin_memory: bool = False,
    quarantine: Path | None = None,
) -> Loader:  # fmt: skip
    """The loader of one rank.

    Args:
        task: "pretrain", "region" (batches of data.region) or "vqa".
        folder: shards with manifest.json.   tokenizer: from `data_pipeline.text.load_tokenizer`.
        batch: images per rank and micro-batch (region batches take region.images instead).
        train: endless, shuffled, augmented; else one pass in order with every question, padded
            rows not valid.
        image_size, patch_size: pixels.   max_tokens, max_answer_tokens: padded lengths.
        rows_per_image: questions drawn per image in training.   limit: only the first `limit`
            images; 0 is all.
        faults: "raise" or "skip".   max_fault_rate: largest share of skipped samples.
        quarantine: JSONL file of skipped samples.

    Raises:
        FileNotFoundError: no folder, manifest or shard.
        ValueError: bad setting or damaged data, with file, key and remedy.
    """
    if task not in _SCHEMAS:
        raise ValueError(f"unknown loader task '{task}': expected one of {', '.join(_SCHEMAS)}")
    if not 0 <= rank < world_size:
        raise ValueError(f"rank {rank} is not in 0..{world_size - 1}")
    size = batch
    if task == "region" and region is not None:
        size = region.images
    if size < 1:
        raise ValueError(f"data.batch must be at least 1, is {size}")
    if workers < 0:
        raise ValueError(f"data.workers must not be negative, is {workers}")
    manifest = load_manifest(Path(folder))
    schemas = {"pretrain", "captioning", "retrieval"} if task == "pretrain" else {_SCHEMAS[task]}
    if manifest.task not in schemas:
        raise ValueError(
            f"{manifest.folder}: holds '{manifest.task}' samples, but '{task}' batches need "
            f"'{_SCHEMAS[task]}' (key data.train / data.val)"
        )
    plan = Plan(
        manifest.shard_samples, manifest.hash, seed, block, window_blocks,
        shuffle=train, limit=limit,
    )  # fmt: skip
    ledger = FaultLedger(faults, max_fault_rate, plan.samples // world_size, quarantine)
    assembler = _assembler(
        task, tokenizer=tokenizer, seed=seed, train=train, image_size=image_size,
        patch_size=patch_size, max_tokens=max_tokens, max_answer_tokens=max_answer_tokens,
        mlm_probability=mlm_probability, mlm_max=mlm_max, rows_per_image=rows_per_image,
        augment=augment, region=region,
    )  # fmt: skip
    return Loader(
        manifest, plan, assembler, ledger, task=task, batch=size, rank=rank,
        world_size=world_size, train=train, workers=workers, pin_memory=pin_memory,
    )  # fmt: skip
