"""The shapes of a model's parts: vision encoder, text and fusion stack, decoder, image stream.

Pruning makes per-layer widths smaller here (heads kept, FFN units kept).
"""

from __future__ import annotations

from dataclasses import replace
from typing import Literal

from pydantic import ConfigDict
from pydantic.dataclasses import dataclass

__all__ = [
    "Activation",
    "DecoderConfig",
    "FinalNorm",
    "GatePosition",
    "ImageFusionConfig",
    "Pooling",
    "TextConfig",
    "VisionConfig",
    "check_pairs",
    "decoder_of",
    "with_pairs",
    "without_pairs",
]

Activation = Literal["gelu", "quick_gelu", "gelu_tanh"]
GatePosition = Literal["pre", "post"]
Pooling = Literal["class", "mean", "map"]
FinalNorm = Literal["tokens", "pooled", "none"]
_STRICT = ConfigDict(extra="forbid")


@dataclass(frozen=True, kw_only=True, config=_STRICT)
class VisionConfig:
    """A plain ViT; the defaults are CLIP's ViT-B/16 tower (EfficientVLM section 3).

    Attributes:
        backbone: where the shape came from ("timm/NAME"), a note; see `models.backbones`.
        heads, ffn: per layer: attention heads kept and FFN units kept.
        region_layers: the last layers that apply the region mask (teacher 4, student 2).
        ffn_gate: FFN gates multiply the input ("pre") or the output ("post") of the activation.
        class_token: a learned token in front of the patches (SigLIP has none).
        register_tokens: learned tokens between class token and patches; they are no output.
        prefix_positions: class and register tokens have positions (DINOv2 with registers: not).
        pooling: what the first output token is: the "class" token, the "mean" of the patches, or
            attention pooling of the patches ("map").
        pool_ffn: FFN units of attention pooling.
        pre_norm: a norm between the embeddings and the blocks (CLIP has one, a plain ViT has not).
        final_norm: what the last norm acts on: all "tokens", the "pooled" token only, or "none".
        patch_bias, qkv_bias: the patch embedding, and the attentions' inputs, have biases.
        layer_scale: initial value of learned per-channel factors on the residuals; None has none.
        drop_path: stochastic depth of the last block, growing linearly from 0.
    """

    backbone: str | None = None
    image_size: int = 224
    patch_size: int = 16
    width: int = 768
    head_dim: int = 64
    heads: tuple[int, ...] = (12,) * 12
    ffn: tuple[int, ...] = (3072,) * 12
    region_layers: int = 4
    activation: Activation = "quick_gelu"
    norm_eps: float = 1e-5
    ffn_gate: GatePosition = "pre"
    class_token: bool = True
    register_tokens: int = 0
    prefix_positions: bool = True
    pooling: Pooling = "class"
    pool_ffn: int = 0
    pre_norm: bool = True
    final_norm: FinalNorm = "tokens"
    patch_bias: bool = False
    qkv_bias: bool = True
    layer_scale: float | None = None
    drop_path: float = 0.0

    def __post_init__(self) -> None:
        if self.pooling == "class" and not self.class_token:
            raise ValueError(
                'vision.pooling "class" needs vision.class_token; choose "mean" or "map"'
            )
        if (self.pooling == "map") != (self.pool_ffn > 0):
            raise ValueError('vision.pool_ffn belongs to vision.pooling "map", and only to it')

    @property
    def layers(self) -> int:
        return len(self.ffn)

    @property
    def prefix_tokens(self) -> int:
        """Tokens in front of the patches inside the blocks: class token and registers."""
        return int(self.class_token) + self.register_tokens

    @property
    def patches(self) -> int:
        return (self.image_size // self.patch_size) ** 2

    @property
    def tokens(self) -> int:
        """Tokens inside the blocks: class token, registers, patches."""
        return self.prefix_tokens + self.patches

    @property
    def output_tokens(self) -> int:
        """Tokens that the encoder returns: one for the whole image, then the patches."""
        return 1 + self.patches

    @property
    def position_prefix(self) -> int:
        """Rows of the position table in front of those of the patches."""
        return self.prefix_tokens if self.prefix_positions else 0

    @property
    def position_rows(self) -> int:
        """Rows of the position table."""
        return self.position_prefix + self.patches


@dataclass(frozen=True, kw_only=True, config=_STRICT)
class TextConfig:
    """One BERT stack split in text layers (below `text_layers`) and fusion layers (from it up).

    Attributes:
        backbone: where the shape came from ("hf/PATH"), a note; see `models.backbones`.
        max_positions: tokens that can be read.
        position_offset: unused rows at the start of the position table (RoBERTa: 2).
        type_vocab_size: token types; 0 has no such table (DistilBERT).
        word_width: width of the word table when a projection follows it (ELECTRA); None is `width`.
        heads, ffn: per layer of the whole stack.   cross_heads: per FUSION layer.
        pair_heads: for two images: fusion layers 2j and 2j + 1 read image 0 and image 1 through ONE
            key and value projection of pair_heads[j] heads. The first of the two uses the first
            cross_heads[2j] of them, the second the last cross_heads[2j + 1]; a dense model uses all
            in both. None: every fusion layer stands alone and there is one image.
        init_std: deviation of fresh weights.
    """

    backbone: str | None = None
    vocab_size: int = 30522
    max_positions: int = 512
    position_offset: int = 0
    type_vocab_size: int = 2
    width: int = 768
    word_width: int | None = None
    head_dim: int = 64
    text_layers: int = 6
    heads: tuple[int, ...] = (12,) * 12
    cross_heads: tuple[int, ...] = (12,) * 6
    pair_heads: tuple[int, ...] | None = None
    ffn: tuple[int, ...] = (3072,) * 12
    activation: Activation = "gelu"
    norm_eps: float = 1e-12
    dropout: float = 0.1
    attention_dropout: float = 0.1
    ffn_gate: GatePosition = "post"
    pad_id: int = 0
    init_std: float = 0.02

    @property
    def layers(self) -> int:
        return len(self.ffn)

    @property
    def embedding_width(self) -> int:
        """Width of the word, position and token-type tables."""
        return self.width if self.word_width is None else self.word_width

    @property
    def fusion_layers(self) -> int:
        return len(self.ffn) - self.text_layers


@dataclass(frozen=True, kw_only=True, config=_STRICT)
class DecoderConfig:
    """Answer decoder: causal BERT layers, cross-attention in each, own embeddings, tied LM head.

    Width, head size, vocabulary, activation, eps and dropout are those of TextConfig.
    """

    heads: tuple[int, ...] = (12,) * 6
    cross_heads: tuple[int, ...] = (12,) * 6
    ffn: tuple[int, ...] = (3072,) * 6

    @property
    def layers(self) -> int:
        return len(self.ffn)


@dataclass(frozen=True, kw_only=True, config=_STRICT)
class ImageFusionConfig:
    """The image stream of a two-stream fusion (METER, 2111.02387): BERT layers beside the fusion
    layers of the text stack, see `models.two_stream`.

    Width, head size, activation, eps and dropout are those of TextConfig.

    Attributes:
        heads, cross_heads, ffn: per fusion layer.
    """

    heads: tuple[int, ...] = (12,) * 6
    cross_heads: tuple[int, ...] = (12,) * 6
    ffn: tuple[int, ...] = (3072,) * 6


def _fusion_widths(text: TextConfig) -> list[tuple[int, int, int]]:
    """(heads, cross heads, units) of each fusion layer."""
    first = text.text_layers
    return list(zip(text.heads[first:], text.cross_heads, text.ffn[first:], strict=True))


def _with_fusion(
    text: TextConfig, widths: list[tuple[int, int, int]], pair_heads: tuple[int, ...] | None
) -> TextConfig:
    first = text.text_layers
    return replace(
        text,
        heads=text.heads[:first] + tuple(own for own, _, _ in widths),
        cross_heads=tuple(cross for _, cross, _ in widths),
        ffn=text.ffn[:first] + tuple(units for _, _, units in widths),
        pair_heads=pair_heads,
    )


def check_pairs(text: TextConfig) -> None:
    """Raises ValueError when pairs of fusion layers do not fit their shared heads."""
    if text.pair_heads is None:
        return
    if 2 * len(text.pair_heads) != text.fusion_layers:
        raise ValueError(
            f"text.pair_heads has {len(text.pair_heads)} entries for {text.fusion_layers} fusion "
            "layers; it needs one per two consecutive ones"
        )
    for pair, shared in enumerate(text.pair_heads):
        first, second = text.cross_heads[2 * pair : 2 * pair + 2]
        if not max(first, second) <= shared <= first + second:
            raise ValueError(
                f"text.pair_heads: pair {pair} shares {shared} heads, its layers use {first} and "
                f"{second}; the shared ones are at least the larger and at most both together"
            )


def with_pairs(text: TextConfig) -> TextConfig:
    """Every fusion layer twice in a row, both reading the same key and value heads."""
    if text.pair_heads is not None:
        return text
    doubled = [widths for widths in _fusion_widths(text) for _ in range(2)]
    return _with_fusion(text, doubled, text.cross_heads)


def without_pairs(text: TextConfig) -> TextConfig:
    """One layer of each pair. Raises ValueError when the two of a pair have unequal widths."""
    if text.pair_heads is None:
        return text
    widths = _fusion_widths(text)
    for pair, (first, second) in enumerate(zip(widths[::2], widths[1::2], strict=True)):
        if first != second or first[1] != text.pair_heads[pair]:
            raise ValueError(
                f"the layers of pair {pair} were pruned differently; no other form follows from it"
            )
    return _with_fusion(text, widths[::2], None)


def decoder_of(text: TextConfig, layers: int | None) -> DecoderConfig:
    """The decoder that starts from the fusion layers. Raises ValueError when `layers` are not theirs
    and theirs are unequal.
    """
    widths = _fusion_widths(without_pairs(text))
    if layers is not None and layers != len(widths):
        if len(set(widths)) != 1:
            raise ValueError(
                f"{layers} decoder layers from {len(widths)} fusion layers of unequal widths; "
                "leave decoder_layers out or write the decoder's widths"
            )
        widths = widths[:1] * layers
    heads, cross, ffn = (tuple(part) for part in zip(*widths, strict=True))
    return DecoderConfig(heads=heads, cross_heads=cross, ffn=ffn)
