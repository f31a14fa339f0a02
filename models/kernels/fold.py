"""Gates folded into weights with a cast, and closed units left out; see reference_fold.compact.

`fold_cast` and `compact` are one op, of several weights in one launch; compact has indices too.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from models.kernels import dispatch, library
from models.kernels import reference_fold as reference
from models.kernels.ops import define, differentiable, once_differentiable

__all__ = ["Part", "backend", "fold", "launch", "launch_backward", "pack"]

# What an op takes of the parts: weights, gates, indices, layout. The layout has for each weight
# the places of its rows and columns among the indices, and of its row gate and column gate among
# the gates; -1: none. Autograd sees the tensors of Tensor[] only, not of Tensor?[].
Packed = tuple[list[Tensor], list[Tensor], list[Tensor], list[int]]


class Part(NamedTuple):
    """A weight (R, C) and what takes part of it; arguments of `reference_fold.compact`."""

    weight: Tensor
    rows: Tensor | None = None
    columns: Tensor | None = None
    row_gate: Tensor | None = None
    column_gate: Tensor | None = None

    @property
    def shape(self) -> tuple[int, int]:
        """(n, m) of the operand."""
        return (
            self.weight.shape[0] if self.rows is None else self.rows.shape[0],
            self.weight.shape[1] if self.columns is None else self.columns.shape[0],
        )


def backend(parts: Sequence[Part], dtype: torch.dtype) -> str:
    """What `fold` would run for these weights."""
    op = "fold_cast" if all(p.rows is None and p.columns is None for p in parts) else "compact"
    return dispatch.pick(op, parts[0].weight.device.type, _unsupported(parts, dtype))


def fold(parts: Sequence[Part], dtype: torch.dtype) -> list[Tensor]:
    """`reference_fold.compact` of each part, all in one launch, by whichever implementation is
    picked (dispatch.py): operands of type `dtype`, (n, m) each.

    Raises:
        ValueError: for gates that do not fit their weight.
        RuntimeError: when the kernel was asked for explicitly and cannot run.
    """
    kernel = torch.ops.espalier.compact
    return dispatch.call(backend(parts, dtype), _reference, kernel, *pack(parts), dtype)


def _unsupported(parts: Sequence[Part], dtype: torch.dtype) -> str | None:
    kinds = {part.weight.dtype for part in parts}
    if len(kinds) != 1:
        return "the weights are of several types"
    (kind,) = kinds
    if kind not in library.TYPES or dtype not in library.TYPES:
        return f"the kernel takes no {kind} to {dtype}"
    if kind not in (dtype, torch.float32):
        return f"the kernel does not cast {kind} to {dtype}"
    gates = [gate for part in parts for gate in part[3:] if gate is not None]
    if any(gate.dtype != torch.float32 for gate in gates):
        return "the kernel takes gates of float32"
    return None


def pack(parts: Sequence[Part]) -> Packed:
    """Parts as the op takes them."""
    gates: list[Tensor] = []
    indices: list[Tensor] = []
    layout = []
    for part in parts:
        for vector, found in zip(part[1:], (indices, indices, gates, gates), strict=True):
            layout.append(-1 if vector is None else len(found))
            if vector is not None:
                found.append(vector)
    return [part.weight for part in parts], gates, indices, layout


def _unpack(
    weights: list[Tensor], gates: list[Tensor], indices: list[Tensor], layout: list[int]
) -> list[Part]:
    """Checked parts of what an op was given."""
    parts = []
    for number, weight in enumerate(weights):
        rows, columns, *gated = layout[4 * number : 4 * number + 4]
        index = [None if i < 0 else indices[i] for i in (rows, columns)]
        part = Part(weight, *index, *(None if i < 0 else gates[i] for i in gated))
        if weight.dim() != 2:
            raise ValueError(f"fold: weight {number} must be (R, C), not {tuple(weight.shape)}")
        for name, gate, size in zip(("row", "column"), part[3:], part.shape, strict=True):
            if gate is not None and gate.shape != (size,):
                raise ValueError(
                    f"fold: the {name} gate of weight {number} must be ({size},), not "
                    f"{tuple(gate.shape)}"
                )
        parts.append(part)
    return parts


def _reference(*arguments: Any) -> list[Tensor]:
    *packed, dtype = arguments
    return [reference.compact(*part, dtype) for part in _unpack(*packed)]


def _contiguous(part: Part) -> Part:
    return Part(part.weight.contiguous(), *(v if v is None else v.contiguous() for v in part[1:]))


def _table(items: list[tuple[Tensor | int | None, ...]]) -> tuple[ctypes.Array[Any], list[Tensor]]:
    """The launcher's table in host memory, and the tensors whose addresses it holds."""
    values, tensors = [], []
    for item in items:
        for field in item:
            if isinstance(field, Tensor):
                tensors.append(field)
                values.append(field.data_ptr())
            else:
                values.append(field or 0)
    return (ctypes.c_int64 * len(values))(*values), tensors


def _groups(count: int) -> list[slice]:
    """As many weights as one launch takes."""
    step = library.current().query("espalier_fold_items")
    return [slice(start, start + step) for start in range(0, count, step)]


def _outputs(parts: list[Part], dtype: torch.dtype) -> list[Tensor]:
    return [torch.empty(part.shape, dtype=dtype, device=part.weight.device) for part in parts]


def launch(*arguments: Any) -> list[Tensor]:
    """The forward kernel: operands, from packed parts and their type."""
    *packed, dtype = arguments
    parts = [_contiguous(part) for part in _unpack(*packed)]
    problem = _unsupported(parts, dtype)
    if problem:
        raise TypeError(f"fold: {problem}")
    outputs = _outputs(parts, dtype)
    types = library.type_code(parts[0].weight.dtype), library.type_code(dtype)
    for group in _groups(len(parts)):
        items = [
            (*part, out, None, None, None, *out.shape, part.weight.shape[1])
            for part, out in zip(parts[group], outputs[group], strict=True)
        ]
        table, tensors = _table(items)
        library.current().launch("espalier_fold", table, len(items), *types, reached=tensors)
    return outputs


def launch_backward(
    gradients: list[Tensor],
    weights: list[Tensor],
    gates: list[Tensor],
    indices: list[Tensor],
    layout: list[int],
) -> tuple[list[Tensor], list[Tensor]]:
    """The backward kernels: gradients of weights and gates, from those of the operands."""
    parts = [_contiguous(part) for part in _unpack(weights, gates, indices, layout)]
    gradients = [g.contiguous() for g in gradients]
    kernels = library.current()
    dweights, dgates = _gradients(parts, gates)
    by_gate: list[Tensor | None] = [*dgates, None]  # the layout's -1
    types = library.type_code(parts[0].weight.dtype), library.type_code(gradients[0].dtype)
    items = [
        (*part, g, dw, *(by_gate[i] for i in layout[4 * n + 2 : 4 * n + 4]), *g.shape, dw.shape[1])
        for n, (part, g, dw) in enumerate(zip(parts, gradients, dweights, strict=True))
    ]
    for group in _groups(len(parts)):
        size = sum(kernels.query("espalier_fold_workspace", *g.shape) for g in gradients[group])
        workspace = torch.empty(size, dtype=torch.uint8, device=gradients[0].device)
        table, tensors = _table(items[group])
        arguments = (table, len(items[group]), workspace, size, *types)
        kernels.launch("espalier_fold_backward", *arguments, reached=tensors)
    return dweights, dgates


def _gradients(parts: list[Part], gates: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
    """Memory for the gradients; zeros where the kernel will not write every element."""
    dweights = []
    for part in parts:
        make = torch.empty if part.rows is None and part.columns is None else torch.zeros
        weight = part.weight
        dweights.append(make(weight.shape, dtype=weight.dtype, device=weight.device))
    return dweights, [torch.empty_like(gate).contiguous() for gate in gates]


def _cpu(*arguments: Any) -> list[Tensor]:
    # An operand that is the weight itself would be an alias, which an op must not return.
    found = _reference(*arguments)
    return [x.clone() if x is w else x for x, w in zip(found, arguments[0], strict=True)]


def _cpu_backward(
    gradients: list[Tensor],
    weights: list[Tensor],
    gates: list[Tensor],
    indices: list[Tensor],
    layout: list[int],
) -> tuple[list[Tensor], list[Tensor]]:
    parts = _unpack(weights, gates, indices, layout)
    dweights, dgates = [], [*gates]
    for number, (gradient, part) in enumerate(zip(gradients, parts, strict=True)):
        dweight, *found = reference.compact_backward(gradient, *part)
        dweights.append(dweight)
        for place, dgate in zip(layout[4 * number + 2 : 4 * number + 4], found, strict=True):
            if place >= 0:
                dgates[place] = dgate.to(gates[place].dtype)
    return dweights, dgates


def _fake(*arguments: Any) -> list[Tensor]:
    *packed, dtype = arguments
    return _outputs(_unpack(*packed), dtype)


def _fake_backward(
    gradients: list[Tensor],
    weights: list[Tensor],
    gates: list[Tensor],
    indices: list[Tensor],
    layout: list[int],
) -> tuple[list[Tensor], list[Tensor]]:
    return _gradients(_unpack(weights, gates, indices, layout), gates)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: list[Tensor]) -> None:
    weights, gates, indices, ctx.layout, ctx.dtype = inputs
    ctx.counts = len(weights), len(gates)
    ctx.save_for_backward(*weights, *gates, *indices)


def _backward(ctx: Any, gradients: list[Tensor | None]) -> tuple[Any, ...]:
    saved, (weights, gates) = list(ctx.saved_tensors), ctx.counts
    packed = (
        *(saved[:weights], saved[weights : weights + gates], saved[weights + gates :]),
        ctx.layout,
    )
    full = [
        part.weight.new_zeros(part.shape, dtype=ctx.dtype) if g is None else g
        for g, part in zip(gradients, _unpack(*packed), strict=True)
    ]
    dweights, dgates = torch.ops.espalier.compact_backward(full, *packed)
    return dweights, dgates, [None] * len(packed[2]), None, None


_PACKED = "Tensor[] weights, Tensor[] gates, Tensor[] indices, int[] layout"
define(
    f"compact({_PACKED}, ScalarType dtype) -> Tensor[]",
    cpu=_cpu,
    cuda=launch,
    fake=_fake,
)
once_differentiable(
    define(
        f"compact_backward(Tensor[] gradients, {_PACKED}) -> (Tensor[], Tensor[])",
        cpu=_cpu_backward,
        cuda=launch_backward,
        fake=_fake_backward,
    )
)
differentiable("compact", _backward, _setup)
