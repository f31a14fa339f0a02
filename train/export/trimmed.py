"""What a trimmed model's graphs are like: shapes in mode "bucket", and what cannot be written."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from models.config import ModelConfig

__all__ = ["check_trimming", "image_tokens", "read_tokens"]


def check_trimming(config: ModelConfig) -> None:
    """Raises ValueError where trimmers decide what a graph of static shapes cannot do."""
    trimming = config.trimming
    assert trimming is not None
    trimming.require_counts("bucket")
    if trimming.text:
        raise ValueError(
            "export: texts have any length, so text tokens cannot be dropped down to a fixed number; "
            "train with trim.text=[]"
        )
    if config.form == "captioning" and {"text", "fusion"} & set(trimming.heads):
        raise ValueError(
            "export: a caption's heads are chosen at its first token, which decoder_step does not "
            "see; train with trim.heads=[] or [vision]"
        )


def image_tokens(config: ModelConfig) -> int:
    """Image states that the image encoder gives."""
    keep = None if config.trimming is None else config.trimming.vision_keep
    return config.vision.output_tokens if not keep else 1 + min(keep[-1], config.vision.patches)


def read_tokens(config: ModelConfig) -> list[int]:
    """Image states that each fusion layer reads."""
    tokens, found = image_tokens(config), []
    trimming = config.trimming
    keep = (
        {}
        if trimming is None
        else dict(zip(trimming.fusion, trimming.fusion_keep or (), strict=True))
    )
    for layer in range(config.text.fusion_layers):
        tokens = min(tokens, 1 + keep.get(layer, tokens))
        found.append(tokens)
    return found
