"""Named models: `presets.create("efficientvlm")`, `presets.config("efficientvlm")`.

Overrides are nested or dotted: `config("blocksworld-teacher", text={"vocab_size": 300})` or
`config(name, **{"vision.image_size": 64})`; `form="vqa"` gives the question-answering form. An
override of `vision.backbone` or `text.backbone` replaces that whole section (`models.backbones`).
"""

from __future__ import annotations

import difflib
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from models.config import ModelConfig
from models.part_configs import ImageFusionConfig, TextConfig, VisionConfig

if TYPE_CHECKING:
    from models.xvlm import XVLM

__all__ = ["config", "create", "names"]

# Image sizes of the published task models; the others stay at the size of pre-training.
_XVLM_PIXELS = {
    "vqa": 480,
    "retrieval": 384,
    "nlvr2": 384,
    "captioning": 384,
    "grounding": 384,
}
_METER_PIXELS = {"vqa": 576, "retrieval": 384, "nlvr2": 288, "grounding": 384}


def _full(name: str, vision: int, text: int, fusion: int, region: int) -> ModelConfig:
    """CLIP ViT-B/16 and BERT-base widths (EfficientVLM section 3)."""
    return ModelConfig(
        name=name,
        vision=VisionConfig(heads=(12,) * vision, ffn=(3072,) * vision, region_layers=region),
        text=TextConfig(
            text_layers=text,
            heads=(12,) * (text + fusion),
            cross_heads=(12,) * fusion,
            ffn=(3072,) * (text + fusion),
        ),
    )


def _small(name: str, width: int, vision: int, text: int, fusion: int, region: int) -> ModelConfig:
    """A model for the embedded data set. On a CPU the exact gelu is the fastest (by a tenth)."""
    heads, ffn = max(1, width // 32), 4 * width
    return ModelConfig(
        name=name,
        embed_dim=max(16, width // 2),
        vision=VisionConfig(
            image_size=48,
            patch_size=8,
            width=width,
            head_dim=min(32, width),
            heads=(heads,) * vision,
            ffn=(ffn,) * vision,
            region_layers=region,
            activation="gelu",
        ),
        text=TextConfig(
            vocab_size=256,
            max_positions=64,
            width=width,
            head_dim=min(32, width),
            text_layers=text,
            heads=(heads,) * (text + fusion),
            cross_heads=(heads,) * fusion,
            ffn=(ffn,) * (text + fusion),
            activation="gelu",
            dropout=0.0,
            attention_dropout=0.0,
            init_std=0.05,  # 0.02 is made for width 768; the same output scale at these widths
        ),
    )


def _two_streams(model: ModelConfig) -> ModelConfig:
    """With an image stream of the fusion layers' widths."""
    text, first = model.text, model.text.text_layers
    stream = ImageFusionConfig(
        heads=text.heads[first:], cross_heads=text.cross_heads, ffn=text.ffn[first:]
    )
    return replace(model, image_fusion=stream)


def _meter(name: str) -> ModelConfig:
    """CLIP ViT-B/16 without its last block, RoBERTa-base, six fusion layers of two streams each
    (METER, 2111.02387, and its released code)."""
    model = _full(name, 11, 12, 6, 4)
    text = replace(
        model.text,
        vocab_size=50265,
        position_offset=2,
        pad_id=1,
        type_vocab_size=1,
        norm_eps=1e-5,
    )
    vision = replace(model.vision, image_size=288)
    return _two_streams(replace(model, vision=vision, text=text))


_PRESETS = {
    preset.name: preset
    for preset in (
        _full("xvlm-clip-base", 12, 6, 6, 4),
        _full("efficientvlm", 6, 3, 3, 2),
        _small("blocksworld-teacher", 128, 4, 2, 2, 2),
        _small("blocksworld-student", 128, 2, 1, 1, 1),
        _small("blocksworld-micro-teacher", 32, 4, 2, 2, 2),
        _small("blocksworld-micro-student", 32, 2, 1, 1, 1),
        _meter("meter-clip-base"),
        _two_streams(_small("blocksworld-meter-teacher", 128, 4, 2, 2, 2)),
        _two_streams(_small("blocksworld-meter-student", 128, 2, 1, 1, 1)),
        _two_streams(_small("blocksworld-meter-micro", 32, 4, 2, 2, 2)),
    )
}
_FULL_SIZE = {
    "xvlm-clip-base": _XVLM_PIXELS,
    "efficientvlm": _XVLM_PIXELS,
    "meter-clip-base": _METER_PIXELS,
}


def names() -> tuple[str, ...]:
    """The preset names."""
    return tuple(_PRESETS)


def _merge(values: dict[str, Any], changes: dict[str, Any]) -> None:
    """Writes nested or dotted changes into a nested dict, in place."""
    for key, change in changes.items():
        head, _, rest = key.partition(".")
        change = {rest: change} if rest else change
        if isinstance(change, dict) and isinstance(values.setdefault(head, {}), dict):
            _merge(values[head], change)
        else:
            values[head] = change


def config(name: str, *, form: str = "pretrain", **overrides: Any) -> ModelConfig:
    """The configuration of a preset.

    Raises:
        ValueError: on an unknown preset, form, or overridden key.
    """
    if name not in _PRESETS:
        near = difflib.get_close_matches(name, _PRESETS, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise ValueError(f"no preset {name!r}{hint} (presets: {', '.join(_PRESETS)})")
    preset, changes = _PRESETS[name], {}
    _merge(changes, overrides)
    pixels = _FULL_SIZE.get(name, {})
    backbones = {
        section: changes.pop(section)
        for section in ("vision", "text")
        if isinstance(changes.get(section), dict) and changes[section].get("backbone")
    }
    if backbones:
        preset = _with_backbones(preset, backbones)
        pixels = {} if "vision" in backbones else pixels
    if form != "pretrain":
        preset = preset.as_form(form, image_size=pixels.get(form))
    values = preset.to_dict()
    _merge(values, changes)
    return ModelConfig.from_dict(values, where=f"preset {name}")


def _with_backbones(preset: ModelConfig, sections: dict[str, dict[str, Any]]) -> ModelConfig:
    """The preset with whole sections from elsewhere: its own fields must not win over theirs."""
    values = preset.to_dict() | sections
    if "vision" in sections:  # the backbone has its own pixel statistics
        del values["image_mean"], values["image_std"]
    return ModelConfig.from_dict(values, where=f"preset {preset.name}")


def create(name: str, *, form: str = "pretrain", **overrides: Any) -> XVLM:
    """A freshly initialised model; arguments as for `config`."""
    from models.xvlm import XVLM  # keeps `config` free of the model's import cost

    return XVLM(config(name, form=form, **overrides))
