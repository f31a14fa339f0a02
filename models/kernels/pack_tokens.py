"""Kept tokens of all rows moved together, and back; see reference_attention.pack_tokens.

Nothing waits for the device: outputs have room for all tokens, or for as many as the caller knows to
be kept. Each op is the other's gradient, any number of times.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from models.kernels import dispatch, library
from models.kernels import reference_attention as reference
from models.kernels.ops import define, differentiable

__all__ = ["launch", "launch_unpack", "pack_tokens", "unpack_tokens"]

_BYTES = (1, 2, 4, 8)  # elements are moved whatever their type is


def pack_tokens(x: Tensor, keep: Tensor, count: int | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """`reference_attention.pack_tokens` by whichever implementation is picked (dispatch.py).

    Raises:
        ValueError: shapes that do not belong together, or a keep that is not bool.
        RuntimeError: when the kernel was asked for explicitly and cannot run.
    """
    _check_pack(x, keep, count)
    backend = dispatch.pick("pack_tokens", x.device.type, _unsupported(x))
    kernel = torch.ops.espalier.pack_tokens
    return dispatch.call(backend, reference.pack_tokens, kernel, x, keep, count)


def unpack_tokens(packed: Tensor, keep: Tensor) -> Tensor:
    """`reference_attention.unpack_tokens`, picked and refused as `pack_tokens` is."""
    _check_unpack(packed, keep)
    backend = dispatch.pick("pack_tokens", packed.device.type, _unsupported(packed))
    kernel = torch.ops.espalier.unpack_tokens
    return dispatch.call(backend, reference.unpack_tokens, kernel, packed, keep)


def _unsupported(x: Tensor) -> str | None:
    size = x.element_size()
    return None if size in _BYTES else f"the kernel moves no elements of {size} bytes"


def _check_keep(keep: Tensor) -> None:
    if keep.dim() != 2 or keep.dtype != torch.bool:
        raise ValueError(f"keep must be bool (B, N), not {keep.dtype} {tuple(keep.shape)}")


def _check_pack(x: Tensor, keep: Tensor, count: int | None) -> None:
    _check_keep(keep)
    if count is not None and not 0 <= count <= keep.numel():
        raise ValueError(f"pack_tokens: count {count} is not among 0 to {keep.numel()} tokens")
    if x.dim() != 3 or x.shape[:2] != keep.shape:
        raise ValueError(f"pack_tokens: x {tuple(x.shape)} must be {tuple(keep.shape)} and a width")


def _check_unpack(packed: Tensor, keep: Tensor) -> None:
    _check_keep(keep)
    if packed.dim() != 2 or packed.shape[0] > keep.numel():
        raise ValueError(
            f"unpack_tokens: packed {tuple(packed.shape)} must be (M, D) with M at most "
            f"{keep.numel()}, the number of tokens"
        )


def _row_major(x: Tensor) -> Tensor:
    return x if x.shape[-1] <= 1 or x.stride(-1) == 1 else x.contiguous()


def _pack_outputs(
    x: Tensor, keep: Tensor, count: int | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    tokens = keep.shape[0] * keep.shape[1]
    count = tokens if count is None else count
    # Without tokens no kernel runs, and every row begins at 0.
    make = torch.empty if tokens else torch.zeros
    return (
        torch.empty((count, x.shape[2]), dtype=x.dtype, device=x.device),
        make(keep.shape[0] + 1, dtype=torch.int32, device=x.device),
        torch.empty(count, dtype=torch.int64, device=x.device),
    )


def launch(x: Tensor, keep: Tensor, count: int | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """The kernel of `pack_tokens`."""
    _check_pack(x, keep, count)
    packed, cumulative, indices = _pack_outputs(x, keep, count)
    x, keep = _row_major(x), keep.contiguous()
    sizes = (*x.shape, len(packed), *x.stride()[:2], x.element_size())
    library.current().launch("espalier_pack_tokens", x, keep, packed, cumulative, indices, *sizes)
    return packed, cumulative, indices


def launch_unpack(packed: Tensor, keep: Tensor) -> Tensor:
    """The kernel of `unpack_tokens`."""
    _check_unpack(packed, keep)
    out = _unpack_output(packed, keep)
    packed, keep = _row_major(packed), keep.contiguous()
    rows, width = packed.shape
    sizes = (*keep.shape, width, rows, packed.stride(0), packed.element_size())
    library.current().launch("espalier_unpack_tokens", packed, keep, out, *sizes)
    return out


def _unpack_output(packed: Tensor, keep: Tensor) -> Tensor:
    shape = (*keep.shape, packed.shape[1])
    return torch.empty(shape, dtype=packed.dtype, device=packed.device)


def _setup_pack(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.save_for_backward(inputs[1])
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)


def _pack_backward(ctx: Any, gradient: Tensor | None, *_: Any) -> tuple[Tensor | None, None, None]:
    (keep,) = ctx.saved_tensors
    dx = None if gradient is None else torch.ops.espalier.unpack_tokens(gradient, keep)
    return dx, None, None


def _setup_unpack(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(inputs[1])
    ctx.rows = inputs[0].shape[0]


def _unpack_backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
    (keep,) = ctx.saved_tensors
    return torch.ops.espalier.pack_tokens(gradient, keep, ctx.rows)[0], None


def _cpu_pack(x: Tensor, keep: Tensor, count: int | None = None) -> tuple[Tensor, Tensor, Tensor]:
    _check_pack(x, keep, count)
    return reference.pack_tokens(x, keep, count)


def _cpu_unpack(packed: Tensor, keep: Tensor) -> Tensor:
    _check_unpack(packed, keep)
    return reference.unpack_tokens(packed, keep)


define(
    "pack_tokens(Tensor x, Tensor keep, SymInt? count=None) -> (Tensor, Tensor, Tensor)",
    cpu=_cpu_pack,
    cuda=launch,
    fake=_pack_outputs,
)
define(
    "unpack_tokens(Tensor packed, Tensor keep) -> Tensor",
    cpu=_cpu_unpack,
    cuda=launch_unpack,
    fake=_unpack_output,
)
differentiable("pack_tokens", _pack_backward, _setup_pack)
differentiable("unpack_tokens", _unpack_backward, _setup_unpack)
