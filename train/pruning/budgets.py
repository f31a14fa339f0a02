"""What a run's gates are held to, and the structure that comes of it: parameters, multiply-accumulates
or a speed-up that is measured.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from models.config import ModelConfig
from models.gates import GateBank
from models.pruning.budget import Constraint, WidthCosts, bank_widths
from models.pruning.latency import LatencyTable
from models.pruning.structure import constrained
from models.pruning.surgery import pruned_config
from train.config import PruneConfig

__all__ = ["Measured", "PruneBudget", "SpeedupBudget"]

_LOG = logging.getLogger(__name__)
_ROUNDS = 3  # structures that are measured: the table's, and two corrected ones


class PruneBudget:
    """A constraint on a bank, and the structure that meets it."""

    def __init__(self, constraint: Constraint, multiple: int = 1) -> None:
        """`multiple`: of kept FFN units, see `models.pruning.structure.allowed_widths`."""
        self.constraint, self.multiple = constraint, multiple

    @classmethod
    def parameters(cls, bank: GateBank, prune: PruneConfig) -> PruneBudget:
        """`prune.sparsity` of the exact parameter counts."""
        costs = WidthCosts.parameters(bank)
        return cls(Constraint(bank, costs, prune.sparsity, prune.scope), prune.round_to)

    def structure(self) -> Tensor:
        """(G,) gates of 0 or 1 that meet the budget. All ranks call it."""
        return constrained(self.constraint, multiple=self.multiple)

    @torch.no_grad()
    def shares(self, hard: Tensor, ramp: float) -> dict[str, float]:
        """Shares removed, of everything and by modality: the ramped "target", what the gates are
        "expected" to remove, and "actual" when the gates at 0 in `hard` (G,) are cut; "MODALITY" is
        the actual one. "parameters" where the budget counts something else.
        """
        rule, bank = self.constraint, self.constraint.bank
        record = {
            "target": ramp * rule.sparsity,
            "expected": float(rule.expected()),
            "actual": float(rule.actual(hard)),
        }
        for name in bank.modalities:
            record[name] = float(rule.actual(hard, name))
            record[f"{name}_expected"] = float(rule.expected(name))
            held = rule.modality_target(name, ramp)
            if held is not None:
                record[f"{name}_target"] = held
        if rule.costs.unit != "parameters":
            record["parameters"] = float(bank.actual_sparsity(hard))
        return record

    def report(self, hard: Tensor) -> dict[str, Any]:
        """What the run was held to and what came of it, for sparsity.json."""
        shares, rule = self.shares(hard, 1.0), self.constraint
        keys = ("target", "expected", "actual")
        return {
            "unit": rule.costs.unit,
            "scope": rule.scope,
            "round_to": self.multiple,
            **{key: shares[key] for key in keys},
            "modalities": {
                name: {
                    "target": shares.get(f"{name}_target"),
                    "expected": shares[f"{name}_expected"],
                    "actual": shares[name],
                }
                for name in rule.bank.modalities
            },
        }

    def state_dict(self) -> dict[str, Any]:
        """Numbers, strings, lists and dicts."""
        return {"constraint": self.constraint.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Raises ValueError when the state is of another budget."""
        unit = state["constraint"]["costs"]["unit"]
        if unit != self.constraint.costs.unit:
            raise ValueError(
                f"prune.budget counts {self.constraint.costs.unit}, the checkpoint's {unit}: put "
                "it back, or start with --resume none"
            )
        self.constraint.load_state_dict(state["constraint"])


@dataclass(frozen=True)
class Measured:
    """A speed-up on the clock: median and quartiles over rounds in which both models took turns."""

    median: float
    q1: float
    q3: float


class SpeedupBudget(PruneBudget):
    """A speed-up: the table says which structure should have it, and measuring whether it has.

    Attributes:
        target: how many times as fast as the table's reference.
        tries: what was measured: "share" of the gated time asked for, "predicted" and "measured"
            speed-up of the structure with quartiles; the chosen one is marked.
    """

    def __init__(
        self,
        constraint: Constraint,
        multiple: int,
        table: LatencyTable,
        target: float,
        dense: ModelConfig,
        measure: Callable[[ModelConfig], Measured],
        tolerance: float = 0.05,
    ) -> None:
        """`dense`: the model that is pruned.   `measure`: the speed-up of a pruned shape, the same
        on every rank (collective).   `tolerance`: relative miss that calls for a correction."""
        super().__init__(constraint, multiple)
        self.table, self.target, self.dense = table, target, dense
        self.measure, self.tolerance = measure, tolerance
        self.tries: list[dict[str, Any]] = []

    @classmethod
    def of_table(
        cls, bank: GateBank, prune: PruneConfig, table: LatencyTable, target: float, *rest: Any
    ) -> SpeedupBudget:
        """The constraint that follows from a table. `rest`: dense, measure, tolerance.

        Raises:
            ValueError: the target is met without pruning, or out of reach.
        """
        costs = table.costs(bank)
        share = table.share_for(costs, target)
        now, most = table.reference / table.dense, table.reference / costs.constant
        if share <= 0.0:
            raise ValueError(
                f"prune.budget.speedup: {target:g} times is asked for, and the dense model is "
                f"{now:.2f} times as fast already: ask for more, or against=student"
            )
        if share >= 1.0:
            raise ValueError(
                f"prune.budget.speedup: {target:g} times is out of reach: the dense model is "
                f"{now:.2f} times as fast, {most:.2f} times without any heads and FFN units of "
                f"prune.modalities ({', '.join(bank.modalities)})"
            )
        _LOG.info(
            "speed-up of %.2f: gates are to remove %.1f %% of their %.2f ms (dense %.2f ms, "
            "reference %.2f ms)", target, 100 * share, 1e3 * costs.total, 1e3 * table.dense,
            1e3 * table.reference,
        )  # fmt: skip
        rule = Constraint(bank, costs, share, prune.scope)
        return cls(rule, prune.round_to, table, target, *rest)

    def predicted(self, z: Tensor) -> float:
        """Speed-up by the table when exactly the gates at 0 in `z` (G,) are cut."""
        rule = self.constraint
        return self.table.speedup(rule.costs, bank_widths(rule.bank, z))

    def structure(self) -> Tensor:
        """The structure whose measured speed-up is nearest to the target, of at most three.

        The first is the table's. While it misses by more than the tolerance, the next one removes
        more or less, by the ratio of the time that was saved to the time that should have been.
        """
        rule, self.tries = self.constraint, []
        share, found = rule.sparsity, []
        for number in range(_ROUNDS):
            z = constrained(rule, share, self.multiple)
            self._try(z, share)
            found.append(z)
            last = self.tries[-1]
            missed = last["measured"] / self.target - 1.0
            if abs(missed) <= self.tolerance or number + 1 == _ROUNDS:
                break
            corrected = self._corrected(last)
            if corrected is None:
                break
            _LOG.warning(
                "the cut model is %.2f times as fast, %+.1f %% off the target of %.2f: correcting "
                "the structure from %.1f %% to %.1f %% of the time removed",
                last["measured"], 100 * missed, self.target, 100 * last["share"], 100 * corrected,
            )  # fmt: skip
            share = corrected
        best = min(
            range(len(found)), key=lambda i: abs(math.log(self.tries[i]["measured"] / self.target))
        )
        self.tries[best]["chosen"] = True
        if abs(self.tries[best]["measured"] / self.target - 1.0) > self.tolerance:
            _LOG.warning(
                "the best structure is %.2f times as fast, the target was %.2f",
                self.tries[best]["measured"], self.target,
            )  # fmt: skip
        rule.sparsity = self.tries[best]["share"]
        return found[best]

    def _try(self, z: Tensor, share: float) -> None:
        rule = self.constraint
        told = self.predicted(z)
        seen = self.measure(pruned_config(self.dense, rule.bank.split(z)))
        self.tries.append(
            {
                "share": share,
                "predicted": told,
                "measured": seen.median,
                "q1": seen.q1,
                "q3": seen.q3,
            }
        )
        _LOG.info(
            "speed-up: target %.2f, predicted %.2f, measured %.2f (quartiles %.2f to %.2f)",
            self.target, told, seen.median, seen.q1, seen.q3,
        )  # fmt: skip

    def _corrected(self, last: Mapping[str, float]) -> float | None:
        """The share that should save what is needed if all savings are off by the same factor."""
        table, total = self.table, self.constraint.costs.total
        saved = table.dense - table.reference / last["measured"]
        promised = table.dense - table.reference / last["predicted"]
        needed = table.dense - table.reference / self.target
        if saved <= 0.0 or promised <= 0.0:
            _LOG.warning("the cut model is no faster than the dense one: nothing to correct by")
            return None
        return min(max(needed * promised / saved / total, 0.0), 0.999)

    def shares(self, hard: Tensor, ramp: float) -> dict[str, float]:
        """Also "speedup", predicted for the gates as they are."""
        return super().shares(hard, ramp) | {"speedup": self.predicted(hard)}

    def report(self, hard: Tensor) -> dict[str, Any]:
        chosen = next((one for one in self.tries if one.get("chosen")), {})
        speedup = {
            "target": self.target,
            "predicted": self.predicted(hard),
            "measured": chosen.get("measured"),
            "q1": chosen.get("q1"),
            "q3": chosen.get("q3"),
            "tries": self.tries,
            **self.table.about,
        }
        return super().report(hard) | {"speedup": speedup}

    def state_dict(self) -> dict[str, Any]:
        return super().state_dict() | {"table": self.table.to_json(), "tries": self.tries}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        super().load_state_dict(state)
        # The table that the gates were driven by, also where this machine would measure another.
        self.table = LatencyTable.of_json(state["table"])
        self.tries = [dict(one) for one in state["tries"]]
