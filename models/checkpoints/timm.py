"""timm Vision Transformers into the vision encoder, as `models.backbones` describes them.

Source: timm.models.vision_transformer and timm.models.deit: plain ViT, DeiT (distilled too), CLIP,
SigLIP with its attention pooling, DINOv2 with and without registers.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping

from torch import Tensor

from models.checkpoints.conversion import (
    ConversionReport,
    fit_positions,
    grid_of,
    load_converted,
)
from models.part_configs import Activation, VisionConfig
from models.vision import VisionEncoder

__all__ = ["config_of", "from_timm", "load"]

_POSITION = "embeddings.position"
_NAMES = {
    "norm_pre": "embeddings.norm",
    "patch_embed.proj": "embeddings.patch.proj",
    "norm": "norm",
    "attn_pool.q": "pool.attention.q",
    "attn_pool.proj": "pool.attention.out",
    "attn_pool.norm": "pool.norm",
    "attn_pool.mlp.fc1": "pool.ffn.fc1",
    "attn_pool.mlp.fc2": "pool.ffn.fc2",
}
_BLOCK = {
    "norm1": "norm1",
    "norm2": "norm2",
    "attn.proj": "attention.out",
    "mlp.fc1": "ffn.fc1",
    "mlp.fc2": "ffn.fc2",
    "ls1": "scale1",
    "ls2": "scale2",
}
# DeiT's distillation token stands where registers do and is never read at the end
_REGISTERS = ("reg_token", "dist_token")
# classifiers have no counterpart: the encoder returns tokens
_IGNORED = re.compile(r"(head|head_dist)\..*")
_BLOCK_KEY = re.compile(r"blocks\.(\d+)\.(.+)")


def from_timm(
    state: Mapping[str, Tensor], pooling: str = "map"
) -> tuple[dict[str, Tensor], ConversionReport]:
    """Renames a timm state dict to the keys of `VisionEncoder`; fused qkv is split in three.

    The norm behind timm's mean pooling (fc_norm) is the final norm of a file without another. What
    has no counterpart (norms of queries and keys, gated feed-forward parts) is reported as
    unexpected.

    Args:
        pooling: of the encoder: other than "map" leaves the file's attention pooling out.
    """
    report, converted = ConversionReport(), {}
    pooled_norm = "norm.weight" not in state
    for key, value in state.items():
        name = f"norm.{key.rpartition('.')[2]}" if key.startswith("fc_norm.") else key
        left_out = (name != key and not pooled_norm) or (
            key.startswith("attn_pool.") and pooling != "map"
        )
        if left_out or _IGNORED.fullmatch(key):
            report.ignored.append(key)
            continue
        for ours, tensor in _convert(name, value):
            converted[ours] = tensor
            report.took(key, ours)
        if key not in report.renamed:
            report.unexpected.append(key)
    return converted, report


def _convert(key: str, value: Tensor) -> list[tuple[str, Tensor]]:
    """Our keys and tensors of a timm key; none for a foreign one."""
    if key == "cls_token":
        return [("embeddings.class_token", value.reshape(-1))]
    if key in _REGISTERS:
        return [("embeddings.registers", value.flatten(0, -2))]
    if key == "pos_embed":
        return [(_POSITION, value.flatten(0, -2))]
    if key == "attn_pool.latent":
        return [("pool.latent", value.reshape(-1))]
    name, _, kind = key.rpartition(".")
    if name == "attn_pool.kv":
        return _split("pool.attention.", "kv", kind, value)
    match = _BLOCK_KEY.fullmatch(name)
    if match is None:
        return [(f"{_NAMES[name]}.{kind}", value)] if name in _NAMES else []
    block = f"blocks.{match[1]}."
    if match[2] == "attn.qkv":
        return _split(f"{block}attention.", "qkv", kind, value)
    return [(f"{block}{_BLOCK[match[2]]}.{kind}", value)] if match[2] in _BLOCK else []


def _split(prefix: str, parts: str, kind: str, value: Tensor) -> list[tuple[str, Tensor]]:
    """A fused projection in its parts, by rows."""
    pieces = zip(parts, value.chunk(len(parts)), strict=True)
    return [(f"{prefix}{part}.{kind}", tensor) for part, tensor in pieces]


def _check_kind(state: Mapping[str, Tensor], where: str) -> None:
    for key in ("pos_embed", "patch_embed.proj.weight", "blocks.0.mlp.fc1.weight"):
        if key not in state:
            raise ValueError(
                f"{where}: {key} is missing; only ViTs with learned absolute positions fit"
            )


def _ffn_widths(state: Mapping[str, Tensor]) -> tuple[int, ...]:
    """Feed-forward units of each block."""
    found: list[int] = []
    while (key := f"blocks.{len(found)}.mlp.fc1.weight") in state:
        found.append(state[key].shape[0])
    return tuple(found)


def config_of(
    state: Mapping[str, Tensor],
    *,
    head_dim: int = 64,
    activation: Activation = "gelu",
    norm_eps: float = 1e-6,
    region_layers: int | None = None,
    where: str = "timm checkpoint",
) -> VisionConfig:
    """The vision configuration of a timm state dict; what weights do not show are arguments.

    Where the name of the timm model is known, `models.backbones.timm_fields` knows all of it.

    Args:
        activation: "gelu" for a plain ViT, "quick_gelu" for OpenAI's CLIP.
        norm_eps: 1e-6 for a plain ViT, 1e-5 for CLIP.

    Raises:
        ValueError: when the state dict is not that of a ViT with learned positions.
    """
    _check_kind(state, where)
    patch = state["patch_embed.proj.weight"]
    ffn = _ffn_widths(state)
    width, side = patch.shape[0], patch.shape[-1]
    if width % head_dim:
        raise ValueError(
            f"{where}: width {width} is not a multiple of head size {head_dim}; "
            "give vision.head_dim"
        )
    class_token = "cls_token" in state
    registers = sum(state[key].shape[-2] for key in _REGISTERS if key in state)
    positions = state["pos_embed"].flatten(0, -2)
    prefix = class_token + registers
    # Where class token and registers have no positions, the patches alone fill a square.
    own = not (prefix and math.isqrt(len(positions)) ** 2 == len(positions))
    pooled_norm = "fc_norm.weight" in state and "norm.weight" not in state
    pool = state.get("attn_pool.mlp.fc1.weight")
    pooling = "class" if class_token and not pooled_norm else "mean"
    return VisionConfig(
        image_size=side * grid_of(positions, where, prefix if own else 0),
        patch_size=side,
        width=width,
        head_dim=head_dim,
        heads=(width // head_dim,) * len(ffn),
        ffn=ffn,
        region_layers=len(ffn) // 3 if region_layers is None else region_layers,
        activation=activation,
        norm_eps=norm_eps,
        class_token=class_token,
        register_tokens=registers,
        prefix_positions=own,
        pooling=pooling if pool is None else "map",
        pool_ffn=0 if pool is None else pool.shape[0],
        pre_norm="norm_pre.weight" in state,
        final_norm="pooled" if pooled_norm else "tokens" if "norm.weight" in state else "none",
        patch_bias="patch_embed.proj.bias" in state,
        qkv_bias="blocks.0.attn.qkv.bias" in state,
        layer_scale=1e-5 if "blocks.0.ls1.gamma" in state else None,
    )


def load(
    encoder: VisionEncoder,
    state: Mapping[str, Tensor],
    *,
    allow_missing: Iterable[str] = (),
    allow_unexpected: bool | Iterable[str] = False,
    where: str = "timm checkpoint",
) -> ConversionReport:
    """Loads timm weights into the vision encoder, resampling positions to its image size.

    Raises:
        ValueError: naming keys that are missing (unless allowed), misshapen or unexpected.
    """
    config = encoder.config
    converted, report = from_timm(state, config.pooling)
    places = encoder.state_dict()
    for key, targets in list(report.renamed.items()):
        if not any(target in places for target in targets):  # the encoder has no such part
            report.unexpected.append(key)
            for target in report.renamed.pop(key):
                del converted[target]
    fit_positions(converted, report, _POSITION, config, where)
    return load_converted(
        encoder,
        converted,
        report,
        allow_missing=allow_missing,
        allow_unexpected=allow_unexpected,
        where=where,
    )
