"""ModelConfig: the shape of a model, dense or pruned, as one JSON-serialisable value.

A pruned model is the same class with smaller per-layer widths here (heads kept, FFN units kept).
"""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, Literal, cast, get_args

from pydantic import ConfigDict, TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass

from models.trim_config import TrimmingConfig

__all__ = [
    "DecoderConfig",
    "Form",
    "HEADS",
    "ImageFusionConfig",
    "ModelConfig",
    "TextConfig",
    "TrimmingConfig",
    "VisionConfig",
]

Form = Literal["pretrain", "retrieval", "vqa", "nlvr2_pretrain", "nlvr2", "captioning", "grounding"]
# The modules of each form beside `vision` and `text`.
HEADS: dict[Form, tuple[str, ...]] = {
    "pretrain": (
        "image_projection",
        "text_projection",
        "contrastive",
        "itm_head",
        "bbox_head",
        "mlm_head",
    ),
    "retrieval": ("image_projection", "text_projection", "contrastive", "itm_head"),
    "vqa": ("decoder",),
    "nlvr2_pretrain": ("image_projection", "ta_head"),
    "nlvr2": ("cls_head",),
    "captioning": ("lm_head",),
    "grounding": ("bbox_head",),
}
PAIRED: tuple[Form, ...] = ("nlvr2_pretrain", "nlvr2")
# What a fusion of two streams has no form for: captions need a stream that never sees later words,
# and the domain stage of NLVR2 is X-VLM's.
ONE_STREAM: tuple[Form, ...] = ("captioning", "nlvr2_pretrain")
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


@dataclass(frozen=True, kw_only=True, config=_STRICT)
class ModelConfig:
    """A whole model. `form` says which modules stand beside the vision and the text encoder.

    pretrain: projections, temperature, matching, box and masked-token heads.
    retrieval: projections, temperature and matching head; also the weakly supervised grounding.
    vqa: an answer decoder.   captioning: `lm_head`, the text encoder itself is the decoder.
    nlvr2: fusion layers in pairs (`TextConfig.pair_heads`) and `cls_head`, two classes.
    nlvr2_pretrain: pairs, `ta_head` (which image, or none, fits) and the image projection.
    grounding: the box head.
    image_fusion: None: the fusion layers update the text alone and read the image as it left the
        vision encoder. Else image states are updated beside it; NLVR2 then fuses the text with each
        image by itself, and the forms in `ONE_STREAM` do not exist.
    trimming: token and head trimmers (`models.trimmers`); None has none.
    """

    name: str = "xvlm"
    form: Form = "pretrain"
    vision: VisionConfig = VisionConfig()
    text: TextConfig = TextConfig()
    decoder: DecoderConfig | None = None
    image_fusion: ImageFusionConfig | None = None
    embed_dim: int = 256
    image_mean: tuple[float, float, float] = (0.48145466, 0.4578275, 0.40821073)
    image_std: tuple[float, float, float] = (0.26862954, 0.26130258, 0.27577711)
    trimming: TrimmingConfig | None = None

    def __post_init__(self) -> None:
        vision, text, decoder = self.vision, self.text, self.decoder
        if vision.image_size % vision.patch_size:
            raise ValueError(
                f"vision.image_size {vision.image_size} is not a multiple of patch_size "
                f"{vision.patch_size}"
            )
        if len(vision.heads) != vision.layers:
            raise ValueError("vision.heads and vision.ffn must have one entry per layer each")
        if len(text.heads) != text.layers or len(text.cross_heads) != text.fusion_layers:
            raise ValueError(
                "text.heads needs one entry per layer, text.cross_heads one per fusion layer"
            )
        paired = self.form in PAIRED and self.image_fusion is None
        if paired != (text.pair_heads is not None):
            raise ValueError(
                f"text.pair_heads belongs to forms {PAIRED} of one-stream models, and only to them"
            )
        _check_image_fusion(self)
        _check_pairs(text)
        if (self.form == "vqa") != (decoder is not None):
            raise ValueError('a decoder belongs to form "vqa", and only to it')
        if (
            decoder is not None
            and not len(decoder.heads) == len(decoder.cross_heads) == decoder.layers
        ):
            raise ValueError(
                "decoder.heads, cross_heads and ffn must have one entry per layer each"
            )
        _check_trimming(self)

    @property
    def context_width(self) -> int:
        """Width of the image states that fusion layers read."""
        return self.vision.width if self.image_fusion is None else self.text.width

    @property
    def fused_tokens(self) -> int:
        """First tokens of the fused states that heads read: one, or one of each stream and image."""
        if self.image_fusion is None:
            return 1
        return 4 if self.form in PAIRED else 2

    def as_form(
        self, form: str, *, decoder_layers: int | None = None, image_size: int | None = None
    ) -> ModelConfig:
        """The same model in another form, as it is built before task fine-tuning.

        Args:
            decoder_layers: for "vqa"; None keeps a decoder that is there, and else takes as many
                layers as there are fusion layers, with their widths (the decoder starts from them).
            image_size: None keeps the size.

        Raises:
            ValueError: on an unknown form, or when the widths of the layers do not follow.
        """
        if form not in get_args(Form):
            raise ValueError(f"form {form!r} is unknown; choose one of {get_args(Form)}")
        if self.trimming is not None and form != self.form:
            raise ValueError(
                f"trimmers belong to form {self.form!r}: make form {form!r} of a model without "
                "them, and add them to it"
            )
        decoder = None
        if form == "vqa":
            keep = self.decoder is not None and decoder_layers is None
            decoder = self.decoder if keep else _decoder(self.text, decoder_layers)
        paired = form in PAIRED and self.image_fusion is None
        text = _paired(self.text) if paired else _unpaired(self.text)
        vision = replace(self.vision, image_size=image_size or self.vision.image_size)
        return replace(self, form=cast(Form, form), vision=vision, text=text, decoder=decoder)

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    def save(self, path: Path) -> None:
        path.write_text(json.dumps(self.to_dict(), indent=2) + "\n")

    @classmethod
    def from_dict(cls, values: dict[str, Any], where: str = "model config") -> ModelConfig:
        """The configuration; vision.backbone and text.backbone fill in what is not given.

        Raises:
            ValueError: naming `where` and the key, on unknown keys or wrong values.
            ValueError, FileNotFoundError: on a backbone that does not fit or is not there.
        """
        sections = (values.get("vision"), values.get("text"))
        if any(isinstance(section, dict) and section.get("backbone") for section in sections):
            from models.backbones import resolve  # it needs timm, which most models do not

            values = resolve(values, where)
        try:
            return TypeAdapter(cls).validate_python(values)
        except ValidationError as error:
            first = error.errors()[0]
            key = ".".join(str(part) for part in first["loc"])
            raise ValueError(f"{where}: {key}: {first['msg']}") from error

    @classmethod
    def load(cls, path: Path) -> ModelConfig:
        """Reads `save`'s file. Raises ValueError naming the file, and the key where one is wrong."""
        try:
            values = json.loads(path.read_text())
        except ValueError as error:  # not JSON, or not UTF-8
            raise ValueError(f"{path}: not a readable JSON file: {error}") from error
        return cls.from_dict(values, where=str(path))


def _check_image_fusion(config: ModelConfig) -> None:
    """Raises ValueError when the image stream does not fit the fusion layers or the form."""
    stream, layers = config.image_fusion, config.text.fusion_layers
    if stream is None:
        return
    if config.form in ONE_STREAM:
        raise ValueError(
            f"form {config.form!r} does not exist for two-stream fusion (image_fusion); choose one "
            f"of {tuple(form for form in get_args(Form) if form not in ONE_STREAM)}"
        )
    if not len(stream.heads) == len(stream.cross_heads) == len(stream.ffn) == layers > 0:
        raise ValueError(
            "image_fusion.heads, cross_heads and ffn must have one entry per fusion layer each, and "
            f"one layer at least ({layers})"
        )
    if config.trimming is not None and "fusion" in config.trimming.heads:
        raise ValueError(
            'trimming.heads: "fusion" belongs to one-stream fusion; with image_fusion choose '
            '"vision" and "text"'
        )


def _check_trimming(config: ModelConfig) -> None:
    """Raises ValueError when trimmers do not fit the model."""
    trimming, vision, text = config.trimming, config.vision, config.text
    if trimming is None:
        return
    trimming.check(config.form, vision.layers, text.text_layers, text.fusion_layers)
    for name in ("vision_keep", "fusion_keep"):
        counts = getattr(trimming, name)
        if counts and counts[0] > vision.patches:
            raise ValueError(
                f"trimming.{name} keeps {counts[0]} tokens, an image has {vision.patches} patches"
            )
    if trimming.min_tokens < 1 and vision.pooling != "class":
        raise ValueError('trimming.min_tokens is at least 1 unless vision.pooling is "class"')


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


def _check_pairs(text: TextConfig) -> None:
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


def _paired(text: TextConfig) -> TextConfig:
    """Every fusion layer twice in a row, both reading the same key and value heads."""
    if text.pair_heads is not None:
        return text
    doubled = [widths for widths in _fusion_widths(text) for _ in range(2)]
    return _with_fusion(text, doubled, text.cross_heads)


def _unpaired(text: TextConfig) -> TextConfig:
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


def _decoder(text: TextConfig, layers: int | None) -> DecoderConfig:
    """The decoder that starts from the fusion layers."""
    widths = _fusion_widths(_unpaired(text))
    if layers is not None and layers != len(widths):
        if len(set(widths)) != 1:
            raise ValueError(
                f"{layers} decoder layers from {len(widths)} fusion layers of unequal widths; "
                "leave decoder_layers out or write the decoder's widths"
            )
        widths = widths[:1] * layers
    heads, cross, ffn = (tuple(part) for part in zip(*widths, strict=True))
    return DecoderConfig(heads=heads, cross_heads=cross, ffn=ffn)
