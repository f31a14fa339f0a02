"""What a data worker sends to the main process: a batch, or what ended it."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import torch

from data_pipeline.batches import Batch
from data_pipeline.faults import Fault
from data_pipeline.remote import TransientError
from data_pipeline.tar_headers import ShardError

__all__ = ["Delivery", "portable"]

# The kind decides what comes next: a launcher starts a run again after an OSError, but not after
# bad input. The first that fits is taken.
_KINDS = (ShardError, TransientError, FileNotFoundError, PermissionError, OSError)


def portable(error: ShardError | OSError) -> ShardError | OSError:
    """The same error, reduced to kind and message: an exception that cannot be pickled would make
    the main process wait for its worker for ever.
    """
    return next(kind for kind in _KINDS if isinstance(error, kind))(str(error))


@dataclass(frozen=True)
class Delivery:
    """What a worker sends: a batch and the faults met on the way; or no batch when they end the
    run.

    Attributes:
        error: what went wrong with a shard, to be raised in the main process.
        counters: what the storages of this process did so far.   process: its number.
    """

    batch: Batch | None
    positions: tuple[int, ...] = ()
    faults: tuple[Fault, ...] = ()
    error: ShardError | OSError | None = None
    counters: dict[str, int] = field(default_factory=dict)
    process: int = 0

    def pin_memory(self) -> Delivery:
        """Called by torch's DataLoader."""
        return self if self.batch is None else replace(self, batch=self.batch.pin_memory())

    def to(self, device: torch.device | str, non_blocking: bool = False) -> Delivery:
        """The same delivery with its batch on `device`."""
        if self.batch is None:
            return self
        return replace(self, batch=self.batch.to(device, non_blocking=non_blocking))

    def record_stream(self, stream: Any) -> None:
        """Keeps the batch's memory until `stream` is done with it (CUDA)."""
        if self.batch is not None:
            self.batch.record_stream(stream)
