"""The BERT stack: text layers, then fusion layers that also attend to the image.

Shape legend: B rows, L tokens, P image tokens, D width.
Source: EfficientVLM (2210.07795) section 3; BERT (1810.04805).
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from models.config import TextConfig
from models.layers import BertLayer, Recorder
from models.outputs import Capture, EncoderOutput

__all__ = ["TextEmbeddings", "TextStack", "bert_layer", "initialise_bert", "run_layers"]


class TextEmbeddings(nn.Module):
    """Word, position and token-type embeddings, summed and normalised."""

    def __init__(self, config: TextConfig) -> None:
        super().__init__()
        self.max_positions = config.max_positions
        self.word = nn.Embedding(config.vocab_size, config.width, padding_idx=config.pad_id)
        self.position = nn.Embedding(config.max_positions, config.width)
        self.token_type = nn.Embedding(config.type_vocab_size, config.width)
        self.norm = nn.LayerNorm(config.width, eps=config.norm_eps)
        self.dropout = nn.Dropout(config.dropout) if config.dropout else nn.Identity()

    def forward(self, ids: Tensor) -> Tensor:
        """(B, L) int64 -> (B, L, D); every token has type 0.

        Raises:
            ValueError: when L is more than the model has positions.
        """
        length = ids.shape[1]
        if length > self.max_positions:
            raise ValueError(
                f"{length} tokens, but text.max_positions is {self.max_positions}; lower max_tokens"
            )
        # The tables are read through their own modules: ZeRO-3 gathers them only there.
        positions = torch.arange(length, device=ids.device)
        kind = self.token_type(torch.zeros_like(positions[:1]))
        return self.dropout(self.norm(self.word(ids) + (self.position(positions) + kind)))


def bert_layer(
    config: TextConfig,
    heads: int,
    units: int,
    cross_heads: int | None = None,
    context_width: int | None = None,
) -> BertLayer:
    """One layer with the widths given and everything else from the text configuration."""
    return BertLayer(
        config.width,
        heads,
        config.head_dim,
        units,
        cross_heads=cross_heads,
        context_width=context_width,
        activation=config.activation,
        gate_position=config.ffn_gate,
        eps=config.norm_eps,
        dropout=config.dropout,
        attention_dropout=config.attention_dropout,
    )


def initialise_bert(module: nn.Module, std: float) -> None:
    """BERT's fresh weights: N(0, std) for linear and embedding weights, zero biases and pad row."""
    for part in module.modules():
        if isinstance(part, nn.Linear | nn.Embedding):
            nn.init.normal_(part.weight, std=std)
        if isinstance(part, nn.Linear) and part.bias is not None:
            nn.init.zeros_(part.bias)
        if isinstance(part, nn.Embedding) and part.padding_idx is not None:
            with torch.no_grad():
                part.weight[part.padding_idx].zero_()


def run_layers(
    layers: list[nn.Module],
    x: Tensor,
    mask: Tensor | None,
    context: Tensor | None,
    context_mask: Tensor | None,
    capture: Capture,
    *,
    causal: bool = False,
) -> EncoderOutput:
    """Runs layers on x (B, L, D); indices of the output count from the first of `layers`."""
    recorder = Recorder(capture)
    recorder.state(0, x)
    for index, layer in enumerate(layers):
        x, own, cross = layer(
            x,
            mask,
            context,
            context_mask,
            causal=causal,
            trace=index in capture.attention,
            cross_trace=index in capture.cross_attention,
        )
        recorder.traces(index, own, cross)
        recorder.state(index + 1, x)
    return recorder.output(x)


class TextStack(nn.Module):
    """Embeddings and one list of layers; those from `text_layers` up have cross-attention."""

    def __init__(self, config: TextConfig, context_width: int) -> None:
        super().__init__()
        self.config = config
        self.embeddings = TextEmbeddings(config)
        cross = (None,) * config.text_layers + tuple(config.cross_heads)
        self.layers = nn.ModuleList(
            bert_layer(config, heads, units, cross_heads, context_width)
            for heads, units, cross_heads in zip(config.heads, config.ffn, cross, strict=True)
        )

    def encode(self, ids: Tensor, mask: Tensor | None, capture: Capture) -> EncoderOutput:
        """Text layers only: ids (B, L), mask (B, L) bool."""
        layers = list(self.layers[: self.config.text_layers])
        return run_layers(layers, self.embeddings(ids), mask, None, None, capture)

    def fuse(
        self,
        states: Tensor,
        mask: Tensor | None,
        image_states: Tensor,
        image_mask: Tensor | None,
        capture: Capture,
    ) -> EncoderOutput:
        """Fusion layers only: states (B, L, D) attend to image_states (B, P, vision width)."""
        layers = list(self.layers[self.config.text_layers :])
        return run_layers(layers, states, mask, image_states, image_mask, capture)

    def multimodal(
        self,
        ids: Tensor,
        mask: Tensor | None,
        image_states: Tensor,
        image_mask: Tensor | None,
        capture: Capture,
    ) -> EncoderOutput:
        """All layers in one pass and one numbering."""
        x = self.embeddings(ids)
        return run_layers(list(self.layers), x, mask, image_states, image_mask, capture)
