"""Gates: the bank that owns the log-alphas of all slots (models/gate_slot.py) of a model.

Hard-concrete gates (Louizos et al., 1712.01312) as EfficientVLM uses them (2210.07795,
section 3.3): stretch (-0.1, 1.1), temperature 2/3.
Shape legend: G gates of the whole model, R rows (slots), U units of one slot.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from models.compaction import ALIGNMENT, ActiveUnits
from models.gate_slot import GateSlot
from models.kernels import hard_concrete as kernel
from models.kernels.reference_gates import EPSILON, probability_open
from models.kernels.reference_gates import sampled as hard_concrete

__all__ = ["GateBank", "GateRow", "hard_concrete", "probability_open"]

LOG_ALPHA_LOW, LOG_ALPHA_HIGH = math.log(0.01), math.log(100.0)
INIT_STD = 0.01


@dataclass(frozen=True)
class GateRow:
    """Where one slot lives in the flat vectors of a bank.

    Attributes:
        name: slot name, "MODALITY.LAYER.KIND" (vision.0.heads, fusion.2.cross_heads, ...).
        start, stop: the slot's slice.   cost: what removing one unit saves (parameters, or another
            budget's unit).
    """

    name: str
    start: int
    stop: int
    cost: float

    @property
    def units(self) -> int:
        return self.stop - self.start

    @property
    def modality(self) -> str:
        return self.name.split(".", 1)[0]

    @property
    def is_heads(self) -> bool:
        return self.name.endswith("heads")


class GatedModel(Protocol):
    """What the bank needs from a model."""

    def gate_slots(self) -> dict[str, GateSlot]: ...

    def parameters_per_unit(self) -> dict[str, int]: ...


def _table(slots: Mapping[str, GateSlot], costs: Mapping[str, float]) -> tuple[GateRow, ...]:
    rows, start = [], 0
    for name, slot in slots.items():
        if name not in costs:
            raise ValueError(
                f"gate slot {name!r} has no unit cost; costs exist for {sorted(costs)}"
            )
        if slot.units:  # a layer pruned empty has nothing left to gate
            rows.append(GateRow(name, start, start + slot.units, float(costs[name])))
            start += slot.units
    if not rows:
        raise ValueError("no gate slots to prune: the chosen modalities have no heads or FFN units")
    return tuple(rows)


class GateBank:
    """All gates of a model: one flat log-alpha vector and two Lagrange multipliers.

    Deliberately not an nn.Module: registered in the engine's model it would be cast to half
    precision, partitioned, and descended by the model's own optimizer (the multipliers must
    ascend).

    Attributes:
        rows: the ordered table slot name -> slice, unit cost.
        log_alpha: (G,) fp32 parameter.   multipliers: (2,) fp32 parameter, lambda1 and lambda2,
            from 0.
        costs: (G,) fp64 cost of each gate.   total: prunable total that sparsity is a share of.
    """

    def __init__(
        self,
        slots: Mapping[str, GateSlot],
        costs: Mapping[str, float],
        *,
        total: float | None = None,
        head_init: float = 10.0,
        ffn_init_drop: float = 0.5,
        seed: int = 0,
        device: torch.device | str = "cpu",
        alignment: int = ALIGNMENT,
    ) -> None:
        """`costs`: unit cost by slot name. `total` replaces the sum of all costs where a budget
        defines its own. `alignment`: rows or columns of a weight, of which `active_units` keeps a
        multiple.

        Initial values (published): heads N(head_init, 0.01), FFN units N(ln((1 - p) / p), 0.01)
        with p = ffn_init_drop; drawn on the CPU from `seed`, so equal on every rank and device.
        Raises ValueError when a slot has no cost, no slot is left, or ffn_init_drop is not in
        (0, 1).
        """
        if not 0.0 < ffn_init_drop < 1.0:
            raise ValueError(f"prune.ffn_init_drop must lie between 0 and 1, not {ffn_init_drop}")
        self.rows = _table(slots, costs)
        self._slots = {row.name: slots[row.name] for row in self.rows}
        ffn_init = math.log(1.0 - ffn_init_drop) - math.log(ffn_init_drop)
        mean = self._spread([head_init if row.is_heads else ffn_init for row in self.rows])
        noise = torch.randn(
            self.gates, generator=torch.Generator().manual_seed(seed), dtype=torch.float64
        )
        self.log_alpha = nn.Parameter((mean + INIT_STD * noise).float())
        self.multipliers = nn.Parameter(torch.zeros(2))
        self.costs = self._spread([row.cost for row in self.rows])
        self.total = float(self.costs.sum()) if total is None else float(total)
        self._index, self._padding = self._grid()
        self._row = self._spread(list(range(len(self.rows)))).long()
        self._units = torch.tensor([row.units for row in self.rows])
        sizes = [self._slots[row.name].size for row in self.rows]
        self._multiples = torch.tensor([alignment // math.gcd(alignment, n) for n in sizes])
        self.to(device)

    @classmethod
    def of_model(
        cls,
        model: GatedModel,
        modalities: Iterable[str] | None = None,
        costs: Mapping[str, float] | None = None,
        **rest: Any,
    ) -> GateBank:
        """The bank of a model's slots, restricted to `modalities` (None: all), at exact parameter
        costs by default.

        Raises ValueError when the model has none of the modalities. `rest` goes to the constructor.
        """
        wanted = None if modalities is None else set(modalities)
        slots = {
            name: slot
            for name, slot in model.gate_slots().items()
            if wanted is None or name.split(".", 1)[0] in wanted
        }
        return cls(slots, model.parameters_per_unit() if costs is None else costs, **rest)

    def _spread(self, per_row: list[float]) -> Tensor:
        """(R,) values -> (G,) fp64, each repeated over the units of its row."""
        units = torch.tensor([row.units for row in self.rows])
        return torch.tensor(per_row, dtype=torch.float64).repeat_interleave(units)

    def _grid(self) -> tuple[Tensor, Tensor]:
        """(R, max U) index into the flat vectors, and (R, max U) bool, True on padding."""
        width = torch.arange(max(row.units for row in self.rows))
        starts = torch.tensor([row.start for row in self.rows])
        units = torch.tensor([row.units for row in self.rows])
        padding = width >= units[:, None]
        return (starts[:, None] + width).masked_fill(padding, 0), padding

    @property
    def gates(self) -> int:
        """G, the number of gates."""
        return self.rows[-1].stop

    @property
    def modalities(self) -> tuple[str, ...]:
        """Modalities in table order."""
        return tuple(dict.fromkeys(row.modality for row in self.rows))

    def to(self, device: torch.device | str) -> GateBank:
        """Moves everything to `device`, in place; before an optimizer has seen the parameters."""
        self.log_alpha.data = self.log_alpha.data.to(device)
        self.multipliers.data = self.multipliers.data.to(device)
        for name in ("costs", "_index", "_padding", "_row", "_units", "_multiples"):
            setattr(self, name, getattr(self, name).to(device))
        return self

    def split(self, flat: Tensor) -> dict[str, Tensor]:
        """(G,) vector -> slot name -> (U,) view."""
        return {row.name: flat[row.start : row.stop] for row in self.rows}

    def join(self, parts: Mapping[str, Tensor]) -> Tensor:
        """Slot name -> (U,) values, put together to (G,)."""
        return torch.cat([parts[row.name].reshape(-1) for row in self.rows])

    def by_row(self, flat: Tensor) -> tuple[Tensor, Tensor]:
        """(G,) values -> (R, max U) of them, and (R, max U) bool, True on padding, which repeats
        the first value."""
        return flat[self._index], self._padding

    def by_gate(self, rows: Tensor) -> Tensor:
        """(R,) values -> (G,), each repeated over the units of its row."""
        return rows.index_select(0, self._row)

    def row_sums(self, flat: Tensor) -> Tensor:
        """(G,) values -> (R,) fp64 sums over the units of each row.

        Every rank moves its own copy of the gates by these, so the order of the additions must
        not be left to a GPU's atomics; nor may the host wait for lengths to be checked.
        """
        return torch.segment_reduce(flat.double(), "sum", lengths=self._units, unsafe=True)

    def share(self, modality: str) -> Tensor:
        """(G,) bool, True on the gates of a modality. Raises ValueError when it has none."""
        if modality not in self.modalities:
            raise ValueError(
                f"no gates of modality {modality!r}; there are {', '.join(self.modalities)}"
            )
        mask = self._spread([float(row.modality == modality) for row in self.rows]) > 0
        return mask.to(self.costs.device)

    def _sparsity(self, kept: Tensor, modality: str | None) -> Tensor:
        """1 - kept cost / total, fp64 scalar, for (G,) shares kept of each gate."""
        size = kept.double() * self.costs
        if modality is None:
            return 1.0 - size.sum() / self.total
        mask = self.share(modality)
        return 1.0 - size[mask].sum() / self.costs[mask].sum()

    def probabilities_open(self) -> Tensor:
        """P(z > 0), (G,)."""
        return probability_open(self.log_alpha)

    def expected_size(self) -> Tensor:
        """Expected cost that remains, fp64 scalar with gradient."""
        return (self.probabilities_open().double() * self.costs).sum()

    def expected_sparsity(self, modality: str | None = None) -> Tensor:
        """Expected share removed of the prunable total (or of one modality's), fp64 scalar with
        gradient."""
        return self._sparsity(self.probabilities_open(), modality)

    def actual_sparsity(self, z: Tensor, modality: str | None = None) -> Tensor:
        """Share removed when exactly the gates at 0 in `z` (G,) are cut; fp64 scalar."""
        return self._sparsity(z.detach() != 0, modality)

    def sample(self, generator: torch.Generator) -> Tensor:
        """One hard-concrete sample, (G,), with the graph to `log_alpha`.

        `generator` is a CPU generator keyed by (seed, step): all ranks draw the SAME noise,
        whatever their device. The published code draws per rank. Shared noise makes a step
        independent of how many ranks share its batch, keeps one structure per step on all ranks,
        and survives a resume on another number of ranks. Where the kernel runs, the generator gives
        the key of a sequence made on the device instead: nothing is copied, nothing waits.
        """
        if kernel.backend(self.log_alpha) == "cuda":
            seed = int(torch.empty((), dtype=torch.int64).random_(generator=generator))
            return kernel.hard_concrete(self.log_alpha, self.costs, seed=seed)[0]
        u = torch.rand(self.gates, generator=generator, dtype=torch.float64)
        u = u * (1.0 - 2.0 * EPSILON) + EPSILON
        return hard_concrete(self.log_alpha, u.to(self.log_alpha.device))

    @torch.no_grad()
    def deterministic(self) -> Tensor:
        """Gates without noise, (G,) of exactly 0 or 1, as published.

        Per row the round(units - sum P(open)) gates of lowest log-alpha are 0 (half rounds to
        even).
        """
        grid = self.log_alpha.double()[self._index].masked_fill(self._padding, math.inf)
        open_grid = self.probabilities_open().double()[self._index].masked_fill(self._padding, 0.0)
        zeros = ((~self._padding).sum(1) - open_grid.sum(1)).round()
        rank = grid.argsort(dim=1, stable=True).argsort(dim=1)
        kept = (rank >= zeros[:, None]).to(self.log_alpha.dtype)
        return kept[~self._padding]

    def active_units(self, z: Tensor) -> ActiveUnits:
        """Which units take part under (G,) gate values, for `write`; ask as early as z is known."""
        return ActiveUnits(z[self._index], self._padding, self._multiples)

    def write(
        self,
        z: Tensor,
        requires_grad: bool = True,
        *,
        folded: bool = True,
        active: ActiveUnits | None = None,
    ) -> None:
        """Puts (G,) gate values into the slots, as leaf tensors; read them back with `gradient`.

        Args:
            folded: gates may go into weights; False: onto activations, the plain form.
            active: of the same z: only these units take part. None: all.
        """
        kept = [None] * len(self.rows) if active is None else active.rows()
        parts = self.split(z.detach())
        for row, units in zip(self.rows, kept, strict=True):
            leaf = parts[row.name].clone().requires_grad_(requires_grad)
            self._slots[row.name].hold(leaf, folded, units)

    def gradient(self) -> Tensor:
        """(G,) gradient gathered from the slots' leaves; zeros where a gate took no part in the
        loss."""
        flat = torch.zeros_like(self.log_alpha, requires_grad=False)
        for row in self.rows:
            z = self._slots[row.name].z
            if z is not None and z.grad is not None:
                flat[row.start : row.stop] = z.grad
        return flat

    def values(self) -> dict[str, Tensor | None]:
        """The gate values in the slots now."""
        return {name: slot.z for name, slot in self._slots.items()}

    def held(self) -> dict[str, tuple[Any, ...]]:
        """Everything in the slots now, for `restore`."""
        return {name: slot.held() for name, slot in self._slots.items()}

    def restore(self, held: Mapping[str, tuple[Any, ...]]) -> None:
        """Puts back what `held` returned."""
        for name, values in held.items():
            self._slots[name].hold(*values)

    def clear(self) -> None:
        """Resets the slots to None: all open, at no cost."""
        for slot in self._slots.values():
            slot.hold(None)

    @torch.no_grad()
    def clamp(self) -> None:
        """Keeps log-alpha in [ln 0.01, ln 100]: beyond, the sigmoid saturates and a gate could
        never come back."""
        self.log_alpha.clamp_(LOG_ALPHA_LOW, LOG_ALPHA_HIGH)

    def state_dict(self) -> dict[str, Any]:
        """Table and values; tensors are copies on the CPU."""
        return {
            "table": [[row.name, row.units, row.cost] for row in self.rows],
            "log_alpha": self.log_alpha.detach().cpu().clone(),
            "multipliers": self.multipliers.detach().cpu().clone(),
        }

    @torch.no_grad()
    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Raises ValueError naming the first slot in which the saved table differs from this
        model's."""
        saved = [(str(name), int(units), float(cost)) for name, units, cost in state["table"]]
        here = [(row.name, row.units, row.cost) for row in self.rows]
        if saved != here:
            pairs = zip(saved + [None] * len(here), here + [None] * len(saved), strict=True)
            was, now = next((a, b) for a, b in pairs if a != b)
            raise ValueError(
                f"gates in the checkpoint are of another model: (slot, units, cost) {was} there, "
                f"{now} here; "
                "resume with the same model and prune.modalities, or start with --resume none"
            )
        self.log_alpha.copy_(state["log_alpha"])
        self.multipliers.copy_(state["multipliers"])
