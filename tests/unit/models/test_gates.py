"""Gate bank: sampling, deterministic gates, slots, state."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from models.gates import (
    EPSILON,
    LOG_ALPHA_HIGH,
    LOG_ALPHA_LOW,
    GateBank,
    GateSlot,
    hard_concrete,
    probability_open,
)

UNITS = {"vision.0.heads": 4, "vision.0.ffn": 16, "text.0.heads": 2, "text.0.ffn": 10}
COSTS = {"vision.0.heads": 100, "vision.0.ffn": 9, "text.0.heads": 120, "text.0.ffn": 11}


def make_bank(units=None, costs=None, **options) -> GateBank:
    units = UNITS if units is None else units
    costs = dict.fromkeys(units, 1) if costs is None else costs
    return GateBank({name: GateSlot(count) for name, count in units.items()}, costs, **options)


def test_table_and_initial_values():
    bank = make_bank(costs=COSTS, seed=3)
    assert bank.gates == 32 and bank.modalities == ("vision", "text")
    assert bank.total == 4 * 100 + 16 * 9 + 2 * 120 + 10 * 11
    parts = bank.split(bank.log_alpha.detach())
    assert parts["vision.0.heads"].mean() == pytest.approx(10.0, abs=0.05)
    assert parts["text.0.ffn"].mean() == pytest.approx(0.0, abs=0.05)
    assert parts["text.0.ffn"].std() > 0
    torch.testing.assert_close(bank.join(parts), bank.log_alpha.detach())
    assert bank.log_alpha.dtype == bank.multipliers.dtype == torch.float32
    assert bank.multipliers.tolist() == [0.0, 0.0]


def test_initial_values_depend_on_the_seed_only():
    first, same, other = (make_bank(seed=seed).log_alpha for seed in (1, 1, 2))
    assert torch.equal(first, same) and not torch.equal(first, other)


def test_ffn_init_follows_the_drop_rate():
    bank = make_bank({"vision.0.ffn": 1000}, ffn_init_drop=0.2)
    assert bank.log_alpha.detach().mean() == pytest.approx(math.log(4.0), abs=0.01)


def test_probability_open_at_zero_is_the_published_one():
    assert probability_open(torch.zeros(1)).item() == pytest.approx(0.8318, abs=1e-4)


def test_bad_construction_names_the_slot():
    with pytest.raises(ValueError, match=r"vision\.0\.ffn"):
        make_bank(costs={"vision.0.heads": 1})
    with pytest.raises(ValueError, match="no gate slots"):
        make_bank({})
    with pytest.raises(ValueError, match="ffn_init_drop"):
        make_bank(ffn_init_drop=1.0)
    with pytest.raises(ValueError, match="decoder"):
        make_bank().expected_sparsity("decoder")


def test_emptied_slots_are_left_out():
    bank = make_bank({"vision.0.heads": 0, "vision.0.ffn": 3})
    assert [row.name for row in bank.rows] == ["vision.0.ffn"]


@settings(max_examples=60, deadline=None)
@given(st.lists(st.floats(-5, 5), min_size=1, max_size=12), st.integers(0, 2**31 - 1))
def test_sampling_gradient_matches_finite_differences(values, seed):
    """dz/d(log-alpha) against central differences in fp64, away from the two kinks of the clamp."""
    log_alpha = torch.tensor(values, dtype=torch.float64, requires_grad=True)
    u = torch.rand(len(values), dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    u = u * 0.98 + 0.01
    z = hard_concrete(log_alpha, u)
    (gradient,) = torch.autograd.grad(z.sum(), log_alpha)
    with torch.no_grad():
        step = 1e-6
        up, down = hard_concrete(log_alpha + step, u), hard_concrete(log_alpha - step, u)
    inside = ((up > 0) & (down > 0) & (up < 1) & (down < 1)) | (up == down)
    numeric = (up - down) / (2 * step)
    torch.testing.assert_close(gradient[inside], numeric[inside], rtol=1e-5, atol=1e-8)
    s = torch.sigmoid((torch.logit(u) + log_alpha.detach()) * 1.5)
    formula = torch.where((z > 0) & (z < 1), 1.2 * 1.5 * s * (1 - s), torch.zeros_like(s))
    torch.testing.assert_close(gradient[inside], formula[inside], rtol=1e-9, atol=1e-12)


def test_sample_frequencies_follow_the_probabilities():
    bank = make_bank({"vision.0.ffn": 20000})
    bank.log_alpha.data.fill_(0.7)
    z = bank.sample(torch.Generator().manual_seed(0))
    assert float((z > 0).float().mean()) == pytest.approx(
        float(probability_open(torch.tensor(0.7))), abs=0.01
    )
    assert bool(((z >= 0) & (z <= 1)).all())


def test_same_generator_state_same_gates():
    bank = make_bank()
    bank.log_alpha.data.zero_()
    first, second, other = (bank.sample(torch.Generator().manual_seed(s)) for s in (5, 5, 6))
    assert torch.equal(first, second) and not torch.equal(first, other)


def test_extreme_uniforms_stay_finite():
    log_alpha = torch.tensor([LOG_ALPHA_LOW, LOG_ALPHA_HIGH], requires_grad=True)
    for u in (EPSILON, 1 - EPSILON):
        z = hard_concrete(log_alpha, torch.full((2,), u, dtype=torch.float64))
        (gradient,) = torch.autograd.grad(z.sum(), log_alpha)
        assert bool(torch.isfinite(z).all()) and bool(torch.isfinite(gradient).all())


rows = st.lists(
    st.lists(st.floats(-4.5, 4.5, width=32), min_size=1, max_size=9), min_size=1, max_size=6
)


@settings(max_examples=80, deadline=None)
@given(rows)
def test_deterministic_gates_row_by_row(values):
    """Against the definition, one row at a time: counts by Python's round (half to even), lowest
    first."""
    bank = make_bank({f"vision.{i}.ffn": len(row) for i, row in enumerate(values)})
    bank.log_alpha.data.copy_(torch.tensor([value for row in values for value in row]))
    gates = bank.split(bank.deterministic())
    for index, row in enumerate(values):
        z = gates[f"vision.{index}.ffn"]
        assert set(z.tolist()) <= {0.0, 1.0}
        size = float(probability_open(torch.tensor(row)).double().sum())
        assert int((z == 0).sum()) == round(len(row) - size)
        closed = [value for value, kept in zip(row, z.tolist(), strict=True) if not kept]
        kept = [value for value, kept in zip(row, z.tolist(), strict=True) if kept]
        assert not closed or not kept or max(closed) <= min(kept)


@pytest.mark.parametrize(("units", "zeros"), [(1, 0), (3, 2), (5, 2), (7, 4)])
def test_half_a_gate_rounds_to_even(units, zeros):
    bank = make_bank({"text.0.ffn": units})
    bank.probabilities_open = lambda: torch.full((units,), 0.5)  # units / 2 expected zeros
    assert int((bank.deterministic() == 0).sum()) == zeros


def test_sparsities_weigh_by_cost_and_modality():
    bank = make_bank(costs=COSTS)
    z = torch.ones(bank.gates)
    bank.split(z)["vision.0.heads"][:2] = 0
    bank.split(z)["text.0.ffn"][:5] = 0
    assert float(bank.actual_sparsity(z)) == pytest.approx(255 / 894)
    assert float(bank.actual_sparsity(z, "vision")) == pytest.approx(200 / 544)
    assert float(bank.actual_sparsity(z, "text")) == pytest.approx(55 / 350)
    soft = z.clone()
    soft[soft == 1] = 0.3
    assert float(bank.actual_sparsity(soft)) == float(bank.actual_sparsity(z))
    parts = [
        bank.expected_sparsity(name).item() * share
        for name, share in (("vision", 544), ("text", 350))
    ]
    assert bank.expected_sparsity().item() == pytest.approx(sum(parts) / 894)
    size = bank.expected_size().item()
    assert bank.expected_sparsity().item() == pytest.approx(1 - size / bank.total)


def test_slots_hold_leaves_and_give_their_gradients_back():
    bank = make_bank()
    bank.write(bank.sample(torch.Generator().manual_seed(0)))
    slots = bank.values()
    leaf = slots["vision.0.ffn"]
    assert leaf is not None and leaf.is_leaf and leaf.requires_grad
    (leaf * torch.arange(16.0)).sum().backward()
    (leaf * torch.arange(16.0)).sum().backward()  # a second micro-batch accumulates
    gradient = bank.split(bank.gradient())
    assert gradient["vision.0.ffn"].tolist() == (2 * torch.arange(16.0)).tolist()
    assert not gradient["text.0.ffn"].any()
    assert bank.log_alpha.grad is None
    bank.clear()
    assert set(bank.values().values()) == {None}


def test_hard_gates_need_no_gradient():
    bank = make_bank()
    bank.write(bank.deterministic(), requires_grad=False)
    assert not any(z.requires_grad for z in bank.values().values())


def test_clamp_keeps_gates_revivable():
    bank = make_bank()
    bank.log_alpha.data.copy_(torch.linspace(-50, 50, bank.gates))
    bank.clamp()
    assert bank.log_alpha.min().item() == pytest.approx(LOG_ALPHA_LOW)
    assert bank.log_alpha.max().item() == pytest.approx(LOG_ALPHA_HIGH)


def test_bank_is_no_module():
    """A module attribute would be registered in the engine's model; the bank's parameters must stay
    outside."""
    holder = torch.nn.Module()
    holder.bank = make_bank()
    holder.slot = GateSlot(3)
    assert list(holder.parameters()) == [] and holder.state_dict() == {}


def test_state_round_trip_and_refusal():
    bank, other = make_bank(costs=COSTS, seed=1), make_bank(costs=COSTS, seed=2)
    bank.multipliers.data.copy_(torch.tensor([0.3, -0.2]))
    other.load_state_dict(bank.state_dict())
    assert torch.equal(bank.log_alpha, other.log_alpha)
    assert torch.equal(bank.multipliers, other.multipliers)
    with pytest.raises(ValueError, match=r"text\.0\.ffn"):
        make_bank({**UNITS, "text.0.ffn": 11}, COSTS).load_state_dict(bank.state_dict())
    shorter = {name: count for name, count in UNITS.items() if name != "text.0.ffn"}
    with pytest.raises(ValueError, match=r"text\.0\.ffn"):
        make_bank(shorter, COSTS).load_state_dict(bank.state_dict())


class TwoSlots:
    """The least a model must offer."""

    def __init__(self) -> None:
        self.slots = {"vision.0.heads": GateSlot(2), "text.0.ffn": GateSlot(5)}

    def gate_slots(self):
        return self.slots

    def parameters_per_unit(self):
        return {"vision.0.heads": 7, "text.0.ffn": 3}


def test_of_model_restricts_to_modalities():
    model = TwoSlots()
    assert GateBank.of_model(model).total == 29
    bank = GateBank.of_model(model, modalities=("text",))
    assert bank.total == 15 and bank.modalities == ("text",)
    bank.write(bank.deterministic())
    assert model.slots["vision.0.heads"].z is None and model.slots["text.0.ffn"].z is not None
    with pytest.raises(ValueError, match="no gate slots"):
        GateBank.of_model(model, modalities=("decoder",))
