"""Attention distances by algebra: no map is formed, and none is streamed over either.

`scores_mse`: mean squared error of the scores before the softmax, by Gram matrices, O(N d^2).
`kl_by_attention`: KL of the maps, its gradient by the attention kernels that every device has.
Shape legend: B rows, H heads, Nq queries, Nk keys, d head size. The teacher gets no gradient.
"""

from __future__ import annotations

from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from models.outputs import AttentionTrace
from train.losses.attention import check_maps, log_normalisers, visible_keys, widen

__all__ = ["kl_by_attention", "scores_mse", "scores_mse_reference"]


def _key_mask(student: AttentionTrace, teacher: AttentionTrace) -> Tensor | None:
    """(B, Nk) keys that count: what either mask hides is compared nowhere."""
    if student.causal or teacher.causal:
        raise ValueError(
            "scores of causal attention cannot be compared by Gram matrices, which know whole keys "
            "only: use kd.attention=probabilities or kl for decoders"
        )
    if student.key_mask is None or teacher.key_mask is None:
        return student.key_mask if teacher.key_mask is None else teacher.key_mask
    return student.key_mask & teacher.key_mask


def _pairs(student: AttentionTrace, mask: Tensor | None) -> Tensor | float:
    """Number of (head, query, visible key) triples of each row: (B,), or one for all."""
    _, heads, queries, _ = student.q.shape
    if mask is None:
        return float(heads * queries * student.k.shape[2])
    return mask.sum(dim=1).clamp(min=1) * (heads * queries)


def scores_mse_reference(student: AttentionTrace, teacher: AttentionTrace) -> Tensor:
    """What `scores_mse` computes, with whole score matrices."""
    check_maps(student, teacher)
    mask = _key_mask(student, teacher)
    ours = widen(student.q) * student.scale @ widen(student.k).transpose(-1, -2)
    theirs = widen(teacher.q) * teacher.scale @ widen(teacher.k).transpose(-1, -2)
    gap = (ours - theirs.detach()).square()
    if mask is not None:
        gap = gap * mask[:, None, None, :]
    return (gap.sum(dim=(1, 2, 3)) / _pairs(student, mask)).mean()


def scores_mse(student: AttentionTrace, teacher: AttentionTrace) -> Tensor:
    """Mean over heads, queries and visible keys of (s_student - s_teacher)^2, s = scale q k^T,
    exactly; then the mean over rows, each of which weighs the same however many keys it sees (so a
    batch that is split over ranks has the same loss).

    The matrix of differences is a product of tall matrices,
        D = [Qs - Qt, Qt] [Ks, Ks - Kt]^T   (the scale is in the Q),
    and its squared norm the inner product of their Gram matrices, (2d x 2d) each:
        ||D||^2 = <L^T L, R^T R>.
    The difference form keeps its precision as the student approaches the teacher. Hidden keys drop
    out as zero rows of R. Head sizes may differ; then D = [Qs, -Qt] [Ks, Kt]^T.

    Raises:
        ValueError: heads, queries or keys differ, or the attention is causal.
    """
    check_maps(student, teacher)
    mask = _key_mask(student, teacher)
    with torch.autocast(student.q.device.type, enabled=False):
        q, k = widen(student.q) * student.scale, widen(student.k)
        other_q = widen(teacher.q).detach() * teacher.scale
        other_k = widen(teacher.k).detach()
        if q.shape[-1] == other_q.shape[-1]:
            left = torch.cat([q - other_q, other_q], dim=-1)
            right = torch.cat([k, k - other_k], dim=-1)
        else:
            left = torch.cat([q, -other_q], dim=-1)
            right = torch.cat([k, other_k], dim=-1)
        if mask is not None:
            right = right * mask[:, None, :, None]
        total = (left.transpose(-1, -2) @ left) * (right.transpose(-1, -2) @ right)
    return (total.sum(dim=(1, 2, 3)) / _pairs(student, mask)).mean()


def _attend(q: Tensor, k: Tensor, v: Tensor, trace: AttentionTrace) -> Tensor:
    """softmax(scale q k^T) v by the device's attention; rows that see no key are zero."""
    whole = slice(0, q.shape[0]), slice(0, q.shape[2])
    visible = None
    if trace.key_mask is not None:
        visible = visible_keys(trace, *whole)
    mixed = F.scaled_dot_product_attention(
        q, k, v, attn_mask=visible, scale=trace.scale,
        is_causal=trace.causal and visible is None,
    )  # fmt: skip
    if visible is None:
        return mixed
    return torch.where(visible.any(dim=-1, keepdim=True), mixed, mixed.new_zeros(()))


class _KlByAttention(torch.autograd.Function):
    """Value from row normalisers, gradient from attention outputs and their gradient in V.

    With T and P the maps of teacher and student, one row of KL(T || P) is
        scale_t q_t . (T K_t)  -  scale_s q_s . (T K_s)  +  lse_s  -  lse_t,
    so dq_s = scale_s (P K_s - T K_s), and dk_s = scale_s (P^T Q_s - T^T Q_s): attention with K as
    values, and the gradient of attention in its values.
    """

    @staticmethod
    def forward(ctx, q: Tensor, k: Tensor, student: AttentionTrace, teacher: AttentionTrace):
        with torch.autocast(q.device.type, enabled=False):
            ours, lse_s = _attend(q, k, k, student), log_normalisers(student)
            theirs, lse_t = (
                _attend(teacher.q, teacher.k, teacher.k, teacher),
                log_normalisers(teacher),
            )
            # The teacher's map over the student's keys: head sizes may differ, so K is the value.
            crossed = _attend(teacher.q, teacher.k, k, teacher)
            row = teacher.scale * (teacher.q * theirs).sum(-1)
            row = row - student.scale * (q * crossed).sum(-1)
            seen = torch.isfinite(lse_s) & torch.isfinite(lse_t)
            loss = torch.where(seen, row + lse_s - lse_t, row.new_zeros(())).mean()
        ctx.save_for_backward(q, k, ours, crossed)
        ctx.traces = student, teacher
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx, *grads: Tensor):
        q, k, ours, crossed = ctx.saved_tensors
        student, teacher = ctx.traces
        factor = grads[0] * student.scale / (q.shape[0] * q.shape[1] * q.shape[2])
        with torch.autocast(q.device.type, enabled=False):
            dq = factor * (ours - crossed)
            dk = factor * (
                _value_gradient(q, k, student, q)
                - _value_gradient(teacher.q, teacher.k, teacher, q)
            )
        return dq, dk, None, None


def _value_gradient(q: Tensor, k: Tensor, trace: AttentionTrace, grad: Tensor) -> Tensor:
    """P^T grad: the gradient of attention in its values, (B, H, Nk, size of grad)."""
    with torch.enable_grad():
        values = torch.zeros(*k.shape[:3], grad.shape[-1], dtype=k.dtype, device=k.device)
        values.requires_grad_(True)
        mixed = _attend(q.detach(), k.detach(), values, trace)
        return torch.autograd.grad(mixed, values, grad)[0]


def kl_by_attention(student: AttentionTrace, teacher: AttentionTrace) -> Tensor:
    """`attention.attention_kl` with attention kernels instead of streamed score tiles.

    Half inputs are attended to in float32: late in training, when the maps nearly agree, value and
    gradient are small differences of large numbers. At a perturbation of 0.01 the value's relative
    error is 2e-4 in float32 and the gradient's 4e-5; with attention in bfloat16 the gradient's would
    be 0.3 (0.002 from streamed tiles; measured).

    Raises:
        ValueError: the maps have different shapes.
    """
    check_maps(student, teacher)
    student, teacher = (replace(t, q=widen(t.q), k=widen(t.k)) for t in (student, teacher))
    detached = [replace(t, q=t.q.detach(), k=t.k.detach()) for t in (student, teacher)]
    loss = _KlByAttention.apply(student.q, student.k, *detached)
    assert isinstance(loss, Tensor)
    return loss
