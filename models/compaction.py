"""Which gated units take part in a step: those that are open, padded to sizes GEMMs like.

Shape legend: R rows (gate slots), U units of the widest.
"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["ALIGNMENT", "ActiveUnits"]

ALIGNMENT = 64  # rows or columns of a weight: whole tiles of tensor cores, few different shapes


class ActiveUnits:
    """The units of every row whose gate is not 0, and closed ones up to a multiple.

    A closed unit that fills up has gate 0, so the result stays exact. At least one multiple takes
    part, so that no product is empty and every parameter gets a gradient. A gate that is NaN counts
    as open. Everything is computed on the gates' device; the counts, which the host needs as sizes,
    are copied to it in the background.
    """

    def __init__(self, z: Tensor, padding: Tensor, multiples: Tensor) -> None:
        """z (R, U) gate values; padding (R, U) bool, True where a row has no such unit; multiples
        (R,) int64, of which the counts are multiples (or all units of the row)."""
        closed = (z.detach() == 0).to(torch.uint8).masked_fill(padding, 2)
        self._order = closed.argsort(dim=1, stable=True)
        live = (closed == 0).sum(1).clamp(min=1)
        counts = (live + multiples - 1).div(multiples, rounding_mode="floor") * multiples
        counts = counts.minimum((~padding).sum(1))
        self._counts, self._copied = counts, None
        if counts.is_cuda:
            self._counts = torch.empty(counts.shape, dtype=counts.dtype, pin_memory=True)
            self._counts.copy_(counts, non_blocking=True)
            self._copied = torch.cuda.Event()
            self._copied.record()

    def rows(self) -> list[Tensor]:
        """Unit indices of each row, int64: the open ones in their order, then what fills up.

        Waits for the counts alone, which a step that asked one step ahead already has.
        """
        if self._copied is not None:
            self._copied.synchronize()
        return [row[:count] for row, count in zip(self._order, self._counts.tolist(), strict=True)]
