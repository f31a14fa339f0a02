"""Attention with gated heads, shared contexts, masks, caches and traces; no map is written.

Shape legend: B rows, C contexts (C = B, or each serves B / C consecutive rows), N tokens, K keys, D
width, H heads, d head size. Masks are boolean and True means visible, or float and hold the weight
of each key (0 equals removal), as trimmers make them.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from models.gate_slot import GateSlot
from models.gated_linear import ALL, Entries, GatedLinear
from models.kernels.head_mask import head_mask
from models.outputs import AttentionTrace
from models.packing import (
    Packing,
    fused_attention,
    packed_attention,
    salient,
    weighted_attention,
)

__all__ = ["Attention", "BiasOnly", "KeyValueCache", "KeyValues", "LayerCache"]


class BiasOnly(nn.Module):
    """What is left of an output projection (H d or F) -> D without inputs: its bias.

    Keeps the key name `bias` of nn.Linear; a zero-element weight would upset sharded optimizers.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.bias = nn.Parameter(torch.zeros(width))

    def forward(self, like: Tensor) -> Tensor:
        """(..., any) -> (..., D): the bias at every position of `like`."""
        # A sum, not a view of the parameter: in inference mode that would go on requiring
        # gradients, on which hooks of torch's counters break.
        return self.bias + self.bias.new_zeros(*like.shape[:-1], 1)


KeyValues = tuple[Tensor, Tensor]  # keys and values, (B, H, K, d) each


class KeyValueCache:
    """Keys and values of one attention, kept between the calls of a decoder.

    Self-attention appends to it; cross-attention, whose context stays, fills it once.
    """

    def __init__(self) -> None:
        self.held: KeyValues | None = None

    @property
    def length(self) -> int:
        """Keys held."""
        return 0 if self.held is None else self.held[0].shape[2]

    def extend(self, k: Tensor, v: Tensor) -> KeyValues:
        """Appends (B, H, new, d) and returns everything held."""
        if self.held is not None:
            k, v = torch.cat([self.held[0], k], dim=2), torch.cat([self.held[1], v], dim=2)
        self.held = (k, v)
        return self.held

    def reorder(self, rows: Tensor) -> None:
        """Row i becomes what row rows[i] was; rows (B,) int64."""
        if self.held is not None:
            k, v = self.held
            self.held = (k.index_select(0, rows), v.index_select(0, rows))


@dataclass
class LayerCache:
    """What one decoder layer keeps between calls.

    With trimmers also what they decided in the first call: the mask and packing of the image tokens
    that are left (`seen`), and the heads.
    """

    own: KeyValueCache = field(default_factory=KeyValueCache)
    cross: KeyValueCache = field(default_factory=KeyValueCache)
    seen: tuple[Tensor | None, Packing | None] | None = None
    heads: tuple[Tensor | None, Tensor | None] = (None, None)


class Attention(nn.Module):
    """Multi-head attention whose heads carry a gate.

    Half precision: scores are q k^T / sqrt(d) inside scaled_dot_product_attention, which scales
    before it rounds, so products beyond the range of float16 do not overflow. The published guard
    (q divided by sqrt(d) first) gives the same bits where sqrt(d) is a power of two, as for d = 64.

    Args:
        width: D of the queries and of the output.   heads: H, possibly 0.   head_dim: d.
        key_width: width of keys and values (defaults to `width`).   dropout: on probabilities.
        qkv_bias: q, k and v have biases.
        shared_heads: two attentions share one key and value projection of that many heads. The one
            that owns it uses the first `heads` of them, the other the last. None: nothing is shared.
        owner: with `shared_heads`: the projection is here; False: keys and values come in as
            `memory`, made for this one by the owner's `keys_values`.
    """

    def __init__(
        self,
        width: int,
        heads: int,
        head_dim: int,
        *,
        key_width: int | None = None,
        dropout: float = 0.0,
        qkv_bias: bool = True,
        shared_heads: int | None = None,
        owner: bool = True,
    ) -> None:
        super().__init__()
        self.heads, self.head_dim, self.dropout = heads, head_dim, dropout
        self.width, self.key_width, self.qkv_bias = width, key_width or width, qkv_bias
        self.shared_heads, self.owner = shared_heads, owner
        self.gate = GateSlot(heads, head_dim)
        inner = heads * head_dim
        key_inner = inner if shared_heads is None else shared_heads * head_dim
        if heads:
            self.q = GatedLinear(width, inner, bias=qkv_bias)
        if key_inner and owner:
            self.k = GatedLinear(self.key_width, key_inner, bias=qkv_bias)
            self.v = GatedLinear(self.key_width, key_inner, bias=qkv_bias)
        if heads:
            self.out: nn.Module = GatedLinear(inner, width)
        else:
            self.out = BiasOnly(width)

    @property
    def parameters_per_head(self) -> int:
        """What removing one head saves: rows and biases of q, k, v, and columns of out.

        A shared key and value row counts half for each of its two readers: it goes when both have
        gone, and a pair together counts what it has. (The published code counts it twice.)
        """
        own = 2 * self.width + self.qkv_bias
        keys = 2 * (self.key_width + self.qkv_bias)
        return self.head_dim * (own + (keys if self.shared_heads is None else keys // 2))

    def _split(self, x: Tensor) -> Tensor:
        """(B, N, H d) -> (B, H, N, d)."""
        return x.unflatten(-1, (-1, self.head_dim)).transpose(1, 2)

    def keys_values(
        self,
        context: Tensor,
        reader: Attention | None = None,
        *,
        trace: bool = False,
        compact: bool = True,
    ) -> KeyValues:
        """context (B, K, key_width) -> keys and values, (B, H, K, d) each.

        Args:
            reader: the attention they are for, this one or its partner: only heads of it that take
                part. None: all heads of the projection, those of both readers.
            trace: the keys (not the values) are of all the reader's heads.
            compact: False: all heads take part.
        """
        if reader is None:
            return self._split(self.k(context)), self._split(self.v(context))
        heads = slice(0, reader.heads)
        if not reader.owner:  # the last ones of the shared projection
            heads = slice((reader.shared_heads or reader.heads) - reader.heads, None)
        places = reader.gate.entries(fold=False, compact=compact).kept
        if places is not None and heads.start:
            places = places + heads.start * self.head_dim
        k = self._split(self.k(context, rows=ALL if trace else Entries(places)))
        v = self._split(self.v(context, rows=Entries(places)))
        return (
            k[:, heads] if trace or places is None else k,
            v[:, heads] if places is None else v,
        )

    def _own_keys(
        self,
        context: Tensor,
        memory: KeyValues | None,
        cache: KeyValueCache | None,
        grows: bool,
        trace: bool,
        chosen: Tensor | None,
    ) -> KeyValues:
        """Keys and values for this attention's heads (`chosen` of them), from wherever they come."""
        if cache is not None and cache.held is not None and not grows:
            return cache.held
        if memory is None and not self.owner:
            raise ValueError("this attention has no keys of its own: it needs `memory`")
        if chosen is not None and memory is None and self.shared_heads is None:
            rows = Entries(_entries(chosen, self.head_dim))
            memory = (
                self._split(self.k(context, rows=rows)),
                self._split(self.v(context, rows=rows)),
            )
        elif memory is None or chosen is not None:
            k, v = memory or self.keys_values(context, self, trace=trace, compact=cache is None)
            memory = (k, v) if chosen is None else (k[:, chosen], v[:, chosen])
        return memory if cache is None else cache.extend(*memory)

    def forward(
        self,
        x: Tensor,
        context: Tensor | None = None,
        key_mask: Tensor | None = None,
        causal: bool = False,
        trace: bool = False,
        *,
        memory: KeyValues | None = None,
        cache: KeyValueCache | None = None,
        queries: Packing | None = None,
        keys: Packing | None = None,
        kept_heads: Tensor | None = None,
    ) -> tuple[Tensor, AttentionTrace | None]:
        """Attends from x (B, N, D) to `context` (C, K, key_width), or to x itself.

        B may be a multiple of C: then each context serves B / C consecutive rows, and its keys
        and values are computed once (several texts for an image, the beams of a search).

        Args:
            key_mask: (C, K) bool, True on visible keys; None when all are. K counts cached keys.
                Float: the weight of each key, with which the softmax is normalised anew.
            causal: queries see keys up to their own position; they are the last N of the K.
            trace: also return what a loss needs to rebuild the attention maps, of all heads: a head
                whose gate is 0 then loses its values and its part of the output projection only.
            memory: keys and values in place of projecting `context`, from `keys_values` with the
                same `trace`.
            cache: grows by the keys of x, or keeps those of `context`.
            queries, keys: how x (1, T, D) and what is attended to (1, K, key_width) are packed.
            kept_heads: (B, H) float factors of each row's heads, or, for one row, (H',) int64, the
                heads that are computed at all.

        Raises:
            ValueError: when B is not a multiple of C, or a trace of packed tokens is asked for.
        """
        if trace and (queries is not None or keys is not None):
            raise ValueError("packed tokens have no attention trace; capture in another mode")
        grows, context = context is None, x if context is None else context
        scale = self.head_dim**-0.5
        if self.heads == 0:
            q = x.new_zeros(x.shape[0], 0, x.shape[1], self.head_dim)
            k = x.new_zeros(x.shape[0], 0, context.shape[1], self.head_dim)
            return self.out(x), _trace(q, k, scale, key_mask, causal) if trace else None
        chosen, factors = self._choose(kept_heads, trace)
        # With a cache all heads take part: it outlives the gates of one pass.
        gates = self.gate.entries(fold=x.numel() // self.width >= self.width, compact=cache is None)
        if chosen is not None:
            gates = Entries(_entries(chosen, self.head_dim))
        q = self._split(self.q(x, rows=ALL if trace else Entries(gates.kept)))
        k, v = self._own_keys(context, memory, cache, grows, trace, chosen)
        record = _trace(q, k, scale, key_mask, causal) if trace else None
        kept = self.gate.kept if gates.kept is not None else None
        if trace and kept is not None:
            q, k = q.index_select(1, kept), k.index_select(1, kept)
        mixed = self._mixed(q, k, v, key_mask, causal, queries, keys)
        if factors is not None:
            if kept is not None:
                factors = factors.index_select(1, kept)
            mixed = _times_heads(mixed, factors, queries)
        return self.out(mixed.transpose(1, 2).flatten(2), columns=gates), record

    def _mixed(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        key_mask: Tensor | None,
        causal: bool,
        queries: Packing | None,
        keys: Packing | None,
    ) -> Tensor:
        """Values (B, H, N, d) weighted by the attention of q, packed or not."""
        if queries is not None or keys is not None:
            return _packed(q, k, v, queries, keys, key_mask)
        dropout = self.dropout if self.training else 0.0
        return _unfold(_mix(_fold(q, k.shape[0]), k, v, key_mask, causal, dropout), q.shape[0])

    def _choose(
        self, kept_heads: Tensor | None, trace: bool
    ) -> tuple[Tensor | None, Tensor | None]:
        """`kept_heads` as the heads that are computed, or as factors where all must be."""
        if kept_heads is None or kept_heads.is_floating_point():
            return None, kept_heads
        if self.gate.z is None and not trace:
            return kept_heads, None
        factors = torch.zeros(1, self.heads, device=kept_heads.device)
        return None, factors.index_fill(1, kept_heads, 1.0)


def _entries(heads: Tensor, size: int) -> Tensor:
    """Head numbers (n,) -> their rows in a projection, (n d,)."""
    return (heads[:, None] * size + torch.arange(size, device=heads.device)).flatten()


def _mix(
    q: Tensor, k: Tensor, v: Tensor, key_mask: Tensor | None, causal: bool, dropout: float
) -> Tensor:
    """Fused attention; key_mask (C, K) bool, or float weights."""
    weight = None
    if key_mask is not None and key_mask.is_floating_point():
        if key_mask.requires_grad and torch.is_grad_enabled():
            weight, key_mask = key_mask, None
        else:  # nobody asks for its gradient: then a mask is the exact form in every precision
            key_mask = key_mask > 0
    mask, is_causal = _visible(key_mask, causal, q.shape[2], k.shape[2], q.device)
    options = {"attn_mask": mask, "dropout_p": dropout, "is_causal": is_causal}
    if weight is None:
        return fused_attention(q, k, v, **options)
    return weighted_attention(q, k, v, salient(weight), q.shape[-1] ** -0.5, **options)


def _packed(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    queries: Packing | None,
    keys: Packing | None,
    key_mask: Tensor | None,
) -> Tensor:
    """`packed_attention`, in which the rows of a context share its keys."""
    mask = None if key_mask is None else key_mask > 0
    if queries is not None or keys is None:
        return packed_attention(q, k, v, queries, keys, mask)
    mixed = packed_attention(_fold(q, keys.batch), k, v, None, keys, mask)
    return _unfold(mixed, q.shape[0])


def _times_heads(mixed: Tensor, factors: Tensor, queries: Packing | None) -> Tensor:
    """Outputs of heads, (B, H, N, d), times the factors of each row's, (B, H), or of all, (1, H)."""
    if queries is None:
        return head_mask(mixed, factors if factors.shape[0] == mixed.shape[0] else factors[0])
    # Packed (1, H, T, d): every token has factors of its own, which leaves a kernel nothing to save.
    factors = factors.index_select(0, queries.rows).t()
    return mixed * factors[None, :, :, None].to(mixed.dtype)


def _fold(q: Tensor, contexts: int) -> Tensor:
    """(C g, H, N, d) -> (C, H, g N, d): the queries of all rows that share a context."""
    if q.shape[0] == contexts:
        return q
    if q.shape[0] % contexts:
        raise ValueError(f"{q.shape[0]} rows cannot share {contexts} contexts evenly")
    return q.unflatten(0, (contexts, -1)).transpose(1, 2).flatten(2, 3)


def _unfold(mixed: Tensor, rows: int) -> Tensor:
    """(C, H, g N, d) -> (C g, H, N, d)."""
    if mixed.shape[0] == rows:
        return mixed
    return mixed.unflatten(2, (rows // mixed.shape[0], -1)).transpose(1, 2).flatten(0, 1)


def _repeat(per_context: Tensor, rows: int) -> Tensor:
    """(C, ...) -> (rows, ...), each entry for its consecutive rows."""
    contexts = per_context.shape[0]
    return per_context if contexts == rows else per_context.repeat_interleave(rows // contexts, 0)


def _trace(
    q: Tensor, k: Tensor, scale: float, key_mask: Tensor | None, causal: bool
) -> AttentionTrace:
    """The trace of q (B, H, N, d) with k (C, H, K, d) and key_mask (C, K): one context a row."""
    if key_mask is not None and key_mask.is_floating_point():
        key_mask = key_mask > 0
    mask = None if key_mask is None else _repeat(key_mask, q.shape[0])
    return AttentionTrace(q, _repeat(k, q.shape[0]), scale, mask, causal)


def _visible(
    key_mask: Tensor | None, causal: bool, queries: int, keys: int, device: torch.device
) -> tuple[Tensor | None, bool]:
    """attn_mask, (B, 1, 1 or N, K) or (N, K), and is_causal for scaled_dot_product_attention.

    torch refuses is_causal together with a mask, and aligns it with the first key rather than the
    last; in both cases the mask holds everything. The last query alone sees all keys anyway.
    """
    causal = causal and queries > 1
    if key_mask is None and (not causal or queries == keys):
        return None, causal
    mask = None if key_mask is None else key_mask[:, None, None, :]
    if causal:
        lower = torch.ones(queries, keys, dtype=torch.bool, device=device).tril(keys - queries)
        mask = lower if mask is None else mask & lower
    return mask, False
