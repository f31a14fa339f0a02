"""Samples and expected size of all gates in one launch; see reference_gates.hard_concrete."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from models.kernels import dispatch, library
from models.kernels import reference_gates as reference
from models.kernels.ops import define, differentiable, once_differentiable

__all__ = ["advance", "backend", "hard_concrete", "launch", "launch_backward"]


def backend(log_alpha: Tensor) -> str:
    """What `hard_concrete` would run for these gates."""
    wrong = log_alpha.dtype != torch.float32
    reason = f"the kernel takes no {log_alpha.dtype}" if wrong else None
    return dispatch.pick("hard_concrete", log_alpha.device.type, reason)


def hard_concrete(
    log_alpha: Tensor,
    costs: Tensor,
    *,
    uniforms: Tensor | None = None,
    state: Tensor | None = None,
    seed: int = 0,
    offset: int = 0,
) -> tuple[Tensor, Tensor]:
    """`reference_gates.hard_concrete` by whichever implementation is picked (dispatch.py).

    Raises:
        ValueError: for shapes or types that do not belong together.
        RuntimeError: when the kernel was asked for explicitly and cannot run.
    """
    return dispatch.call(
        backend(log_alpha),
        reference.hard_concrete,
        torch.ops.espalier.hard_concrete,
        *(log_alpha, costs, uniforms, state, seed, offset),
    )


def advance(state: Tensor, gates: int) -> None:
    """Moves a device-side (seed, offset) past one draw of G gates, in place.

    Captured in a CUDA graph behind the draw, it gives every replay noise of its own.
    """
    state[1].add_(-(-gates // 4))


def _check(log_alpha: Tensor, costs: Tensor, uniforms: Tensor | None, state: Tensor | None) -> None:
    gates = log_alpha.shape
    if log_alpha.dim() != 1:
        raise ValueError(f"hard_concrete: log_alpha must be (G,), not {tuple(gates)}")
    for name, tensor in (("costs", costs), ("uniforms", uniforms)):
        if tensor is not None and (tensor.shape != gates or tensor.dtype != torch.float64):
            raise ValueError(
                f"hard_concrete: {name} must be {tuple(gates)} of float64, not "
                f"{tuple(tensor.shape)} of {tensor.dtype}"
            )
    if state is not None and (state.shape != (2,) or state.dtype != torch.int64):
        raise ValueError("hard_concrete: state must be (2,) of int64: seed and offset")


def launch(
    log_alpha: Tensor,
    costs: Tensor,
    uniforms: Tensor | None,
    state: Tensor | None,
    seed: int,
    offset: int,
) -> tuple[Tensor, Tensor]:
    """The forward kernels: z (G,) and the expected size ()."""
    _check(log_alpha, costs, uniforms, state)
    if log_alpha.dtype != torch.float32:
        raise TypeError(f"hard_concrete: the kernel takes float32, not {log_alpha.dtype}")
    gates = log_alpha.numel()
    kernels = library.current()
    size_bytes = kernels.query("espalier_hard_concrete_workspace", gates)
    workspace = torch.empty(size_bytes, dtype=torch.uint8, device=log_alpha.device)
    z, size = _fake(log_alpha, costs)
    uniforms = None if uniforms is None else uniforms.contiguous()
    kernels.launch(
        "espalier_hard_concrete",
        *(log_alpha.contiguous(), costs.contiguous(), uniforms, state, z, size),
        *(workspace, size_bytes, gates, seed, offset),
    )
    return z, size


def launch_backward(
    dz: Tensor | None, dsize: Tensor | None, z: Tensor, log_alpha: Tensor, costs: Tensor
) -> Tensor:
    """The backward kernel: gradient by log_alpha, (G,)."""
    out = torch.empty(log_alpha.shape, dtype=log_alpha.dtype, device=log_alpha.device)
    dz = None if dz is None else dz.to(torch.float32).contiguous()
    dsize = None if dsize is None else dsize.to(torch.float64)
    library.current().launch(
        "espalier_hard_concrete_backward",
        *(dz, dsize, z, log_alpha.contiguous(), costs.contiguous(), out, log_alpha.numel()),
    )
    return out


def _cpu(
    log_alpha: Tensor,
    costs: Tensor,
    uniforms: Tensor | None,
    state: Tensor | None,
    seed: int,
    offset: int,
) -> tuple[Tensor, Tensor]:
    _check(log_alpha, costs, uniforms, state)
    return reference.hard_concrete(log_alpha, costs, uniforms, state, seed, offset)


def _fake(log_alpha: Tensor, costs: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    z = torch.empty(log_alpha.shape, dtype=log_alpha.dtype, device=log_alpha.device)
    return z, torch.empty((), dtype=torch.float64, device=log_alpha.device)


def _fake_backward(
    dz: Tensor | None, dsize: Tensor | None, z: Tensor, log_alpha: Tensor, costs: Tensor
) -> Tensor:
    return torch.empty(log_alpha.shape, dtype=log_alpha.dtype, device=log_alpha.device)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(output[0], *inputs[:2])


def _backward(ctx: Any, dz: Tensor | None, dsize: Tensor | None) -> tuple[Tensor | None, ...]:
    gradient = None
    if dz is not None or dsize is not None:
        gradient = torch.ops.espalier.hard_concrete_backward(dz, dsize, *ctx.saved_tensors)
    return gradient, None, None, None, None, None


define(
    "hard_concrete(Tensor log_alpha, Tensor costs, Tensor? uniforms, Tensor? state, int seed, "
    "int offset) -> (Tensor, Tensor)",
    cpu=_cpu,
    cuda=launch,
    fake=_fake,
)
once_differentiable(
    define(
        "hard_concrete_backward(Tensor? dz, Tensor? dsize, Tensor z, Tensor log_alpha, "
        "Tensor costs) -> Tensor",
        cpu=reference.hard_concrete_backward,
        cuda=launch_backward,
        fake=_fake_backward,
    )
)
differentiable("hard_concrete", _backward, _setup)
