"""Which units stay: a structure of exactly 0 or 1 that meets its budget, in widths a device likes.

In each row the most open gates stay, so a structure is the widths of its rows, and a step from one
allowed width to the next closes (or opens) the units in between.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from models.gates import GateBank, GateRow
from models.pruning.budget import Constraint, Scope, WidthCosts, bank_widths, uniform_share

__all__ = ["allowed_widths", "constrained", "meet_budget"]


def allowed_widths(row: GateRow, multiple: int) -> list[int]:
    """Widths that a row may have, ascending: heads are whole; FFN units come in multiples, and a
    layer of which nothing is cut keeps its width, multiple or not."""
    step = 1 if row.is_heads else multiple
    return sorted({*range(0, row.units + 1, step), row.units})


@dataclass
class _Row:
    """One row while a structure is made.

    Attributes:
        widths, sizes: allowed widths and what they cost.   place: the present one.
        scores: scores[i] ranks the step between widths i and i + 1: low is closed first.
    """

    widths: list[int]
    sizes: list[float]
    scores: list[float]
    place: int

    def step(self, closing: bool) -> int | None:
        """Index of the next step in this direction; None at the end."""
        if closing:
            return self.place - 1 if self.place else None
        return self.place if self.place + 1 < len(self.widths) else None

    def saving(self, step: int) -> float:
        return self.sizes[step + 1] - self.sizes[step]


def _openness(bank: GateBank, row: GateRow, widths: Sequence[int]) -> list[float]:
    """Mean log-alpha of the units between neighbouring widths."""
    values = bank.log_alpha.detach()[row.start : row.stop].double().cpu()
    sums = torch.cat([values.new_zeros(1), values.sort(descending=True).values.cumsum(0)])
    if len(widths) == row.units + 1:  # exact, so that equal gates tie
        return values.sort(descending=True).values.tolist()
    at = sums[torch.tensor(list(widths))]
    spans = torch.tensor(widths[1:]) - torch.tensor(widths[:-1])
    return ((at[1:] - at[:-1]) / spans).tolist()


def _nearest(widths: Sequence[int], wanted: float) -> int:
    return min(range(len(widths)), key=lambda place: abs(widths[place] - wanted))


@torch.no_grad()
def meet_budget(
    bank: GateBank,
    sparsity: float,
    start: Tensor | None = None,
    *,
    costs: WidthCosts | None = None,
    scope: Scope = "modal-adaptive",
    multiple: int = 1,
) -> Tensor:
    """Hard gates (G,) whose removed cost is as close to `sparsity` * total as whole steps allow.

    Ours, not published: deterministic gates round per row and follow the expected sparsity, which
    oscillates about the target, so they miss it by up to a few points. Beginning with `start`
    (None: `bank.deterministic()`, uniform scope: the uniform widths), widths go to the nearest
    allowed ones, and then steps are closed that lie lowest by mean log-alpha (uniform: that are
    furthest above their share), or opened that lie highest; a step that would overshoot by more
    than half the cheapest is passed over. What is left is then at most half the cheapest step, as
    long as one of those can still be taken.

    Args:
        costs: of the bank's rows; None: parameters.
        scope: "per-encoder" meets the budget within each modality.
        multiple: FFN widths are multiples of it, see `allowed_widths`.

    Raises:
        ValueError: on a share outside [0, 1).
    """
    if not 0.0 <= sparsity < 1.0:
        raise ValueError(f"prune.sparsity must lie in [0, 1), not {sparsity}")
    costs = WidthCosts.parameters(bank) if costs is None else costs
    rows = _rows(bank, costs, sparsity, start, scope, multiple)
    groups = [(rows, sparsity * costs.total)]
    if scope == "per-encoder":
        parts = [
            [rows[index] for index, row in enumerate(bank.rows) if row.modality == modality]
            for modality in bank.modalities
        ]
        groups = [(part, sparsity * sum(row.sizes[-1] for row in part)) for part in parts]
    for group, wanted in groups:
        while _approach(group, wanted, costs.slack):
            pass
    return _hard_gates(bank, [row.widths[row.place] for row in rows])


def _rows(
    bank: GateBank, costs: WidthCosts, sparsity: float, start: Tensor | None, scope: Scope,
    multiple: int,
) -> list[_Row]:  # fmt: skip
    share = uniform_share(costs, sparsity) if scope == "uniform" else 0.0
    begin = bank_widths(bank, bank.deterministic() if start is None else start).tolist()
    found = []
    for index, row in enumerate(bank.rows):
        widths = allowed_widths(row, multiple)
        if scope == "uniform":  # the step whose middle lies furthest above the share goes first
            wanted = row.units * (1.0 - share)
            middles = [(a + b) / 2 for a, b in zip(widths, widths[1:], strict=False)]
            scores = [(wanted - middle) / row.units for middle in middles]
        else:
            wanted, scores = begin[index], _openness(bank, row, widths)
        sizes = [costs.size_at(index, width) for width in widths]
        found.append(_Row(widths, sizes, scores, _nearest(widths, wanted)))
    return found


def _approach(rows: Sequence[_Row], wanted: float, slack: float) -> bool:
    """Moves the rows' places towards `wanted` cost removed. True when the last step went past it:
    cheap ones can make up for it the other way. The gap shrinks with every call, so this ends."""
    gap = wanted - sum(row.sizes[-1] - row.sizes[row.place] for row in rows)
    closing, missing = gap > 0, abs(gap)
    savings = [row.saving(step) for row in rows for step in range(len(row.scores))]
    slack = max(slack, min((saving for saving in savings if saving > 0), default=0.0) / 2)
    sign = 1.0 if closing else -1.0
    queue = [
        (sign * row.scores[step], index)
        for index, row in enumerate(rows)
        if (step := row.step(closing)) is not None
    ]
    heapq.heapify(queue)
    passed: list[tuple[float, int]] = []
    while queue and missing > slack:
        _, index = heapq.heappop(queue)
        row = rows[index]
        step = row.step(closing)
        assert step is not None
        if row.saving(step) > missing + slack:
            passed.append((row.saving(step), index))
            continue
        missing -= row.saving(step)
        row.place += -1 if closing else 1
        step = row.step(closing)
        if step is not None:
            heapq.heappush(queue, (sign * row.scores[step], index))
    if missing <= slack or not passed:
        return False
    # Only dearer steps are left: one more when that lands closer than stopping short.
    saving, index = min(passed, key=lambda item: abs(item[0] - missing))
    if abs(saving - missing) >= missing:
        return False
    rows[index].place += -1 if closing else 1
    return True


def _hard_gates(bank: GateBank, widths: Sequence[int]) -> Tensor:
    """(G,) gates: the `widths[r]` most open ones of row r are 1."""
    score = bank.log_alpha.detach().double().cpu()
    z = torch.ones(bank.gates)
    for row, width in zip(bank.rows, widths, strict=True):
        order = score[row.start : row.stop].argsort(stable=True)
        z[row.start + order[: row.units - width]] = 0.0
    return z.to(bank.log_alpha)


def constrained(constraint: Constraint, sparsity: float | None = None, multiple: int = 1) -> Tensor:
    """`meet_budget` under a constraint's costs and scope; `sparsity` None: its own."""
    wanted = constraint.sparsity if sparsity is None else sparsity
    return meet_budget(
        constraint.bank, wanted, costs=constraint.costs, scope=constraint.scope, multiple=multiple
    )
