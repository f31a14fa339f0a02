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

from models.part_configs import (
    DecoderConfig,
    ImageFusionConfig,
    TextConfig,
    VisionConfig,
    check_pairs,
    decoder_of,
    with_pairs,
    without_pairs,
)
from models.trim_config import TrimmingConfig

__all__ = ["Form", "HEADS", "ModelConfig", "TrimmingConfig"]

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


@dataclass(frozen=True, kw_only=True, config=ConfigDict(extra="forbid"))
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
        check_pairs(text)
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
            decoder = self.decoder if keep else decoder_of(self.text, decoder_layers)
        paired = form in PAIRED and self.image_fusion is None
        text = with_pairs(self.text) if paired else without_pairs(self.text)
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
