"""The sparsity constraint: lambda1 (s - t) + lambda2 (s - t)^2.

EfficientVLM (2210.07795, section 3.3), after Wang et al. (1910.04732).
"""

from __future__ import annotations

from torch import Tensor

__all__ = ["lagrangian"]


def lagrangian(sparsity: Tensor, target: float | Tensor, multipliers: Tensor) -> Tensor:
    """Scalar penalty; the gates descend it and the multipliers ascend it.

    sparsity: scalar s, expected share removed.   target: t, same unit.   multipliers: (2,), lambda1
        and lambda2.
    The multipliers are unconstrained in sign, so this is an equality: too sparse is penalised too.
    """
    gap = sparsity - target
    return multipliers[0] * gap + multipliers[1] * gap.square()
