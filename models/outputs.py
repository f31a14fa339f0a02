"""Typed outputs of encoders, and how a caller asks for intermediate results.

Shape legend: B rows, N tokens, D width, H heads, d head size.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

from torch import Tensor

__all__ = ["AttentionTrace", "Capture", "EncoderOutput"]


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


@dataclass
class EncoderOutput:
    """What an encoder returns.

    Attributes:
        last: (B, N, D) final states (after the final norm where there is one).
        hidden: index -> (B, N, D) residual-stream states as asked for by `Capture.hidden`.
        attention, cross_attention: layer index -> trace as asked for.
    Indices count from the first layer of the pass that ran (a fusion pass starts at 0).
    """

    last: Tensor
    hidden: dict[int, Tensor] = field(default_factory=dict)
    attention: dict[int, AttentionTrace] = field(default_factory=dict)
    cross_attention: dict[int, AttentionTrace] = field(default_factory=dict)
