"""Multiply-accumulates of one answered question, per part, from a configuration alone.

Counted are matrix products and the patch convolution, as torch's FlopCounterMode does (two flops
are one MAC); embeddings, norms, activations and softmax are left out.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from models.config import ModelConfig

if TYPE_CHECKING:
    from models.xvlm import XVLM

__all__ = ["count_macs", "parameters", "part_of"]

PARTS = ("vision", "text", "fusion", "decoder")


def _attention(
    queries: int, keys: int, heads: int, head_dim: int, width: int, key_width: int
) -> int:
    """Projections of q, k, v and the output, and the two products between tokens."""
    inner = heads * head_dim
    projections = queries * width * inner * 2 + keys * key_width * inner * 2
    return projections + 2 * queries * keys * inner


def _ffn(tokens: int, width: int, units: int) -> int:
    return 2 * tokens * width * units


def _vision(config: ModelConfig, resolution: int) -> int:
    vision = config.vision
    patches = (resolution // vision.patch_size) ** 2
    tokens = patches + 1
    total = patches * 3 * vision.patch_size**2 * vision.width
    for heads, units in zip(vision.heads, vision.ffn, strict=True):
        total += _attention(tokens, tokens, heads, vision.head_dim, vision.width, vision.width)
        total += _ffn(tokens, vision.width, units)
    return total


def _decoder(config: ModelConfig, answer_tokens: int, text_tokens: int) -> int:
    """One answer sequence: all layers, the head's transform and the vocabulary."""
    text, decoder = config.text, config.decoder
    if decoder is None:
        return 0
    total = answer_tokens * text.width * (text.width + text.vocab_size)
    for heads, cross, units in zip(decoder.heads, decoder.cross_heads, decoder.ffn, strict=True):
        total += _attention(
            answer_tokens, answer_tokens, heads, text.head_dim, text.width, text.width
        )
        total += _attention(
            answer_tokens, text_tokens, cross, text.head_dim, text.width, text.width
        )
        total += _ffn(answer_tokens, text.width, units)
    return total


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
    resolution = config.vision.image_size if resolution is None else resolution
    text, width = config.text, config.text.width
    image_tokens = (resolution // config.vision.patch_size) ** 2 + 1
    result = dict.fromkeys(PARTS, 0)
    result["vision"] = _vision(config, resolution)
    for layer, (heads, units) in enumerate(zip(text.heads, text.ffn, strict=True)):
        part = "text" if layer < text.text_layers else "fusion"
        result[part] += _attention(text_tokens, text_tokens, heads, text.head_dim, width, width)
        result[part] += _ffn(text_tokens, width, units)
    for heads in text.cross_heads:
        result["fusion"] += _attention(
            text_tokens, image_tokens, heads, text.head_dim, width, config.vision.width
        )
    if config.decoder is not None:
        result["decoder"] = _decoder(config, 1, text_tokens)
        result["decoder"] += top_k * _decoder(config, answer_tokens, text_tokens)
    return result | {"total": sum(result.values())}


def part_of(name: str, text_layers: int) -> str:
    """Part of the model that parameter or gate `name` belongs to.

    vision, text (with the embeddings), fusion, decoder, or "heads" (projections, ITM, box, MLM).
    """
    pieces = name.split(".")
    if pieces[0] in ("vision", "decoder", "fusion"):
        return pieces[0]
    if pieces[0] != "text":
        return "heads"
    numbers = [int(piece) for piece in pieces if piece.isdigit()]
    return "fusion" if numbers and numbers[0] >= text_layers else "text"


def parameters(model: XVLM) -> dict[str, int]:
    """Parameters per part, "total", and "prunable": what gates on heads and FFN units could remove."""
    result: dict[str, int] = {}
    for name, value in model.named_parameters():  # a tied matrix is listed once
        part = part_of(name, model.config.text.text_layers)
        result[part] = result.get(part, 0) + value.numel()
    result["total"] = sum(result.values())
    costs: Mapping[str, int] = model.parameters_per_unit()
    slots = model.gate_slots()
    result["prunable"] = sum(cost * slots[name].units for name, cost in costs.items())
    return result
