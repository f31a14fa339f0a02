"""Linear layers whose rows or columns carry gates: folded into the weight, and dropped where closed.

Shape legend: T tokens, I inputs and O outputs of the layer, n entries that take part.

A gate beside a linear layer moves into its weight: (a * z) W^T = a (W * z)^T, so that the gradient
of z is a sum over the weight rather than over batch and tokens. An entry whose gate is 0 adds
nothing to the output, gets no gradient in its weights, and its gate's gradient ends at the clamp of
the hard-concrete distribution: leaving it out of the product changes neither value nor gradient.
Parameters are read only in the forward of the module that owns them, as ZeRO-3 needs.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.kernels import ffn_act_mask as activations
from models.kernels import fold as folds

__all__ = ["ALL", "Entries", "GatedLinear"]


class Entries(NamedTuple):
    """What gates say about the rows or the columns of a weight.

    Attributes:
        kept: (n,) int64, each once: those that take part. None: all.
        gate: (n,) factor of each entry that takes part. None: 1.
        fold: the factors go into the weight; False: onto the activations. The same value; which is
            cheaper depends on whether there are more tokens or more weights.
    """

    kept: Tensor | None = None
    gate: Tensor | None = None
    fold: bool = True


ALL = Entries()


def _scaled(weight: Tensor, gate: Tensor) -> Tensor:
    """weight * gate in the wider type of the two, rounded once to the weight's."""
    return (weight * gate).to(weight.dtype)


class GatedLinear(nn.Linear):
    """nn.Linear, with its parameters and key names, of which gates may govern rows and columns."""

    def forward(
        self,
        input: Tensor,
        *,
        rows: Entries = ALL,
        columns: Entries = ALL,
        activation: str | None = None,
        gate_first: bool = True,
    ) -> Tensor:
        """input (..., T, n of columns) -> (..., T, n of rows).

        Args:
            rows: gates of the outputs, which are the n that take part, in the order of `kept`.
            columns: gates of the inputs, which are already only those that take part.
            activation: name of the one applied to the outputs. All map 0 to 0, which is why an entry
                closed before its activation can be left out.
            gate_first: the gates of the rows act before the activation (and may fold), or after it
                (and may not: a gate after it belongs to the columns of the layer that comes next).
        """
        gate = rows.gate
        if columns.gate is not None and not columns.fold:
            input = input * columns.gate.to(input.dtype)
        column_gate = columns.gate if columns.fold else None
        row_gate = gate if rows.fold and gate_first else None
        part = folds.Part(self.weight, rows.kept, columns.kept, row_gate, column_gate)
        weight, bias = _operands(part, self.bias)
        gate = gate if row_gate is None else None
        return _finish(input, weight, bias, gate, activation, gate_first)


def _operands(part: folds.Part, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """Weight and bias of the product: the entries that take part, with their gates in."""
    weight, rows, columns, row_gate, column_gate = part
    if all(vector is None for vector in part[1:]):
        return weight, bias
    dtype = _product_type(weight)
    if folds.backend([part], dtype) == "cuda":
        parts = [part]
        if bias is not None and (rows is not None or row_gate is not None):
            parts.append(folds.Part(bias[None], columns=rows, column_gate=row_gate))
        weight, *biases = folds.fold(parts, dtype)
        return weight, biases[0][0] if biases else bias
    if rows is not None:
        weight = weight.index_select(0, rows)
        bias = None if bias is None else bias.index_select(0, rows)
    if columns is not None:
        weight = weight.index_select(1, columns)
    if column_gate is not None:
        weight = _scaled(weight, column_gate)
    if row_gate is not None:
        weight = _scaled(weight, row_gate[:, None])
        bias = None if bias is None else _scaled(bias, row_gate)
    return weight, bias


def _product_type(weight: Tensor) -> torch.dtype:
    """The type F.linear multiplies in: a kernel that casts spares it a pass over the weight."""
    if weight.is_cuda and torch.is_autocast_enabled("cuda"):
        return torch.get_autocast_dtype("cuda")
    return weight.dtype


def _finish(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    gate: Tensor | None,
    activation: str | None,
    gate_first: bool,
) -> Tensor:
    """The one place where bias, activation and a gate on activations meet.

    `gate` is None where it was folded.
    """
    if activation is not None and activations.backend(x, bias, gate) == "cuda":
        return activations.ffn_act_mask(F.linear(x, weight), bias, gate, activation, gate_first)
    hidden = F.linear(x, weight, bias)
    if activation is not None:
        return activations.ffn_act_mask(hidden, None, gate, activation, gate_first)
    return hidden if gate is None else hidden * gate.to(hidden.dtype)
