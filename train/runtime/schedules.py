"""Learning rate as a pure function of the general step. DeepSpeed's schedulers are not used.

They step on every engine step (region steps too) and set one value on all groups; ours is set by
the loop on each group as `lr_at(step) * lr_multiplier`.
"""

from __future__ import annotations

import math
from typing import Any

from train.config import OptimConfig

__all__ = ["factor_at", "lr_at", "set_lr"]


def factor_at(optim: OptimConfig, step: int) -> float:
    """Share of `optim.lr` that general step `step` (from 0) uses, in [0, 1].

    Linear warm-up over `warmup_steps` ending at 1, then "linear" or "cosine" to 0 at `steps`, or
    "constant". The first step of a warm-up is 1 / warmup_steps, never 0: a step that does nothing
    is a wasted batch.
    """
    if step < optim.warmup_steps:
        return (step + 1) / optim.warmup_steps
    if optim.schedule == "constant":
        return 1.0
    span = max(1, optim.steps - optim.warmup_steps)
    left = min(1.0, max(0.0, (optim.steps - step) / span))
    return left if optim.schedule == "linear" else 0.5 * (1.0 - math.cos(math.pi * left))


def lr_at(optim: OptimConfig, step: int) -> float:
    """Learning rate of general step `step` (from 0), before group multipliers."""
    return optim.lr * factor_at(optim, step)


def set_lr(param_groups: list[dict[str, Any]], lr: float) -> None:
    """Writes `lr` times each group's `lr_multiplier` (1 when it has none) into the groups of an
    optimizer.
    """
    for group in param_groups:
        group["lr"] = lr * group.get("lr_multiplier", 1.0)
