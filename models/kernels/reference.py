"""Plain torch definitions of the gate and feed-forward ops: the specification of csrc/.

Differentiable, any floating type; each backward in closed form stands beside its forward. Shape
legend: T rows (all leading dimensions), F feed-forward units.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = [
    "ACTIVATIONS",
    "activation_function",
    "ffn_act_mask",
    "ffn_act_mask_backward",
    "quick_gelu",
]

_SQRT_HALF, _INVERSE_SQRT_TAU = 0.7071067811865476, 0.3989422804014327
_TANH_SCALE, _TANH_CUBE = 0.7978845608028654, 0.044715


def quick_gelu(x: Tensor) -> Tensor:
    """CLIP's activation, x * sigmoid(1.702 x)."""
    return x * torch.sigmoid(1.702 * x)


def _gelu_tanh(x: Tensor) -> Tensor:
    return F.gelu(x, approximate="tanh")


# The order is that of enum Activation in csrc/ffn_act_mask.cuh.
ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu": F.gelu,
    "gelu_tanh": _gelu_tanh,
    "quick_gelu": quick_gelu,
}


def activation_function(name: str) -> Callable[[Tensor], Tensor]:
    """The function behind an activation's name ("gelu" is the exact, erf one); it maps 0 to 0.

    Raises ValueError for a name that is not known.
    """
    if name not in ACTIVATIONS:
        raise ValueError(f"activation {name!r} is unknown; choose one of {sorted(ACTIVATIONS)}")
    return ACTIVATIONS[name]


def _slope(name: str, x: Tensor) -> Tensor:
    """f'(x) of an activation."""
    if name == "gelu":
        below = 0.5 * torch.special.erfc(-_SQRT_HALF * x)
        return below + x * _INVERSE_SQRT_TAU * torch.exp(-0.5 * x * x)
    if name == "gelu_tanh":
        s = torch.sigmoid(2 * _TANH_SCALE * x * (1 + _TANH_CUBE * x * x))
        return s + x * s * (1 - s) * 2 * _TANH_SCALE * (1 + 3 * _TANH_CUBE * x * x)
    s = torch.sigmoid(1.702 * x)
    return s + 1.702 * x * s * (1 - s)


def ffn_act_mask(
    x: Tensor, bias: Tensor | None, mask: Tensor | None, activation: str, mask_first: bool
) -> Tensor:
    """What stands between the products of a feed-forward layer.

    Args:
        x: (..., F).   bias, mask: (F,), taken in the type of x; None is 0 and 1.
        activation: "gelu" (erf), "gelu_tanh" or "quick_gelu".
        mask_first: whether the mask multiplies the activation's input or its output. Both are the
            same for masks of 0 and 1.

    Returns:
        f((x + bias) * mask) or f(x + bias) * mask, (..., F). A NaN stays NaN under a mask of 0.

    Source: the gated feed-forward layers of EfficientVLM (2210.07795), first in its ViT, last in
    its BERT.
    """
    function = activation_function(activation)
    hidden = x if bias is None else x + bias.to(x.dtype)
    if mask is None:
        return function(hidden)
    mask = mask.to(hidden.dtype)
    return function(hidden * mask) if mask_first else function(hidden) * mask


def ffn_act_mask_backward(
    gradient: Tensor,
    x: Tensor,
    bias: Tensor | None,
    mask: Tensor | None,
    activation: str,
    mask_first: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of `ffn_act_mask` by x (..., F), mask (F,) and bias (F,), computed in fp32 or fp64.

    All three are in that type or in the type of x, mask, bias where those are given.
    """
    wide = torch.promote_types(x.dtype, torch.float32)
    g, h = gradient.to(wide).flatten(0, -2), x.to(wide).flatten(0, -2)
    h = h if bias is None else h + bias.to(wide)
    scale = torch.ones_like(h[:1]) if mask is None else mask.to(wide)
    function = activation_function(activation)
    if mask_first:
        slope = g * _slope(activation, h * scale)
        by_mask = slope * h
    else:
        slope = g * _slope(activation, h)
        by_mask = g * function(h)
    by_x = slope * scale
    return (
        by_x.to(x.dtype).view(x.shape),
        by_mask.sum(0).to(wide if mask is None else mask.dtype),
        by_x.sum(0).to(wide if bias is None else bias.dtype),
    )
