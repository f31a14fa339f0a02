"""Plain torch definition of folding gates into weights: the specification of csrc/fold.cuh.

Shape legend: R, C rows and columns of a weight; n, m those that take part.
"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["compact", "compact_backward"]

Optional = Tensor | None


def compact(
    weight: Tensor,
    rows: Optional,
    columns: Optional,
    row_gate: Optional,
    column_gate: Optional,
    dtype: torch.dtype,
) -> Tensor:
    """The rows and columns of a weight that take part, times their gates, as a product's operand.

    Args:
        weight: (R, C).   rows (n,), columns (m,): int64, each index once. None: all.
        row_gate (n,), column_gate (m,): factors, None is 1; multiplied in the wider type and
            rounded once.
        dtype: of the result.

    Returns:
        (n, m); element [i, j] is weight[rows[i], columns[j]] * row_gate[i] * column_gate[j].
    """
    if rows is not None:
        weight = weight.index_select(0, rows)
    if columns is not None:
        weight = weight.index_select(1, columns)
    if column_gate is not None:
        weight = weight * column_gate
    if row_gate is not None:
        weight = weight * row_gate[:, None]
    return weight.to(dtype)


def compact_backward(
    gradient: Tensor,
    weight: Tensor,
    rows: Optional,
    columns: Optional,
    row_gate: Optional,
    column_gate: Optional,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of `compact` by weight (R, C), row_gate (n,) and column_gate (m,).

    A weight that took no part has gradient 0.
    """
    wide = torch.promote_types(weight.dtype, torch.float32)
    part = compact(weight.to(wide), rows, columns, None, None, wide)
    g = gradient.to(wide)
    by_row = torch.ones_like(g[:, 0]) if row_gate is None else row_gate.to(wide)
    by_column = torch.ones_like(g[0]) if column_gate is None else column_gate.to(wide)
    product = g * part
    scaled = g * by_row[:, None] * by_column
    if columns is not None:
        full = scaled.new_zeros(scaled.shape[0], weight.shape[1])
        scaled = full.index_copy(1, columns, scaled)
    if rows is not None:
        scaled = torch.zeros_like(weight, dtype=wide).index_copy(0, rows, scaled)
    return scaled.to(weight.dtype), product @ by_column, by_row @ product
