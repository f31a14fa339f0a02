"""One pass of an encoder with its trimmers: what happens in front of each layer.

With trimmers off, or absent, both passes hand on what they were given.

Shape legend: B rows, N images, L text tokens, T tokens of an image, C images read, K their tokens,
D width.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from models.attention import LayerCache
from models.outputs import TrimRecord
from models.packing import Packing
from models.part_configs import TextConfig, VisionConfig
from models.streams import BlockTrim, TokenStream
from models.trim_config import TrimmingConfig
from models.trimmers import Trimmers

__all__ = ["Context", "ImagePass", "TextPass", "text_trimmers", "vision_trimmers"]

Context = tuple[Tensor, Tensor | None]  # image states and their mask


def vision_trimmers(
    config: VisionConfig, trimming: TrimmingConfig, guide_width: int | None
) -> Trimmers:
    guide = guide_width if trimming.guided else None
    heads = enumerate(config.heads if "vision" in trimming.heads else ())
    trimmers = Trimmers(
        trimming,
        tokens=dict.fromkeys(trimming.vision, (config.width, guide)),
        heads={layer: (config.width, count) for layer, count in heads},
    )
    if trimming.vision_keep is not None:
        trimmers.keep = dict(zip(trimming.vision, trimming.vision_keep, strict=True))
    if trimming.repack is not None:
        trimmers.repack = frozenset(trimming.repack)
    return trimmers


def text_trimmers(config: TextConfig, trimming: TrimmingConfig, context_width: int) -> Trimmers:
    """Trimmers of the whole stack. Text layers run first: their sites know nothing of the image."""
    width, first = config.width, config.text_layers
    heads = {
        layer: (width, count)
        for layer, count in enumerate(config.heads)
        if ("text" if layer < first else "fusion") in trimming.heads
    }
    cross = enumerate(config.cross_heads if "fusion" in trimming.heads else ())
    trimmers = Trimmers(
        trimming,
        tokens={i: (width, None if i < first else context_width) for i in trimming.text},
        context={first + i: (context_width, width) for i in trimming.fusion},
        heads=heads,
        cross_heads={first + i: (width + context_width, count) for i, count in cross},
    )
    if trimming.text_keep is not None:
        trimmers.keep = dict(zip(trimming.text, trimming.text_keep, strict=True))
    if trimming.fusion_keep is not None:
        layers = [first + layer for layer in trimming.fusion]
        trimmers.context_keep = dict(zip(layers, trimming.fusion_keep, strict=True))
    return trimmers


class ImagePass:
    """One pass through the blocks: what trimmers do in front of each; nothing where they are off."""

    def __init__(
        self,
        trimmers: Trimmers | None,
        stream: TokenStream,
        guide: Tensor | None,
        image_index: Tensor | None,
    ) -> None:
        active = trimmers is not None and trimmers.mode != "off"
        self.trimmers = trimmers if active else None
        self.record = TrimRecord() if active else None
        self.stream, self.guide = stream, guide
        # Blocks in front of the first guided site run once for each image.
        self.index = None if guide is None else image_index
        if self.trimmers is not None:
            self.trimmers.check()

    def _expand(self, x: Tensor) -> Tensor:
        """Rows become those of the guide."""
        if self.index is not None:
            x = self.stream.select(x, self.index)
            self.index = None
        return x

    def before(self, layer: int, x: Tensor, gates: Tensor | None) -> tuple[Tensor, BlockTrim]:
        """The states that enter block `layer`, and what it is told; gates (H,) are its heads'."""
        trimmers, stream, record = self.trimmers, self.stream, self.record
        if trimmers is None or record is None:
            return x, BlockTrim()
        if str(layer) in trimmers.tokens:
            x = self._expand(x)
            x, record.sites[layer] = stream.trim(x, trimmers, layer, self.guide)
        record.tokens[layer] = stream.count(x)
        heads = None
        if str(layer) in trimmers.heads:
            first = stream.first(x)
            heads, record.heads[layer] = trimmers.choose_heads("heads", layer, first, gates=gates)
        return x, BlockTrim(packing=stream.packing, heads=heads)

    def finish(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """The last states, (B, T, D) in any mode, and their mask."""
        x = self.stream.unpack(self._expand(x))
        return x, self.stream.mask


class TextPass:
    """One pass of a stack over its tokens and the images it reads, with or without trimmers.

    Args:
        packs: mode "packed" packs the images' tokens; False: it moves them to the front.
    """

    def __init__(
        self,
        x: Tensor,
        mask: Tensor | None,
        contexts: Sequence[Context],
        trimmers: Trimmers | None,
        first: int,
        causal: bool,
        packs: bool = True,
    ) -> None:
        active = trimmers is not None and trimmers.mode != "off"
        self.trimmers = trimmers if active else None
        self.record = TrimRecord() if active else None
        # Text is short and everything behind it reads rows: it is never packed.
        self.stream = TokenStream(x, mask, 1, packs=False)
        self.first, self.causal = first, causal
        self.states = [states for states, _ in contexts]
        self.read = [TokenStream(states, seen, 1, packs) for states, seen in contexts]
        if self.trimmers is not None:
            self.trimmers.check()
            if self.trimmers.mode == "packed" and packs:
                pairs = zip(self.read, self.states, strict=True)
                self.states = [stream.pack(states) for stream, states in pairs]

    def context(
        self, layer: int, x: Tensor, turn: int, cache: LayerCache | None
    ) -> tuple[Tensor, Tensor | None, Packing | None]:
        """The image that `layer` reads, trimmed in front of it: states, mask and packing."""
        stream = self.read[turn]
        if cache is not None and cache.seen is not None:
            return self.states[turn], *cache.seen
        name = str(self.first + layer)
        if self.trimmers is not None and self.record is not None:
            if name in self.trimmers.context:
                states, guide = self._paired(x, turn)
                self.states[turn], site = stream.trim(
                    states, self.trimmers, self.first + layer, guide, context=True
                )
                self.record.context_sites[self.first + layer] = site
            self.record.context_tokens[self.first + layer] = stream.count(self.states[turn])
        if cache is not None and self.trimmers is not None:
            cache.seen = stream.mask, stream.packing
        return self.states[turn], stream.mask, stream.packing

    def _paired(self, x: Tensor, turn: int) -> tuple[Tensor, Tensor]:
        """States (C, K, D) of the image, and the first token of its text, (C, D).

        Where texts share an image, each needs its own copy of it, for they keep different tokens.
        In a causal stack the first token has seen only itself and the image, so it is the same in
        all of them.
        """
        guide, stream, states = self.stream.first(x), self.read[turn], self.states[turn]
        if guide.shape[0] == stream.rows:  # len() would fix the number in an export
            return states, guide
        group = guide.shape[0] // stream.rows
        if self.causal:
            return states, guide[::group]
        rows = torch.arange(guide.shape[0], device=x.device) // group
        return stream.select(states, rows), guide

    def own(self, layer: int, x: Tensor, turn: int | None) -> Tensor:
        """The states that enter `layer`, trimmed in front of it."""
        number = self.first + layer
        if self.trimmers is None or self.record is None:
            return x
        if str(number) in self.trimmers.tokens:
            guide = None if turn is None else self._image_first(turn, x.shape[0])
            x, self.record.sites[number] = self.stream.trim(x, self.trimmers, number, guide)
            self.record.places = self.stream.places
        self.record.tokens[number] = self.stream.count(x)
        return x

    def _image_first(self, turn: int, rows: int) -> Tensor:
        """(B, D): the first token of the image that each row reads."""
        first = self.read[turn].first(self.states[turn])
        count = first.shape[0]
        return first if count == rows else first.repeat_interleave(rows // count, 0)

    def heads(
        self,
        layer: int,
        x: Tensor,
        turn: int | None,
        cache: LayerCache | None,
        gates: tuple[Tensor | None, Tensor | None],
    ) -> tuple[Tensor | None, Tensor | None]:
        """What self-attention and cross-attention of `layer` are told about their heads, from the
        gates (H,) of both."""
        trimmers, record, number = self.trimmers, self.record, self.first + layer
        if trimmers is None or record is None:
            return None, None
        if cache is not None and cache.own.held is not None:
            return cache.heads  # the first token has passed
        first = self.stream.first(x)
        own = cross = None
        if str(number) in trimmers.heads:
            own, kept = trimmers.choose_heads("heads", number, first, gates=gates[0])
            record.heads[number] = kept
        if turn is not None and str(number) in trimmers.cross_heads:
            other = self._image_first(turn, x.shape[0])
            cross, kept = trimmers.choose_heads("cross_heads", number, first, other, gates[1])
            record.cross_heads[number] = kept
        if cache is not None:
            cache.heads = own, cross
        return own, cross
