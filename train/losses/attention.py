"""Attention distillation: distances of attention maps, computed from traces; maps are never stored.

On a GPU by the kernel attention_kd, which forms tiles of the maps and keeps none (docs/kernels.md);
elsewhere, and for what it does not take, in chunks.

Shape legend: B rows, H heads, Nq queries, Nk keys, d head size. The teacher gets no gradient.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from models.kernels import attention_kd, dispatch, reference_attention
from models.outputs import AttentionTrace

__all__ = [
    "attention_kl",
    "attention_kl_reference",
    "attention_mse",
    "attention_mse_reference",
    "attention_probabilities",
    "check_maps",
    "kernel_backend",
    "log_normalisers",
    "on_gpu",
    "planned_on_gpu",
    "probabilities_mse",
    "visible_keys",
    "widen",
]

Kind = Literal["mse", "kl"]
_KERNEL_KINDS: dict[Kind, str] = {"mse": "probabilities", "kl": "kl"}
# Finite stand-in for minus infinity: a row without any visible key must not become NaN.
_HIDDEN = -1e30
# Elements of one chunk of an attention map: cache-sized on a CPU, large enough to fill a GPU.
_CHUNK_CPU, _CHUNK_GPU = 1 << 17, 1 << 25
# Backend of attention_kd that a plan assumes; None: tensors are what they are.
_planned: str | None = None


@contextmanager
def planned_on_gpu(kernels: str) -> Iterator[None]:
    """For plans: tensors stand for a GPU's, where the kernel attention_kd is there.

    Without data only what is kept and allocated counts, so a plan runs anywhere.

    Args:
        kernels: as `engine.kernels`; ESPALIER_KERNELS comes before it.
    """
    global _planned
    before = _planned
    asked = dispatch.parse(os.environ.get(dispatch.ENVIRONMENT) or kernels)["attention_kd"]
    _planned = "cuda" if asked == "auto" else asked
    try:
        yield
    finally:
        _planned = before


def on_gpu(x: Tensor) -> bool:
    """Whether x is on a GPU, or stands for a tensor there (`planned_on_gpu`)."""
    return x.is_cuda or _planned is not None


def widen(x: Tensor) -> Tensor:
    """float32, or float64 kept."""
    return x if x.dtype == torch.float64 else x.float()


def visible_keys(trace: AttentionTrace, rows: slice, queries: slice) -> Tensor | None:
    """(b, 1, nq or 1, Nk) bool of visible keys, or None when all are."""
    mask = None if trace.key_mask is None else trace.key_mask[rows, None, None, :]
    if trace.causal:
        position = torch.arange(queries.start, queries.stop, device=trace.q.device)
        causal = (
            torch.arange(trace.k.shape[2], device=trace.q.device)[None, :] <= position[:, None]
        )[None, None]
        mask = causal if mask is None else mask & causal
    return mask


def _log_softmax(
    trace: AttentionTrace, rows: slice, queries: slice
) -> tuple[Tensor, Tensor | None]:
    """Log-probabilities (b, H, nq, Nk) of a chunk (meaningless on hidden keys), visible keys."""
    q = widen(trace.q[rows, :, queries]) * trace.scale
    scores = q @ widen(trace.k[rows]).transpose(-1, -2)
    visible = visible_keys(trace, rows, queries)
    if visible is not None:
        scores = scores.masked_fill(~visible, _HIDDEN)
    return scores.log_softmax(dim=-1), visible


def _probabilities(trace: AttentionTrace, rows: slice, queries: slice) -> Tensor:
    log_p, visible = _log_softmax(trace, rows, queries)
    p = log_p.exp()
    return p if visible is None else p * visible


def attention_probabilities(trace: AttentionTrace) -> Tensor:
    """The whole map softmax(scale q k^T), (B, H, Nq, Nk): the definition, for tests and pictures.

    Hidden keys have probability 0; a query that sees no key has a row of zeros.
    """
    return _probabilities(trace, slice(0, trace.q.shape[0]), slice(0, trace.q.shape[2]))


def probabilities_mse(student: Tensor, teacher: Tensor) -> Tensor:
    """Number of keys * mean squared error of maps (B, H, Nq, Nk): the published loss on maps."""
    return student.shape[-1] * F.mse_loss(widen(student), widen(teacher.detach()))


def attention_mse_reference(student: AttentionTrace, teacher: AttentionTrace) -> Tensor:
    """What `attention_mse` computes, with whole maps and plain autograd."""
    check_maps(student, teacher)
    return probabilities_mse(
        attention_probabilities(student), attention_probabilities(teacher).detach()
    )


def attention_kl_reference(student: AttentionTrace, teacher: AttentionTrace) -> Tensor:
    """What `attention_kl` computes, with whole maps and plain autograd."""
    check_maps(student, teacher)
    rows, queries = slice(0, student.q.shape[0]), slice(0, student.q.shape[2])
    log_p, _ = _log_softmax(student, rows, queries)
    log_t, visible = _log_softmax(teacher, rows, queries)
    t = log_t.exp() if visible is None else log_t.exp() * visible
    return (t.detach() * (log_t.detach() - log_p)).sum(dim=-1).mean()


def check_maps(student: AttentionTrace, teacher: AttentionTrace) -> None:
    """Raises ValueError when the two maps have different shapes."""
    ours = (*student.q.shape[:3], student.k.shape[2])
    theirs = (*teacher.q.shape[:3], teacher.k.shape[2])
    if ours != theirs:
        raise ValueError(
            f"attention of the student is {ours} (rows, heads, queries, keys), "
            f"of the teacher {theirs}: maps are compared head by head, so heads must be gated, "
            "not cut, while attention is distilled "
            "(or set kd.attention to none)"
        )


def _chunks(trace: AttentionTrace, chunk: int | None) -> Iterator[tuple[slice, slice]]:
    """(rows, queries) slices that cover the map with at most about `chunk` elements each."""
    rows, heads, queries, _ = trace.q.shape
    budget = chunk or (_CHUNK_GPU if on_gpu(trace.q) else _CHUNK_CPU)
    per_query = heads * trace.k.shape[2]
    row_step = max(1, budget // max(1, per_query * queries))
    query_step = queries if row_step > 1 else min(queries, max(1, budget // per_query))
    for row in range(0, rows, row_step):
        for query in range(0, queries, query_step):
            yield (
                slice(row, min(rows, row + row_step)),
                slice(query, min(queries, query + query_step)),
            )


def _chunk_loss(
    kind: Kind,
    student: AttentionTrace,
    teacher: AttentionTrace,
    rows: slice,
    queries: slice,
    want_grad: bool,
) -> tuple[Tensor, Tensor | None]:
    """Sum of the loss over one chunk, and its gradient with respect to the student's scaled scores.

    mse: l = sum (P - T)^2,          dl/dS = P * (G - sum_k P G), G = 2 (P - T)
    kl:  l = sum T (log T - log P),  dl/dS = P * sum_k T - T  (T's rows sum to 1, or to 0 without a
        visible key)
    Hidden keys have P = T = 0 and so no gradient.
    """
    log_t, seen = _log_softmax(teacher, rows, queries)
    t = log_t.exp() if seen is None else log_t.exp() * seen
    log_p, visible = _log_softmax(student, rows, queries)
    if kind == "kl":
        loss = (t * (log_t - log_p)).sum()
        if not want_grad:
            return loss, None
        p = log_p.exp() if visible is None else log_p.exp() * visible
        grad = p * t.sum(dim=-1, keepdim=True) - t
        return loss, grad if visible is None else grad * visible
    p = log_p.exp() if visible is None else log_p.exp() * visible
    gap = p - t
    loss = gap.square().sum()
    if not want_grad:
        return loss, None
    weighted = gap * p
    return loss, (weighted - p * weighted.sum(dim=-1, keepdim=True)).mul_(2)


class _AttentionDistance(torch.autograd.Function):
    """Streams over chunks of the maps; keeps dq and dk (sizes of q and k), never a map.

    The loss is a scalar, so its gradient is known up to a factor as soon as the forward has a chunk
    in hand: taking it there saves the second pass over the scores, and the teacher's q and k need
    not live until the backward.
    """

    @staticmethod
    def forward(
        ctx,
        q: Tensor,
        k: Tensor,
        student: AttentionTrace,
        teacher: AttentionTrace,
        kind: Kind,
        chunk,
    ):
        want = ctx.needs_input_grad[0] or ctx.needs_input_grad[1]
        # fp32 also for fp16 inputs: the gradients are not yet multiplied by the loss scale and
        # would underflow.
        wide = torch.float64 if q.dtype == torch.float64 else torch.float32
        total = q.new_zeros((), dtype=wide)
        dq = torch.empty(q.shape, dtype=wide, device=q.device) if want else None
        dk = torch.zeros(k.shape, dtype=wide, device=k.device) if want else None
        rows_in_all = q.shape[0] * q.shape[1] * q.shape[2]
        with torch.autocast(q.device.type, enabled=False):
            for rows, queries in _chunks(student, chunk):
                loss, grad = _chunk_loss(kind, student, teacher, rows, queries, want)
                total += loss
                if dq is not None and dk is not None and grad is not None:
                    grad.mul_(student.scale / rows_in_all)
                    dq[rows, :, queries] = grad @ widen(k[rows])
                    dk[rows] += grad.transpose(-1, -2) @ widen(q[rows, :, queries])
        if dq is not None and dk is not None:
            # bf16 has the range of fp32, so it may be kept small.
            keep = torch.bfloat16 if q.dtype == torch.bfloat16 else wide
            ctx.save_for_backward(dq.to(keep), dk.to(keep))
            ctx.dtypes = (q.dtype, k.dtype)
        return total / rows_in_all

    @staticmethod
    @once_differentiable
    def backward(ctx, *grads: Tensor):
        dq, dk = ctx.saved_tensors
        return (
            (dq * grads[0]).to(ctx.dtypes[0]),
            (dk * grads[0]).to(ctx.dtypes[1]),
            None,
            None,
            None,
            None,
        )


def _detached(trace: AttentionTrace) -> AttentionTrace:
    return AttentionTrace(
        trace.q.detach(), trace.k.detach(), trace.scale, trace.key_mask, trace.causal
    )


def kernel_backend(student: AttentionTrace, teacher: AttentionTrace) -> str:
    """ "cuda" where the kernel attention_kd takes these maps, "compiled", or "reference".

    Raises RuntimeError when the kernel was asked for explicitly and cannot run.
    """
    unsupported = attention_kd.unsupported(student.q, teacher.q)
    if _planned is not None:
        return "reference" if _planned == "cuda" and unsupported else _planned
    return dispatch.pick("attention_kd", student.q.device.type, unsupported)


def _distance(
    student: AttentionTrace, teacher: AttentionTrace, kind: Kind, chunk: int | None
) -> Tensor:
    check_maps(student, teacher)
    backend = kernel_backend(student, teacher) if chunk is None else "reference"
    if backend != "reference":
        arguments = (student.q, student.k, teacher.q.detach(), teacher.k.detach())
        arguments += (student.key_mask, teacher.key_mask, None, student.scale, teacher.scale)
        arguments += (student.causal, teacher.causal, _KERNEL_KINDS[kind])
        whole, kernel = reference_attention.attention_kd, attention_kd.kernel
        if _planned == "compiled":
            return whole(*arguments)  # what torch.compile would save is not known
        return dispatch.call(backend, whole, kernel, *arguments)
    loss = _AttentionDistance.apply(
        student.q, student.k, _detached(student), _detached(teacher), kind, chunk
    )
    assert isinstance(loss, Tensor)
    return loss


@torch.no_grad()
def log_normalisers(trace: AttentionTrace, chunk: int | None = None) -> Tensor:
    """(B, H, Nq) log of the softmax's denominators, streamed; -inf where a query sees no key."""
    q, k = trace.q, trace.k
    wide = torch.float64 if q.dtype == torch.float64 else torch.float32
    result = torch.empty(q.shape[:3], dtype=wide, device=q.device)
    with torch.autocast(q.device.type, enabled=False):
        for rows, queries in _chunks(trace, chunk):
            scores = widen(q[rows, :, queries]) * trace.scale @ widen(k[rows]).transpose(-1, -2)
            visible = visible_keys(trace, rows, queries)
            if visible is not None:
                scores = scores.masked_fill(~visible, float("-inf"))
            result[rows, :, queries] = scores.logsumexp(dim=-1)
    return result


def attention_mse(
    student: AttentionTrace, teacher: AttentionTrace, chunk: int | None = None
) -> Tensor:
    """Number of keys * mean((P_student - P_teacher)^2) over (B, H, Nq, Nk), streamed.

    As published (section 3.2): heads are matched by index, padded queries count, hidden keys have
    probability 0.

    Args:
        student, teacher: traces with equal rows, heads, queries and keys; head sizes may differ.
        chunk: take the chunked way, with about so many elements of a map in memory at a time; None
            takes the kernel where it runs, else chunks by device.

    Raises:
        ValueError: the maps have different shapes.
    """
    return _distance(student, teacher, "mse", chunk)


def attention_kl(
    student: AttentionTrace, teacher: AttentionTrace, chunk: int | None = None
) -> Tensor:
    """Mean over queries (and heads, rows) of KL(P_teacher || P_student); as `attention_mse`."""
    return _distance(student, teacher, "kl", chunk)
