"""Baselines of adaptive trimming: what a fixed number of patches reaches, without training.

    from models.trimming import baselines
    pruned = baselines.apply(model, "tome", keep=(28, 20, 14, 10))

"random": patches drawn anew for each picture. "uniform": the learned scores of a trimmed model, but
as many patches of every picture (mode "bucket"). "evit", "evit-fused": inside a block, behind its
attention, the patches that the class token attends to most; the others go, or become one token, the
sum of them weighted by that attention (2202.07800). "tome": at the same place the patches whose keys
are most alike are merged in pairs, and attention counts each token as often as it has patches
(2210.09461). "resolution": a smaller picture.

"evit" and "tome" are written from their papers. All act on the vision encoder, in evaluation.

Shape legend: B rows, N tokens, P patches, D width, H heads, d head size.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple, Protocol, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.attention import Attention
from models.layers import ViTBlock
from models.outputs import AttentionTrace
from models.streams import BlockTrim
from models.trim_config import TrimmingConfig
from models.trimming.convert import with_trimming, without_trimming
from models.vision import resize_positions
from models.xvlm import XVLM

__all__ = ["NAMES", "ClassAttention", "Merging", "RandomScores", "apply", "geometric"]

NAMES = ("random", "uniform", "evit", "evit-fused", "tome", "resolution")
_POSITION = "vision.embeddings.position"
_UNTRIMMED = BlockTrim()


def geometric(patches: int, rate: float, sites: int) -> tuple[int, ...]:
    """Patches left behind each of `sites` sites when each keeps the same share of what it sees."""
    return tuple(max(1, math.ceil(patches * rate ** (site + 1))) for site in range(sites))


def apply(
    model: XVLM,
    name: str,
    *,
    keep: Sequence[int],
    sites: Sequence[int] | None = None,
    seed: int = 0,
) -> XVLM:
    """A copy of `model` in evaluation mode that keeps so many patches.

    Args:
        name: one of `NAMES`.
        keep: patches left behind each site, never more than in front of it; the fused token of
            "evit-fused" comes on top. "resolution": one number, a square.
        sites: vision blocks, one for each count: in front of which ("random", "uniform") or in which
            (the others) patches go. None: the first ones; "uniform": the model's own sites, where
            fusion sites keep at most the last count.
        seed: of "random".

    Raises:
        ValueError: an unknown name, counts that the model cannot keep, "uniform" of a model without
            trimmers, "evit" without a class token, or "tome" asked for more than half at once.
    """
    if name not in NAMES:
        raise ValueError(f"no baseline {name!r}; there are {', '.join(NAMES)}")
    counts = tuple(int(count) for count in keep)
    vision = model.config.vision
    if not counts or min(counts) < 1 or list(counts) != sorted(counts, reverse=True):
        raise ValueError(f"keep {counts}: counts from 1 up that never increase")
    if counts[0] > vision.patches:
        raise ValueError(f"keep {counts}: a picture has {vision.patches} patches")
    if name == "uniform":
        return _uniform(model, counts)
    if model.config.trimming is not None:
        model = without_trimming(model)
    if name == "resolution":
        return _smaller(model, counts)
    places = tuple(range(len(counts))) if sites is None else tuple(sites)
    if len(places) != len(counts) or list(places) != sorted(set(places)):
        raise ValueError(f"sites {places} must be as many rising blocks as keep has counts")
    if places[0] < 0 or places[-1] >= vision.layers:
        raise ValueError(f"sites {places}: the vision encoder has {vision.layers} blocks")
    if name == "random":
        return _random(model, counts, places, seed)
    return _stepped(model, name, counts, places)


# --- scores in front of blocks --------------------------------------------------------------------


class RandomScores(nn.Module):
    """In place of a `TokenTrimmer`: scores that know nothing, anew for every row and pass."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        self.seed = seed
        self._generators: dict[torch.device, torch.Generator] = {}

    def forward(self, x: Tensor, guide: Tensor | None = None, rows: Tensor | None = None) -> Tensor:
        """x (B, N, D) -> (B, N) float32."""
        generator = self._generators.get(x.device)
        if generator is None:
            generator = torch.Generator(x.device).manual_seed(self.seed)
            self._generators[x.device] = generator
        return torch.rand(x.shape[:2], device=x.device, generator=generator)


def _random(model: XVLM, counts: tuple[int, ...], sites: tuple[int, ...], seed: int) -> XVLM:
    with torch.random.fork_rng(devices=()):
        made = with_trimming(
            model, TrimmingConfig(vision=sites, vision_keep=counts, mode="bucket")
        ).eval()
    trimmers = made.vision.trimmers
    assert trimmers is not None
    for number, site in enumerate(sites):
        trimmers.tokens[str(site)] = RandomScores(seed * len(sites) + number)
    return made


def _uniform(model: XVLM, counts: tuple[int, ...]) -> XVLM:
    trimming = model.config.trimming
    if trimming is None:
        raise ValueError('"uniform" keeps by the scores of trained trimmers: this model has none')
    if len(counts) != len(trimming.vision):
        raise ValueError(f"keep {counts}: one count for each of the sites {trimming.vision}")
    fusion = trimming.fusion_keep or (counts[-1],) * len(trimming.fusion)
    fusion = tuple(min(count, counts[-1]) for count in fusion) if trimming.fusion else None
    made = copy.deepcopy(model).eval()
    trimming = replace(trimming, vision_keep=counts, fusion_keep=fusion)
    made.config = replace(made.config, trimming=trimming)
    assert made.vision.trimmers is not None and made.text.trimmers is not None
    made.vision.trimmers.keep = dict(zip(trimming.vision, counts, strict=True))
    first = made.config.text.text_layers
    layers = [first + layer for layer in trimming.fusion]
    made.text.trimmers.context_keep = dict(zip(layers, fusion or (), strict=True))
    made.set_trimming("bucket")
    return made


# --- steps inside blocks --------------------------------------------------------------------------


class Tokens(NamedTuple):
    """Tokens between the attention and the feed-forward part of a block.

    Attributes:
        x: (B, N, D).   q, k: (B, H, N, d) of the attention.
        sizes: (B, N) patches that each token stands for; None: one each.
    """

    x: Tensor
    q: Tensor
    k: Tensor
    sizes: Tensor | None


class _Step(Protocol):
    def __call__(self, tokens: Tokens) -> tuple[Tensor, Tensor | None]:
        """The states that are left, (B, n, D), and their sizes."""
        ...


class ClassAttention(NamedTuple):
    """Keeps the `count` patches that the class token attends to most, on average over heads.

    Attributes:
        prefix: tokens in front of the patches.
        fused: the others become one more token behind them, sum_j a_j x_j (EViT, section 3.2).
    """

    count: int
    prefix: int
    fused: bool = False

    def __call__(self, tokens: Tokens) -> tuple[Tensor, Tensor | None]:
        x, prefix = tokens.x, self.prefix
        if x.shape[1] - prefix <= self.count:
            return x, tokens.sizes
        first = tokens.q[:, :, :1] @ tokens.k.transpose(-1, -2) * tokens.q.shape[-1] ** -0.5
        attention = first.float().softmax(-1).mean(1)[:, 0, prefix:]  # (B, P)
        best = attention.topk(self.count, dim=1).indices.sort(dim=1).values
        parts = [x[:, :prefix], _take(x, best + prefix)]
        if self.fused:
            weight = attention.scatter(1, best, 0.0).to(x.dtype)
            parts.append(torch.einsum("bp,bpd->bd", weight, x[:, prefix:])[:, None])
        return torch.cat(parts, dim=1), tokens.sizes


class Merging(NamedTuple):
    """Merges pairs of patches until `count` are left (ToMe, section 3).

    Patches are dealt in turns to two sets. Each of the first set has one most similar partner in the
    second, by the cosine of keys averaged over heads; the most similar pairs are merged, each token
    counting as often as it has patches. Tokens stay in order, merged ones at the partner's place.

    Attributes:
        prefix: tokens in front of the patches, which are never merged.
    """

    count: int
    prefix: int

    def __call__(self, tokens: Tokens) -> tuple[Tensor, Tensor]:
        x, prefix = tokens.x, self.prefix
        sizes = torch.ones(x.shape[:2], device=x.device) if tokens.sizes is None else tokens.sizes
        merged = x.shape[1] - prefix - self.count
        if merged <= 0:
            return x, sizes
        keys = F.normalize(tokens.k[:, :, prefix:].mean(1).float(), dim=-1)
        likeness = keys[:, 0::2] @ keys[:, 1::2].transpose(1, 2)
        closeness, partner = likeness.max(-1)
        gone = closeness.topk(merged, dim=1).indices  # (B, r), numbers in the first set
        target = prefix + 2 * partner.gather(1, gone) + 1
        source = prefix + 2 * gone
        weighted = x * sizes.to(x.dtype)[..., None]
        wide = (-1, -1, x.shape[-1])
        weighted = weighted.scatter_add(1, target[..., None].expand(*wide), _take(weighted, source))
        sizes = sizes.scatter_add(1, target, sizes.gather(1, source))
        left = torch.ones_like(sizes).scatter(1, source, 0.0)
        # Kept places first, in order: a stable sort, and as many of them in every row.
        order = left.argsort(dim=1, descending=True, stable=True)[:, : x.shape[1] - merged]
        sizes = sizes.gather(1, order)
        return _take(weighted, order) / sizes.to(x.dtype)[..., None], sizes


def _take(x: Tensor, places: Tensor) -> Tensor:
    """(B, N, D), places (B, n) -> (B, n, D)."""
    return x.gather(1, places[..., None].expand(-1, -1, x.shape[-1]))


class _Held:
    """Sizes of the tokens in the pass that runs; blocks of an encoder share it."""

    sizes: Tensor | None = None


class _SteppedBlock(ViTBlock):
    """`block`, with a step between its two parts, and attention that counts tokens by their size."""

    def __init__(self, block: ViTBlock, step: _Step | None, held: _Held, first: bool) -> None:
        nn.Module.__init__(self)
        for name, child in block.named_children():
            self.add_module(name, child)
        self.recompute = False
        self._step, self._held, self._first = step, held, first

    def forward(
        self,
        x: Tensor,
        key_mask: Tensor | None = None,
        trace: bool = False,
        trim: BlockTrim = _UNTRIMMED,
    ) -> tuple[Tensor, AttentionTrace | None]:
        """As of ViTBlock, without masks and traces.

        Raises:
            ValueError: in training, with region masks or traces.
        """
        if self.training or key_mask is not None or trace:
            raise ValueError("baselines run in evaluation, without region masks and traces")
        if self._first:
            self._held.sizes = None
        mixed, q, k = _sized_attention(self.attention, self.norm1(x), self._held.sizes)
        x = x + self.scale1(mixed)
        if self._step is not None:
            x, self._held.sizes = self._step(Tokens(x, q, k, self._held.sizes))
        return x + self.scale2(self.ffn(self.norm2(x))), None


def _sized_attention(
    attention: Attention, x: Tensor, sizes: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Self-attention in which key j counts `sizes[j]` times: its output, q and k."""
    q, k, v = (
        linear(x).unflatten(-1, (-1, attention.head_dim)).transpose(1, 2)
        for linear in (attention.q, attention.k, attention.v)
    )
    bias = None if sizes is None else sizes.log().to(q.dtype)[:, None, None, :]
    mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=bias)
    return attention.out(mixed.transpose(1, 2).flatten(2)), q, k


def _stepped(model: XVLM, name: str, counts: tuple[int, ...], sites: tuple[int, ...]) -> XVLM:
    vision, made = model.config.vision, copy.deepcopy(model).eval()
    prefix = vision.prefix_tokens
    if name != "tome" and not vision.class_token:
        raise ValueError(f'"{name}" goes by the attention of a class token: this model has none')
    held, steps = _Held(), dict[int, _Step]()
    before = vision.patches
    for site, count in zip(sites, counts, strict=True):
        if name == "tome" and before - count > (before + 1) // 2 - (before == 1):
            raise ValueError(
                f"keep {counts}: at most half of the patches merge at once, {before} to {count} "
                "is more"
            )
        fused = name == "evit-fused"
        steps[site] = (
            Merging(count, prefix) if name == "tome" else ClassAttention(count, prefix, fused)
        )
        before = count
    for layer, block in enumerate(made.vision.blocks):
        if not cast(ViTBlock, block).attention.heads:
            if layer in steps:
                raise ValueError(f"block {layer} has no attention heads left to go by")
            continue
        stepped = _SteppedBlock(cast(ViTBlock, block), steps.get(layer), held, layer == 0)
        made.vision.blocks[layer] = stepped.eval()
    return made


# --- smaller pictures -----------------------------------------------------------------------------


def _smaller(model: XVLM, counts: tuple[int, ...]) -> XVLM:
    vision, grid = model.config.vision, math.isqrt(counts[0])
    if len(counts) != 1 or grid * grid != counts[0]:
        raise ValueError(f'keep {counts}: "resolution" takes one square number of patches')
    config = replace(model.config, vision=replace(vision, image_size=grid * vision.patch_size))
    state = {key: value.detach().clone() for key, value in model.state_dict().items()}
    position = state[_POSITION]
    state[_POSITION] = resize_positions(position.float(), grid, vision.position_prefix).to(position)
    with torch.device("meta"):
        made = XVLM(config)
    made.load_state_dict(state, assign=True)
    return made.eval()
