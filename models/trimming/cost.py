"""What a trimmed pass costs: multiply-accumulates from the decisions, with their gradient.

Counted as `models.summary` does: matrix products and the patch convolution; trimmers included. In
mode "gather" with one row it is what torch's FlopCounterMode counts while the pass runs.

Shape legend: B rows, H heads.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from models.config import PAIRED, ModelConfig
from models.outputs import EncoderOutput, TrimRecord
from models.part_configs import TextConfig, VisionConfig
from models.summary import decoder_macs, text_macs, vision_macs
from models.trim_config import TrimmingConfig

__all__ = ["Costs", "dense_macs", "expected_macs"]

Count = int | float | Tensor


@dataclass(frozen=True)
class Costs:
    """MACs by part: "vision", "text", "fusion", "decoder", those that were asked for.

    Attributes:
        parts: part -> float32 (rows of the part's pass): images (or texts, where images were
            encoded for each text) of vision, texts of the others. With gradient in training.
        images: images of an example, 2 in forms of NLVR2.
        by_image: the parts whose rows are images, all first ones in front.
        read: the rows of vision that each text reads, first and second image; empty: as above.
        dense: part -> mean MACs of the same examples in the model without trimmers. Padding counts
            in neither.
    """

    parts: Mapping[str, Tensor]
    images: int
    dense: Mapping[str, Tensor | float]
    by_image: tuple[str, ...] = ("vision",)
    read: tuple[Tensor, ...] = ()

    def total(self) -> Tensor:
        """Mean MACs of an example, a scalar with gradient in training."""
        means = [
            rows.mean() * (self.images if part in self.by_image else 1)
            for part, rows in self.parts.items()
        ]
        return torch.stack(means).sum()

    def total_dense(self) -> Tensor:
        """Mean MACs of the same examples in the model without trimmers, a scalar."""
        like = next(iter(self.parts.values()))
        return torch.stack([torch.as_tensor(part).to(like) for part in self.dense.values()]).sum()

    def share(self) -> Tensor:
        """`total` over `total_dense`, for the cost term of the loss."""
        return self.total() / self.total_dense()

    def per_example(self) -> Tensor:
        """(B,) MACs of each example, where images belong to one text each.

        Raises:
            ValueError: when rows of the parts do not match: images shared by several texts.
        """
        total: Tensor | None = None
        for part, rows in self.parts.items():
            if part in self.by_image and self.images == 2:
                pairs = self.read if part == "vision" else ()
                sides = [rows[index] for index in pairs] or list(rows.chunk(2))
                rows = sides[0] + sides[1]
            if total is not None and len(rows) != len(total):
                raise ValueError(
                    f"costs of {len(rows)} rows of {part} do not add up with {len(total)} others: "
                    "images are shared by texts; look at `parts`"
                )
            total = rows if total is None else total + rows
        if total is None:
            raise ValueError("there are no costs to add")
        return total


def expected_macs(
    config: ModelConfig,
    *,
    image: EncoderOutput | None = None,
    text: EncoderOutput | None = None,
    fused: EncoderOutput | None = None,
    answer_tokens: int | None = None,
) -> Costs:
    """MACs of the passes given, as their decisions say; differentiable in token and head masks.

    Args:
        image: of `encode_image`.
        text: of `encode_text`, when it ran; part of `fused` already where that continued it.
        fused: of `fuse`, `multimodal` or `decode` (captions).
        answer_tokens: decoder inputs of an answer, whose decoder reads `fused` (form "vqa").

    Raises:
        ValueError: when the trimmers were off in a pass.
    """
    parts: dict[str, Tensor] = {}
    dense: dict[str, Tensor | float] = {}
    if image is not None:
        parts["vision"] = _vision(config, image)
        dense["vision"] = float(vision_macs(config) * _images(config))
    if text is not None and _within(text, fused):
        text = None
    for output in (text, fused):
        if output is None:
            continue
        # A pass over texts that came trimmed is compared with one over the whole texts.
        begun = output if text is None or not _record(text).sites else text
        for part, macs in _stack(config, _record(output)).items():
            parts[part] = parts[part] + macs if part in parts else macs
            whole = text_macs(config, _first_tokens(begun), config.vision.output_tokens)  # type: ignore[arg-type]
            dense[part] = _as_rows(whole[part == "fusion"], macs.detach()).mean()
    if answer_tokens is not None and fused is not None:
        left = _left(fused)
        parts["decoder"] = _as_rows(decoder_macs(config, answer_tokens, left), left)  # type: ignore[arg-type]
        whole = decoder_macs(config, answer_tokens, _first_tokens(fused))  # type: ignore[arg-type]
        dense["decoder"] = _as_rows(whole, left).mean()
    ordered = {
        part: parts[part] for part in ("vision", "text", "fusion", "decoder") if part in parts
    }
    # Two streams meet each image by itself.
    by_image = ("vision",) if config.image_fusion is None else ("vision", "fusion")
    read = () if image is None else image.read
    return Costs(ordered, _images(config), {part: dense[part] for part in ordered}, by_image, read)


def dense_macs(config: ModelConfig, text_tokens: int, answer_tokens: int = 0) -> dict[str, int]:
    """MACs of an example without trimmers: "vision" (both images of NLVR2), "text", "fusion" and
    "decoder"."""
    text, fusion = text_macs(config, text_tokens, config.vision.output_tokens)
    return {
        "vision": vision_macs(config) * _images(config),
        "text": text,
        "fusion": fusion,
        "decoder": decoder_macs(config, answer_tokens, text_tokens) if answer_tokens else 0,
    }


def _images(config: ModelConfig) -> int:
    return 2 if config.form in PAIRED else 1


def _record(output: EncoderOutput) -> TrimRecord:
    if output.trimming is None:
        raise ValueError(
            'a pass without trimmers has no expected cost: set_trimming("mask"), or use dense_macs'
        )
    return output.trimming


def _within(text: EncoderOutput, fused: EncoderOutput | None) -> bool:
    """Whether `fused` is the pass that continued `text` (`multimodal(..., text=text)`)."""
    if fused is None:
        return False
    counts = _record(fused).tokens
    return any(counts.get(layer) is count for layer, count in _record(text).tokens.items())


def _as_rows(macs: Count, like: Tensor) -> Tensor:
    return macs if isinstance(macs, Tensor) else torch.full_like(like, float(macs))


# --- parts ----------------------------------------------------------------------------------------


def _heads(layer: int, count: int, chosen: Mapping[int, Tensor]) -> Count:
    """Heads of a layer: those chosen in each row, (B,), or all."""
    return chosen[layer].sum(1) if layer in chosen else count


def _attention(
    queries: Count, keys: Count, heads: Count, size: int, width: int, key_width: int,
    shared: int | None = None,
) -> Count:  # fmt: skip
    """As `summary._attention`, for numbers that may be tensors of rows."""
    inner = heads * size
    projected = inner if shared is None else shared * size
    projections = 2 * queries * width * inner + 2 * keys * key_width * projected
    return projections + 2 * queries * keys * inner


def _token_trimmer(
    trimming: TrimmingConfig, tokens: Count, width: int, guide_width: int | None
) -> Count:
    cost = tokens * (width + 1) * trimming.bottleneck
    if guide_width is not None:
        cost = cost + (tokens * width + guide_width) * trimming.projection
    return cost


def _head_trimmer(trimming: TrimmingConfig, width: int, heads: int) -> int:
    return (width + heads) * trimming.bottleneck


def _trimming(config: ModelConfig) -> TrimmingConfig:
    assert config.trimming is not None  # there is a record
    return config.trimming


def _vision(config: ModelConfig, output: EncoderOutput) -> Tensor:
    """(B,) MACs of each image, or of each text's image."""
    vision, trimming, record = config.vision, _trimming(config), _record(output)
    width, size = vision.width, vision.head_dim
    rows = output.last.shape[0]
    total = torch.zeros(rows, device=output.last.device)
    total = total + vision.patches * 3 * vision.patch_size**2 * width
    guide = config.text.width if trimming.guided else None
    for layer, tokens in record.tokens.items():
        cost: Count = 0.0
        if layer in record.sites:
            before = record.sites[layer].before
            total = total + _token_trimmer(trimming, before, width, guide)
        if layer in record.heads:
            cost = float(_head_trimmer(trimming, width, vision.heads[layer]))
        heads = _heads(layer, vision.heads[layer], record.heads)
        cost = cost + _attention(tokens, tokens, heads, size, width, width)
        cost = cost + 2 * tokens * width * vision.ffn[layer]
        total = total + _spread(_as_rows(cost, tokens), rows)
    if vision.pooling == "map":
        total = total + _pool(vision, _left(output) - 1)
    return total


def _spread(cost: Tensor, rows: int) -> Tensor:
    """Costs of the images in front of the first guided site, for texts that may share them.

    Each text counts a whole image, as `dense_macs` does: in service it comes with its own.
    """
    return cost if len(cost) == rows else cost.mean().expand(rows)


def _pool(vision: VisionConfig, patches: Tensor) -> Count:
    width, size = vision.width, vision.head_dim
    cost = _attention(1, patches, width // size, size, width, width)
    return cost + 2 * width * vision.pool_ffn


def _stack(config: ModelConfig, record: TrimRecord) -> dict[str, Tensor]:
    """ "text" and "fusion", those of them that ran: (B,) MACs of each text."""
    text, trimming = config.text, _trimming(config)
    parts: dict[str, Tensor] = {}
    for layer, tokens in record.tokens.items():
        fusion = layer >= text.text_layers
        other = config.context_width if fusion else None
        heads = _heads(layer, text.heads[layer], record.heads)
        width, size = text.width, text.head_dim
        cost = _attention(tokens, tokens, heads, size, width, width)
        cost = cost + 2 * tokens * width * text.ffn[layer]
        if layer in record.sites:
            before = record.sites[layer].before
            cost = cost + _token_trimmer(trimming, before, width, other)
        if layer in record.heads:
            cost = cost + _head_trimmer(trimming, width, text.heads[layer])
        if fusion:
            cost = cost + _cross(config, record, layer, tokens)
            cost = cost + _image_stream(config, record, layer, tokens)
        if layer == 0:
            cost = cost + _embedding(text, tokens if 0 not in record.sites else before)
        part = "fusion" if fusion else "text"
        rows = _as_rows(cost, tokens)
        parts[part] = parts[part] + rows if part in parts else rows
    return parts


def _embedding(text: TextConfig, tokens: Tensor) -> Count:
    return 0 if text.word_width is None else tokens * text.word_width * text.width


def _cross(config: ModelConfig, record: TrimRecord, layer: int, tokens: Tensor) -> Count:
    """Cross-attention of a fusion layer, its trimmers, and that of the image it reads.

    An image that several texts read is projected for each of them once tokens are trimmed for each,
    and else counted for each as well.
    """
    text, trimming, other = config.text, _trimming(config), config.context_width
    place = layer - text.text_layers
    width, size, count = text.width, text.head_dim, text.cross_heads[place]
    shared = None if text.pair_heads is None else text.pair_heads[place // 2]
    heads = _heads(layer, count, record.cross_heads)
    read = _paired(record.context_tokens[layer], tokens)
    cost: Count = 0
    if count:
        cost = _attention(tokens, read, heads, size, width, other, shared)
    if layer in record.context_sites:
        before = _paired(record.context_sites[layer].before, tokens)
        cost = cost + _token_trimmer(trimming, before, other, width)
    if layer in record.cross_heads:
        cost = cost + _head_trimmer(trimming, width + other, count)
    return cost


def _image_stream(config: ModelConfig, record: TrimRecord, layer: int, tokens: Tensor) -> Count:
    """The image's layer beside a fusion layer of two streams; with the first of them, what stands
    in front of and behind both streams."""
    stream, text, width = config.image_fusion, config.text, config.text.width
    if stream is None:
        return 0
    place, size = layer - text.text_layers, text.head_dim
    read = record.context_tokens[layer]
    cost = _attention(read, read, stream.heads[place], size, width, width)
    cost = cost + _attention(read, tokens, stream.cross_heads[place], size, width, width)
    cost = cost + 2 * read * width * stream.ffn[place]
    if place == 0:
        words, image = record.sites.get(layer), record.context_sites.get(layer)
        words, image = words.before if words else tokens, image.before if image else read
        cost = cost + (words + 2) * width * width + image * config.vision.width * width
    return cost


def _paired(images: Tensor, texts: Tensor) -> Tensor:
    """(C,) -> (B,): each image for its consecutive texts."""
    if len(images) == len(texts):
        return images
    return images.repeat_interleave(len(texts) // len(images))


def _left(output: EncoderOutput) -> Tensor:
    """(B,) tokens of `last` that are left."""
    if output.mask is not None:
        return output.mask.float().sum(1)
    rows, tokens = output.last.shape[:2]
    return torch.full((rows,), float(tokens), device=output.last.device)


def _first_tokens(output: EncoderOutput) -> Tensor:
    """(B,) text tokens of each row when the pass began, padding not counted."""
    record = _record(output)
    first = min(record.tokens)
    found = record.sites[first].before if first in record.sites else record.tokens[first]
    return found.detach()
