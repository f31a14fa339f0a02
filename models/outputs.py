"""Typed outputs of encoders, and how a caller asks for intermediate results.

Shape legend: B rows, N tokens, D width, H heads, d head size.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from typing import TypeVar

from torch import Tensor

__all__ = ["AttentionTrace", "Capture", "EncoderOutput", "TrimRecord", "TrimSite"]

T = TypeVar("T")


@dataclass(frozen=True)
class AttentionTrace:
    """Inputs of one attention, from which a loss can form softmax(scale * q k^T) itself, never the
    map.

    Attributes:
        q: (B, H, Nq, d) before scaling.   k: (B, H, Nk, d).   scale: factor on q k^T.
        key_mask: (B, Nk) bool, True on visible keys; None when all are.
        causal: queries see keys up to their own position only.
    """

    q: Tensor
    k: Tensor
    scale: float
    key_mask: Tensor | None = None
    causal: bool = False


@dataclass(frozen=True)
class Capture:
    """Which intermediate results a caller wants.

    Attributes:
        hidden: indices of hidden states; 0 is the input of the first layer, i + 1 the output of
            layer i.
        attention: indices of layers whose self-attention trace is wanted.
        cross_attention: indices of layers whose cross-attention trace is wanted.
    """

    hidden: frozenset[int] = frozenset()
    attention: frozenset[int] = frozenset()
    cross_attention: frozenset[int] = frozenset()

    @classmethod
    def of(
        cls,
        hidden: Iterable[int] = (),
        attention: Iterable[int] = (),
        cross_attention: Iterable[int] = (),
    ) -> Capture:
        """A capture from any iterables of indices."""
        return cls(frozenset(hidden), frozenset(attention), frozenset(cross_attention))

    def below(self, layer: int) -> Capture:
        """What is wanted of a pass that ends in front of `layer`."""
        hidden = (i for i in self.hidden if i <= layer)
        traces = self.attention, self.cross_attention
        return Capture.of(hidden, *((i for i in wanted if i < layer) for wanted in traces))

    def above(self, layer: int) -> Capture:
        """What is wanted of a pass that begins with `layer`, counted from it."""
        sets = self.hidden, self.attention, self.cross_attention
        return Capture.of(*((i - layer for i in wanted if i >= layer) for wanted in sets))


@dataclass(frozen=True)
class TrimSite:
    """What one token trimmer decided about the n tokens that were in front of it.

    Attributes:
        logits: (B, n) float32, noise not included.
        kept: (B, n) float32 of 0 and 1: the token is there from here on (those that were gone
            before, or are padding, have 0). In training with the straight-through gradient.
        movable: (B, n) bool: it could have gone: no protected token, no padding, not gone before.
        places: (B, n) int64, place of each among the `tokens` at the start of the stack; None: as
            they were. Where `kept` and `movable` are 0 it may be any place.
        tokens: N.
        before: (B,) float32, how many there were in front of the site.
    """

    logits: Tensor
    kept: Tensor
    movable: Tensor
    places: Tensor | None
    tokens: int
    before: Tensor

    def spread(self, values: Tensor) -> Tensor:
        """(B, n) values of the site's tokens -> (B, N), by their place at the start; else 0."""
        if self.places is None:
            return values
        empty = values.new_zeros(values.shape[0], self.tokens)
        return empty.scatter_add(1, self.places, values)

    def keep(self) -> Tensor:
        """(B, N) float32: which tokens of the stack's start are there behind the site."""
        return self.spread(self.kept)


@dataclass
class TrimRecord:
    """Decisions of one pass, and what each of its layers worked on.

    Layers are numbered as in the stack's configuration: vision blocks; text layers, then fusion
    layers (a fusion pass starts at `text_layers`).

    Attributes:
        sites: layer -> decisions about the stack's own tokens in front of it.
        context_sites: layer -> decisions about the image tokens that it reads.
        heads, cross_heads: layer -> (B, H) float32 of 0 and 1, for layers with a head trimmer.
        tokens: layer -> (B,) float32 tokens it worked on, padding not counted.
        context_tokens: layer -> (B,) image tokens that its cross-attention read.
        places: (B, n), where the stack's own tokens that are left lay at the start; None: as then.
    Rows are images in a vision pass (or texts, where they were encoded for each text), else texts.
    """

    sites: dict[int, TrimSite] = field(default_factory=dict)
    context_sites: dict[int, TrimSite] = field(default_factory=dict)
    heads: dict[int, Tensor] = field(default_factory=dict)
    cross_heads: dict[int, Tensor] = field(default_factory=dict)
    tokens: dict[int, Tensor] = field(default_factory=dict)
    context_tokens: dict[int, Tensor] = field(default_factory=dict)
    places: Tensor | None = None

    def join(self, above: TrimRecord) -> TrimRecord:
        """The record of this pass of a text stack and of the one above it, as of one pass."""
        sites = self.sites | {layer: self._from_start(site) for layer, site in above.sites.items()}
        return TrimRecord(
            sites,
            self.context_sites | above.context_sites,
            self.heads | above.heads,
            self.cross_heads | above.cross_heads,
            self.tokens | above.tokens,
            self.context_tokens | above.context_tokens,
            self._through(above.places, len(next(iter(above.tokens.values())))),
        )

    def _through(self, places: Tensor | None, rows: int) -> Tensor | None:
        """Places among the tokens that this pass left -> among those that it began with."""
        if self.places is None:
            return places
        start = self.places.repeat(rows // len(self.places), 1)  # texts of two images come twice
        return start if places is None else start.gather(1, places)

    def _from_start(self, site: TrimSite) -> TrimSite:
        if self.places is None:
            return site
        tokens = next(iter(self.sites.values())).tokens  # who moves tokens has sites
        places = self._through(site.places, len(site.logits))
        return replace(site, places=places, tokens=tokens)


@dataclass
class EncoderOutput:
    """What an encoder returns.

    Attributes:
        last: (B, N, D) final states (after the final norm where there is one). Where trimmers move
            tokens, those that are left, in their order.
        hidden: index -> (B, N, D) residual-stream states as asked for by `Capture.hidden`.
        attention, cross_attention: layer index -> trace as asked for.
        mask: (B, N) what may be read of `last`: bool, True is visible, or float keep weights where
            trimmers mask; None: everything. Who attends to `last` passes it on.
        trimming: decisions of the trimmers; None where they are off.
        streams: of a two-stream fusion: the text stream's output (its states as `last`; `hidden` and
            the traces are those above) and the image stream's. `last` is then what heads and the
            answer decoder read, the pooled first tokens of both (`models.two_stream`).
        per_text: rows are texts, each with its own copy of the image (see `XVLM.encode_image`).
        guide: of an image pass by `models.trimming.see`: the text pass that guided it.
        read: of such a pass without a guide: for each image that a text reads, (B,) its row here.
    Indices count from the first layer of the pass that ran (a fusion pass starts at 0).
    """

    last: Tensor
    hidden: dict[int, Tensor] = field(default_factory=dict)
    attention: dict[int, AttentionTrace] = field(default_factory=dict)
    cross_attention: dict[int, AttentionTrace] = field(default_factory=dict)
    mask: Tensor | None = None
    trimming: TrimRecord | None = None
    per_text: bool = False
    streams: tuple[EncoderOutput, EncoderOutput] | None = None
    guide: EncoderOutput | None = None
    read: tuple[Tensor, ...] = ()

    @property
    def words(self) -> Tensor:
        """(B, L, D) states of the text's tokens, of a pass of the text stack."""
        return self.last if self.streams is None else self.streams[0].last

    def context(self, index: Tensor) -> tuple[Tensor, Tensor | None]:
        """States and mask of the image of each text, for `fuse`, `multimodal` and `decode`.

        Args:
            index: (B,) int64, the image of each text; not used where rows are texts already.
        """
        if self.per_text:
            return self.last, self.mask
        return self.last[index], None if self.mask is None else self.mask[index]

    def check(self, capture: Capture) -> None:
        """Raises ValueError when something that `capture` asks of text layers was not recorded."""
        for name in ("hidden", "attention"):
            missing = getattr(capture, name) - getattr(self, name).keys()
            if missing:
                raise ValueError(
                    f"the text pass recorded no {name} of {sorted(missing)}: encode the text with "
                    "the capture of the whole pass, Capture.below(text_layers)"
                )

    def join(self, above: EncoderOutput, layers: int) -> EncoderOutput:
        """This pass through `layers` layers of text and the fusion pass above it, as one pass."""

        def both(lower: dict[int, T], upper: dict[int, T]) -> dict[int, T]:
            """Of the state between the passes, what the lower one says."""
            return {index + layers: value for index, value in upper.items()} | lower

        record, streams = above.trimming, above.streams
        if record is not None and self.trimming is not None:
            record = self.trimming.join(record)
        if streams is not None:
            words, image = streams
            streams = self.join(words, layers), EncoderOutput(image.last).join(image, layers)
        return EncoderOutput(
            above.last,
            both(self.hidden, above.hidden),
            both(self.attention, above.attention),
            both(self.cross_attention, above.cross_attention),
            above.mask,
            record,
            streams=streams,
        )
