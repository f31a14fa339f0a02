"""GateSlot: where a layer finds the gate values of the current step. No parameters.

Shape legend: U units of the slot.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from models.gated_linear import ALL, Entries

__all__ = ["GateSlot"]


class GateSlot(nn.Module):
    """Holds the gate values of one layer's heads or FFN units for the current step.

    No parameters, no buffers. A `GateBank` writes it once a step, so that activation recomputation
    sees the same values.

    Attributes:
        units: U.   size: rows or columns of a weight that belong to one unit (d of a head).
        z: None (open, costs nothing) or (U,) fp32.
        folded: gates may go into weights; False: onto activations, always.
    """

    def __init__(self, units: int, size: int = 1) -> None:
        super().__init__()
        self.units, self.size = units, size
        self.z: Tensor | None = None
        self.folded = True
        self._kept: Tensor | None = None
        self._places: Tensor | None = None

    def extra_repr(self) -> str:
        return f"units={self.units}"

    def hold(self, z: Tensor | None, folded: bool = True, kept: Tensor | None = None) -> None:
        """Values for the coming passes; `kept` (n,) int64: the units that take part (None: all)."""
        self.z, self.folded, self._kept = z, folded, kept
        self._places = None if kept is None else self._entries_of(kept)

    def held(self) -> tuple[Tensor | None, bool, Tensor | None]:
        """What `hold` was given."""
        return self.z, self.folded, self._kept

    def _entries_of(self, units: Tensor) -> Tensor:
        """Unit indices -> indices of their rows or columns."""
        if self.size == 1:
            return units
        return (units[:, None] * self.size + torch.arange(self.size, device=units.device)).flatten()

    @property
    def kept(self) -> Tensor | None:
        """(n,) int64, the units that take part; None where all of them do.

        When all do the index changes nothing but their order. A compiled graph takes it all the
        same: it would otherwise be compiled for each set of slots that are complete.
        """
        kept = self._kept
        if kept is None or (kept.shape[0] == self.units and not torch.compiler.is_compiling()):
            return None
        return kept

    def entries(self, fold: bool, compact: bool = True) -> Entries:
        """The gates as a `GatedLinear` takes them.

        Args:
            fold: folding is the cheaper form here: there are at least as many tokens as outputs of
                the layer whose columns (or inputs of the layer whose rows) the gates govern.
            compact: False: all units take part in this pass, whatever the bank chose.
        """
        if self.z is None:
            return ALL
        z, places = self.z, None
        kept = self.kept if compact else None
        if kept is not None:
            z, places = z.index_select(0, kept), self._places
        if self.size > 1:
            z = z[:, None].expand(-1, self.size).flatten()
        return Entries(places, z, fold and self.folded)
