"""Feed-forward part and the two block kinds (pre-norm ViT, post-norm BERT), with gate slots.

Shape legend: B rows, N or L tokens, K keys, D width, H heads, d head size, F feed-forward units.
Masks are boolean and True means visible. Per-layer H and F come from the configuration; either may
be zero in a pruned model, and then the sub-layer contributes its output bias only.
"""

from __future__ import annotations

from typing import Any

import torch
from timm.layers.drop import DropPath
from timm.layers.layer_scale import LayerScale
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from models.attention import Attention, BiasOnly, KeyValues, LayerCache
from models.gate_slot import GateSlot
from models.gated_linear import GatedLinear
from models.kernels.reference import activation_function, quick_gelu
from models.outputs import AttentionTrace, Capture, EncoderOutput, TrimRecord
from models.streams import BlockTrim

__all__ = [
    "BertLayer",
    "FeedForward",
    "Recorder",
    "ViTBlock",
    "activation_function",
    "quick_gelu",
    "run_block",
]


# Below, gathering the weights of the units that take part costs more than the others' products.
_FEW_TOKENS = 64
_UNTRIMMED = BlockTrim()


class FeedForward(nn.Module):
    """D -> F -> D with a gate on the F units, on the input ("pre") or output of the activation."""

    def __init__(self, width: int, units: int, activation: str, gate_position: str) -> None:
        super().__init__()
        self.width, self.units = width, units
        activation_function(activation)  # a name that is not known is refused here
        self.activation = activation
        self.gate_first = gate_position == "pre"
        self.gate = GateSlot(units)
        if units:
            self.fc1 = GatedLinear(width, units)
            self.fc2: nn.Module = GatedLinear(units, width)
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
        tokens = x.numel() // self.width
        gates = self.gate.entries(fold=tokens >= self.width, compact=tokens >= _FEW_TOKENS)
        # A gate after the activation folds into the columns that read it, and otherwise meets the
        # activation where it is computed; one before it belongs to the rows of fc1 either way.
        last = gates.fold and not self.gate_first
        hidden = self.fc1(
            x,
            rows=gates._replace(gate=None) if last else gates,
            activation=self.activation,
            gate_first=self.gate_first,
        )
        return self.fc2(hidden, columns=gates if last else gates._replace(gate=None))


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
        self,
        x: Tensor,
        key_mask: Tensor | None = None,
        trace: bool = False,
        trim: BlockTrim = _UNTRIMMED,
    ) -> tuple[Tensor, AttentionTrace | None]:
        """x (B, N, D), key_mask (B, N) or None -> (B, N, D) and the trace if asked for."""
        mixed, record = self.attention(
            self.norm1(x),
            key_mask=key_mask,
            trace=trace,
            queries=trim.packing,
            keys=trim.packing,
            kept_heads=trim.heads,
        )
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
        trim: BlockTrim = _UNTRIMMED,
    ) -> tuple[Tensor, AttentionTrace | None, AttentionTrace | None]:
        """x (B, L, D), mask (B, L), context (C, K, context_width), context_mask (C, K).

        Args:
            memory: keys and values of the cross-attention in place of projecting `context`.
            cache: what the layer keeps between calls; `mask` then counts the keys held as well.
            trim: decisions of trimmers, and how the context is packed.

        Returns:
            states (B, L, D), self-attention trace, cross-attention trace (None unless asked).
        """
        mixed, record = self.attention(
            x,
            key_mask=mask,
            causal=causal,
            trace=trace,
            cache=cache and cache.own,
            kept_heads=trim.heads,
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
                keys=trim.context_packing,
                kept_heads=trim.cross_heads,
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

    def output(
        self, last: Tensor, mask: Tensor | None = None, trimming: TrimRecord | None = None
    ) -> EncoderOutput:
        """The typed output with everything recorded."""
        recorded = self.hidden, self.attention, self.cross_attention
        return EncoderOutput(last, *recorded, mask, trimming)
