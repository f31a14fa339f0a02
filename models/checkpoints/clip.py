"""CLIP's vision tower into the vision encoder: transformers' names and OpenAI's (open_clip's) own.

Projections and the text tower have no counterpart and are left out.
Source: https://github.com/openai/CLIP (2103.00020); transformers' CLIPModel and CLIPVisionModel.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from torch import Tensor

from models.checkpoints.conversion import (
    ConversionReport,
    fit_positions,
    grid_of,
    load_converted,
    spread,
)
from models.initialise import default_map
from models.part_configs import VisionConfig
from models.vision import VisionEncoder

__all__ = ["config_of", "from_clip", "load", "sizes_of"]

# foreign name without its prefix -> ours; tensors without a kind (weight, bias) have an empty one
_TRANSFORMERS = {
    "embeddings.class_embedding": "embeddings.class_token",
    "embeddings.patch_embedding.weight": "embeddings.patch.proj.weight",
    "embeddings.position_embedding.weight": "embeddings.position",
    "pre_layrnorm.{p}": "embeddings.norm.{p}",  # transformers' own spelling
    "pre_layernorm.{p}": "embeddings.norm.{p}",
    "post_layernorm.{p}": "norm.{p}",
    "encoder.layers.{i}.layer_norm1.{p}": "blocks.{i}.norm1.{p}",
    "encoder.layers.{i}.layer_norm2.{p}": "blocks.{i}.norm2.{p}",
    "encoder.layers.{i}.self_attn.q_proj.{p}": "blocks.{i}.attention.q.{p}",
    "encoder.layers.{i}.self_attn.k_proj.{p}": "blocks.{i}.attention.k.{p}",
    "encoder.layers.{i}.self_attn.v_proj.{p}": "blocks.{i}.attention.v.{p}",
    "encoder.layers.{i}.self_attn.out_proj.{p}": "blocks.{i}.attention.out.{p}",
    "encoder.layers.{i}.mlp.fc1.{p}": "blocks.{i}.ffn.fc1.{p}",
    "encoder.layers.{i}.mlp.fc2.{p}": "blocks.{i}.ffn.fc2.{p}",
}
_OPENAI = {
    "class_embedding": "embeddings.class_token",
    "conv1.weight": "embeddings.patch.proj.weight",
    "positional_embedding": "embeddings.position",
    "ln_pre.{p}": "embeddings.norm.{p}",
    "ln_post.{p}": "norm.{p}",
    "transformer.resblocks.{i}.ln_1.{p}": "blocks.{i}.norm1.{p}",
    "transformer.resblocks.{i}.ln_2.{p}": "blocks.{i}.norm2.{p}",
    "transformer.resblocks.{i}.attn.out_proj.{p}": "blocks.{i}.attention.out.{p}",
    "transformer.resblocks.{i}.mlp.c_fc.{p}": "blocks.{i}.ffn.fc1.{p}",
    "transformer.resblocks.{i}.mlp.c_proj.{p}": "blocks.{i}.ffn.fc2.{p}",
}
_FUSED = re.compile(r"transformer\.resblocks\.(\d+)\.attn\.in_proj_(weight|bias)")
_IGNORED = re.compile(
    r"(text_model|transformer|token_embedding|ln_final|text)\..*|(vision_model\.)?embeddings\.position_ids"
    r"|(visual|text)_projection\.weight|logit_scale|logit_bias|positional_embedding|text_projection"
    r"|visual\.proj|input_resolution|context_length|vocab_size"
)
_NUMBER = re.compile(r"\.(\d+)\.")
_ACTIVATIONS = {"gelu": "gelu", "quick_gelu": "quick_gelu", "gelu_pytorch_tanh": "gelu_tanh"}


def _plain(key: str) -> tuple[str, str, dict[str, str]]:
    """A key as a template ({i} for the layer, {p} for weight or bias) with what fills it."""
    fills = {}
    number, (name, _, kind) = _NUMBER.search(key), key.rpartition(".")
    if kind in ("weight", "bias"):
        fills["p"] = kind
        name = f"{name}.{{p}}"
    else:
        name = key
    if number:
        fills["i"] = number[1]
        name = _NUMBER.sub(".{i}.", name, count=1)
    return key, name, fills


def _targets(key: str, is_openai: bool) -> list[str]:
    """Our keys of one foreign key: three for a fused projection, none when it has no place."""
    if is_openai:
        if not key.startswith("visual."):
            return []
        key, names = key.removeprefix("visual."), _OPENAI
        fused = _FUSED.fullmatch(key)
        if fused:
            return [f"blocks.{fused[1]}.attention.{part}.{fused[2]}" for part in "qkv"]
    else:
        key, names = key.removeprefix("vision_model."), _TRANSFORMERS
    exact, template, fills = _plain(key)
    target = names.get(exact) or names.get(template)
    return [] if target is None else [target.format(**fills)]


def from_clip(
    state: Mapping[str, Tensor], layer_map: Sequence[int] | None = None
) -> tuple[dict[str, Tensor], ConversionReport]:
    """Renames the vision tower of a CLIP state dict to the keys of `VisionEncoder`.

    Args:
        layer_map: foreign block of each of our blocks; blocks that are not taken are reported as
            ignored. None takes every block as it is.
    """
    is_openai = "visual.conv1.weight" in state
    report, converted = ConversionReport(), {}
    for key, value in state.items():
        targets = _targets(key, is_openai)
        if not targets:
            (report.ignored if _IGNORED.fullmatch(key) else report.unexpected).append(key)
            continue
        parts = value.chunk(len(targets)) if len(targets) > 1 else (value,)
        for target, part in zip(targets, parts, strict=True):
            for ours in _mapped(target, layer_map):
                converted[ours] = part
                report.took(key, ours)
        if key not in report.renamed:
            report.ignored.append(key)
    return converted, report


def _mapped(key: str, layer_map: Sequence[int] | None) -> list[str]:
    match = re.match(r"blocks\.(\d+)\.", key)
    if match is None or layer_map is None:
        return [key]
    rest = key[match.end() :]
    return [f"blocks.{ours}.{rest}" for ours in spread(layer_map, int(match[1]))]


def _units(converted: Mapping[str, Tensor]) -> list[int]:
    """Feed-forward units of each block."""
    units: list[int] = []
    while (bias := converted.get(f"blocks.{len(units)}.ffn.fc1.bias")) is not None:
        units.append(bias.shape[0])
    return units


def config_of(
    state: Mapping[str, Tensor],
    *,
    head_dim: int = 64,
    region_layers: int | None = None,
    where: str = "CLIP checkpoint",
) -> VisionConfig:
    """The vision configuration of a CLIP state dict.

    Args:
        head_dim: not visible in the weights (64 in OpenAI's models).
        region_layers: not visible either; None takes a third of the blocks.

    Raises:
        ValueError: when it holds no CLIP vision tower, or sizes that do not go together.
    """
    converted, _ = from_clip(state)
    for key in ("embeddings.patch.proj.weight", "embeddings.position", "embeddings.class_token"):
        if key not in converted:
            raise ValueError(
                f"{where}: holds no CLIP vision tower (vision_model.embeddings..., visual.conv1...)"
            )
    patch, units = converted["embeddings.patch.proj.weight"], _units(converted)
    if not units:
        raise ValueError(f"{where}: holds no blocks of a CLIP vision tower")
    width, side = patch.shape[0], patch.shape[-1]
    if width % head_dim:
        raise ValueError(
            f"{where}: width {width} is not a multiple of head size {head_dim}; "
            "give vision.head_dim"
        )
    grid = grid_of(converted["embeddings.position"], where)
    return VisionConfig(
        image_size=grid * side,
        patch_size=side,
        width=width,
        head_dim=head_dim,
        heads=(width // head_dim,) * len(units),
        ffn=tuple(units),
        region_layers=len(units) // 3 if region_layers is None else region_layers,
        pre_norm="embeddings.norm.weight" in converted,
    )


def sizes_of(config: Mapping[str, Any], where: str = "config.json") -> dict[str, Any]:
    """What transformers' CLIPConfig or CLIPVisionConfig says beyond the weights, as values of a
    `VisionConfig`.

    Raises:
        ValueError: on another kind of model, or an activation that the encoder has not.
    """
    if config.get("model_type") == "clip":
        config = config.get("vision_config") or {}
    elif config.get("model_type") != "clip_vision_model":
        raise ValueError(f"{where}: model_type {config.get('model_type')!r}, expected 'clip'")
    activation = config.get("hidden_act", "quick_gelu")
    if activation not in _ACTIVATIONS:
        raise ValueError(f"{where}: hidden_act {activation!r} is none of {sorted(_ACTIVATIONS)}")
    width, heads = config.get("hidden_size", 768), config.get("num_attention_heads", 12)
    return {
        "activation": _ACTIVATIONS[activation],
        "norm_eps": config.get("layer_norm_eps", 1e-5),
        "head_dim": width // heads,
    }


def load(
    encoder: VisionEncoder,
    state: Mapping[str, Tensor],
    layer_map: Sequence[int] | None = None,
    *,
    allow_missing: Iterable[str] = (),
    allow_unexpected: bool | Iterable[str] = False,
    where: str = "CLIP checkpoint",
) -> ConversionReport:
    """Loads a CLIP vision tower, resampling positions to the encoder's image size.

    Args:
        layer_map: as in `from_clip`; None spreads our blocks over CLIP's (1, 3, 5, ... for half).
        allow_missing, allow_unexpected: keys, modules or globs, as in `load_converted`.

    Raises:
        ValueError: naming keys that are missing (unless allowed), misshapen or unexpected.
    """
    depth, ours = len(_units(from_clip(state)[0])), encoder.config.layers
    layers = default_map(ours, depth, "layer") if layer_map is None and depth else layer_map
    if layers is not None and not (len(layers) == ours and all(0 <= i < depth for i in layers)):
        raise ValueError(
            f"{where}: layer map {tuple(layers)} needs {ours} entries from 0 to {depth - 1}"
        )
    converted, report = from_clip(state, layers)
    fit_positions(converted, report, "embeddings.position", encoder.config, where)
    return load_converted(
        encoder,
        converted,
        report,
        allow_missing=allow_missing,
        allow_unexpected=allow_unexpected,
        where=where,
    )
