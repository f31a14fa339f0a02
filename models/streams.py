"""Tokens on their way through a stack whose trimmers drop some of them.

Every mode makes the same decisions. "mask": all tokens stay in memory, attention and pooling leave
the dropped ones out, exactly as if they were gone; what dropped tokens compute nobody reads.
"gather" and "bucket": the kept tokens of each row move to the front and the rest is cut off.
"packed": the kept tokens of all rows lie one behind the other.

Shape legend: B rows, N tokens at the start of the stack, n tokens now (of the longest row), D width.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from models.kernels.pack_tokens import pack_tokens
from models.outputs import TrimSite
from models.packing import Packing, masked_mean
from models.trimmers import Trimmers, decide

__all__ = ["BlockTrim", "TokenStream"]


@dataclass(frozen=True)
class BlockTrim:
    """What a block is told about trimming beside its masks.

    Attributes:
        packing, context_packing: of the own tokens and of those that cross-attention reads.
        heads, cross_heads: (B, H) factors of the heads, or (H',) int64, the heads that stay.
    """

    packing: Packing | None = None
    context_packing: Packing | None = None
    heads: Tensor | None = None
    cross_heads: Tensor | None = None


class TokenStream:
    """Which tokens of B rows are left, and how they lie.

    Attributes:
        mask: (B, n), packed (1, T): bool, True on tokens that attention reads, or float keep
            weights; None: all are read.
        packing: None, or how the rows are packed.
        places: (B, n), packed (T,): place of each token among the first N; None: as at the start.
        protected: tokens at the start of each row that never go.
        packs: mode "packed" packs these tokens; False: it moves them to the front, as "gather".
        tokens, rows: N and B.
    """

    def __init__(self, x: Tensor, mask: Tensor | None, protected: int, packs: bool = True) -> None:
        self.mask, self.protected, self.packs = mask, protected, packs
        self.rows, self.tokens = x.shape[0], x.shape[1]
        self.packing: Packing | None = None
        self.places: Tensor | None = None
        self._count: Tensor | None = None

    # --- what is there --------------------------------------------------------------------------

    def count(self, x: Tensor) -> Tensor:
        """(B,) float32: tokens of each row that are left, with a gradient in training."""
        if self._count is None:
            grid = self._grid_mask()
            self._count = (
                torch.full((x.shape[0],), float(x.shape[1]), device=x.device)
                if grid is None
                else grid.float().sum(1)
            )
        return self._count

    def _grid_mask(self) -> Tensor | None:
        """`mask` as (B, n), packed or not."""
        if self.packing is None:
            return self.mask
        valid = self.packing.valid
        return valid if self.mask is None else valid & (self.packing.grid(self.mask[0]) > 0)

    def first(self, x: Tensor) -> Tensor:
        """(B, D): each row's first token, or the mean of what is left where none is protected."""
        if self.packing is not None:
            if self.protected:
                return self.packing.first(x[0])
            x = self.packing.grid(x[0])
        elif self.protected:
            return x[:, 0]
        mask = self._grid_mask()
        if mask is None:
            return x.mean(1)
        return masked_mean(x, mask)

    # --- changes --------------------------------------------------------------------------------

    def _forget(self, mask: Tensor | None) -> None:
        self.mask, self._count = mask, None

    def select(self, x: Tensor, index: Tensor, visible: Tensor | None = None) -> Tensor:
        """Row i becomes what row index[i] was; of it only `visible` (len(index), N) bool is read."""
        if self.packing is not None:
            x = self.unpack(x)
        mask = None if self.mask is None else self.mask.index_select(0, index)
        self.places = None if self.places is None else self.places.index_select(0, index)
        if visible is not None:
            if self.places is not None:
                visible = visible.gather(1, self.places)
            mask = visible if mask is None else mask * visible
        self._forget(mask)
        self.rows = len(index)
        return x.index_select(0, index)

    def trim(
        self,
        x: Tensor,
        trimmers: Trimmers,
        layer: int,
        guide: Tensor | None,
        *,
        context: bool = False,
    ) -> tuple[Tensor, TrimSite]:
        """Drops tokens at the site in front of `layer`; the states that are left, and the site.

        Args:
            guide: (B, Dg), the first token of the other modality, or None.
            context: the site is one of `trimmers.context`.
        """
        name = str(layer)
        trimmer = (trimmers.context if context else trimmers.tokens)[name]
        counts = trimmers.context_keep if context else trimmers.keep
        before = self.count(x)
        rows = None if self.packing is None else self.packing.rows
        logits = trimmer(x, guide, rows)
        places = self.places
        if self.packing is not None:
            logits = self.packing.grid(logits[0])
            places = None if places is None else self.packing.grid(places)
        weight = self._grid_mask()
        movable = torch.ones_like(logits, dtype=torch.bool) if weight is None else weight > 0
        if self.protected:
            movable = movable & (
                torch.arange(logits.shape[1], device=logits.device) >= self.protected
            )
        kept = decide(
            logits,
            movable,
            least=trimmers.config.min_tokens,
            count=counts[layer] if trimmers.fixed else None,
            tau=trimmers.noise,
        )
        kept = kept if weight is None else kept * weight
        site = TrimSite(logits, kept, movable, places, self.tokens, before)
        if trimmers.mode == "mask":
            self._forget(kept)
        elif trimmers.mode != "packed" or not self.packs:
            x = self._compact(x, kept > 0, counts[layer] if trimmers.fixed else None)
        elif context or trimmers.repack is None or layer in trimmers.repack:
            x = self._pack(x, kept > 0)
        else:
            kept = kept if self.packing is None else self.packing.flat(kept)[None]
            self._forget(kept > 0)
        return x, site

    def _compact(self, x: Tensor, kept: Tensor, count: int | None) -> Tensor:
        """The kept tokens (B, n) of each row move to the front, in order; the rest is cut off."""
        ragged, rows = self.mask is not None, kept.shape[0]
        if count is not None:  # nothing here may depend on the data
            length = min(self.protected + count, kept.shape[1])
        else:
            counts = kept.sum(1)
            least, length = torch.stack(counts.aminmax()).tolist()
            ragged = least != length
        if length == kept.shape[1] and not ragged:
            self._forget(None)
            return x
        # As a stable sort by `kept`, which ONNX has not: no two keys are equal.
        place = torch.arange(kept.shape[1], device=x.device)
        keys = torch.where(kept, place, place + kept.shape[1])
        order = keys.topk(length, dim=1, largest=False).indices
        flat = (order + torch.arange(rows, device=x.device)[:, None] * kept.shape[1]).flatten()
        x = x.flatten(0, 1).index_select(0, flat).unflatten(0, (rows, length))
        self.places = order if self.places is None else self.places.gather(1, order)
        self._forget(kept.gather(1, order) if ragged else None)
        return x

    def pack(self, x: Tensor) -> Tensor:
        """Packs rows that are padded; the others are left as they are."""
        mask = self._grid_mask()
        return x if self.packing is not None or mask is None else self._pack(x, mask > 0)

    def _pack(self, x: Tensor, kept: Tensor) -> Tensor:
        """Only the kept tokens (B, n) of each row are left, one behind the other."""
        before, self.packing = self.packing, Packing.of(kept.sum(1))
        chosen = kept if before is None else before.flat(kept)[None]
        packed, _, index = pack_tokens(x, chosen, len(self.packing.rows))
        self.places = index % kept.shape[1] if self.places is None else self.places.flatten()[index]
        self._forget(None)
        return packed[None]

    def unpack(self, x: Tensor) -> Tensor:
        """Back to (B, n, D), with a mask where rows differ in length."""
        packing = self.packing
        if packing is None:
            return x
        mask = self._grid_mask()
        x = packing.grid(x[0])
        self.places = None if self.places is None else packing.grid(self.places)
        self.packing = None
        self._forget(None if packing.batch * packing.longest == len(packing.rows) else mask)
        return x
