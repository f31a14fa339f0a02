"""Monitor: what a run says about itself, in metrics.jsonl, TensorBoard and on the console."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, Self, TextIO

import torch
from torch import Tensor

from train.config import LogConfig
from train.monitor.console import Console
from train.monitor.jsonl import JsonlWriter
from train.monitor.tensorboard import TensorBoard
from train.monitor.throughput import Throughput
from train.monitor.wandb_page import WandB, require_wandb

__all__ = ["Monitor", "flatten"]

# Tags whose last value says how a run ended.
_FINAL = ("loss/total", "validation/", "sparsity/actual", "samples_per_s", "mfu")


def flatten(record: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Leaves of a nested dict as (tag, value): {"loss": {"itc": 1}} gives ("loss/itc", 1)."""
    for key, value in record.items():
        if isinstance(value, Mapping):
            yield from flatten(value, f"{prefix}{key}/")
        else:
            yield f"{prefix}{key}", value


def _detach(record: Mapping[str, Any]) -> dict[str, Any]:
    """A copy whose tensors hold no graph and cannot be changed in place by the next step."""
    copy: dict[str, Any] = {}
    for key, value in record.items():
        if isinstance(value, Mapping):
            copy[key] = _detach(value)
        elif isinstance(value, Tensor):
            if value.numel() != 1:
                raise ValueError(
                    f"metric {key} has shape {tuple(value.shape)}: the monitor records scalars"
                )
            copy[key] = value.detach().reshape(()).clone()
        else:
            copy[key] = value
    return copy


def _read_tensors(records: Sequence[dict[str, Any]]) -> None:
    """Replaces every tensor by its float, with one wait a device instead of one a value."""
    found: dict[torch.device, list[tuple[dict[str, Any], str, Tensor]]] = {}
    todo = list(records)
    while todo:
        record = todo.pop()
        for key, value in record.items():
            if isinstance(value, dict):
                todo.append(value)
            elif isinstance(value, Tensor):
                found.setdefault(value.device, []).append((record, key, value))
    for leaves in found.values():
        values = torch.stack([tensor.double() for _, _, tensor in leaves]).tolist()
        for (record, key, _), value in zip(leaves, values, strict=True):
            record[key] = value


class Monitor:
    """Records of a run. On ranks other than 0 every method does nothing (and opens nothing).

    Records wait in memory, tensors unread on their device, until an interval of `log.every` steps
    is over: one synchronisation and one write an interval. Call `close` (or leave the `with` block)
    to keep the last ones.

    Args:
        directory: run directory; metrics.jsonl and tensorboard/ are made in it.
        total_steps: steps of the whole run, for the time left.
        rank: global rank of this process.
        log: intervals.
        resume_step: steps already done; later records of an earlier attempt are removed.
        epoch: passes over the data so far, for the "epoch" of a record that has none.
        stream: where progress goes, default stderr.
        clock: monotonic seconds, for rates.
        settings: the run's configuration, flat: a table in TensorBoard, and with the final metrics
            its HPARAMS page.

    Raises:
        UserError: on every rank, when log.wandb names a project and the package is missing.
    """

    def __init__(
        self,
        directory: Path | str,
        total_steps: int,
        rank: int,
        log: LogConfig,
        resume_step: int = 0,
        epoch: Callable[[], float] = lambda: 0.0,
        stream: TextIO | None = None,
        clock: Callable[[], float] = time.perf_counter,
        settings: Mapping[str, Any] | None = None,
    ) -> None:
        require_wandb(log.wandb)
        self.log = log
        self.throughput = Throughput(total_steps, clock=clock)
        self._total = total_steps
        self._active = rank == 0
        self._epoch = epoch
        self._pending: list[dict[str, Any]] = []
        self._flushed_step = resume_step
        self._settings, self._final = dict(settings or {}), dict[str, float]()
        self._wandb: WandB | None = None
        if not self._active:
            return
        directory = Path(directory)
        directory.mkdir(parents=True, exist_ok=True)
        self._jsonl = JsonlWriter(directory / "metrics.jsonl", resume_step)
        self._board = TensorBoard(directory / "tensorboard", resume_step)
        self._console = Console(total_steps, resume_step, stream)
        if log.wandb is not None:
            self._wandb = WandB(log.wandb, directory, self._settings)
        if self._settings:
            self._board.table(resume_step, "configuration", self._settings)

    def waiting(self) -> AbstractContextManager[None]:
        """Counts the time inside as waiting for data."""
        return self.throughput.waiting()

    def step(self, step: int, samples: int, record: Mapping[str, Any]) -> None:
        """Notes one step (or, at the same step, a further record such as validation results).

        Args:
            step: general steps done.   samples: text rows seen so far by all ranks.
            record: nested dict of numbers, one-element tensors or strings, {"loss": {"total": ...},
                "lr": ...}. "epoch", "samples_per_s" and "data_wait" are filled in where they are
                missing.

        Raises:
            ValueError: a tensor has more than one element.
        """
        if not self._active:
            return
        line: dict[str, Any] = {"step": step, "samples": samples}
        line |= {"epoch": self._epoch(), "time": time.time()}
        rates = self.throughput.update(step, samples)
        line.update(_detach(record))
        for key, value in rates.items():
            line.setdefault(key, value)
        self._pending.append(line)
        every = max(1, self.log.every)  # intervals, wherever a checkpoint made us write between
        if step // every > self._flushed_step // every or step >= self._total:
            self.flush()

    def flush(self) -> None:
        """Writes everything noted so far; call it before a checkpoint is saved."""
        if not self._active or not self._pending:
            return
        pending, self._pending = self._pending, []
        _read_tensors(pending)
        shown: dict[str, float] = {}
        for line in pending:
            self._jsonl.write(line)
            scalars = {
                tag: float(value)
                for tag, value in flatten(line)
                if isinstance(value, int | float) and tag not in ("step", "time")
            }
            self._board.scalars(line["step"], scalars, line["time"])
            if self._wandb is not None:
                self._wandb.scalars(line["step"], scalars)
            shown.update(scalars)
        self._final |= {tag: value for tag, value in shown.items() if tag.startswith(_FINAL)}
        self._jsonl.flush()
        self._board.flush()
        self._flushed_step = pending[-1]["step"]
        self._console.show(self._flushed_step, shown)

    def wants_histograms(self, step: int) -> bool:
        """Whether `step` is one for histograms; the same answer on every rank."""
        return self.log.histograms_every > 0 and step % self.log.histograms_every == 0

    def wants_pictures(self, step: int) -> bool:
        """Whether `step` is one for pictures; the same answer on every rank."""
        return self.log.pictures_every > 0 and step % self.log.pictures_every == 0

    def histograms(self, step: int, values: Mapping[str, Tensor]) -> None:
        """Writes the distribution of each tensor under its tag."""
        if not self._active:
            return
        for tag, tensor in values.items():
            self._board.histogram(step, tag, tensor)

    def pictures(self, step: int, tag: str, images: Tensor, captions: Sequence[str]) -> None:
        """Writes pictures (N, 3, H, W) uint8 with a caption under each."""
        if not self._active:
            return
        self._board.pictures(step, tag, images, captions)
        if self._wandb is not None:
            self._wandb.pictures(step, tag, images, captions)

    def image(self, step: int, tag: str, image: Tensor) -> None:
        """Writes one picture (3, H, W) uint8 as it is."""
        if not self._active:
            return
        self._board.image(step, tag, image)
        if self._wandb is not None:
            self._wandb.image(step, tag, image)

    def finished(self) -> None:
        """The run is through: its settings and final metrics (losses, validation, sparsity, speed)
        go together onto TensorBoard's HPARAMS page. A run that is stopped has none yet.
        """
        if not self._active:
            return
        self.flush()
        final = {f"final/{tag}": value for tag, value in self._final.items()}
        self._board.hparams(self._flushed_step, self._settings, final)
        if self._wandb is not None:
            self._wandb.summary(final)

    def message(self, text: str) -> None:
        """Tells the reader of the console something."""
        if self._active:
            self._console.message(text)

    def close(self) -> None:
        """Writes what is left and closes the files; further calls do nothing."""
        if not self._active:
            return
        try:
            self.flush()
        finally:
            self._active = False
            self._jsonl.close()
            self._board.close()
            self._console.close()
            if self._wandb is not None:
                self._wandb.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
