"""timm Vision Transformers (class token, learned absolute positions) into the vision encoder.

Source: timm.models.vision_transformer; plain ViT, and those with a norm before the blocks (CLIP).
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import replace

from torch import Tensor

from models.checkpoints.conversion import ConversionReport, load_converted
from models.config import VisionConfig
from models.vision import VisionEncoder, resize_positions

__all__ = ["config_of", "from_timm", "load"]

_NAMES = {
    "cls_token": "embeddings.class_token",
    "pos_embed": "embeddings.position",
    "norm_pre": "embeddings.norm",
    "patch_embed.proj": "embeddings.patch.proj",
    "norm": "norm",
}
_BLOCK = {
    "norm1": "norm1",
    "norm2": "norm2",
    "attn.proj": "attention.out",
    "mlp.fc1": "ffn.fc1",
    "mlp.fc2": "ffn.fc2",
}
# classifiers have no counterpart: the encoder returns all normalised tokens
_IGNORED = re.compile(r"(head|head_dist|fc_norm)\..*")
_BLOCK_KEY = re.compile(r"blocks\.(\d+)\.(.+)")


def from_timm(state: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], ConversionReport]:
    """Renames a timm state dict to the keys of `VisionEncoder`; fused qkv is split in three.

    What has no counterpart (register tokens, q/k norms, pooling heads) is reported as unexpected.
    """
    report, converted = ConversionReport(), {}
    for key, value in state.items():
        for ours, tensor in _convert(key, value):
            converted[ours] = tensor
            report.took(key, ours)
        if key not in report.renamed:
            (report.ignored if _IGNORED.fullmatch(key) else report.unexpected).append(key)
    return converted, report


def _convert(key: str, value: Tensor) -> list[tuple[str, Tensor]]:
    if key == "cls_token":
        return [(_NAMES[key], value.reshape(-1))]
    if key == "pos_embed":
        return [(_NAMES[key], value.squeeze(0))]
    match = _BLOCK_KEY.fullmatch(key)
    name, _, kind = (match[2] if match else key).rpartition(".")
    if match is None:
        return [(f"{_NAMES[name]}.{kind}", value)] if name in _NAMES else []
    block = f"blocks.{match[1]}."
    if name == "attn.qkv":
        parts = zip("qkv", value.chunk(3), strict=True)
        return [(f"{block}attention.{part}.{kind}", tensor) for part, tensor in parts]
    if name in ("ls1", "ls2"):
        return [(f"{block}scale{name[-1]}.{kind}", value)]
    return [(f"{block}{_BLOCK[name]}.{kind}", value)] if name in _BLOCK else []


def config_of(
    state: Mapping[str, Tensor],
    *,
    head_dim: int = 64,
    activation: str = "gelu",
    norm_eps: float = 1e-6,
    region_layers: int | None = None,
) -> VisionConfig:
    """The vision configuration of a timm state dict; what weights do not show are arguments.

    Args:
        activation: "gelu" for a plain ViT, "quick_gelu" for OpenAI's CLIP.
        norm_eps: 1e-6 for a plain ViT, 1e-5 for CLIP.

    Raises:
        ValueError: when the state dict is not that of a ViT with a class token.
    """
    for key in ("cls_token", "pos_embed", "patch_embed.proj.weight"):
        if key not in state:
            raise ValueError(f"timm checkpoint: {key} is missing; only ViTs with a class token fit")
    patch = state["patch_embed.proj.weight"]
    ffn: list[int] = []
    while f"blocks.{len(ffn)}.mlp.fc1.weight" in state:
        ffn.append(state[f"blocks.{len(ffn)}.mlp.fc1.weight"].shape[0])
    width, side = patch.shape[0], patch.shape[-1]
    grid = round((state["pos_embed"].shape[1] - 1) ** 0.5)
    scaled = "blocks.0.ls1.gamma" in state
    return replace(
        VisionConfig(),
        image_size=grid * side,
        patch_size=side,
        width=width,
        head_dim=head_dim,
        heads=(width // head_dim,) * len(ffn),
        ffn=tuple(ffn),
        region_layers=len(ffn) // 3 if region_layers is None else region_layers,
        activation=activation,
        norm_eps=norm_eps,
        pre_norm="norm_pre.weight" in state,
        patch_bias="patch_embed.proj.bias" in state,
        layer_scale=1e-5 if scaled else None,
    )


def load(
    encoder: VisionEncoder,
    state: Mapping[str, Tensor],
    *,
    allow_missing: Iterable[str] = (),
    allow_unexpected: bool = False,
    where: str = "timm checkpoint",
) -> ConversionReport:
    """Loads timm weights into the vision encoder, resampling positions to its image size.

    Raises:
        ValueError: naming keys that are missing (unless allowed), misshapen or unexpected.
    """
    converted, report = from_timm(state)
    key, config = "embeddings.position", encoder.config
    if key in converted and converted[key].shape[0] != config.tokens:
        converted[key] = resize_positions(converted[key], config.image_size // config.patch_size)
        report.resized.append(key)
    return load_converted(
        encoder,
        converted,
        report,
        allow_missing=allow_missing,
        allow_unexpected=allow_unexpected,
        where=where,
    )
