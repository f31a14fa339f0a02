"""Heads on top of the encoders: projections, temperature, matching, box and masked tokens.

Shape legend: B rows, L tokens, M asked positions, D width, E shared embedding, V vocabulary.
Source: EfficientVLM (2210.07795) section 3, X-VLM (2111.08276) section 3.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

__all__ = ["ContrastiveTemperature", "FeatureProjection", "MlpHead", "TokenHead"]

LOWEST_TEMPERATURE, HIGHEST_TEMPERATURE = 0.001, 0.5


class FeatureProjection(nn.Module):
    """Linear map of the class token into the shared space, L2-normalised in float32."""

    def __init__(self, width: int, embed_dim: int) -> None:
        super().__init__()
        self.linear = nn.Linear(width, embed_dim)

    def forward(self, states: Tensor) -> Tensor:
        """(B, L, D) -> (B, E) float32 with unit rows."""
        return F.normalize(self.linear(states[:, 0]).float(), dim=-1)


class ContrastiveTemperature(nn.Module):
    """The divisor of contrastive logits; one element, because engines refuse 0-dim parameters."""

    def __init__(self, initial: float = 0.07) -> None:
        super().__init__()
        self.value = nn.Parameter(torch.full((1,), initial))

    def forward(self) -> Tensor:
        """(1,) float32, clamped to [0.001, 0.5]; the gradient passes through the clamp.

        The published code clamps the parameter in place instead, which sharded optimizers undo.
        """
        value = self.value.float()
        return value + (value.clamp(LOWEST_TEMPERATURE, HIGHEST_TEMPERATURE) - value).detach()


class MlpHead(nn.Module):
    """Linear to 2 D, LayerNorm, exact gelu, Linear; reads the class token.

    Args:
        tokens: first tokens that are read, one behind the other (those of a two-stream fusion).
    """

    def __init__(self, width: int, outputs: int, tokens: int = 1) -> None:
        super().__init__()
        self.tokens = tokens
        self.linear = nn.Linear(tokens * width, 2 * width)
        self.norm = nn.LayerNorm(2 * width, eps=1e-5)
        self.output = nn.Linear(2 * width, outputs)

    def forward(self, states: Tensor) -> Tensor:
        """(B, L, D) -> (B, outputs)."""
        return self.output(F.gelu(self.norm(self.linear(states[:, : self.tokens].flatten(1)))))


class TokenHead(nn.Module):
    """Scores over the vocabulary: dense, gelu, LayerNorm, decoder tied to the word embeddings.

    Holds no reference to the tied weight: it comes as a KEYWORD argument, so that hooks that
    rewrap positional tensors leave the parameter itself alone (ZeRO-3 gathers it by identity).

    Args:
        word_width: W of the word embeddings; None is `width`.
    """

    def __init__(
        self, width: int, vocab_size: int, eps: float, word_width: int | None = None
    ) -> None:
        super().__init__()
        self.dense = nn.Linear(width, word_width or width)
        self.norm = nn.LayerNorm(word_width or width, eps=eps)
        self.bias = nn.Parameter(torch.zeros(vocab_size))

    def forward(
        self, states: Tensor, positions: Tensor | None = None, *, word_weight: Tensor
    ) -> Tensor:
        """states (B, L, D), word_weight (V, W) -> (B, M, V) at `positions` (B, M), or (B, L, V)."""
        if positions is not None:
            index = positions.unsqueeze(-1).expand(-1, -1, states.shape[-1])
            states = states.gather(1, index)
        return F.linear(self.norm(F.gelu(self.dense(states))), word_weight, self.bias)
