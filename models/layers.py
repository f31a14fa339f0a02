"""Attention, feed-forward and the two block kinds (pre-norm ViT, post-norm BERT), with gate slots.

Shape legend: B rows, N or L tokens, K keys, D width, H heads, d head size, F feed-forward units.
Masks are boolean and True means visible. Per-layer H and F come from the configuration; either may
be zero in a pruned model, and then the sub-layer contributes its output bias only.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from timm.layers.drop import DropPath
from timm.layers.layer_scale import LayerScale
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from models.gates import GateSlot
from models.outputs import AttentionTrace, Capture, EncoderOutput

__all__ = [
    "Attention",
    "BertLayer",
    "BiasOnly",
    "FeedForward",
    "KeyValueCache",
    "KeyValues",
    "LayerCache",
    "Recorder",
    "ViTBlock",
    "activation_function",
    "quick_gelu",
    "run_block",
]


def quick_gelu(x: Tensor) -> Tensor:
    """CLIP's activation, x * sigmoid(1.702 x)."""
    return x * torch.sigmoid(1.702 * x)


def _gelu_tanh(x: Tensor) -> Tensor:
    return F.gelu(x, approximate="tanh")


def activation_function(name: str) -> Callable[[Tensor], Tensor]:
    """The function behind a configuration's activation name ("gelu" is the exact, erf one)."""
    functions = {"gelu": F.gelu, "quick_gelu": quick_gelu, "gelu_tanh": _gelu_tanh}
    if name not in functions:
        raise ValueError(f"activation {name!r} is unknown; choose one of {sorted(functions)}")
    return functions[name]


class BiasOnly(nn.Module):
    """What is left of an output projection (H d or F) -> D without inputs: its bias.

    Keeps the key name `bias` of nn.Linear; a zero-element weight would upset sharded optimizers.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.bias = nn.Parameter(torch.zeros(width))

    def forward(self, like: Tensor) -> Tensor:
        """(..., any) -> (..., D): the bias at every position of `like`."""
        return self.bias.expand(*like.shape[:-1], -1)


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
    """What one decoder layer keeps between calls."""

    own: KeyValueCache = field(default_factory=KeyValueCache)
    cross: KeyValueCache = field(default_factory=KeyValueCache)


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
            `memory`, made by the owner's `keys_values`.
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
        self.gate = GateSlot(heads)
        inner = heads * head_dim
        key_inner = inner if shared_heads is None else shared_heads * head_dim
        if heads:
            self.q = nn.Linear(width, inner, bias=qkv_bias)
        if key_inner and owner:
            self.k = nn.Linear(self.key_width, key_inner, bias=qkv_bias)
            self.v = nn.Linear(self.key_width, key_inner, bias=qkv_bias)
        if heads:
            self.out: nn.Module = nn.Linear(inner, width)
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

    def keys_values(self, context: Tensor) -> KeyValues:
        """context (B, K, key_width) -> keys and values, (B, H, K, d) each (H of both readers)."""
        return self._split(self.k(context)), self._split(self.v(context))

    def _own_keys(
        self, context: Tensor, memory: KeyValues | None, cache: KeyValueCache | None, grows: bool
    ) -> KeyValues:
        """Keys and values for this attention's heads, from wherever they come."""
        if cache is not None and cache.held is not None and not grows:
            return cache.held
        if memory is None and not self.owner:
            raise ValueError("this attention has no keys of its own: it needs `memory`")
        k, v = self.keys_values(context) if memory is None else memory
        if self.shared_heads is not None:
            heads = slice(0, self.heads) if self.owner else slice(k.shape[1] - self.heads, None)
            k, v = k[:, heads], v[:, heads]
        return (k, v) if cache is None else cache.extend(k, v)

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
    ) -> tuple[Tensor, AttentionTrace | None]:
        """Attends from x (B, N, D) to `context` (C, K, key_width), or to x itself.

        B may be a multiple of C: then each context serves B / C consecutive rows, and its keys
        and values are computed once (several texts for an image, the beams of a search).

        Args:
            key_mask: (C, K) bool, True on visible keys; None when all are. K counts cached keys.
            causal: queries see keys up to their own position; they are the last N of the K.
            trace: also return what a loss needs to rebuild the attention map.
            memory: keys and values in place of projecting `context`.
            cache: grows by the keys of x, or keeps those of `context`.

        Raises:
            ValueError: when B is not a multiple of C.
        """
        grows, context = context is None, x if context is None else context
        scale = self.head_dim**-0.5
        if self.heads == 0:
            empty = x.new_zeros(x.shape[0], 0, x.shape[1], self.head_dim)
            keys = x.new_zeros(x.shape[0], 0, context.shape[1], self.head_dim)
            record = _trace(empty, keys, scale, key_mask, causal) if trace else None
            return self.out(x), record
        q = self._split(self.q(x))
        k, v = self._own_keys(context, memory, cache, grows)
        mask, is_causal = _visible(key_mask, causal, q.shape[2], k.shape[2], q.device)
        mixed = F.scaled_dot_product_attention(
            _fold(q, k.shape[0]),
            k,
            v,
            attn_mask=mask,
            dropout_p=self.dropout if self.training else 0.0,
            is_causal=is_causal,
        )
        mixed = _unfold(mixed, q.shape[0])
        if self.gate.z is not None:
            mixed = mixed * self.gate.z.to(mixed.dtype).view(1, -1, 1, 1)
        record = _trace(q, k, scale, key_mask, causal) if trace else None
        return self.out(mixed.transpose(1, 2).flatten(2)), record


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


class FeedForward(nn.Module):
    """D -> F -> D with a gate on the F units, on the input ("pre") or output of the activation."""

    def __init__(self, width: int, units: int, activation: str, gate_position: str) -> None:
        super().__init__()
        self.width, self.units = width, units
        self.activation = activation_function(activation)
        self.gate_first = gate_position == "pre"
        self.gate = GateSlot(units)
        if units:
            self.fc1 = nn.Linear(width, units)
            self.fc2: nn.Module = nn.Linear(units, width)
        else:
            self.fc2 = BiasOnly(width)

    @property
    def parameters_per_unit(self) -> int:
        """What removing one unit saves: a row and bias of fc1 and a column of fc2."""
        return 2 * self.width + 1

    def forward(self, x: Tensor) -> Tensor:
        """(B, N, D) -> (B, N, D)."""
        if self.units == 0:
            return self.fc2(x)
        hidden, z = self.fc1(x), self.gate.z
        if z is not None:
            z = z.to(hidden.dtype)
        if z is not None and self.gate_first:
            hidden = hidden * z
        hidden = self.activation(hidden)
        if z is not None and not self.gate_first:
            hidden = hidden * z
        return self.fc2(hidden)


class ViTBlock(nn.Module):
    """Pre-norm block: x + attention(norm1(x)), then x + ffn(norm2(x))."""

    def __init__(
        self,
        width: int,
        heads: int,
        head_dim: int,
        units: int,
        *,
        activation: str,
        gate_position: str,
        eps: float,
        layer_scale: float | None = None,
        drop_path: float = 0.0,
        qkv_bias: bool = True,
    ) -> None:
        super().__init__()
        self.recompute = False
        self.norm1 = nn.LayerNorm(width, eps=eps)
        self.attention = Attention(width, heads, head_dim, qkv_bias=qkv_bias)
        self.norm2 = nn.LayerNorm(width, eps=eps)
        self.ffn = FeedForward(width, units, activation, gate_position)
        scaled = layer_scale is not None
        self.scale1 = LayerScale(width, init_values=layer_scale) if scaled else nn.Identity()
        self.scale2 = LayerScale(width, init_values=layer_scale) if scaled else nn.Identity()
        self.drop_path = DropPath(drop_path) if drop_path else nn.Identity()

    def forward(
        self, x: Tensor, key_mask: Tensor | None = None, trace: bool = False
    ) -> tuple[Tensor, AttentionTrace | None]:
        """x (B, N, D), key_mask (B, N) bool or None -> (B, N, D) and the trace if asked for."""
        mixed, record = self.attention(self.norm1(x), key_mask=key_mask, trace=trace)
        x = x + self.drop_path(self.scale1(mixed))
        return x + self.drop_path(self.scale2(self.ffn(self.norm2(x)))), record


class BertLayer(nn.Module):
    """Post-norm block: self-attention, cross-attention if it has one, feed-forward.

    Args:
        cross_heads: None for a layer without cross-attention; 0 for one whose heads were pruned.
        context_width: width of the states that cross-attention reads.
        shared_heads, owner: of the cross-attention's keys and values, see `Attention`.
    """

    def __init__(
        self,
        width: int,
        heads: int,
        head_dim: int,
        units: int,
        *,
        cross_heads: int | None = None,
        context_width: int | None = None,
        shared_heads: int | None = None,
        owner: bool = True,
        activation: str,
        gate_position: str,
        eps: float,
        dropout: float,
        attention_dropout: float,
    ) -> None:
        super().__init__()
        self.recompute = False
        self.attention = Attention(width, heads, head_dim, dropout=attention_dropout)
        self.attention_norm = nn.LayerNorm(width, eps=eps)
        self.has_cross = cross_heads is not None
        if cross_heads is not None:
            self.cross_attention = Attention(
                width,
                cross_heads,
                head_dim,
                key_width=context_width,
                dropout=attention_dropout,
                shared_heads=shared_heads,
                owner=owner,
            )
            self.cross_norm = nn.LayerNorm(width, eps=eps)
        self.ffn = FeedForward(width, units, activation, gate_position)
        self.ffn_norm = nn.LayerNorm(width, eps=eps)
        self.dropout = nn.Dropout(dropout) if dropout else nn.Identity()

    def forward(
        self,
        x: Tensor,
        mask: Tensor | None,
        context: Tensor | None = None,
        context_mask: Tensor | None = None,
        *,
        causal: bool = False,
        trace: bool = False,
        cross_trace: bool = False,
        memory: KeyValues | None = None,
        cache: LayerCache | None = None,
    ) -> tuple[Tensor, AttentionTrace | None, AttentionTrace | None]:
        """x (B, L, D), mask (B, L), context (C, K, context_width), context_mask (C, K).

        Args:
            memory: keys and values of the cross-attention in place of projecting `context`.
            cache: what the layer keeps between calls; `mask` then counts the keys held as well.

        Returns:
            states (B, L, D), self-attention trace, cross-attention trace (None unless asked).
        """
        mixed, record = self.attention(
            x, key_mask=mask, causal=causal, trace=trace, cache=cache and cache.own
        )
        x = self.attention_norm(x + self.dropout(mixed))
        cross_record = None
        if self.has_cross:
            mixed, cross_record = self.cross_attention(
                x,
                context=context,
                key_mask=context_mask,
                trace=cross_trace,
                memory=memory,
                cache=cache and cache.cross,
            )
            x = self.cross_norm(x + self.dropout(mixed))
        return self.ffn_norm(x + self.dropout(self.ffn(x))), record, cross_record


def run_block(block: ViTBlock | BertLayer, x: Tensor, *args: Any, **kwargs: Any) -> Any:
    """block(x, ...), whose activations are computed again in the backward where `block.recompute`.

    The block is called as a module both times, so an engine's hooks gather its parameters again.
    Dropout draws the same numbers, autocast is as it was, and gates must still hold the values of
    the forward (a `GateBank` writes them once a step). Traces that come out are ordinary tensors,
    kept and not computed again. Calls with a cache are left alone: a second run would extend it.

    Source: Chen et al., 1604.06174.
    """
    if not (block.recompute and torch.is_grad_enabled()) or kwargs.get("cache") is not None:
        return block(x, *args, **kwargs)
    return checkpoint(block, x, *args, use_reentrant=False, **kwargs)


class Recorder:
    """Collects what a `Capture` asks for while a stack runs."""

    def __init__(self, capture: Capture) -> None:
        self.capture = capture
        self.hidden: dict[int, Tensor] = {}
        self.attention: dict[int, AttentionTrace] = {}
        self.cross_attention: dict[int, AttentionTrace] = {}

    def state(self, index: int, x: Tensor) -> None:
        """Keeps hidden state `index` if it was asked for."""
        if index in self.capture.hidden:
            self.hidden[index] = x

    def traces(
        self, index: int, own: AttentionTrace | None, cross: AttentionTrace | None = None
    ) -> None:
        """Keeps the traces of layer `index` that exist."""
        if own is not None:
            self.attention[index] = own
        if cross is not None:
            self.cross_attention[index] = cross

    def output(self, last: Tensor) -> EncoderOutput:
        """The typed output with everything recorded."""
        return EncoderOutput(last, self.hidden, self.attention, self.cross_attention)
