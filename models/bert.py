"""The BERT stack: text layers, then fusion layers that also attend to the image.

Shape legend: B rows, L tokens, P image tokens, D width.
Source: EfficientVLM (2210.07795) section 3; BERT (1810.04805).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from models.attention import Attention, KeyValues, LayerCache
from models.layers import BertLayer, Recorder, run_block
from models.outputs import Capture, EncoderOutput
from models.part_configs import TextConfig
from models.streams import BlockTrim
from models.trim_config import TrimmingConfig
from models.trim_pass import Context, TextPass, text_trimmers
from models.trimmers import Trimmers

__all__ = [
    "DecoderCache",
    "ImageMasks",
    "Images",
    "TextEmbeddings",
    "TextStack",
    "bert_layer",
    "contexts_of",
    "initialise_bert",
    "run_layers",
]

# One image for each text, or two of them (forms of NLVR2).
Images = Tensor | Sequence[Tensor]
ImageMasks = Tensor | Sequence[Tensor | None] | None  # bool, or float keep weights


class DecoderCache:
    """What the layers of a decoder keep between calls, so that each token is computed once."""

    def __init__(self, layers: int) -> None:
        self.layers = [LayerCache() for _ in range(layers)]
        self.length = 0

    def __getitem__(self, index: int) -> LayerCache:
        return self.layers[index]

    def reorder(self, rows: Tensor) -> None:
        """Row i continues what row rows[i] was; rows must stay with their own context."""
        for layer in self.layers:
            layer.own.reorder(rows)


class TextEmbeddings(nn.Module):
    """Word, position and token-type embeddings, summed, normalised, and projected where the tables
    are narrower than the layers (ELECTRA).
    """

    def __init__(self, config: TextConfig) -> None:
        super().__init__()
        width, types = config.embedding_width, config.type_vocab_size
        self.max_positions, self.offset = config.max_positions, config.position_offset
        self.word = nn.Embedding(config.vocab_size, width, padding_idx=config.pad_id)
        self.position = nn.Embedding(config.position_offset + config.max_positions, width)
        self.token_type = nn.Embedding(types, width) if types else None
        self.norm = nn.LayerNorm(width, eps=config.norm_eps)
        self.dropout = nn.Dropout(config.dropout) if config.dropout else nn.Identity()
        self.projection = (
            nn.Identity() if config.word_width is None else nn.Linear(width, config.width)
        )

    def forward(self, ids: Tensor, start: int = 0) -> Tensor:
        """(B, L) int64, padded on the right -> (B, L, D); every token has type 0.

        Args:
            start: place of the first token, when those before it were seen in earlier calls.

        Raises:
            ValueError: when there are more tokens than the model has positions.
        """
        stop = start + ids.shape[1]
        if stop > self.max_positions:
            raise ValueError(
                f"{stop} tokens, but text.max_positions is {self.max_positions}; lower max_tokens"
            )
        # The tables are read through their own modules: ZeRO-3 gathers them only there.
        positions = torch.arange(self.offset + start, self.offset + stop, device=ids.device)
        place = self.position(positions)
        if self.token_type is not None:
            place = place + self.token_type(torch.zeros_like(positions[:1]))
        return self.projection(self.dropout(self.norm(self.word(ids) + place)))


def bert_layer(
    config: TextConfig,
    heads: int,
    units: int,
    cross_heads: int | None = None,
    context_width: int | None = None,
    shared_heads: int | None = None,
    owner: bool = True,
) -> BertLayer:
    """One layer with the widths given and everything else from the text configuration."""
    return BertLayer(
        config.width,
        heads,
        config.head_dim,
        units,
        cross_heads=cross_heads,
        context_width=context_width,
        shared_heads=shared_heads,
        owner=owner,
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


def contexts_of(states: Images, mask: ImageMasks, wanted: int) -> list[Context]:
    """(states, mask) of each image. Raises ValueError unless there are `wanted` of them."""
    images = [states] if isinstance(states, Tensor) else list(states)
    masks = [mask] if mask is None or isinstance(mask, Tensor) else list(mask)
    if mask is None:
        masks = [None] * len(images)
    if not len(images) == len(masks) == wanted:
        raise ValueError(
            f"the model reads {wanted} image(s) for a text: got states of {len(images)} and "
            f"masks of {len(masks)}"
        )
    return list(zip(images, masks, strict=True))


def _shared(
    owner: Attention | None, cross: Attention, context: Tensor, trace: bool, compact: bool
) -> KeyValues | None:
    """Keys and values for the second layer of a pair, projected by the first, its owner."""
    if owner is None or cross.owner or not cross.heads:
        return None
    return owner.keys_values(context, cross, trace=trace, compact=compact)


def run_layers(
    layers: Sequence[nn.Module],
    x: Tensor,
    mask: Tensor | None,
    contexts: Sequence[Context],
    capture: Capture,
    *,
    causal: bool = False,
    cache: DecoderCache | None = None,
    trimmers: Trimmers | None = None,
    first: int = 0,
    trim: TextPass | None = None,
) -> EncoderOutput:
    """Runs layers on x (B, L, D); indices of the output count from the first of `layers`.

    Args:
        contexts: what cross-attention reads, states and mask; none for text layers. With two,
            layers with cross-attention take turns, and the second of each two attends through the
            key and value projection of the first.
        trimmers: of the whole stack, in which `layers` begin with number `first`.
        trim: a pass that other layers continue; then mask, contexts and trimmers are its own.
    """
    recorder, turn = Recorder(capture), 0
    recorder.state(0, x)
    owner: Attention | None = None
    trim = trim or TextPass(x, mask, contexts, trimmers, first, causal)
    for index, layer in enumerate(layers):
        assert isinstance(layer, BertLayer)
        context, context_mask, packing, memory, place = None, None, None, None, None
        held = None if cache is None else cache[index]
        if layer.has_cross:
            if not contexts:
                raise ValueError("layers with cross-attention need image states to read")
            place, turn = turn % len(contexts), turn + 1
        x = trim.own(index, x, place)
        gates = layer.attention.gate.z, layer.cross_attention.gate.z if layer.has_cross else None
        own_heads, cross_heads = trim.heads(index, x, place, held, gates)
        if place is not None:
            context, context_mask, packing = trim.context(index, x, place, held)
            cross = layer.cross_attention
            memory = _shared(owner, cross, context, index in capture.cross_attention, cache is None)
            owner = cross
        x, own_trace, cross_trace = run_block(
            layer,
            x,
            trim.stream.mask,
            context,
            context_mask,
            causal=causal,
            trace=index in capture.attention,
            cross_trace=index in capture.cross_attention,
            memory=memory,
            cache=held,
            trim=BlockTrim(None, packing, own_heads, cross_heads),
        )
        recorder.traces(index, own_trace, cross_trace)
        recorder.state(index + 1, x)
    if cache is not None:
        cache.length += x.shape[1]
    return recorder.output(x, trim.stream.mask, trim.record)


class TextStack(nn.Module):
    """Embeddings and one list of layers; those from `text_layers` up have cross-attention.

    With `pair_heads` in the configuration, two consecutive fusion layers read one image each.
    """

    def __init__(
        self, config: TextConfig, context_width: int, trimming: TrimmingConfig | None = None
    ) -> None:
        super().__init__()
        self.config = config
        self.embeddings = TextEmbeddings(config)
        cross = (None,) * config.text_layers + tuple(config.cross_heads)
        pairs = config.pair_heads
        self.layers = nn.ModuleList()
        for index, heads in enumerate(config.heads):
            place = index - config.text_layers
            self.layers.append(
                bert_layer(
                    config,
                    heads,
                    config.ffn[index],
                    cross[index],
                    context_width,
                    shared_heads=pairs[place // 2] if pairs is not None and place >= 0 else None,
                    owner=pairs is None or place % 2 == 0,
                )
            )
        self.trimmers = None if trimming is None else text_trimmers(config, trimming, context_width)

    def _contexts(self, states: Images, mask: ImageMasks) -> list[Context]:
        return contexts_of(states, mask, 1 if self.config.pair_heads is None else 2)

    def encode(self, ids: Tensor, mask: Tensor | None, capture: Capture) -> EncoderOutput:
        """Text layers only: ids (B, L), mask (B, L) bool."""
        layers = list(self.layers[: self.config.text_layers])
        x = self.embeddings(ids)
        return run_layers(layers, x, mask, (), capture, trimmers=self.trimmers)

    def fuse(
        self,
        states: Tensor,
        mask: Tensor | None,
        image_states: Images,
        image_mask: ImageMasks,
        capture: Capture,
    ) -> EncoderOutput:
        """Fusion layers only: states (B, L, D) attend to image_states, see `XVLM.fuse`."""
        first = self.config.text_layers
        layers, contexts = list(self.layers[first:]), self._contexts(image_states, image_mask)
        return run_layers(
            layers, states, mask, contexts, capture, trimmers=self.trimmers, first=first
        )

    def multimodal(
        self,
        ids: Tensor,
        mask: Tensor | None,
        image_states: Images,
        image_mask: ImageMasks,
        capture: Capture,
        *,
        causal: bool = False,
        cache: DecoderCache | None = None,
    ) -> EncoderOutput:
        """All layers in one pass and one numbering.

        Args:
            causal: tokens see earlier ones only: the stack is a decoder (captioning).
            cache: then ids are the tokens after those that the cache has seen.
        """
        x = self.embeddings(ids, 0 if cache is None else cache.length)
        contexts = self._contexts(image_states, image_mask)
        return run_layers(
            list(self.layers),
            x,
            mask,
            contexts,
            capture,
            causal=causal,
            cache=cache,
            trimmers=self.trimmers,
        )
