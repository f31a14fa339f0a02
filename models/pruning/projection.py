"""The sparsity constraint met in every step: gradients along it, and log-alphas moved back onto it.

Ours, not published. The published multipliers (`models.pruning.lagrangian`) need about a thousand
steps to settle; in a ramp of some hundred they swing, and what gates are expected to remove stands
points away from the target when the structure is fixed.
Shape legend: G gates of the whole model, R rows (slots), U units of the widest row, g groups.
"""

from __future__ import annotations

import torch
from torch import Tensor

from models.gates import LOG_ALPHA_HIGH, LOG_ALPHA_LOW, GateBank
from models.kernels.reference_gates import probability_open
from models.pruning.budget import Constraint, expected_widths

__all__ = ["check_reach", "project", "reach", "tangent"]

_SPAN = LOG_ALPHA_HIGH - LOG_ALPHA_LOW  # shifts every gate from one bound past the other
_HALVINGS = 34  # of 2 * _SPAN: to 1e-9, far below what fp32 log-alphas resolve


class _Grid:
    """Log-alphas by row, fp64, brought between their bounds first.

    By row, so that sums run along rows: in the same order on every rank, which adding by index on a
    GPU does not promise.
    """

    def __init__(self, bank: GateBank) -> None:
        bank.clamp()
        self.values, self.padding = bank.by_row(bank.log_alpha.detach().double())  # (R, U)

    def widths(self, shift: Tensor) -> Tensor:
        """(R,) expected widths when row r moves by shift[r] and stays between the bounds."""
        moved = (self.values + shift[:, None]).clamp(LOG_ALPHA_LOW, LOG_ALPHA_HIGH)
        return probability_open(moved).masked_fill(self.padding, 0.0).sum(1)


def _solve(constraint: Constraint, grid: _Grid, ramp: float) -> Tensor:
    """(g,) fp64 shifts by bisection: the share removed falls as the shift grows."""
    target, group = constraint.target(ramp), constraint.group
    low = torch.full((len(constraint.groups),), -_SPAN, dtype=torch.float64, device=group.device)
    high = -low
    for _ in range(_HALVINGS):
        middle = (low + high) / 2
        sparse = constraint.shares(grid.widths(middle[group])) > target
        low, high = torch.where(sparse, middle, low), torch.where(sparse, high, middle)
    return (low + high) / 2


@torch.no_grad()
def project(constraint: Constraint, ramp: float) -> Tensor:
    """Moves the log-alphas of each group by one number, so that the group is expected to remove its
    target at `ramp` (0 to 1); in place, bounded as `GateBank.clamp` does.

    Order within a group stays, up to ties at the bounds, where gates still get gradients. A target
    out of reach (`reach`: at most 0.2 % of parameters, in the first steps of a ramp) takes the gates
    to the bound. Depends on log-alphas and `ramp` alone: nothing to keep in a checkpoint, and equal
    on all ranks. Waits for nothing on the device.

    Returns:
        (g,) fp64 shifts.
    """
    bank = constraint.bank
    shift = _solve(constraint, _Grid(bank), ramp)
    moved = bank.log_alpha.double() + bank.by_gate(shift[constraint.group])
    bank.log_alpha.copy_(moved.clamp(LOG_ALPHA_LOW, LOG_ALPHA_HIGH))
    return shift


def tangent(constraint: Constraint, gradient: Tensor) -> Tensor:
    """(G,) gradient of a loss through `project`, from its gradient by log-alpha on the constraint.

    A gate that opens shuts all others of its group a little. With s the share that the group is
    expected to remove (implicit function theorem; sums over the group):

        g_i - lambda ds/da_i,   lambda = sum_j g_j / sum_j ds/da_j

    lambda is the multiplier of this step: what a gate is worth stands against what it costs. Without
    it an optimizer that scales each gradient by itself (Adam) would shut dear gates and cheap ones
    alike.
    """
    bank, group = constraint.bank, constraint.group
    shares = constraint.shares(expected_widths(bank)).sum()
    slope = torch.autograd.grad(shares, bank.log_alpha)[0].double()
    wanted, given = _by_group(constraint, gradient.double()), _by_group(constraint, slope)
    # Shares fall with every log-alpha: a sum of 0 is that of slopes which are all 0.
    rate = torch.where(given < 0, wanted / given.clamp(max=-1e-300), 0.0)
    return (gradient.double() - bank.by_gate(rate[group]) * slope).to(gradient)


def _by_group(constraint: Constraint, values: Tensor) -> Tensor:
    """(G,) -> (g,) fp64 sums."""
    grid, padding = constraint.bank.by_row(values)
    return constraint.over_groups(grid.masked_fill(padding, 0.0).sum(1))


@torch.no_grad()
def reach(constraint: Constraint) -> tuple[Tensor, Tensor]:
    """(g,) least and most share that gates between their bounds can be expected to remove."""
    grid = _Grid(constraint.bank)
    ends = (
        constraint.shares(grid.widths(torch.full_like(grid.values[:, 0], shift)))
        for shift in (_SPAN, -_SPAN)
    )
    least, most = ends
    return least, most


def check_reach(constraint: Constraint, key: str) -> None:
    """Raises ValueError naming `key` when the final target lies beyond what gates can reach."""
    most = float(reach(constraint)[1].min())
    target = constraint.target(1.0)
    if target > most:
        raise ValueError(
            f"{key}: {target:.1%} of the {constraint.costs.unit} are to go, and gates can be "
            f"expected to remove at most {most:.1%} of them: ask for less, or set "
            "prune.constraint=lagrangian, which cuts the rest by rank"
        )
