"""Multiply-accumulates of one answered question, as the ranking of answers runs it."""

from __future__ import annotations

from models.config import ModelConfig
from models.summary import (
    decoder_macs,
    parameters,
    part_of,
    read_tokens,
    text_macs,
    vision_macs,
)

__all__ = ["count_macs", "parameters", "part_of"]

PARTS = ("vision", "text", "fusion", "decoder")


def count_macs(
    config: ModelConfig,
    resolution: int | None = None,
    text_tokens: int = 16,
    answer_tokens: int = 2,
    top_k: int = 128,
) -> dict[str, int]:
    """MACs of one picture and one question: "vision", "text", "fusion", "decoder" and "total".

    Args:
        resolution: picture side in px; None is the configured one.
        answer_tokens: decoder inputs per candidate ([CLS] and the answer; its [SEP] is only
            predicted).
        top_k: candidates whose whole sequence is scored, after one first-token pass.
    """
    side = (resolution or config.vision.image_size) // config.vision.patch_size
    text, fusion = text_macs(config, text_tokens, 1 + side**2)
    decoder = decoder_macs(config, 1, text_tokens)
    decoder += top_k * decoder_macs(config, answer_tokens, text_tokens)
    decoder -= (top_k - 1) * _question_keys(config, text_tokens)
    costs = (vision_macs(config, resolution), text, fusion, decoder)
    result = dict(zip(PARTS, costs, strict=True))
    return result | {"total": sum(result.values())}


def _question_keys(config: ModelConfig, text_tokens: int) -> int:
    """Keys and values of a question in all decoder layers; its candidates share them."""
    inner = sum(config.decoder.cross_heads if config.decoder else ()) * config.text.head_dim
    return 2 * read_tokens(config, text_tokens) * config.text.width * inner
