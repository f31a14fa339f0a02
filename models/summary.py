"""What a model costs: parameters, prunable parameters and multiply-accumulates of each part.

    print(summarise(presets.config("efficientvlm"), image_size=384, text_tokens=30))

Counted are matrix products and the patch convolution, as torch's FlopCounterMode does (two flops
are one MAC); embeddings, norms, activations and softmax are left out. Everything follows from the
configuration, pruned widths included.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import torch

from models.config import HEADS, PAIRED, ModelConfig
from models.part_configs import TextConfig
from models.xvlm import XVLM

__all__ = [
    "PARTS",
    "Summary",
    "decoder_macs",
    "generation_macs",
    "head_macs",
    "image_stream_macs",
    "parameters",
    "part_of",
    "prunable",
    "read_tokens",
    "summarise",
    "text_macs",
    "vision_macs",
]

PARTS = ("vision", "text", "fusion", "decoder", "heads")


@dataclass(frozen=True)
class Summary:
    """Costs by part (`PARTS`, those that exist) and "total".

    MACs are those of one example through every module of the form once: its image (two in forms of
    NLVR2), its text, one answer or masked token.
    """

    name: str
    form: str
    image_size: int
    text_tokens: int
    parameters: dict[str, int]
    prunable: dict[str, int]
    macs: dict[str, int]

    def to_dict(self) -> dict[str, Any]:
        """For a JSON file."""
        return asdict(self)

    def __str__(self) -> str:
        lines = [
            f"{self.name} ({self.form}), {self.image_size} px, {self.text_tokens} text tokens",
            f"{'':8}{'parameters':>14}{'prunable':>14}{'GMACs':>10}",
        ]
        for part in self.parameters:
            lines.append(
                f"{part:8}{self.parameters[part] / 1e6:>13.2f}M"
                f"{self.prunable.get(part, 0) / 1e6:>13.2f}M{self.macs[part] / 1e9:>10.3f}"
            )
        return "\n".join(lines)


def summarise(
    model: XVLM | ModelConfig,
    image_size: int | None = None,
    text_tokens: int = 30,
    *,
    answer_tokens: int = 2,
    masked_tokens: int = 1,
) -> Summary:
    """Parameters, prunable parameters and MACs of each part.

    Args:
        model: a model, or the configuration of one (then no weights are made).
        image_size: of the MACs, in px; None is the configured one.
        answer_tokens: decoder inputs of one answer (form "vqa").
        masked_tokens: positions that the masked-token head is asked for (form "pretrain").

    Raises:
        ValueError: when the size is not a multiple of the patches'.
    """
    if isinstance(model, ModelConfig):
        with torch.device("meta"):
            model = XVLM(model)
    config = model.config
    size, patch = image_size or config.vision.image_size, config.vision.patch_size
    if size % patch:
        raise ValueError(f"image_size {size} is not a multiple of the patches' {patch} px")
    counted = parameters(model)
    del counted["prunable"]
    text, fusion = text_macs(config, text_tokens, 1 + (size // patch) ** 2)
    macs = {
        "vision": vision_macs(config, size) * (2 if config.form in PAIRED else 1),
        "text": text,
        "fusion": fusion,
        "decoder": decoder_macs(config, answer_tokens, text_tokens),
        "heads": head_macs(config, text_tokens, masked_tokens),
    }
    macs = {part: macs[part] for part in counted if part != "total"}
    return Summary(
        name=config.name,
        form=config.form,
        image_size=size,
        text_tokens=text_tokens,
        parameters=counted,
        prunable=prunable(model),
        macs=macs | {"total": sum(macs.values())},
    )


# --- parameters -----------------------------------------------------------------------------------


def part_of(name: str, text_layers: int) -> str:
    """Part of the model that parameter or gate `name` belongs to.

    vision, text (with the embeddings), fusion (with an image stream), decoder, or "heads"
    (projections, ITM, box, MLM).
    """
    pieces = name.split(".")
    if pieces[0] == "image_fusion":
        return "fusion"
    if pieces[0] in ("vision", "decoder", "fusion"):
        return pieces[0]
    if pieces[0] != "text":
        return "heads"
    numbers = [int(piece) for piece in pieces if piece.isdigit()]
    return "fusion" if numbers and numbers[0] >= text_layers else "text"


def parameters(model: XVLM) -> dict[str, int]:
    """Parameters per part, "total", and "prunable": what gates on heads and FFN units could remove."""
    found: dict[str, int] = {}
    for name, value in model.named_parameters():  # a tied matrix is listed once
        part = part_of(name, model.config.text.text_layers)
        found[part] = found.get(part, 0) + value.numel()
    result = {part: found[part] for part in PARTS if part in found}
    return result | {"total": sum(result.values()), "prunable": prunable(model)["total"]}


def prunable(model: XVLM) -> dict[str, int]:
    """Parameters that gates on heads and FFN units could remove, per part and "total"."""
    costs, slots = model.parameters_per_unit(), model.gate_slots()
    result: dict[str, int] = {}
    for name, cost in costs.items():
        part = part_of(name, model.config.text.text_layers)
        result[part] = result.get(part, 0) + cost * slots[name].units
    return result | {"total": sum(result.values())}


# --- multiply-accumulates -------------------------------------------------------------------------


def _attention(
    queries: int,
    keys: int,
    heads: int,
    head_dim: int,
    width: int,
    key_width: int,
    key_heads: int | None = None,
) -> int:
    """Projections of q, k, v and the output, and the two products between tokens.

    key_heads: of the key and value projection where it is shared; None is `heads`.
    """
    if heads == 0:
        return 0
    inner = heads * head_dim
    projected = inner if key_heads is None else key_heads * head_dim
    projections = 2 * queries * width * inner + 2 * keys * key_width * projected
    return projections + 2 * queries * keys * inner


def _ffn(tokens: int, width: int, units: int) -> int:
    return 2 * tokens * width * units


def vision_macs(config: ModelConfig, image_size: int | None = None) -> int:
    """MACs of one image; None takes the configured size."""
    vision = config.vision
    patches = ((image_size or vision.image_size) // vision.patch_size) ** 2
    tokens = patches + vision.prefix_tokens
    width, size = vision.width, vision.head_dim
    total = patches * 3 * vision.patch_size**2 * width
    for heads, units in zip(vision.heads, vision.ffn, strict=True):
        total += _attention(tokens, tokens, heads, size, width, width) + _ffn(tokens, width, units)
    if vision.pooling == "map":
        total += _attention(1, patches, width // size, size, width, width)
        total += _ffn(1, width, vision.pool_ffn)
    return total


def text_macs(config: ModelConfig, tokens: int, image_tokens: int) -> tuple[int, int]:
    """MACs of one text through the text layers, and of it and its image(s) through the fusion."""
    text, width = config.text, config.text.width
    text_part, fusion = _embedding(text, tokens), 0
    for layer, (heads, units) in enumerate(zip(text.heads, text.ffn, strict=True)):
        cost = _attention(tokens, tokens, heads, text.head_dim, width, width)
        cost += _ffn(tokens, width, units)
        if layer < text.text_layers:
            text_part += cost
        else:
            fusion += cost
    for place, heads in enumerate(text.cross_heads):
        shared = None if text.pair_heads is None else text.pair_heads[place // 2]
        fusion += _attention(
            tokens, image_tokens, heads, text.head_dim, width, config.context_width, shared
        )
    if config.image_fusion is None:
        return text_part, fusion
    fusion += image_stream_macs(config, tokens, image_tokens)
    return text_part, fusion * (2 if config.form in PAIRED else 1)


def image_stream_macs(config: ModelConfig, tokens: int, image_tokens: int) -> int:
    """MACs of an image stream beside one text, with the maps in front of both streams and the
    poolers behind them; 0 without one."""
    stream, text, width = config.image_fusion, config.text, config.text.width
    if stream is None:
        return 0
    total = (tokens + 2) * width * width + image_tokens * config.vision.width * width
    for heads, cross, units in zip(stream.heads, stream.cross_heads, stream.ffn, strict=True):
        total += _attention(image_tokens, image_tokens, heads, text.head_dim, width, width)
        total += _attention(image_tokens, tokens, cross, text.head_dim, width, width)
        total += _ffn(image_tokens, width, units)
    return total


def _embedding(text: TextConfig, tokens: int) -> int:
    """The projection behind narrow tables, where there is one."""
    return 0 if text.word_width is None else tokens * text.word_width * text.width


def _token_head(text: TextConfig, tokens: int) -> int:
    """The head's transform and the vocabulary."""
    return tokens * text.embedding_width * (text.width + text.vocab_size)


def decoder_macs(config: ModelConfig, answer_tokens: int, text_tokens: int) -> int:
    """MACs of one answer given a question's states: all layers and the head; 0 without decoder.

    The states are as many as text tokens, or the pooled ones of two streams.
    """
    text, decoder = config.text, config.decoder
    if decoder is None:
        return 0
    text_tokens = read_tokens(config, text_tokens)
    width, size = text.width, text.head_dim
    total = _embedding(text, answer_tokens) + _token_head(text, answer_tokens)
    for heads, cross, units in zip(decoder.heads, decoder.cross_heads, decoder.ffn, strict=True):
        total += _attention(answer_tokens, answer_tokens, heads, size, width, width)
        total += _attention(answer_tokens, text_tokens, cross, size, width, width)
        total += _ffn(answer_tokens, width, units)
    return total


def read_tokens(config: ModelConfig, text_tokens: int) -> int:
    """States of a question that the answer decoder reads."""
    return text_tokens if config.image_fusion is None else config.fused_tokens


def generation_macs(
    config: ModelConfig, prompt_tokens: int, max_length: int, beams: int, image_tokens: int
) -> int:
    """MACs of one caption by beam search with a cache (form "captioning"), without its image.

    Every token but the last goes through the layers and the head once in each beam; the image's
    keys and values are computed once and shared by the beams.
    """
    text, width, size = config.text, config.text.width, config.text.head_dim
    fed = max_length - 1
    # The prompt meets itself, each later token all those up to itself.
    met = prompt_tokens**2 + sum(range(prompt_tokens + 1, fed + 1))
    total = _embedding(text, fed) + _token_head(text, fed)
    for heads, units in zip(text.heads, text.ffn, strict=True):
        total += 4 * fed * width * heads * size + 2 * met * heads * size + _ffn(fed, width, units)
    keys = 0
    for heads in text.cross_heads:
        total += 2 * fed * width * heads * size + 2 * fed * image_tokens * heads * size
        keys += 2 * image_tokens * config.vision.width * heads * size
    return beams * total + keys


def head_macs(config: ModelConfig, text_tokens: int, masked_tokens: int = 1) -> int:
    """MACs of every other module of the form, each once (captioning scores every token)."""
    text, width = config.text, config.text.width
    mlp = 2 * width * width * config.fused_tokens  # its outputs come on top
    costs = {
        "image_projection": config.vision.width * config.embed_dim,
        "text_projection": width * config.embed_dim,
        "contrastive": 0,
        "itm_head": mlp + 2 * width * 2,
        "bbox_head": mlp + 2 * width * 4,
        "cls_head": mlp + 2 * width * 2,
        "ta_head": width * 3,
        "mlm_head": _token_head(text, masked_tokens),
        "lm_head": _token_head(text, text_tokens),
        "decoder": 0,  # a part of its own
    }
    return sum(costs[name] for name in HEADS[config.form])
