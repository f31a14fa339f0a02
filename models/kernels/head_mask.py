"""Outputs of attention's heads times a mask of heads; see reference_attention.head_mask.

Static masks fold into the output projection, which costs nothing per token: this is for masks of
each row, and for projections that take no gradient.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from models.kernels import dispatch, library
from models.kernels import reference_attention as reference
from models.kernels.ops import define, differentiable, once_differentiable

__all__ = ["head_mask", "launch", "launch_backward"]

MOST_DEPTH = 256  # HEAD_THREADS in csrc/head_mask.cuh: elements of a head, one a thread at worst


def head_mask(context: Tensor, mask: Tensor) -> Tensor:
    """`reference_attention.head_mask` by whichever implementation is picked (dispatch.py).

    Raises:
        ValueError: shapes that do not belong together.
        RuntimeError: when the kernel was asked for explicitly and cannot run.
    """
    _check(context, mask)
    backend = dispatch.pick("head_mask", context.device.type, _unsupported(context, mask))
    kernel = torch.ops.espalier.head_mask
    return dispatch.call(backend, reference.head_mask, kernel, context, mask)


def _unsupported(context: Tensor, mask: Tensor) -> str | None:
    for tensor in (context, mask):
        if tensor.dtype not in library.TYPES:
            return f"the kernel takes no {tensor.dtype}"
    depth = context.shape[-1] // (1 if context.dim() == 4 else max(1, mask.shape[-1]))
    return None if depth <= MOST_DEPTH else f"the kernel takes heads of up to {MOST_DEPTH}"


def _check(context: Tensor, mask: Tensor) -> None:
    if context.dim() not in (3, 4) or mask.dim() not in (1, 2):
        raise ValueError(
            "head_mask takes a context (B, H, N, d) or (B, N, H d) and a mask (H,) or (B, H), not "
            f"{tuple(context.shape)} and {tuple(mask.shape)}"
        )
    heads = mask.shape[-1]
    fits = (
        context.shape[1] == heads if context.dim() == 4 else heads and not context.shape[2] % heads
    )
    if not fits or (mask.dim() == 2 and mask.shape[0] != context.shape[0]):
        raise ValueError(
            f"head_mask: a mask {tuple(mask.shape)} does not fit a context {tuple(context.shape)}"
        )


def _by_head(x: Tensor, mask: Tensor) -> Tensor:
    """x as (B, H, N, d) with unit stride in d; a copy only where it has another."""
    if x.dim() == 3:
        x = x.unflatten(-1, (mask.shape[-1], -1)).transpose(1, 2)
    return x if x.shape[-1] <= 1 or x.stride(-1) == 1 else x.contiguous()


def _output(x: Tensor) -> Tensor:
    """Memory laid out as x where x is dense and its last dimension has unit stride."""
    if x.shape[-1] > 1 and x.stride(-1) != 1:
        return torch.empty(x.shape, dtype=x.dtype, device=x.device)
    return torch.empty_like(x)


def _mask_strides(mask: Tensor) -> tuple[int, int]:
    return (0, mask.stride(0)) if mask.dim() == 1 else (mask.stride(0), mask.stride(1))


def launch(context: Tensor, mask: Tensor) -> Tensor:
    """The forward kernel."""
    _check(context, mask)
    y = _output(context)
    source, target = _by_head(context, mask), _by_head(y, mask)
    strides = (*source.stride()[:3], *target.stride()[:3], *_mask_strides(mask))
    types = (library.type_code(context.dtype), library.type_code(mask.dtype))
    library.current().launch(
        "espalier_head_mask", source, mask, target, *source.shape, *strides, *types
    )
    return y


def launch_backward(gradient: Tensor, context: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """The backward kernels: gradients by context and mask."""
    _check(context, mask)
    down = _output(context)
    dmask = torch.empty(mask.shape, dtype=mask.dtype, device=mask.device)
    up = _by_head(gradient.to(context.dtype), mask)
    source, target = _by_head(context, mask), _by_head(down, mask)
    kernels = library.current()
    floats = kernels.query("espalier_head_mask_backward_workspace", *source.shape[:3])
    workspace = torch.empty(floats, dtype=torch.float32, device=context.device)
    strides = [stride for x in (up, source, target) for stride in x.stride()[:3]]
    types = (library.type_code(context.dtype), library.type_code(mask.dtype))
    kernels.launch(
        "espalier_head_mask_backward",
        *(up, source, mask, target, dmask, workspace, floats, *source.shape),
        *(*strides, *_mask_strides(mask), *types, int(mask.dim() == 2)),
    )
    return down, dmask


def _cpu(context: Tensor, mask: Tensor) -> Tensor:
    _check(context, mask)
    return _output(context).copy_(reference.head_mask(context, mask))


def _cpu_backward(gradient: Tensor, context: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    down, dmask = reference.head_mask_backward(gradient, context, mask)
    return _output(context).copy_(down), dmask


def _fake_backward(gradient: Tensor, context: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    return _output(context), torch.empty(mask.shape, dtype=mask.dtype, device=mask.device)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
    down, dmask = torch.ops.espalier.head_mask_backward(gradient, *ctx.saved_tensors)
    by_context, by_mask = ctx.needs_input_grad
    return down if by_context else None, dmask if by_mask else None


define(
    "head_mask(Tensor context, Tensor mask) -> Tensor",
    cpu=_cpu,
    cuda=launch,
    fake=lambda context, mask: _output(context),
)
once_differentiable(
    define(
        "head_mask_backward(Tensor gradient, Tensor context, Tensor mask) -> (Tensor, Tensor)",
        cpu=_cpu_backward,
        cuda=launch_backward,
        fake=_fake_backward,
    )
)
differentiable("head_mask", _backward, _setup)
