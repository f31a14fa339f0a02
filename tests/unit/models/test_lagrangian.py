"""The sparsity penalty: value, gradients, signs."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from models.pruning.lagrangian import lagrangian

share = st.floats(0, 1)
multiplier = st.floats(-5, 5)


@settings(max_examples=60, deadline=None)
@given(share, share, multiplier, multiplier)
def test_value_and_gradients(sparsity, target, first, second):
    s = torch.tensor(sparsity, dtype=torch.float64, requires_grad=True)
    multipliers = torch.tensor([first, second], dtype=torch.float64, requires_grad=True)
    penalty = lagrangian(s, target, multipliers)
    gap = sparsity - target
    assert penalty.item() == pytest.approx(first * gap + second * gap**2, abs=1e-12)
    by_s, by_multipliers = torch.autograd.grad(penalty, (s, multipliers))
    assert by_s.item() == pytest.approx(first + 2 * second * gap, abs=1e-12)
    assert by_multipliers.tolist() == pytest.approx([gap, gap**2], abs=1e-12)


def test_nothing_to_pay_on_target():
    assert lagrangian(torch.tensor(0.35), 0.35, torch.tensor([3.0, 4.0])).item() == 0.0
