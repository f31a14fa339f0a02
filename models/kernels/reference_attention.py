"""Plain torch definitions of the ops on attention and tokens: the specification of csrc/.

Differentiable, any floating type; each backward in closed form stands beside its forward. Shape
legend: B rows, H heads, Nq queries, Nk keys, N tokens, d head size, D width.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

__all__ = [
    "KINDS",
    "attention_kd",
    "attention_kd_backward",
    "attention_statistics",
    "head_mask",
    "head_mask_backward",
    "pack_tokens",
    "unpack_tokens",
]

# The order is that of enum KdKind in csrc/attention_kd.cuh.
KINDS = ("probabilities", "kl", "scores")


def _wide(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()


def _scores(q: Tensor, k: Tensor, scale: float) -> Tensor:
    with torch.autocast(q.device.type, enabled=False):
        return _wide(q) * scale @ _wide(k).transpose(-1, -2)


def _visible(q: Tensor, k: Tensor, mask: Tensor | None, causal: bool) -> Tensor:
    """(1 or B, 1, 1 or Nq, Nk) bool."""
    keys = torch.arange(k.shape[2], device=k.device)
    visible = torch.ones(1, 1, 1, k.shape[2], dtype=torch.bool, device=k.device)
    if mask is not None:
        visible = visible & mask[:, None, None, :]
    if causal:
        visible = visible & (keys <= torch.arange(q.shape[2], device=q.device)[:, None])
    return visible


def _log_probabilities(scores: Tensor, visible: Tensor) -> Tensor:
    """log softmax over the visible keys, -inf on the others; all -inf where a row sees no key."""
    scores = scores.masked_fill(~visible, -math.inf)
    # log_softmax of nothing but -inf is NaN, and its gradient too: such rows get other scores.
    empty = ~visible.any(dim=-1, keepdim=True)
    log_p = scores.masked_fill(empty, 0.0).log_softmax(dim=-1)
    return log_p.masked_fill(~visible, -math.inf)


def _weighted_mean(rows: Tensor, weight: Tensor | None) -> Tensor:
    """Mean of (B, H, Nq) times a weight of heads, (H,) or (B, H); 0 of nothing."""
    if weight is not None:
        rows = rows * weight.detach().to(rows.dtype)[..., None]
    return rows.sum() / max(1, rows.numel())


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
    """Distance of a student's attention from a teacher's, computed with whole maps.

    With S = scale q k^T, P its softmax over the visible keys (0 on hidden ones, and in rows that
    see none), T and Q those of the teacher, the loss of a row is
        "probabilities"  sum_j (P - Q)^2          (2210.07795, section 3.2: Nk times the mean)
        "kl"             sum_j Q (log Q - log P)  (infinite where the teacher alone sees a key)
        "scores"         sum_j (S - T)^2 over keys that both see.

    Args:
        q, teacher_q: (B, H, Nq, d), (B, H, Nq, e).   k, teacher_k: (B, H, Nk, d), (B, H, Nk, e).
        mask, teacher_mask: (B, Nk) bool, True on visible keys (padding, regions); None: all.
        weight: (H,) or (B, H), factor of a head's loss; gets no gradient. None: 1.
        causal, teacher_causal: queries see keys up to their own position only.

    Returns:
        () in float32, or float64 for such q: the mean over rows, heads and queries. The teacher
        gets no gradient.
    """
    scores = _scores(q, k, scale)
    goal = _scores(teacher_q.detach(), teacher_k.detach(), teacher_scale)
    visible = _visible(q, k, mask, causal)
    goal_visible = _visible(teacher_q, teacher_k, teacher_mask, teacher_causal)
    if kind == "scores":
        gap = (scores - goal).masked_fill(~(visible & goal_visible), 0.0)
        return _weighted_mean(gap.square().sum(dim=-1), weight)
    log_p, log_q = _log_probabilities(scores, visible), _log_probabilities(goal, goal_visible)
    if kind == "probabilities":
        return _weighted_mean((log_p.exp() - log_q.exp()).square().sum(dim=-1), weight)
    ratio = torch.where(goal_visible, log_q - log_p, 0.0)
    return _weighted_mean((log_q.exp() * ratio).sum(dim=-1), weight)


def attention_statistics(
    q: Tensor,
    k: Tensor,
    teacher_q: Tensor,
    teacher_k: Tensor,
    mask: Tensor | None,
    teacher_mask: Tensor | None,
    scale: float,
    teacher_scale: float,
    causal: bool,
    teacher_causal: bool,
    kind: str,
) -> Tensor:
    """(3, B, H, Nq) float32, what the kernels keep of each row for the backward: log2 of both
    softmaxes' denominators, and the sum D of csrc/attention_kd.cuh. "scores": (0, B, H, Nq)."""
    result = torch.empty(0 if kind == "scores" else 3, *q.shape[:3], device=q.device)
    if kind == "scores":
        return result
    sides = ((q, k, mask, scale, causal),)
    sides += ((teacher_q, teacher_k, teacher_mask, teacher_scale, teacher_causal),)
    maps = []
    for i, (queries, keys, seen, factor, one_way) in enumerate(sides):
        visible = _visible(queries, keys, seen, one_way)
        scores = _scores(queries, keys, factor)
        result[i] = scores.masked_fill(~visible, -math.inf).logsumexp(dim=-1) / math.log(2.0)
        maps.append(_log_probabilities(scores, visible).exp())
    p, t = maps
    result[2] = t.sum(dim=-1) if kind == "kl" else (p * (p - t)).sum(dim=-1)
    return result


def attention_kd_backward(
    gradient: Tensor,
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
) -> tuple[Tensor, Tensor]:
    """Gradients of `attention_kd` by q and k in their types; gradient: () that of the loss."""
    s, t = _scores(q, k, scale), _scores(teacher_q, teacher_k, teacher_scale)
    visible = _visible(q, k, mask, causal)
    goal_visible = _visible(teacher_q, teacher_k, teacher_mask, teacher_causal)
    if kind == "scores":
        by_score = 2 * (s - t).masked_fill(~(visible & goal_visible), 0.0)
    else:
        p = _log_probabilities(s, visible).exp()
        t = _log_probabilities(t, goal_visible).exp()
        if kind == "probabilities":
            weighted = p * (p - t)
            by_score = 2 * (weighted - p * weighted.sum(dim=-1, keepdim=True))
        else:
            by_score = (p * t.sum(dim=-1, keepdim=True) - t).masked_fill(~visible, 0.0)
    if weight is not None:
        by_score = by_score * weight.to(by_score.dtype)[..., None, None]
    by_score = by_score * (gradient.to(by_score.dtype) * scale / max(1, math.prod(q.shape[:3])))
    with torch.autocast(q.device.type, enabled=False):
        dq, dk = by_score @ _wide(k), by_score.transpose(-1, -2) @ _wide(q)
    return dq.to(q.dtype), dk.to(k.dtype)


def _over_heads(mask: Tensor, context: Tensor) -> Tensor:
    """A mask (H,) or (B, H) against context (B, H, N, d) or (B, N, H, d) alike: (.., H, 1, 1)."""
    return mask.to(context.dtype)[..., None, None]


def _by_head(context: Tensor, heads: int) -> Tensor:
    """(B, H, N, d) as it is; (B, N, H d) as such a view."""
    if context.dim() == 4:
        return context
    return context.unflatten(-1, (heads, -1)).transpose(1, 2)


def head_mask(context: Tensor, mask: Tensor) -> Tensor:
    """The outputs of attention's heads times a mask of heads.

    Args:
        context: (B, H, N, d), or (B, N, H d) as the output projection takes it.
        mask: (H,) or, of each row, (B, H); taken in the type of the context.

    Returns:
        The shape and type of the context. A NaN stays NaN under a mask of 0.

    Source: the head gates of EfficientVLM (2210.07795), and per row those of SmartTrim (2305.15033).
    """
    if context.dim() == 4:
        return context * _over_heads(mask, context)
    heads = context.unflatten(-1, (mask.shape[-1], -1))
    return (heads * mask.to(context.dtype).unsqueeze(-1).unsqueeze(-3)).flatten(-2)


def head_mask_backward(gradient: Tensor, context: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of `head_mask` by context and mask, in their types; sums in fp32 or fp64."""
    heads = mask.shape[-1]
    by_mask = _wide(_by_head(gradient, heads)) * _wide(_by_head(context, heads))
    total = by_mask.sum(dim=(-1, -2))
    total = total.sum(dim=0) if mask.dim() == 1 else total
    return head_mask(gradient.to(context.dtype), mask), total.to(mask.dtype)


def pack_tokens(x: Tensor, keep: Tensor, count: int | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """Kept tokens of all rows, one after the other, without asking the device how many there are.

    Args:
        x: (B, N, D) of any type.   keep: (B, N) bool.
        count: packed rows M, from 0 to B N, where the caller knows how many are needed; tokens that
            find no place are left out. None: B N.

    Returns:
        packed (M, D): the kept tokens first, zeros behind them.
        cumulative (B + 1,) int32: where each row begins, and at last the number of kept tokens.
        indices (M,) int64: which token b N + n each packed row is, -1 behind them.

    Source: sequence packing as flash attention's variable-length interface takes it.
    """
    count = keep.shape[0] * keep.shape[1] if count is None else count
    indices = torch.nonzero_static(keep.flatten(), size=count, fill_value=-1).squeeze(1)
    packed = x.flatten(0, 1).index_select(0, indices.clamp(min=0))
    packed = packed.masked_fill_((indices < 0)[:, None], 0)
    cumulative = torch.nn.functional.pad(keep.sum(dim=1).cumsum(0), (1, 0))
    return packed, cumulative.to(torch.int32), indices


def unpack_tokens(packed: Tensor, keep: Tensor) -> Tensor:
    """The way back: (B, N, D) with packed rows on the kept tokens and zeros on the others.

    Args:
        packed: (M, D), M at most B N; rows behind the number of kept tokens are not read, and
            kept tokens whose row is M or more are zero.
        keep: (B, N) bool, as given to `pack_tokens`.
    """
    row = keep.flatten().cumsum(0) - 1
    there = keep.flatten() & (row < packed.shape[0])
    if packed.shape[0] == 0:
        return packed.new_zeros(*keep.shape, packed.shape[1])
    found = packed.index_select(0, row.clamp(0, packed.shape[0] - 1))
    return found.masked_fill_(~there[:, None], 0).unflatten(0, tuple(keep.shape))
