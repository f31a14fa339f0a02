"""Plain torch definition of hard-concrete gates: the specification of csrc/hard_concrete.cuh.

Hard-concrete gates (Louizos et al., 1712.01312) as EfficientVLM uses them (2210.07795, section
3.3): stretch (-0.1, 1.1), temperature 2/3. Shape legend: G gates of the whole model.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

__all__ = [
    "EPSILON",
    "hard_concrete",
    "hard_concrete_backward",
    "philox_uniforms",
    "probability_open",
    "sampled",
]

TEMPERATURE = 2.0 / 3.0
STRETCH_LOW, STRETCH_HIGH = -0.1, 1.1
EPSILON = 1e-6
# P(z > 0) = sigmoid(log_alpha - OPEN_SHIFT)
OPEN_SHIFT = TEMPERATURE * math.log(-STRETCH_LOW / STRETCH_HIGH)
_LOW_WORD = 0xFFFFFFFF


def probability_open(log_alpha: Tensor) -> Tensor:
    """P(z > 0) of each gate, (G,), kept in [1e-6, 1 - 1e-6] so that no expected size is exactly 0
    or full."""
    return torch.sigmoid(log_alpha - OPEN_SHIFT).clamp(EPSILON, 1.0 - EPSILON)


def sampled(log_alpha: Tensor, u: Tensor) -> Tensor:
    """Gates in [0, 1] for uniforms `u` in (0, 1), both (G,); differentiable in `log_alpha`.

    The logit of u is taken in fp64: near 1 an fp32 u has only a few bits left.
    """
    noise = torch.logit(u.double()).to(log_alpha)
    stretched = torch.sigmoid((noise + log_alpha) / TEMPERATURE) * (STRETCH_HIGH - STRETCH_LOW)
    return (stretched + STRETCH_LOW).clamp(0.0, 1.0)


def hard_concrete(
    log_alpha: Tensor,
    costs: Tensor,
    uniforms: Tensor | None,
    state: Tensor | None,
    seed: int,
    offset: int,
) -> tuple[Tensor, Tensor]:
    """One sample of all gates, and their expected size.

    Args:
        log_alpha: (G,).   costs: (G,) fp64, what an open gate costs.
        uniforms: (G,) in (0, 1). None: drawn by Philox from `state` (2,) int64, seed and offset,
            or, where that is None too, from the numbers `seed` and `offset`. A draw uses up
            ceil(G / 4) offsets.

    Returns:
        z (G,) in [0, 1] and the fp64 scalar sum of costs times P(z > 0), both differentiable.
    """
    if uniforms is None:
        if state is not None:
            seed, offset = state.tolist()
        uniforms = philox_uniforms(seed, offset, log_alpha.numel()).to(log_alpha.device)
    size = (probability_open(log_alpha).double() * costs).sum()
    return sampled(log_alpha, uniforms), size


def hard_concrete_backward(
    dz: Tensor | None, dsize: Tensor | None, z: Tensor, log_alpha: Tensor, costs: Tensor
) -> Tensor:
    """Gradient by log_alpha, (G,), from those of z (G,) and of the size (); None is zero.

    dz/dlog_alpha is a function of z: with s = (z - low) / (high - low) it is
    (high - low) / T * s (1 - s), and 0 where z was clipped.
    """
    total = torch.zeros_like(log_alpha)
    if dz is not None:
        span = STRETCH_HIGH - STRETCH_LOW
        s = (z - STRETCH_LOW) / span
        slope = span / TEMPERATURE * s * (1 - s)
        total = total + dz * slope.masked_fill((z <= 0) | (z >= 1), 0.0)
    if dsize is not None:
        p = torch.sigmoid(log_alpha - OPEN_SHIFT)
        clipped = (p < EPSILON) | (p > 1 - EPSILON)
        total = total + ((dsize * costs).to(p) * p * (1 - p)).masked_fill(clipped, 0.0)
    return total


def _multiply(a: Tensor, constant: int) -> tuple[Tensor, Tensor]:
    """High and low words of a product of 32-bit words held in int64, by halves of the constant."""
    low, high = a * (constant & 0xFFFF), a * (constant >> 16)
    middle = (low >> 16) + high
    return middle >> 16, ((middle & 0xFFFF) << 16) | (low & 0xFFFF)


def philox_words(seed: int, offset: int, counters: int) -> Tensor:
    """(counters, 4) random 32-bit words, int64: Philox4x32-10 with key `seed` (64 bits) and the
    counters offset, offset + 1, ...

    Source: Salmon et al., "Parallel random numbers: as easy as 1, 2, 3" (SC 2011).
    """
    key = [seed & _LOW_WORD, seed >> 32 & _LOW_WORD]
    counter = torch.arange(counters) + offset
    zero = torch.zeros_like(counter)
    c0, c1, c2, c3 = counter & _LOW_WORD, counter >> 32 & _LOW_WORD, zero, zero
    for _ in range(10):
        high0, low0 = _multiply(c0, 0xD2511F53)
        high1, low1 = _multiply(c2, 0xCD9E8D57)
        c0, c1, c2, c3 = high1 ^ c1 ^ key[0], low1, high0 ^ c3 ^ key[1], low0
        key = [key[0] + 0x9E3779B9 & _LOW_WORD, key[1] + 0xBB67AE85 & _LOW_WORD]
    return torch.stack([c0, c1, c2, c3], dim=1)


def philox_uniforms(seed: int, offset: int, gates: int) -> Tensor:
    """(G,) fp64 in (1e-6, 1 - 1e-6), on the CPU; the numbers of the kernel, bit for bit."""
    words = philox_words(seed, offset, -(-gates // 4)).flatten()[:gates]
    u = (words.double() + 0.5) / 2**32
    return u * (1.0 - 2.0 * EPSILON) + EPSILON
