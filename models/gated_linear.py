"""Linear layers whose rows or columns carry gates: folded into the weight, and dropped where closed.

Shape legend: T tokens, I inputs and O outputs of the layer, n entries that take part.

A gate beside a linear layer moves into its weight: (a * z) W^T = a (W * z)^T, so that the gradient
of z is a sum over the weight rather than over batch and tokens. An entry whose gate is 0 adds
nothing to the output, gets no gradient in its weights, and its gate's gradient ends at the clamp of
the hard-concrete distribution: leaving it out of the product changes neither value nor gradient.
Parameters are read only in the forward of the module that owns them, as ZeRO-3 needs.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch.nn.functional as F
from torch import Tensor, nn

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
        activation: Callable[[Tensor], Tensor] | None = None,
        gate_first: bool = True,
    ) -> Tensor:
        """input (..., T, n of columns) -> (..., T, n of rows).

        Args:
            rows: gates of the outputs, which are the n that take part, in the order of `kept`.
            columns: gates of the inputs, which are already only those that take part.
            activation: applied to the outputs; one that is to lose closed entries maps 0 to 0.
            gate_first: the gates of the rows act before the activation (and may fold), or after it
                (and may not: a gate after it belongs to the columns of the layer that comes next).
        """
        weight, bias = self.weight, self.bias
        if rows.kept is not None:
            weight = weight.index_select(0, rows.kept)
            bias = None if bias is None else bias.index_select(0, rows.kept)
        if columns.kept is not None:
            weight = weight.index_select(1, columns.kept)
        if columns.gate is not None and columns.fold:
            weight = _scaled(weight, columns.gate)
        elif columns.gate is not None:
            input = input * columns.gate.to(input.dtype)
        gate = rows.gate
        if gate is not None and rows.fold and gate_first:
            weight = _scaled(weight, gate[:, None])
            bias, gate = None if bias is None else _scaled(bias, gate), None
        return _finish(input, weight, bias, gate, activation, gate_first)


def _finish(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    gate: Tensor | None,
    activation: Callable[[Tensor], Tensor] | None,
    gate_first: bool,
) -> Tensor:
    """The one place where bias, activation and a gate on activations meet.

    A fused kernel takes F.linear(x, weight) and the other four. `gate` is None where it was folded.
    """
    hidden = F.linear(x, weight, bias)
    gate = None if gate is None else gate.to(hidden.dtype)
    if gate is not None and gate_first:
        hidden = hidden * gate
    if activation is not None:
        hidden = activation(hidden)
    return hidden if gate is None or gate_first else hidden * gate
