"""The weights that a run with `checkpoint.best` ends with: those of its best validated step."""

from __future__ import annotations

import logging
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from train.checkpoint.retention import best_first
from train.config import RunConfig

if TYPE_CHECKING:
    from deepspeed import DeepSpeedEngine

    from train.checkpoint.manager import CheckpointManager

__all__ = ["SELECTED", "Selected", "first_judged", "select"]

_LOG = logging.getLogger(__name__)
SELECTED = "selected.json"  # in the run directory: `Selected`, where checkpoint.best is set


@dataclass(frozen=True)
class Selected:
    """Where the weights of `model/` are from.

    Attributes:
        metric: `checkpoint.best`.
        step, value: of these weights.   last_step, last_value: of the end of the run. A value is
            None where the metric was not measured, or not finite.
    """

    metric: str
    step: int
    value: float | None
    last_step: int
    last_value: float | None


def first_judged(config: RunConfig) -> int:
    """The first step whose validation says something about the model that the run ends with.

    Pruning: after a step with the fixed structure, that is beyond `prune.freeze_step`; without it
    only after the last step. Before, gates were others, and what is cut would not be what was
    validated. Trimming: after a step with the whole budget, that is beyond the ramp; before, a
    model may keep more and is better for it.
    """
    last = config.optim.steps
    if config.prune is not None:
        freeze = config.prune.freeze_step
        return last if freeze is None else min(freeze + 1, last)
    if config.trim is not None:
        return min(math.ceil((config.trim.warmup + config.trim.ramp) * last) + 1, last)
    return 0


def select(manager: CheckpointManager, engine: DeepSpeedEngine, last: int) -> Selected | None:
    """Puts the best kept checkpoint's weights into the engine, unless they are of step `last`, where
    the engine stands and whose checkpoint is complete. None without `checkpoint.best`. Collective.

    What is chosen depends on the checkpoints on disk alone, so a run that was stopped after its last
    step chooses the same. One that is damaged is passed over with a warning.
    """
    metric = manager.best.metric
    if metric is None:
        return None
    scores = manager.scores()
    order = best_first(scores, metric)
    if not order:
        _LOG.warning(
            "checkpoint.best: no checkpoint has a %s that counts (from step %d on): model/ is of the "
            "last step, %d", metric, manager.best.first, last,
        )  # fmt: skip
    elif manager.best.value is not None and manager.best.step not in order:
        _LOG.warning(
            "checkpoint.best: the checkpoint of step %d, the best (%s %g), is not there",
            manager.best.step, metric, manager.best.value,
        )  # fmt: skip
    chosen = last
    for step in order:
        problem = None if step == last else manager.load_weights(engine, step)
        if problem is None:
            chosen = step
            break
        _LOG.warning("checkpoint.best: passed over: %s", problem)
    found = Selected(metric, chosen, scores.get(chosen), last, scores.get(last))
    if order:
        _LOG.info(
            "model/ is of step %d (%s %s), the best; the last step, %d, has %s",
            found.step, metric, _told(found.value), last, _told(found.last_value),
        )  # fmt: skip
    return found


def _told(value: float | None) -> str:
    return "none" if value is None else f"{value:g}"
