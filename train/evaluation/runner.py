"""One pass over an evaluation loader on all ranks: sums are added up, then divided once."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any, Protocol

import torch
import torch.distributed
from tqdm import tqdm

from train.runtime.signals import Stopped, poll

if TYPE_CHECKING:
    from data_pipeline.batches import Batch
    from models.xvlm import XVLM

__all__ = ["Evaluates", "evaluate"]


class Evaluates(Protocol):
    """The part of a task that evaluation uses."""

    def evaluate(self, model: Any, batch: Any) -> dict[str, Any]:
        """name -> (sum, count) over the valid rows of one batch."""
        ...


def _reduce(sums: dict[str, list[float]], world_size: int) -> dict[str, list[float]]:
    """Add the sums of all ranks. Names may differ (a rank may miss a question type), so objects are
    gathered.
    """
    if world_size == 1:
        return sums
    # Every rank comes here once per evaluation, after its loop: loaders give all ranks equally many
    # batches.
    gathered: list[Any] = [None] * world_size
    torch.distributed.all_gather_object(gathered, {name: list(pair) for name, pair in sums.items()})
    total: dict[str, list[float]] = defaultdict(lambda: [0.0, 0.0])
    for part in gathered:
        for name, (value, count) in part.items():
            total[name][0] += value
            total[name][1] += count
    return total


def evaluate(
    model: XVLM, task: Evaluates, loader: Iterable[Batch], dist: Any = None, progress: bool = False
) -> dict[str, float]:
    """Mean of every metric over all ranks' valid rows, and "NAME_count" of the ungrouped ones.

    Args:
        task: gives name -> (sum, count) per batch; "accuracy/colour" is a metric grouped by
            question type.
        loader: one pass; every sample once over all ranks.
        dist: has .rank, .world_size, .device; None is one process on the model's device.
    The model is in eval mode meanwhile and gets its mode back.

    Raises:
        Stopped: all ranks were told to stop (only where a stage handles signals).
    """
    device = dist.device if dist is not None else next(model.parameters()).device
    sums: dict[str, list[float]] = defaultdict(lambda: [0.0, 0.0])
    quiet = not progress or (dist is not None and dist.rank != 0)
    was_training = model.training
    model.eval()
    try:
        with torch.inference_mode():
            for batch in tqdm(
                loader, desc="evaluate", unit="batch", disable=None if not quiet else True
            ):
                for name, (value, count) in task.evaluate(model, batch.to(device)).items():
                    sums[name][0] += float(value)
                    sums[name][1] += float(count)
                # Once a batch on every rank: all have equally many, so none asks alone.
                if dist is not None and poll():
                    raise Stopped("validation was left for a stop")
    finally:
        model.train(was_training)
    total = _reduce(sums, 1 if dist is None else dist.world_size)
    result = {
        name: value / count if count else 0.0 for name, (value, count) in sorted(total.items())
    }
    return result | {f"{name}_count": total[name][1] for name in sorted(total) if "/" not in name}
