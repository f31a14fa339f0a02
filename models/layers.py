"""Attention, feed-forward and the two block kinds (pre-norm ViT, post-norm BERT), with gate slots.

Shape legend: B rows, N or L tokens, K keys, D width, H heads, d head size, F feed-forward units.
Masks are boolean and True means visible. Per-layer H and F come from the configuration; either may
be zero in a pruned model, and then the sub-layer contributes its output bias only.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from timm.layers.drop import DropPath
from timm.layers.layer_scale import LayerScale
from torch import Tensor, nn

from models.gates import GateSlot
from models.outputs import AttentionTrace, Capture, EncoderOutput

__all__ = [
    "Attention",
    "BertLayer",
    "BiasOnly",
    "FeedForward",
    "Recorder",
    "ViTBlock",
    "activation_function",
    "quick_gelu",
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


class Attention(nn.Module):
    """Multi-head attention whose heads carry a gate.

    Args:
        width: D of the queries and of the output.   heads: H, possibly 0.   head_dim: d.
        key_width: width of keys and values (defaults to `width`).   dropout: on probabilities.
        qkv_bias: q, k and v have biases.
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
    ) -> None:
        super().__init__()
        self.heads, self.head_dim, self.dropout = heads, head_dim, dropout
        self.width, self.key_width, self.qkv_bias = width, key_width or width, qkv_bias
        self.gate = GateSlot(heads)
        inner = heads * head_dim
        if heads:
            self.q = nn.Linear(width, inner, bias=qkv_bias)
            self.k = nn.Linear(self.key_width, inner, bias=qkv_bias)
            self.v = nn.Linear(self.key_width, inner, bias=qkv_bias)
            self.out: nn.Module = nn.Linear(inner, width)
        else:
            self.out = BiasOnly(width)

    @property
    def parameters_per_head(self) -> int:
        """What removing one head saves: rows and biases of q, k, v, and columns of out."""
        return self.head_dim * (2 * self.width + 2 * self.key_width + 3 * self.qkv_bias)

    def _split(self, x: Tensor) -> Tensor:
        """(B, N, H d) -> (B, H, N, d)."""
        return x.unflatten(-1, (self.heads, self.head_dim)).transpose(1, 2)

    def forward(
        self,
        x: Tensor,
        context: Tensor | None = None,
        key_mask: Tensor | None = None,
        causal: bool = False,
        trace: bool = False,
    ) -> tuple[Tensor, AttentionTrace | None]:
        """Attends from x (B, N, D) to `context` (B, K, key_width), or to x itself.

        Args:
            key_mask: (B, K) bool, True on visible keys; None when all are.
            causal: queries see keys up to their own position (then K = N).
            trace: also return what a loss needs to rebuild the attention map.
        """
        context = x if context is None else context
        scale = self.head_dim**-0.5
        if self.heads == 0:
            empty = x.new_zeros(x.shape[0], 0, x.shape[1], self.head_dim)
            keys = x.new_zeros(x.shape[0], 0, context.shape[1], self.head_dim)
            record = AttentionTrace(empty, keys, scale, key_mask, causal) if trace else None
            return self.out(x), record
        q, k, v = self._split(self.q(x)), self._split(self.k(context)), self._split(self.v(context))
        mixed = F.scaled_dot_product_attention(
            q,
            k,
            v,
            attn_mask=_attention_mask(key_mask, causal, x.shape[1]),
            dropout_p=self.dropout if self.training else 0.0,
            # torch refuses is_causal together with a mask, so then the mask holds both
            is_causal=causal and key_mask is None,
        )
        if self.gate.z is not None:
            mixed = mixed * self.gate.z.to(mixed.dtype).view(1, -1, 1, 1)
        record = AttentionTrace(q, k, scale, key_mask, causal) if trace else None
        return self.out(mixed.transpose(1, 2).flatten(2)), record


def _attention_mask(key_mask: Tensor | None, causal: bool, queries: int) -> Tensor | None:
    """(B, K) visible keys -> (B, 1, 1 or N, K) for scaled_dot_product_attention."""
    if key_mask is None:
        return None
    mask = key_mask[:, None, None, :]
    if causal:
        lower = torch.ones(queries, key_mask.shape[1], dtype=torch.bool, device=key_mask.device)
        mask = mask & lower.tril()
    return mask


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
        activation: str,
        gate_position: str,
        eps: float,
        dropout: float,
        attention_dropout: float,
    ) -> None:
        super().__init__()
        self.attention = Attention(width, heads, head_dim, dropout=attention_dropout)
        self.attention_norm = nn.LayerNorm(width, eps=eps)
        self.has_cross = cross_heads is not None
        if cross_heads is not None:
            self.cross_attention = Attention(
                width, cross_heads, head_dim, key_width=context_width, dropout=attention_dropout
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
    ) -> tuple[Tensor, AttentionTrace | None, AttentionTrace | None]:
        """x (B, L, D), mask (B, L), context (B, K, context_width), context_mask (B, K).

        Returns:
            states (B, L, D), self-attention trace, cross-attention trace (None unless asked).
        """
        mixed, record = self.attention(x, key_mask=mask, causal=causal, trace=trace)
        x = self.attention_norm(x + self.dropout(mixed))
        cross_record = None
        if self.has_cross:
            mixed, cross_record = self.cross_attention(
                x, context=context, key_mask=context_mask, trace=cross_trace
            )
            x = self.cross_norm(x + self.dropout(mixed))
        return self.ffn_norm(x + self.dropout(self.ffn(x))), record, cross_record


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
