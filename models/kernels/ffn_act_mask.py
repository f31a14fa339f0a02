"""Bias, activation and mask of a feed-forward layer in one pass; see reference.ffn_act_mask."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from models.kernels import dispatch, library, reference
from models.kernels.ops import define, differentiable, once_differentiable

__all__ = ["backend", "ffn_act_mask", "launch", "launch_backward"]

_CODES = {name: code for code, name in enumerate(reference.ACTIVATIONS)}


def ffn_act_mask(
    x: Tensor, bias: Tensor | None, mask: Tensor | None, activation: str, mask_first: bool
) -> Tensor:
    """`reference.ffn_act_mask` by whichever implementation is picked (dispatch.py).

    Raises:
        ValueError: for an unknown activation, or a bias or mask that is not (F,).
        RuntimeError: when the kernel was asked for explicitly and cannot run.
    """
    kernel = torch.ops.espalier.ffn_act_mask
    arguments = (x, bias, mask, activation, mask_first)
    return dispatch.call(backend(x, bias, mask), reference.ffn_act_mask, kernel, *arguments)


def backend(x: Tensor, bias: Tensor | None, mask: Tensor | None) -> str:
    """What `ffn_act_mask` would run for these tensors. Where it is "cuda", the product before it
    leaves its bias to it."""
    return dispatch.pick("ffn_act_mask", x.device.type, _unsupported(x, bias, mask))


def _unsupported(x: Tensor, bias: Tensor | None, mask: Tensor | None) -> str | None:
    for tensor in (x, bias, mask):
        if tensor is not None and tensor.dtype not in library.TYPES:
            return f"the kernel takes no {tensor.dtype}"
    return None


def _check(x: Tensor, bias: Tensor | None, mask: Tensor | None, activation: str) -> None:
    if activation not in _CODES:
        raise ValueError(f"activation {activation!r} is unknown; choose one of {sorted(_CODES)}")
    if x.dim() == 0:
        raise ValueError("ffn_act_mask takes (..., F), not a scalar")
    for name, vector in (("bias", bias), ("mask", mask)):
        if vector is not None and vector.shape != x.shape[-1:]:
            raise ValueError(
                f"ffn_act_mask: {name} must be ({x.shape[-1]},), not {tuple(vector.shape)}"
            )


def _rows(x: Tensor) -> tuple[Tensor, int, int]:
    """(..., F) as rows with unit stride between columns: the tensor, T, and the rows' stride.

    A copy only where no single stride leads from row to row.
    """
    columns = x.shape[-1]
    count = x.numel() // columns if columns else 0
    flat = x.reshape(count, columns)
    if columns > 1 and flat.stride(1) != 1:
        flat = flat.contiguous()
    # torch gives a single row any stride; only a true one says something about alignment.
    return flat, count, flat.stride(0) if count > 1 else columns


def _vector(vector: Tensor | None) -> tuple[Tensor | None, int]:
    """A contiguous bias or mask and its type code."""
    if vector is None:
        return None, 0
    return vector.contiguous(), library.type_code(vector.dtype)


def launch(
    x: Tensor, bias: Tensor | None, mask: Tensor | None, activation: str, mask_first: bool
) -> Tensor:
    """The forward kernel."""
    _check(x, bias, mask, activation)
    flat, rows, stride = _rows(x)
    bias, bias_type = _vector(bias)
    mask, mask_type = _vector(mask)
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    options = (_CODES[activation], int(mask_first))
    types = (library.type_code(x.dtype), bias_type, mask_type)
    library.current().launch(
        "espalier_ffn_act_mask", flat, bias, mask, y, rows, x.shape[-1], stride, *types, *options
    )
    return y


def launch_backward(
    gradient: Tensor,
    x: Tensor,
    bias: Tensor | None,
    mask: Tensor | None,
    activation: str,
    mask_first: bool,
    need_mask: bool,
    need_bias: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """The backward kernels: dx, dmask, dbias; empty (0,) where a sum is not wanted."""
    _check(x, bias, mask, activation)
    up, _, up_stride = _rows(gradient.to(x.dtype))
    flat, rows, stride = _rows(x)
    dx, dmask, dbias = _outputs(x, bias, mask, need_mask, need_bias)
    bias, bias_type = _vector(bias)
    mask, mask_type = _vector(mask)
    kernels = library.current()
    columns = x.shape[-1]
    size = kernels.query("espalier_ffn_act_mask_backward_workspace", rows, columns)
    workspace = torch.empty(size, dtype=torch.uint8, device=x.device)
    kernels.launch(
        "espalier_ffn_act_mask_backward",
        *(up, flat, bias, mask, dx),
        *(dmask if dmask.numel() else None, dbias if dbias.numel() else None, workspace, size),
        *(rows, columns, up_stride, stride),
        *(library.type_code(x.dtype), bias_type, mask_type, _CODES[activation], int(mask_first)),
    )
    return dx, dmask, dbias


def _outputs(
    x: Tensor, bias: Tensor | None, mask: Tensor | None, need_mask: bool, need_bias: bool
) -> tuple[Tensor, Tensor, Tensor]:
    dx = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    wanted = ((mask, need_mask), (bias, need_bias))
    dmask, dbias = (
        x.new_empty(0) if vector is None or not need else torch.empty_like(vector).contiguous()
        for vector, need in wanted
    )
    return dx, dmask, dbias


def _cpu(
    x: Tensor, bias: Tensor | None, mask: Tensor | None, activation: str, mask_first: bool
) -> Tensor:
    _check(x, bias, mask, activation)
    return reference.ffn_act_mask(x, bias, mask, activation, mask_first).contiguous()


def _cpu_backward(
    gradient: Tensor,
    x: Tensor,
    bias: Tensor | None,
    mask: Tensor | None,
    activation: str,
    mask_first: bool,
    need_mask: bool,
    need_bias: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    dx, dmask, dbias = reference.ffn_act_mask_backward(
        gradient, x, bias, mask, activation, mask_first
    )
    none = x.new_empty(0)
    return (
        dx.contiguous(),
        dmask if mask is not None and need_mask else none,
        dbias if bias is not None and need_bias else none,
    )


def _fake(x: Tensor, *_: Any) -> Tensor:
    return torch.empty(x.shape, dtype=x.dtype, device=x.device)


def _fake_backward(
    gradient: Tensor,
    x: Tensor,
    bias: Tensor | None,
    mask: Tensor | None,
    activation: str,
    mask_first: bool,
    need_mask: bool,
    need_bias: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    return _outputs(x, bias, mask, need_mask, need_bias)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, bias, mask, ctx.activation, ctx.mask_first = inputs
    ctx.save_for_backward(x, bias, mask)


def _backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
    x, bias, mask = ctx.saved_tensors
    _, by_bias, by_mask, *_ = ctx.needs_input_grad
    need_bias, need_mask = bias is not None and by_bias, mask is not None and by_mask
    dx, dmask, dbias = torch.ops.espalier.ffn_act_mask_backward(
        *(gradient, x, bias, mask, ctx.activation, ctx.mask_first, need_mask, need_bias)
    )
    return dx, dbias if need_bias else None, dmask if need_mask else None, None, None


define(
    "ffn_act_mask(Tensor x, Tensor? bias, Tensor? mask, str activation, bool mask_first) -> Tensor",
    cpu=_cpu,
    cuda=launch,
    fake=_fake,
)
once_differentiable(
    define(
        "ffn_act_mask_backward(Tensor gradient, Tensor x, Tensor? bias, Tensor? mask, "
        "str activation, bool mask_first, bool need_mask, bool need_bias) "
        "-> (Tensor, Tensor, Tensor)",
        cpu=_cpu_backward,
        cuda=launch_backward,
        fake=_fake_backward,
    )
)
differentiable("ffn_act_mask", _backward, _setup)
