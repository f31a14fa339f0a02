"""Rows of unequal length without padding: one behind the other in one long row.

Linear maps, norms and feed-forward parts run on the packed tensor (1, T, D) as they are; attention
goes through `packed_attention`. Inference only: sizes depend on the data.

Shape legend: B rows, n tokens of the longest of them, T tokens in all, H heads, d head size.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from models.kernels.pack_tokens import unpack_tokens

try:
    from torch.nn.attention.varlen import varlen_attn
except ImportError:  # before torch 2.10
    varlen_attn = None

__all__ = [
    "Packing",
    "fused_attention",
    "masked_mean",
    "packed_attention",
    "salient",
    "weighted_attention",
]

_EPSILON = 1e-6  # least share of the kept keys in a softmax; bounds the gradient of weights


@dataclass(frozen=True)
class Packing:
    """Where the tokens of B rows lie in (1, T, ...).

    Attributes:
        rows: (T,) int64, the row of each token, rising.
        slots: (T,) int64, its place in a padded grid (B, n) read row by row.
        starts: (B + 1,) int32, first token of each row, and T.
        valid: (B, n) bool, slots of the grid that hold a token.
    """

    rows: Tensor
    slots: Tensor
    starts: Tensor
    valid: Tensor

    @classmethod
    def of(cls, lengths: Tensor) -> Packing:
        """The packing of rows that are `lengths` (B,) int64 tokens long.

        Waits for the device: T and n are needed.
        """
        total, longest = map(int, torch.stack([lengths.sum(), lengths.max()]).tolist())
        starts = F.pad(lengths.cumsum(0), (1, 0))
        rows = torch.arange(len(lengths), device=lengths.device)
        rows = rows.repeat_interleave(lengths, output_size=total)
        slots = torch.arange(total, device=lengths.device) - starts[rows] + rows * longest
        valid = torch.arange(longest, device=lengths.device) < lengths[:, None]
        return cls(rows, slots, starts.int(), valid)

    @property
    def batch(self) -> int:
        """B."""
        return self.valid.shape[0]

    @property
    def longest(self) -> int:
        """n."""
        return self.valid.shape[1]

    def grid(self, packed: Tensor) -> Tensor:
        """(T, ...) -> (B, n, ...), zeros where there is no token."""
        tokens, *rest = packed.shape
        grid = unpack_tokens(packed.reshape(tokens, math.prod(rest)), self.valid)
        return grid.view(self.batch, self.longest, *rest)

    def flat(self, grid: Tensor) -> Tensor:
        """(B, n, ...) -> (T, ...). The slots are known, so this is one gather on any device."""
        return grid.flatten(0, 1).index_select(0, self.slots)

    def first(self, packed: Tensor) -> Tensor:
        """(T, ...) -> (B, ...): the first token of each row; every row has one."""
        return packed.index_select(0, self.starts[:-1].long())


def masked_mean(x: Tensor, mask: Tensor) -> Tensor:
    """(B, N, D), (B, N) bool or weights -> (B, D), the mean of what the mask shows.

    Sums in float32: in float16 a few hundred tokens with a large channel are beyond its range.
    """
    wide = torch.promote_types(x.dtype, torch.float32)
    weight = mask.to(wide).unsqueeze(-1)
    total = (x * weight.to(x.dtype)).sum(1, dtype=wide)
    return (total / weight.sum(1).clamp(min=1)).to(x.dtype)


def fused_attention(q: Tensor, k: Tensor, v: Tensor, **options: object) -> Tensor:
    """scaled_dot_product_attention; on a CPU in half precision computed in float32.

    There torch's fused kernel (2.15, on a CPU with AMX) is slower in bfloat16 than in float32, several
    times at short lengths, while linear layers are faster: converting operands is the cheaper way.

    Args:
        q: (B, H, N, d).   k, v: (B, H, K, d).   options: of scaled_dot_product_attention.
    """
    half = q.dtype in (torch.bfloat16, torch.float16)
    # A plan of a GPU's memory runs on fake tensors, which say "cpu".
    if not half or q.device.type != "cpu" or isinstance(q, FakeTensor):
        return F.scaled_dot_product_attention(q, k, v, **options)  # type: ignore[arg-type]
    bias = options.get("attn_mask")
    if isinstance(bias, Tensor) and bias.is_floating_point():
        options["attn_mask"] = bias.float()
    with torch.autocast("cpu", enabled=False):
        wide = F.scaled_dot_product_attention(q.float(), k.float(), v.float(), **options)  # type: ignore[arg-type]
    return wide.to(q.dtype)


def weighted_attention(
    q: Tensor, k: Tensor, v: Tensor, weight: Tensor, scale: float, **options: object
) -> Tensor:
    """Attention in which key j counts `weight[j]` times, renormalised: weight 0 equals removal.

    sum_j w_j exp(s_j) v_j / sum_j w_j exp(s_j), by fused attention on values with one more channel,
    [v w, w], and a division by it: no mask, no map, and a gradient for w of dropped keys too. With
    dropout the sum below is over the same dropped-out probabilities (as in DropAttention,
    1907.11065).

    Args:
        q: (B, H, N, d).   k, v: (B, H, K, d).   weight: (B, K), in [0, 1], not all 0.
        options: of scaled_dot_product_attention.

    Source: the policy softmax of DynamicViT (2106.02034); this form of it is ours.
    """
    size = v.shape[-1]
    spare = -(size + 1) % 8  # head sizes that fused kernels like
    factor = weight.to(v.dtype)[:, None, :, None]
    one = factor.expand(-1, v.shape[1], -1, -1)
    v = F.pad(torch.cat([v * factor, one], dim=-1), (0, spare))
    q, k = F.pad(q, (0, 1 + spare)), F.pad(k, (0, 1 + spare))
    mixed = fused_attention(q, k, v, scale=scale, **options)
    least = max(_EPSILON, torch.finfo(v.dtype).tiny)
    return mixed[..., :size] / mixed[..., size : size + 1].clamp(min=least)


class _Salient(torch.autograd.Function):
    """Identity; see `salient`."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor) -> Tensor:
        ctx.save_for_backward(weight)
        return weight.view_as(weight)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:  # type: ignore[override]
        (weight,) = ctx.saved_tensors
        return torch.where(weight > 0, -grad.abs(), torch.zeros_like(grad))


def salient(weight: Tensor) -> Tensor:
    """`weight`, with a gradient that says how much each entry matters instead of where it should go.

    What is kept (weight above 0) receives -|gradient|: as much reason to stay as the loss depends on
    it, in either direction. What is dropped receives nothing. The signed gradient is no guide: at a
    minimum of the loss a token's first-order effect is 0 on average, whether it shows the thing that
    is asked about or the wall behind it, and of the two only the first has a large effect; a dropped
    token's has no bound, e_j / S over the sum of what is kept, where bringing it back would change
    e_j / (S + e_j). The magnitude is the usual criterion of pruning by sensitivity (Molchanov et al.,
    1611.06440); as the gradient of token decisions it is ours.
    """
    return _Salient.apply(weight) if weight.requires_grad else weight


def packed_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    queries: Packing | None,
    keys: Packing | None,
    key_mask: Tensor | None = None,
) -> Tensor:
    """Attention of each row's queries to its own keys, either of them packed.

    Args:
        q: (B, H, N, d), or (1, H, T, d) with `queries`.   k, v: likewise, with `keys`.
        key_mask: (B, K) bool, or (1, T) with `keys`; True on visible keys, None when all are.

    Returns:
        As q. One varlen kernel on CUDA in half precision, else padded attention.
    """
    if _varlen_fits(q, k) and (key_mask is None or keys is not None):
        return _varlen(q, k, v, queries, keys, key_mask)
    mask = key_mask
    if keys is not None:
        seen = keys.valid
        if key_mask is not None:
            seen = seen & keys.grid(key_mask[0])
        k, v, mask = _padded(k, keys), _padded(v, keys), seen
    wide = q if queries is None else _padded(q, queries)
    mask = None if mask is None else mask[:, None, None, :]
    mixed = fused_attention(wide, k, v, attn_mask=mask)
    if queries is None:
        return mixed
    return queries.flat(mixed.transpose(1, 2)).transpose(0, 1).unsqueeze(0)


def _padded(x: Tensor, packing: Packing) -> Tensor:
    """(1, H, T, d) -> (B, H, n, d)."""
    return packing.grid(x[0].transpose(0, 1)).transpose(1, 2)


def _varlen_fits(q: Tensor, k: Tensor) -> bool:
    return (
        varlen_attn is not None
        and q.is_cuda
        and q.dtype in (torch.float16, torch.bfloat16)
        and q.shape[-1] % 8 == 0
        and torch.cuda.get_device_capability(q.device) >= (8, 0)
    )


def _varlen(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    queries: Packing | None,
    keys: Packing | None,
    key_mask: Tensor | None,
) -> Tensor:
    """`packed_attention` by torch's varlen kernel; masked keys carry weight 0."""
    assert varlen_attn is not None
    size, scale = q.shape[-1], q.shape[-1] ** -0.5
    if key_mask is not None:
        weight = key_mask.to(v.dtype)[:, None, :, None].expand(-1, v.shape[1], -1, -1)
        v = F.pad(torch.cat([v * weight, weight], dim=-1), (0, 7))
        q, k = F.pad(q, (0, 8)), F.pad(k, (0, 8))
    q_flat, q_starts, q_longest = _flat(q, queries)
    k_flat, k_starts, k_longest = _flat(k, keys)
    v_flat, _, _ = _flat(v, keys)
    mixed = varlen_attn(
        q_flat, k_flat, v_flat, q_starts, k_starts, q_longest, k_longest, scale=scale
    )
    assert isinstance(mixed, Tensor)
    if key_mask is not None:
        share = mixed[..., size : size + 1].clamp(min=torch.finfo(v.dtype).tiny)
        mixed = mixed[..., :size] / share
    if queries is not None:
        return mixed.transpose(0, 1).unsqueeze(0)
    return mixed.unflatten(0, (q.shape[0], -1)).transpose(1, 2)


def _flat(x: Tensor, packing: Packing | None) -> tuple[Tensor, Tensor, int]:
    """(B, H, N, d) or packed (1, H, T, d) -> (T, H, d), starts (B + 1,) and the longest row."""
    flat = x.transpose(1, 2).flatten(0, 1)
    if packing is not None:
        return flat, packing.starts, packing.longest
    rows, length = x.shape[0], x.shape[2]
    starts = torch.arange(0, (rows + 1) * length, length, device=x.device, dtype=torch.int32)
    return flat, starts, length
