"""Gates: parameterless slots in layers, and the bank that owns their log-alphas."""

from __future__ import annotations

from torch import Tensor, nn

__all__ = ["GateSlot"]


class GateSlot(nn.Module):
    """Holds the gate values of one layer's heads or FFN units for the current step; no parameters, no buffers.

    `z` is None (open, costs nothing) or a (units,) tensor that is part of the autograd graph of a `GateBank`.
    The bank writes it once a step, so that activation recomputation sees the same values.
    """

    def __init__(self, units: int) -> None:
        super().__init__()
        self.units = units
        self.z: Tensor | None = None

    def extra_repr(self) -> str:
        return f"units={self.units}"
