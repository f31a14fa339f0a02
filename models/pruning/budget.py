"""What removing a unit saves, how the target grows, how a structure is made to meet it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Protocol

import torch
from torch import Tensor

from models.gates import GateBank, GatedModel

__all__ = ["Budget", "ParameterBudget", "meet_budget", "target_sparsity"]


class Budget(Protocol):
    """What a unit of a slot costs. Sparsity is the share of `total` removed.

    Parameters today; multiply-accumulates or measured latency fit as long as a unit's cost does not
    depend on which other units are kept.

    Attributes:
        unit: name of what is counted, for reports.
        costs: slot name -> cost of one unit.   total: cost of everything that can be removed.
    """

    unit: str
    costs: Mapping[str, float]
    total: float


class ParameterBudget:
    """Exact parameters of a model's gated units, restricted to `modalities` (None: all)."""

    unit = "parameters"

    def __init__(self, model: GatedModel, modalities: Iterable[str] | None = None) -> None:
        wanted = None if modalities is None else set(modalities)
        slots = model.gate_slots()
        self.costs: Mapping[str, float] = {
            name: float(cost)
            for name, cost in model.parameters_per_unit().items()
            if wanted is None or name.split(".", 1)[0] in wanted
        }
        self.total = sum(
            slots[name].units * cost for name, cost in self.costs.items() if name in slots
        )


def target_sparsity(step: int, sparsity: float, ramp_steps: int) -> float:
    """Target at a GLOBAL step: linear from 0 over `ramp_steps`, then constant (0 steps: constant
    from the start).

    A pure function of the step, so a resume, or a new epoch, cannot restart it.
    """
    return sparsity if ramp_steps <= 0 else min(1.0, step / ramp_steps) * sparsity


@torch.no_grad()
def meet_budget(bank: GateBank, sparsity: float, start: Tensor | None = None) -> Tensor:
    """Hard gates (G,) whose removed cost is as close to `sparsity` * total as flipping allows.

    Ours, not published: deterministic gates round per row and follow the expected sparsity, which
    oscillates about the target, so they miss it by up to a few points. Starting from `start` (None:
    `bank.deterministic()`), open gates of lowest log-alpha are closed, or closed ones of highest
    log-alpha opened, those nearest to the boundary first; a gate that would overshoot by more than
    half the cheapest unit is passed over. What is left is then at most half the cheapest unit, as
    long as one of those can still be flipped.
    """
    if not 0.0 <= sparsity < 1.0:
        raise ValueError(f"prune.sparsity must lie in [0, 1), not {sparsity}")
    z = (bank.deterministic() if start is None else start.clone()).cpu()
    costs = bank.costs.cpu()
    gap = sparsity * bank.total - float((costs * (z == 0)).sum())
    closing = gap > 0
    score = bank.log_alpha.detach().double().cpu()
    candidates = (z != 0 if closing else z == 0).nonzero().flatten()
    order = candidates[score[candidates].argsort(descending=not closing, stable=True)]
    missing, slack = abs(gap), float(costs.min()) / 2
    flipped, passed = [], []
    for gate, cost in zip(order.tolist(), costs[order].tolist(), strict=True):
        if missing <= slack:
            break
        if cost <= missing + slack:
            flipped.append(gate)
            missing -= cost
        else:
            passed.append((gate, cost))
    # Only dearer units are left: one more flip when that lands closer than stopping short.
    best = min(passed, key=lambda item: abs(item[1] - missing), default=None)
    nearer = best is not None and abs(best[1] - missing) < missing
    if best is not None and nearer:
        flipped.append(best[0])
    z[flipped] = 0.0 if closing else 1.0
    # That flip went past the target: cheap gates make up for it the other way. The gap shrinks with
    # every call, so this ends.
    return meet_budget(bank, sparsity, z) if nearer else z.to(bank.log_alpha)
