"""Distance of two attentions without their maps in memory; see reference_attention.attention_kd.

Memory beyond the inputs and their gradients: three floats a query. The backward forms the scores
anew, from q and k of both models, which autograd keeps. Student and teacher may have any two of
the types: products of 16-bit numbers go through tensor cores, sums are fp32 throughout.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from models.kernels import dispatch, library
from models.kernels import reference_attention as reference
from models.kernels.ops import define, differentiable, once_differentiable

__all__ = ["attention_kd", "launch", "launch_backward", "unsupported"]

MOST_DEPTH = 64  # TILE_DEPTH in csrc/tensor_core.cuh
_CODES = {name: code for code, name in enumerate(reference.KINDS)}


def attention_kd(
    q: Tensor,
    k: Tensor,
    teacher_q: Tensor,
    teacher_k: Tensor,
    mask: Tensor | None,
    teacher_mask: Tensor | None,
    weight: Tensor | None,
    scale: float,
    teacher_scale: float,
    causal: bool,
    teacher_causal: bool,
    kind: str,
) -> Tensor:
    """`reference_attention.attention_kd` by whichever implementation is picked (dispatch.py).

    Raises:
        ValueError: for an unknown kind, or shapes that do not belong together.
        RuntimeError: when the kernel was asked for explicitly and cannot run.
    """
    arguments = (q, k, teacher_q, teacher_k, mask, teacher_mask, weight, scale, teacher_scale)
    arguments += (causal, teacher_causal, kind)
    _check(*arguments)
    backend = dispatch.pick("attention_kd", q.device.type, unsupported(q, teacher_q))
    return dispatch.call(backend, reference.attention_kd, kernel, *arguments)


def kernel(*arguments: Any) -> Tensor:
    """The op itself, with the arguments of `attention_kd`."""
    loss, _ = torch.ops.espalier.attention_kd(*arguments)
    return loss


def unsupported(q: Tensor, teacher_q: Tensor) -> str | None:
    """Why the kernel does not take these queries, or None; keys have the same types and sizes."""
    for tensor in (q, teacher_q):
        if tensor.dtype not in library.TYPES:
            return f"the kernel takes no {tensor.dtype}"
        if not 1 <= tensor.shape[-1] <= MOST_DEPTH:
            return f"the kernel takes heads of up to {MOST_DEPTH}, not of {tensor.shape[-1]}"
    return None


def _check(
    q: Tensor,
    k: Tensor,
    teacher_q: Tensor,
    teacher_k: Tensor,
    mask: Tensor | None,
    teacher_mask: Tensor | None,
    weight: Tensor | None,
    scale: float,
    teacher_scale: float,
    causal: bool,
    teacher_causal: bool,
    kind: str,
) -> None:
    if kind not in _CODES:
        raise ValueError(f"attention_kd: kind {kind!r} is unknown; choose one of {reference.KINDS}")
    rows, heads, queries, keys = *q.shape[:3], k.shape[2]
    for who, a, b in (("student", q, k), ("teacher", teacher_q, teacher_k)):
        expected = (rows, heads, queries, a.shape[-1]), (rows, heads, keys, a.shape[-1])
        if (tuple(a.shape), tuple(b.shape)) != expected or a.dtype != b.dtype:
            raise ValueError(
                f"attention_kd: q and k of the {who} must be (B, H, Nq, d) and (B, H, Nk, d) with "
                f"B, H, Nq, Nk = {(rows, heads, queries, keys)} and of one type, not "
                f"{tuple(a.shape)} {a.dtype} and {tuple(b.shape)} {b.dtype}"
            )
    for name, seen in (("mask", mask), ("teacher_mask", teacher_mask)):
        if seen is not None and (seen.shape != (rows, keys) or seen.dtype != torch.bool):
            raise ValueError(
                f"attention_kd: {name} must be bool ({rows}, {keys}), "
                f"not {seen.dtype} {tuple(seen.shape)}"
            )
    if weight is not None and weight.shape not in ((heads,), (rows, heads)):
        raise ValueError(
            f"attention_kd: weight must be ({heads},) or ({rows}, {heads}), "
            f"not {tuple(weight.shape)}"
        )


def _row_major(x: Tensor | None) -> Tensor | None:
    """With unit stride in the last dimension; a copy only where it has another."""
    return x if x is None or x.shape[-1] <= 1 or x.stride(-1) == 1 else x.contiguous()


def _side(q: Tensor, k: Tensor, mask: Tensor | None, scale: float, causal: bool) -> tuple[Any, ...]:
    """The parameters KD_SIDE of csrc/attention_kd.cu; the tensors among them stay alive with it."""
    q, k, mask = (_row_major(x) for x in (q, k, mask))  # type: ignore[assignment]
    strides = (*q.stride()[:3], *k.stride()[:3], 0 if mask is None else mask.stride(0))
    code = library.type_code(q.dtype)
    return (q, k, mask, code, q.shape[-1], int(causal), *strides, float(scale))


def _problem(
    q: Tensor,
    k: Tensor,
    teacher_q: Tensor,
    teacher_k: Tensor,
    mask: Tensor | None,
    teacher_mask: Tensor | None,
    weight: Tensor | None,
    scale: float,
    teacher_scale: float,
    causal: bool,
    teacher_causal: bool,
    kind: str,
) -> tuple[Any, ...]:
    """The parameters KD_PROBLEM of csrc/attention_kd.cu."""
    student = _side(q, k, mask, scale, causal)
    teacher = _side(teacher_q, teacher_k, teacher_mask, teacher_scale, teacher_causal)
    strides = (0, 0)
    if weight is not None:
        weight = weight.detach().float().expand(q.shape[:2])
        strides = weight.stride()
    return (*student, *teacher, weight, *strides, *q.shape[:3], k.shape[2], _CODES[kind])


def _outputs(q: Tensor, kind: str) -> tuple[Tensor, Tensor]:
    wide = torch.float64 if q.dtype == torch.float64 else torch.float32
    loss = torch.empty((), dtype=wide, device=q.device)
    shape = (0 if kind == "scores" else 3, *q.shape[:3])
    return loss, torch.empty(shape, dtype=torch.float32, device=q.device)


def launch(*arguments: Any) -> tuple[Tensor, Tensor]:
    """The forward kernels: loss () and row statistics (`reference.attention_statistics`)."""
    _check(*arguments)
    q = arguments[0]
    loss, statistics = _outputs(q, arguments[-1])
    kernels = library.current()
    floats = kernels.query("espalier_attention_kd_workspace", *q.shape[:3])
    workspace = torch.empty(floats, dtype=torch.float32, device=q.device)
    problem = _problem(*arguments)
    kernels.launch("espalier_attention_kd", *problem, loss, statistics, workspace, floats)
    return loss, statistics


def _gradient_like(x: Tensor) -> Tensor:
    """Memory laid out as x where x is dense, so that its views get their gradient without a copy."""
    if x.shape[-1] > 1 and x.stride(-1) != 1:
        return torch.empty(x.shape, dtype=x.dtype, device=x.device)
    return torch.empty_like(x)


def launch_backward(gradient: Tensor, statistics: Tensor, *arguments: Any) -> tuple[Tensor, Tensor]:
    """The backward kernels: dq and dk; `arguments` as of `launch`."""
    _check(*arguments)
    q, k, *_ = arguments
    dq, dk = _gradient_like(q), _gradient_like(k)
    strides = (*dq.stride()[:3], *dk.stride()[:3])
    upstream = gradient.to(torch.float32)
    problem = _problem(*arguments)
    name = "espalier_attention_kd_backward"
    library.current().launch(name, *problem, statistics, upstream, dq, dk, *strides)
    return dq, dk


def _cpu(*arguments: Any) -> tuple[Tensor, Tensor]:
    _check(*arguments)
    statistics = reference.attention_statistics(*arguments[:6], *arguments[7:])
    return reference.attention_kd(*arguments), statistics


def _cpu_backward(gradient: Tensor, statistics: Tensor, *arguments: Any) -> tuple[Tensor, Tensor]:
    found = reference.attention_kd_backward(gradient, *arguments)
    like = (_gradient_like(x) for x in arguments[:2])
    dq, dk = (out.copy_(value) for out, value in zip(like, found, strict=True))
    return dq, dk


def _fake_backward(gradient: Tensor, statistics: Tensor, q: Tensor, k: Tensor, *_: Any) -> Any:
    return _gradient_like(q), _gradient_like(k)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.save_for_backward(output[1], *inputs[:7])
    ctx.options = inputs[7:]
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, gradient: Tensor | None, _: Any) -> tuple[Tensor | None, ...]:
    none = (None,) * 12
    if gradient is None:
        return none
    statistics, *tensors = ctx.saved_tensors
    dq, dk = torch.ops.espalier.attention_kd_backward(gradient, statistics, *tensors, *ctx.options)
    by_q, by_k, *_ = ctx.needs_input_grad
    return dq if by_q else None, dk if by_k else None, *none[2:]


_PROBLEM = (
    "Tensor q, Tensor k, Tensor teacher_q, Tensor teacher_k, Tensor? mask, Tensor? teacher_mask, "
    "Tensor? weight, float scale, float teacher_scale, bool causal, bool teacher_causal, str kind"
)
define(
    f"attention_kd({_PROBLEM}) -> (Tensor, Tensor)",
    cpu=_cpu,
    cuda=launch,
    fake=lambda *arguments: _outputs(arguments[0], arguments[-1]),
)
once_differentiable(
    define(
        f"attention_kd_backward(Tensor gradient, Tensor statistics, {_PROBLEM}) -> (Tensor, Tensor)",
        cpu=_cpu_backward,
        cuda=launch_backward,
        fake=_fake_backward,
    )
)
differentiable("attention_kd", _backward, _setup)
