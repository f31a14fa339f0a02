"""What layers cost at any width, how the target grows, and how a bank of gates is held to it.

Shape legend: G gates of the whole model, R rows (slots), g groups of rows, P points of a table.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from models.gates import GateBank
from models.pruning.lagrangian import lagrangian

__all__ = ["Constraint", "Scope", "WidthCosts", "bank_widths", "expected_widths", "target_sparsity"]

Scope = Literal["modal-adaptive", "per-encoder", "uniform"]
Points = Sequence[tuple[float, float]]

# Share of the mean slope in the gradient of a measured table. Where a table is flat (a device that
# is not filled by the layer) its own slope is 0, and gates would never reach the next step of it.
_TILT = 0.1


def target_sparsity(step: int, sparsity: float, ramp_steps: int) -> float:
    """Target at a GLOBAL step: linear from 0 over `ramp_steps`, then constant (0 steps: constant
    from the start).

    A pure function of the step, so a resume, or a new epoch, cannot restart it.
    """
    return sparsity if ramp_steps <= 0 else min(1.0, step / ramp_steps) * sparsity


def expected_widths(bank: GateBank) -> Tensor:
    """(R,) fp64 expected number of open gates of each row, with gradient to log-alpha."""
    return bank.row_sums(bank.probabilities_open())


def bank_widths(bank: GateBank, z: Tensor) -> Tensor:
    """(R,) fp64 number of gates of each row that are not exactly 0 in `z` (G,)."""
    return bank.row_sums(z.detach() != 0)


class WidthCosts:
    """What each row of a bank costs at any width: piecewise linear, rising, 0 at width 0.

    Parameters and multiply-accumulates are straight lines, measured latency is not. What no gate
    can remove is `constant`, and belongs to no row.

    Attributes:
        unit: what is counted, for people ("parameters", "MACs", "seconds").
        points: row name -> ascending (width, cost) from (0, 0) to the full width.
        full: (R,) fp64 cost of each row at full width.
        total: what shares are of: the sum of `full`, unless a budget defines its own.
        constant: cost of everything else.
        slack: how far from a target a structure may stay, where units are finer than is known.
    """

    def __init__(
        self,
        unit: str,
        points: Mapping[str, Points],
        constant: float = 0.0,
        slack: float = 0.0,
        total: float | None = None,
    ) -> None:
        """Raises ValueError on a table that does not begin at (0, 0), falls, or has one point."""
        self.unit, self.constant, self.slack = unit, float(constant), float(slack)
        self.points = {name: _checked(name, row) for name, row in points.items()}
        most = max(len(row) for row in self.points.values())
        self._widths, self._values, self._slopes = (
            torch.full((len(self.points), most), fill, dtype=torch.float64)
            for fill in (math.inf, 0.0, 0.0)
        )
        for index, row in enumerate(self.points.values()):
            for place, (width, value) in enumerate(row):
                self._widths[index, place], self._values[index, place] = width, value
            for place, ((a, low), (b, high)) in enumerate(zip(row, row[1:], strict=False)):
                self._slopes[index, place] = (high - low) / (b - a)
        self._last = torch.tensor([len(row) - 2 for row in self.points.values()])
        self.units = torch.tensor([row[-1][0] for row in self.points.values()]).double()
        self.full = torch.tensor([row[-1][1] for row in self.points.values()]).double()
        self.total = float(self.full.sum()) if total is None else float(total)
        self._chords = self.full / self.units

    @classmethod
    def linear(
        cls, unit: str, bank: GateBank, costs: Mapping[str, float], total: float | None = None
    ) -> WidthCosts:
        """Straight lines: `costs` by row name is that of one unit."""
        points = {
            row.name: ((0.0, 0.0), (float(row.units), row.units * float(costs[row.name])))
            for row in bank.rows
        }
        return cls(unit, points, total=total)

    @classmethod
    def parameters(cls, bank: GateBank) -> WidthCosts:
        """The bank's own unit costs and total, exact parameter counts."""
        costs = {row.name: row.cost for row in bank.rows}
        return cls.linear("parameters", bank, costs, bank.total)

    def to(self, device: torch.device | str) -> WidthCosts:
        """Moves the tables, in place."""
        for name in ("_widths", "_values", "_slopes", "_last", "units", "full", "_chords"):
            setattr(self, name, getattr(self, name).to(device))
        return self

    def sizes(self, widths: Tensor) -> Tensor:
        """(R,) fp64 cost of each row at `widths` (R,), with gradient; widths may be fractions."""
        reached = (self._widths <= widths.detach()[:, None]).sum(1) - 1
        place = torch.minimum(reached.clamp(min=0), self._last)[:, None]
        begin, value, slope = (
            table.gather(1, place)[:, 0] for table in (self._widths, self._values, self._slopes)
        )
        tilt = _TILT * (self._chords - slope) * (widths - widths.detach())
        return value + slope * (widths - begin) + tilt

    def size_at(self, row: int, width: float) -> float:
        """Cost of one row at one width."""
        points = list(self.points.values())[row]
        for (a, low), (b, high) in zip(points, points[1:], strict=False):
            if width <= b:
                return low + (high - low) / (b - a) * (width - a)
        return points[-1][1]

    def state_dict(self) -> dict[str, Any]:
        """Numbers, strings and lists, for a checkpoint: a resumed run goes on with the same costs,
        also on another machine."""
        table = [[name, [list(point) for point in row]] for name, row in self.points.items()]
        return {
            "unit": self.unit,
            "points": table,
            "constant": self.constant,
            "slack": self.slack,
            "total": self.total,
        }

    @classmethod
    def of_state(cls, state: Mapping[str, Any]) -> WidthCosts:
        """What `state_dict` gave."""
        points = {name: [(w, v) for w, v in row] for name, row in state["points"]}
        return cls(state["unit"], points, state["constant"], state["slack"], state["total"])


def _checked(name: str, points: Points) -> tuple[tuple[float, float], ...]:
    row = tuple((float(width), float(value)) for width, value in points)
    rising = all(a[0] < b[0] and a[1] <= b[1] for a, b in zip(row, row[1:], strict=False))
    if len(row) < 2 or row[0] != (0.0, 0.0) or not rising:
        raise ValueError(f"costs of {name}: points must rise from (0, 0), not {row[:4]}")
    return row


class Constraint:
    """Holds a bank to a share of some cost to remove.

    Attributes:
        costs: of the bank's rows, in their order.
        sparsity: share of `costs.total` to remove in the end.
        scope: "modal-adaptive" (published): one constraint over everything; "per-encoder": the same
            share within each modality; "uniform": the same share of the units of every row. The
            last two are baselines.
        groups: names of what has a constraint of its own.   group: (R,) index of each row's group.
    """

    def __init__(
        self, bank: GateBank, costs: WidthCosts, sparsity: float, scope: Scope = "modal-adaptive"
    ) -> None:
        """Gives the bank as many multipliers as there are groups: before an optimizer sees them.

        Raises ValueError when the costs are of other rows, or on a share outside [0, 1).
        """
        if list(costs.points) != [row.name for row in bank.rows]:
            raise ValueError("costs and gates have different rows")
        if not 0.0 <= sparsity < 1.0:
            raise ValueError(f"share to remove must lie in [0, 1), not {sparsity:.4f}")
        device = bank.log_alpha.device
        self.bank, self.costs, self.sparsity = bank, costs.to(device), sparsity
        self.scope: Scope = scope
        self.groups = _groups(bank, scope)
        self._member = torch.tensor(
            [[float(row.name in names) for row in bank.rows] for names in self.groups.values()],
            dtype=torch.float64, device=device,
        )  # fmt: skip
        self.group = self._member.argmax(0)
        self._totals = self._group_totals()
        if scope != "modal-adaptive":
            bank.multipliers = nn.Parameter(torch.zeros(2, len(self.groups), device=device))
        self._unit_share = uniform_share(costs, sparsity) if scope == "uniform" else sparsity

    def replace(self, costs: WidthCosts, sparsity: float) -> None:
        """Other costs of the same rows, from a checkpoint."""
        self.costs, self.sparsity = costs.to(self.bank.log_alpha.device), sparsity
        self._totals = self._group_totals()
        if self.scope == "uniform":
            self._unit_share = uniform_share(self.costs, sparsity)
        else:
            self._unit_share = sparsity

    def _group_totals(self) -> Tensor:
        """(g,) cost that the share of each group is of."""
        if self.scope == "modal-adaptive":
            return torch.full_like(self._member[:, 0], self.costs.total)
        return self._member @ self.costs.full

    def penalty(self, ramp: float) -> Tensor:
        """The Lagrangian at `ramp` (0 to 1) of the final target, fp64 scalar."""
        shares = self.shares(expected_widths(self.bank))
        return lagrangian(shares, self.target(ramp), self.bank.multipliers).sum()

    def shares(self, widths: Tensor) -> Tensor:
        """(g,) fp64 share of each group that widths (R,) remove, as its constraint counts it
        ("uniform": of units), with gradient."""
        if self.scope == "uniform":
            return 1.0 - widths / self.costs.units
        return 1.0 - self.over_groups(self.costs.sizes(widths)) / self._totals

    def over_groups(self, values: Tensor) -> Tensor:
        """(R,) -> (g,) fp64 sums."""
        return self._member @ values

    def target(self, ramp: float) -> float:
        """What every group's share is held to at `ramp` (0 to 1) of the final target."""
        return ramp * self._unit_share

    def share(self, widths: Tensor, modality: str | None = None) -> Tensor:
        """Share of the cost (of a modality's) that these widths (R,) remove, fp64 scalar."""
        sizes = self.costs.sizes(widths)
        if modality is None:
            return 1.0 - sizes.sum() / self.costs.total
        names = [row.modality == modality for row in self.bank.rows]
        mask = torch.tensor(names, device=sizes.device)
        return 1.0 - sizes[mask].sum() / self.costs.full[mask].sum()

    def expected(self, modality: str | None = None) -> Tensor:
        """Share that the gates are expected to remove."""
        return self.share(expected_widths(self.bank), modality)

    def actual(self, z: Tensor, modality: str | None = None) -> Tensor:
        """Share that is removed when exactly the gates at 0 in `z` (G,) are cut."""
        return self.share(bank_widths(self.bank, z), modality)

    def modality_target(self, modality: str, ramp: float = 1.0) -> float | None:
        """The share that a modality is held to; None where the losses decide."""
        if self.scope == "modal-adaptive":
            return None
        if self.scope == "per-encoder":
            return ramp * self.sparsity
        return float(self.share(self.costs.units * (1.0 - ramp * self._unit_share), modality))

    def state_dict(self) -> dict[str, Any]:
        return {"costs": self.costs.state_dict(), "sparsity": self.sparsity, "scope": self.scope}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Raises ValueError when the state was made under another scope."""
        if state["scope"] != self.scope:
            raise ValueError(
                f"prune.scope is {self.scope!r}, the checkpoint's {state['scope']!r}: put it back, "
                "or start with --resume none"
            )
        self.replace(WidthCosts.of_state(state["costs"]), float(state["sparsity"]))


def _groups(bank: GateBank, scope: Scope) -> dict[str, list[str]]:
    """Group name -> the rows in it."""
    names = [row.name for row in bank.rows]
    if scope == "uniform":
        return {name: [name] for name in names}
    if scope == "per-encoder":
        return {
            modality: [row.name for row in bank.rows if row.modality == modality]
            for modality in bank.modalities
        }
    return {"all": names}


def uniform_share(costs: WidthCosts, sparsity: float) -> float:
    """The share of units which, taken from every row, removes `sparsity` of the cost (bisection;
    equal to `sparsity` where costs are straight lines)."""
    low, high = 0.0, 1.0
    for _ in range(50):
        middle = (low + high) / 2
        left = float(costs.sizes(costs.units * (1.0 - middle)).sum())
        low, high = (middle, high) if 1.0 - left / costs.total < sparsity else (low, middle)
    return (low + high) / 2
