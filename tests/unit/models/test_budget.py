"""Target ramp, parameter budget and the structure that meets it."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from models.gate_slot import GateSlot
from models.gates import GateBank
from models.pruning.budget import target_sparsity
from models.pruning.structure import meet_budget

CHEAP, DEAR = 50, 1000


def make_bank(layers: int = 3, heads: int = 4, ffn: int = 64, seed: int = 0) -> GateBank:
    slots, costs = {}, {}
    for layer in range(layers):
        slots[f"vision.{layer}.heads"], costs[f"vision.{layer}.heads"] = GateSlot(heads), DEAR
        slots[f"vision.{layer}.ffn"], costs[f"vision.{layer}.ffn"] = GateSlot(ffn), CHEAP
    bank = GateBank(slots, costs)
    noise = torch.randn(bank.gates, generator=torch.Generator().manual_seed(seed))
    bank.log_alpha.data.copy_(noise * 3)
    bank.clamp()
    return bank


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10_000), st.integers(0, 5_000), st.floats(0.01, 0.95), st.integers(0, 100))
def test_ramp_is_monotone_and_bounded(step, ramp, sparsity, more):
    now, later = (target_sparsity(s, sparsity, ramp) for s in (step, step + more))
    assert 0 <= now <= later <= sparsity
    if step >= ramp:
        assert now == sparsity


def test_ramp_points():
    assert target_sparsity(0, 0.4, 100) == 0.0
    assert target_sparsity(50, 0.4, 100) == pytest.approx(0.2)
    assert target_sparsity(0, 0.4, 0) == 0.4


@settings(max_examples=60, deadline=None)
@given(st.floats(0.0, 0.9), st.integers(0, 1000))
def test_budget_met_within_half_a_cheap_unit(sparsity, seed):
    bank = make_bank(seed=seed)
    z = meet_budget(bank, sparsity)
    assert set(z.tolist()) <= {0.0, 1.0}
    # Counted in float64: a tie at half a unit must not be decided by the rounding of a ratio.
    removed = float((bank.costs.double() * (z == 0)).sum())
    cheap = torch.cat([part for name, part in bank.split(z).items() if name.endswith("ffn")])
    wanted = sparsity * bank.total
    # Cheap units run out only when all of them are on the side that is being emptied.
    spare = cheap.any() if removed < wanted else (cheap == 0).any()
    assert abs(removed - wanted) <= (CHEAP / 2 if spare else DEAR / 2) + 1e-6


@settings(max_examples=30, deadline=None)
@given(st.floats(0.05, 0.85), st.integers(0, 1000))
def test_flips_go_one_way_and_take_the_nearest_cheap_gates(sparsity, seed):
    bank = make_bank(seed=seed)
    before, after = bank.deterministic(), meet_budget(bank, sparsity)
    closed, opened = (before == 1) & (after == 0), (before == 0) & (after == 1)
    assert not (closed.any() and opened.any())
    cheap = bank.costs == CHEAP
    score = bank.log_alpha.detach()
    lowest, highest = torch.tensor([-torch.inf]), torch.tensor([torch.inf])
    if (closed & cheap).any():
        kept = torch.cat([score[cheap & (after == 1)], highest])
        assert score[closed & cheap].max() <= kept.min()
    if (opened & cheap).any():
        gone = torch.cat([score[cheap & (after == 0)], lowest])
        assert score[opened & cheap].min() >= gone.max()


def test_a_structure_on_target_is_kept():
    bank = make_bank()
    z = bank.deterministic()
    assert torch.equal(meet_budget(bank, float(bank.actual_sparsity(z))), z)


def test_only_dear_units_left():
    bank = GateBank({"text.0.heads": GateSlot(4)}, {"text.0.heads": DEAR})
    for sparsity, kept in ((0.2, 3), (0.1, 4), (0.4, 2), (0.7, 1)):
        assert int(meet_budget(bank, sparsity, torch.ones(4)).sum()) == kept


def test_impossible_share_is_refused():
    with pytest.raises(ValueError, match=r"prune\.sparsity"):
        meet_budget(make_bank(), 1.0)
