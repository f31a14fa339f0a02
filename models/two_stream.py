"""Two-stream fusion: text and image update each other, layer by layer (METER).

One linear map and one token-type vector a modality stand in front. Layer j of both streams is a BERT
layer: self-attention, cross-attention to the other stream, feed-forward part. Both read what the
other stream was in front of layer j, so neither is ahead. (A known port hands the image layer the
text that was updated already.) Behind the last layer the first token of each stream is pooled, a
linear map and tanh; heads and the answer decoder read these two and nothing else.

Of two images (NLVR2) the text meets each by itself, through the same weights; heads read the four
pooled tokens: text and image of the first pass, then of the second.

The text stream's layers are the fusion layers of the text stack. Trimmers drop image and text tokens
in front of a layer for both streams: who is gone is neither updated nor read.

Shape legend: B texts, R = B rows (two images: 2 B, all of the first image in front), L text tokens,
P image tokens, D width of the text stack.
Source: METER (2111.02387) and its released code.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn

from models.bert import ImageMasks, Images, TextStack, bert_layer, contexts_of, run_layers
from models.config import PAIRED, ModelConfig
from models.layers import BertLayer, Recorder, run_block
from models.outputs import Capture, EncoderOutput
from models.trim_pass import Context, TextPass

__all__ = ["ImageFusion", "Pooler", "TwoStreams"]


class Pooler(nn.Module):
    """tanh(linear(first token)), as BERT pools."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.linear = nn.Linear(width, width)

    def forward(self, states: Tensor) -> Tensor:
        """(B, N, D) -> (B, D)."""
        return self.linear(states[:, 0]).tanh()


class ImageFusion(nn.Module):
    """What two streams have beside the text stack: the image stream's layers, and what stands in
    front of and behind both.

    Raises:
        ValueError: the configuration has no `image_fusion`.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        stream, text, width = config.image_fusion, config.text, config.text.width
        if stream is None:
            raise ValueError("the model has one stream: its configuration has no image_fusion")
        self.images = 2 if config.form in PAIRED else 1
        self.text_linear = nn.Linear(width, width)
        self.image_linear = nn.Linear(config.vision.width, width)
        self.token_type = nn.Embedding(2, width)
        self.layers = nn.ModuleList(
            bert_layer(text, heads, units, cross, width)
            for heads, cross, units in zip(
                stream.heads, stream.cross_heads, stream.ffn, strict=True
            )
        )
        self.text_pooler, self.image_pooler = Pooler(width), Pooler(width)

    def _type(self, kind: int, like: Tensor) -> Tensor:
        """(1, D): 0 is text, 1 is image."""
        return self.token_type(torch.full((1,), kind, dtype=torch.int64, device=like.device))

    def enter_text(self, states: Tensor) -> Tensor:
        """(B, L, D) -> (B, L, D)."""
        return self.text_linear(states) + self._type(0, states)

    def enter_image(self, images: Sequence[Context], texts: int) -> Context:
        """States (N, P, width of the vision encoder) and masks of each image -> (R, P, D), (R, P).

        Every text has a copy of its image, which it changes; N divides the number of texts.
        """
        states = torch.cat([_repeat(one, texts) for one, _ in images])
        mask = None
        if any(seen is not None for _, seen in images):
            mask = torch.cat(
                [
                    _repeat(
                        one.new_ones(one.shape[:2], dtype=torch.bool) if m is None else m, texts
                    )
                    for one, m in images
                ]
            )
        return self.image_linear(states) + self._type(1, states), mask

    def pool(self, text: Tensor, image: Tensor) -> Tensor:
        """(R, L, D), (R, P, D) -> (B, 2, D), or (B, 4, D) of two images."""
        pooled = torch.stack([self.text_pooler(text), self.image_pooler(image)], dim=1)
        if self.images == 1:
            return pooled
        return pooled.unflatten(0, (self.images, -1)).transpose(0, 1).flatten(1, 2)


def _repeat(per_image: Tensor, rows: int) -> Tensor:
    """(N, ...) -> (rows, ...), each entry for its consecutive rows."""
    images = per_image.shape[0]
    if images == rows:
        return per_image
    if rows % images:
        raise ValueError(f"{rows} texts cannot share {images} images evenly")
    return per_image.repeat_interleave(rows // images, 0)


@dataclass(frozen=True)
class TwoStreams:
    """`fuse` and `multimodal` of a text stack and the image stream beside it."""

    text: TextStack
    image: ImageFusion

    def fuse(
        self,
        states: Tensor,
        mask: Tensor | None,
        image_states: Images,
        image_mask: ImageMasks,
        capture: Capture,
    ) -> EncoderOutput:
        """Fusion layers only, see `XVLM.fuse`; index 0 is the first of them."""
        return self._run(states, mask, image_states, image_mask, capture, below=0)

    def multimodal(
        self,
        ids: Tensor,
        mask: Tensor | None,
        image_states: Images,
        image_mask: ImageMasks,
        capture: Capture,
    ) -> EncoderOutput:
        """Text layers (once, of two images too), then fusion layers, in one numbering."""
        x, below = self.text.embeddings(ids), self.text.config.text_layers
        return self._run(x, mask, image_states, image_mask, capture, below)

    def _run(
        self,
        x: Tensor,
        mask: Tensor | None,
        image_states: Images,
        image_mask: ImageMasks,
        capture: Capture,
        below: int,
    ) -> EncoderOutput:
        """`below` text layers, then the fusion layers.

        Image states and traces count as those of the fusion layers beside them. Of the state between
        text and fusion layers `hidden` has what the text layers made of it, or, in a pass without
        them, what enters the first fusion layer; of the image always the latter.
        """
        first, image = self.text.config.text_layers, self.image
        context = image.enter_image(contexts_of(image_states, image_mask, image.images), len(x))
        trim = TextPass(
            x, mask, [context], self.text.trimmers, first - below, causal=False, packs=False
        )
        words = run_layers(list(self.text.layers[:below]), x, mask, (), capture, trim=trim)
        x, y = words.last, context[0]
        if image.images > 1:
            x = trim.stream.select(x, torch.arange(len(x), device=x.device).repeat(image.images))
        x = image.enter_text(x)
        ours, theirs = Recorder(capture), Recorder(capture)
        if not below:
            ours.state(0, x)
        theirs.state(below, y)
        pairs = zip(self.text.layers[first:], image.layers, strict=True)
        for index, (layer, beside) in enumerate(pairs, start=below):
            x, y = self._layer(index, cast(BertLayer, layer), cast(BertLayer, beside), x, trim,
                               (ours, theirs))  # fmt: skip
        text = ours.output(x, trim.stream.mask, trim.record)
        text.hidden = words.hidden | text.hidden
        text.attention = words.attention | text.attention
        joint = image.pool(x, y)
        return EncoderOutput(
            joint,
            text.hidden,
            text.attention,
            text.cross_attention,
            mask=torch.ones(joint.shape[:2], dtype=torch.bool, device=joint.device),
            trimming=trim.record,
            streams=(text, theirs.output(y, trim.read[0].mask)),
        )

    @staticmethod
    def _layer(
        index: int,
        layer: BertLayer,
        beside: BertLayer,
        x: Tensor,
        trim: TextPass,
        recorders: tuple[Recorder, Recorder],
    ) -> tuple[Tensor, Tensor]:
        """Both streams behind layer `index`, from both in front of it."""
        x = trim.own(index, x, 0)
        y, seen, _ = trim.context(index, x, 0, None)
        mask, capture = trim.stream.mask, recorders[0].capture
        wanted = {
            "trace": index in capture.attention,
            "cross_trace": index in capture.cross_attention,
        }
        text, *traces = run_block(layer, x, mask, y, seen, **wanted)
        recorders[0].traces(index, *traces)
        recorders[0].state(index + 1, text)
        picture, *traces = run_block(beside, y, seen, x, mask, **wanted)
        recorders[1].traces(index, *traces)
        recorders[1].state(index + 1, picture)
        trim.states[0] = picture
        return text, picture
