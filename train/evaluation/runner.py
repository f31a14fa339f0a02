"""One pass over an evaluation loader on all ranks: sums are added up, then divided once."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

import torch
import torch.distributed
from tqdm import tqdm

from train.runtime.signals import Stopped, poll

if TYPE_CHECKING:
    from data_pipeline.batches import Batch
    from models.xvlm import XVLM

__all__ = ["Evaluates", "EvaluatesSplit", "evaluate"]


class Evaluates(Protocol):
    """The part of a task that evaluation uses."""

    def evaluate(self, model: Any, batch: Any) -> dict[str, Any]:
        """name -> (sum, count) over the valid rows of one batch."""
        ...


@runtime_checkable
class EvaluatesSplit(Protocol):
    """A task whose metrics are no means over rows: it goes over the split itself."""

    def evaluate_split(
        self, model: Any, batches: Callable[[], Iterator[Any]], dist: Any = None
    ) -> dict[str, float]:
        """Metrics over all ranks. `batches` starts a pass, with batches on the model's device; all
        ranks start as many passes.
        """
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


def _batches(
    loader: Iterable[Batch], device: torch.device, dist: Any, quiet: bool
) -> Iterator[Batch]:
    """One pass, with a bar where somebody looks; it ends early when all ranks are to stop."""
    for batch in tqdm(loader, desc="evaluate", unit="batch", disable=None if not quiet else True):
        yield batch.to(device)
        # Once a batch on every rank: all have equally many, so none asks alone.
        if dist is not None and poll():
            raise Stopped("validation was left for a stop")


def _means(
    model: XVLM, task: Evaluates, batches: Iterable[Batch], world_size: int
) -> dict[str, float]:
    sums: dict[str, list[float]] = defaultdict(lambda: [0.0, 0.0])
    for batch in batches:
        for name, (value, count) in task.evaluate(model, batch).items():
            sums[name][0] += float(value)
            sums[name][1] += float(count)
    total = _reduce(sums, world_size)
    result = {
        name: value / count if count else 0.0 for name, (value, count) in sorted(total.items())
    }
    return result | {f"{name}_count": total[name][1] for name in sorted(total) if "/" not in name}


def evaluate(
    model: XVLM,
    task: Evaluates | EvaluatesSplit,
    loader: Iterable[Batch],
    dist: Any = None,
    progress: bool = False,
) -> dict[str, float]:
    """Mean of every metric over all ranks' valid rows, and "NAME_count" of the ungrouped ones; or
    what the task makes of the whole split (`EvaluatesSplit`).

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
    quiet = not progress or (dist is not None and dist.rank != 0)
    was_training = model.training
    model.eval()
    try:
        with torch.inference_mode():
            if isinstance(task, EvaluatesSplit):
                return task.evaluate_split(
                    model, lambda: _batches(loader, device, dist, quiet), dist
                )
            batches = _batches(loader, device, dist, quiet)
            return _means(model, task, batches, 1 if dist is None else dist.world_size)
    finally:
        model.train(was_training)
