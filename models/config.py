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

__all__ = ["DecoderConfig", "ModelConfig", "TextConfig", "VisionConfig", "Form"]

Form = Literal["pretrain", "vqa"]
Activation = Literal["gelu", "quick_gelu", "gelu_tanh"]
GatePosition = Literal["pre", "post"]
_STRICT = ConfigDict(extra="forbid")


@dataclass(frozen=True, kw_only=True, config=_STRICT)
class VisionConfig:
    """CLIP-style ViT (EfficientVLM section 3; CLIP ViT-B/16 vision tower).

    Attributes:
        heads, ffn: per layer: attention heads kept and FFN units kept.
        region_layers: the last layers that apply the region mask (teacher 4, student 2).
        ffn_gate: FFN gates multiply the input ("pre") or the output ("post") of the activation.
        pre_norm: a norm between the embeddings and the blocks (CLIP has one, a plain ViT has not).
        patch_bias: the patch embedding has a bias.
        layer_scale: initial value of learned per-channel factors on the residuals; None has none.
        drop_path: stochastic depth of the last block, growing linearly from 0.
    """

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
    pre_norm: bool = True
    patch_bias: bool = False
    layer_scale: float | None = None
    drop_path: float = 0.0

    @property
    def layers(self) -> int:
        return len(self.ffn)

    @property
    def tokens(self) -> int:
        """1 + number of patches."""
        return 1 + (self.image_size // self.patch_size) ** 2


@dataclass(frozen=True, kw_only=True, config=_STRICT)
class TextConfig:
    """One BERT stack split in text layers (below `text_layers`) and fusion layers (from it up).

    Attributes:
        heads, ffn: per layer of the whole stack.   cross_heads: per FUSION layer.
        init_std: deviation of fresh weights.
    """

    vocab_size: int = 30522
    max_positions: int = 512
    type_vocab_size: int = 2
    width: int = 768
    head_dim: int = 64
    text_layers: int = 6
    heads: tuple[int, ...] = (12,) * 12
    cross_heads: tuple[int, ...] = (12,) * 6
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
class ModelConfig:
    """A whole model. `form` says which heads exist.

    pretrain: vision, text, projections, temperature, ITM, box and MLM heads.
    vqa: vision, text (no MLM), decoder.
    """

    name: str = "xvlm"
    form: Form = "pretrain"
    vision: VisionConfig = VisionConfig()
    text: TextConfig = TextConfig()
    decoder: DecoderConfig | None = None
    embed_dim: int = 256
    image_mean: tuple[float, float, float] = (0.48145466, 0.4578275, 0.40821073)
    image_std: tuple[float, float, float] = (0.26862954, 0.26130258, 0.27577711)

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
        if (self.form == "vqa") != (decoder is not None):
            raise ValueError('a decoder belongs to form "vqa", and only to it')
        if (
            decoder is not None
            and not len(decoder.heads) == len(decoder.cross_heads) == decoder.layers
        ):
            raise ValueError(
                "decoder.heads, cross_heads and ffn must have one entry per layer each"
            )

    def as_form(
        self, form: str, *, decoder_layers: int | None = None, image_size: int | None = None
    ) -> ModelConfig:
        """The same model in another form, as it is built before task fine-tuning.

        Args:
            decoder_layers: for "vqa"; None takes as many as there are fusion layers, with their
                widths (the decoder starts from them).   image_size: None keeps the size.

        Raises:
            ValueError: on an unknown form, or when the decoder's widths do not follow.
        """
        if form not in get_args(Form):
            raise ValueError(f"form {form!r} is unknown; choose one of {get_args(Form)}")
        text = self.text
        decoder = None
        if form == "vqa":
            widths = list(
                zip(
                    text.heads[text.text_layers :],
                    text.cross_heads,
                    text.ffn[text.text_layers :],
                    strict=True,
                )
            )
            if decoder_layers is not None and decoder_layers != len(widths):
                if len(set(widths)) != 1:
                    raise ValueError(
                        f"{decoder_layers} decoder layers from {len(widths)} fusion layers of "
                        "unequal widths; leave decoder_layers out or write the decoder's widths"
                    )
                widths = widths[:1] * decoder_layers
            heads, cross, ffn = (tuple(part) for part in zip(*widths, strict=True))
            decoder = DecoderConfig(heads=heads, cross_heads=cross, ffn=ffn)
        vision = replace(self.vision, image_size=image_size or self.vision.image_size)
        return replace(self, form=cast(Form, form), vision=vision, decoder=decoder)

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    def save(self, path: Path) -> None:
        path.write_text(json.dumps(self.to_dict(), indent=2) + "\n")

    @classmethod
    def from_dict(cls, values: dict[str, Any], where: str = "model config") -> ModelConfig:
        """Raises ValueError, naming `where` and the key, on unknown keys or wrong values."""
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
