"""Gate optimizer: gradients, ascent, schedule, freezing, resuming, and reaching the target."""

from __future__ import annotations

import copy
import logging

import pytest
import torch
from torch import Tensor, nn

from models.gate_slot import GateSlot
from models.gates import GateBank, hard_concrete
from models.pruning.lagrangian import lagrangian
from train.config import PruneConfig
from train.runtime.gate_optimizer import GateOptimizer

UNITS = {"vision.0.heads": 4, "vision.0.ffn": 40, "text.0.ffn": 30}
COSTS = {"vision.0.heads": 60, "vision.0.ffn": 7, "text.0.ffn": 5}


def keyed(step: int) -> torch.Generator:
    """What a training step passes in: a generator keyed by seed and step."""
    return torch.Generator().manual_seed(1000 + step)


def make(lr: float = 0.05, head_init: float = 2.0, **prune) -> GateOptimizer:
    slots = {name: GateSlot(units) for name, units in UNITS.items()}
    bank = GateBank(slots, COSTS, head_init=head_init)
    config = PruneConfig(**{"sparsity": 0.4, "ramp_steps": 20, "lr": lr, **prune})
    return GateOptimizer(bank, config, "cpu", 1)


IMPORTANCE = torch.linspace(0.0, 1.0, sum(UNITS.values()))


def task_loss(gates: GateOptimizer) -> Tensor:
    """Closing a gate costs its importance; quadratic, so that the gradient depends on the
    sample."""
    z = gates.bank.join({name: z for name, z in gates.bank.values().items() if z is not None})
    return (IMPORTANCE * (1.0 - z) ** 2).sum() * 0.02


def run(gates: GateOptimizer, first: int, last: int) -> None:
    for step in range(first, last):
        gates.begin_step(step, keyed(step))
        if not gates.frozen:
            task_loss(gates).backward()
        gates.finish_step(step, applied=True)


def states_equal(a: object, b: object) -> bool:
    if isinstance(a, dict) and isinstance(b, dict):
        return a.keys() == b.keys() and all(states_equal(a[key], b[key]) for key in a)
    return torch.equal(a, b) if isinstance(a, Tensor) and isinstance(b, Tensor) else a == b


def test_gradient_equals_end_to_end_autograd(monkeypatch):
    """Leaves, two micro-batches and a loss scale: the same gradient as one graph from log-alpha."""
    gates = make()
    gates.bank.multipliers.data.copy_(torch.tensor([0.7, -0.4]))
    step, scale = 30, 64.0
    reference = gates.bank.log_alpha.detach().clone().requires_grad_()
    u = torch.rand(gates.bank.gates, generator=keyed(step), dtype=torch.float64) * (1 - 2e-6) + 1e-6
    loss = (IMPORTANCE * (1.0 - hard_concrete(reference, u)) ** 2).sum() * 0.02
    (expected,) = torch.autograd.grad(loss, reference)
    penalty = lagrangian(gates.bank.expected_sparsity(), 0.4, gates.bank.multipliers)
    constraint, ascent = torch.autograd.grad(
        penalty, (gates.bank.log_alpha, gates.bank.multipliers)
    )
    seen = {}
    for name in ("_gate_optimizer", "_multiplier_optimizer"):
        optimizer = getattr(gates, name)
        parameter = optimizer.param_groups[0]["params"][0]
        monkeypatch.setattr(
            optimizer, "step", lambda n=name, p=parameter: seen.update({n: p.grad.clone()})
        )
    gates.begin_step(step, keyed(step))
    for _ in range(2):
        (task_loss(gates) * scale / 2).backward()
    gates.finish_step(step, applied=True, grad_scale=scale)
    torch.testing.assert_close(seen["_gate_optimizer"], expected + constraint)
    torch.testing.assert_close(seen["_multiplier_optimizer"], ascent)


@pytest.mark.parametrize(("ffn", "sign"), [(4.0, -1.0), (-4.0, 1.0)])
def test_multipliers_ascend_with_the_gap(ffn, sign):
    """Too dense (s < t) drives lambda1 down, so that its term pushes gates shut; and the
    reverse."""
    gates = make(ramp_steps=0)
    gates.bank.log_alpha.data.fill_(ffn)
    run(gates, 0, 1)
    first, second = gates.bank.multipliers.tolist()
    assert first == pytest.approx(sign * 0.05, rel=1e-3)
    assert second == pytest.approx(0.05, rel=1e-3)  # (s - t)^2 is positive either way


def test_constraint_moves_the_gates_towards_the_target():
    gates = make(ramp_steps=0)
    before = gates.bank.expected_sparsity().item()
    assert before < 0.4
    for step in range(30):
        gates.begin_step(step, keyed(step))
        gates.finish_step(step, applied=True)
    assert before < gates.bank.expected_sparsity().item()


@pytest.mark.parametrize("applied", [True, False])
def test_skipped_steps_change_nothing(applied):
    gates = make()
    run(gates, 0, 3)
    before = gates.state_dict()
    gates.begin_step(3, keyed(3))
    (task_loss(gates) * (torch.inf if applied else 1.0)).backward()
    gates.finish_step(3, applied=applied)
    after = gates.state_dict()
    assert gates.skipped == 1
    for key in ("bank", "gate_optimizer", "multiplier_optimizer"):
        assert states_equal(before[key], after[key])
    assert set(gates.bank.values().values()) == {None}


def test_unused_gates_follow_the_constraint_alone():
    """A step in which a part of the model had nothing to do leaves no gradient on its gates."""
    gates = make(ramp_steps=0)
    gates.begin_step(0, keyed(0))
    gates.finish_step(0, applied=True)
    assert gates.skipped == 0


def test_gates_are_clamped_after_the_update():
    """Heads start at 10, beyond the clamp; the first applied step brings them to ln 100."""
    gates = make(head_init=10.0)
    run(gates, 0, 1)
    assert gates.bank.log_alpha.max().item() == pytest.approx(4.60517, abs=1e-4)


def test_noise_is_shared_and_keyed():
    first, second = make(), make()
    for gates, step in ((first, 4), (second, 4)):
        gates.begin_step(step, keyed(step))
    assert states_equal(first.bank.values(), second.bank.values())
    second.begin_step(5, keyed(5))
    assert not states_equal(first.bank.values(), second.bank.values())


@pytest.mark.parametrize("stop", [1, 13, 25, 34])
def test_resume_equals_uninterrupted(stop):
    """Also across the freeze at step 30; through a JSON-like copy of the state."""
    whole, part, resumed = make(freeze_step=30), make(freeze_step=30), make(freeze_step=30)
    run(whole, 0, 40)
    run(part, 0, stop)
    state = copy.deepcopy(part.state_dict())
    run(part, stop, stop + 1)  # the copy must not follow
    with torch.no_grad():
        resumed.bank.log_alpha.add_(1.0)
    resumed.load_state_dict(state)
    assert states_equal(resumed.state_dict(), state)
    run(resumed, stop, 40)
    assert states_equal(whole.state_dict(), resumed.state_dict())


def test_state_keys_are_strings():
    gates = make()
    run(gates, 0, 2)
    pending: list[object] = [gates.state_dict()]
    while pending:
        value = pending.pop()
        if isinstance(value, dict):
            assert all(isinstance(key, str) for key in value)
            pending += value.values()
        elif isinstance(value, list | tuple):
            pending += value
        else:
            assert value is None or isinstance(value, Tensor | str | int | float)


def test_frozen_structure_meets_the_budget_and_stays(caplog):
    gates = make(freeze_step=30)
    run(gates, 0, 30)
    assert not gates.frozen
    gates.begin_step(30, keyed(30))
    held = {name: z.clone() for name, z in gates.bank.values().items()}
    assert gates.frozen and not any(z.requires_grad for z in held.values())
    before = gates.state_dict()
    gates.finish_step(30, applied=True)
    run(gates, 31, 40)
    after = gates.state_dict()
    assert states_equal(before["bank"], after["bank"])
    assert torch.equal(after["frozen"], gates.bank.join(held))
    assert states_equal(gates.structure(), held)
    actual = gates.metrics()["actual"]
    assert abs(actual - 0.4) * gates.bank.total <= min(COSTS.values()) / 2 + 1e-6
    with gates.evaluation():
        assert states_equal(gates.bank.values(), held)


def test_a_structure_far_from_its_target_warns(caplog):
    gates = make()
    with caplog.at_level(logging.WARNING):
        structure = gates.structure()
    assert "prune.ramp_steps" in caplog.text and "prune.constraint=projection" in caplog.text
    z = gates.bank.join(structure)
    assert float(gates.bank.actual_sparsity(z)) == pytest.approx(0.4, abs=0.01)
    assert not gates.frozen


def test_evaluation_writes_hard_gates_and_restores():
    gates = make()
    gates.begin_step(0, keyed(0))
    before = gates.bank.values()
    with pytest.raises(RuntimeError), gates.evaluation():
        inside = gates.bank.join(gates.bank.values())
        assert set(inside.tolist()) <= {0.0, 1.0} and not inside.requires_grad
        raise RuntimeError
    assert all(gates.bank.values()[name] is before[name] for name in before)


def test_metrics_and_histograms():
    gates = make(ramp_steps=10)
    run(gates, 0, 6)
    record = gates.metrics()
    assert record["target"] == pytest.approx(0.2)  # of the last step that ran, step 5
    assert record["expected"] == pytest.approx(gates.bank.expected_sparsity().item())
    hard = gates.bank.deterministic()
    assert record["actual"] == pytest.approx(float(gates.bank.actual_sparsity(hard)))
    assert record["text"] == pytest.approx(float(gates.bank.actual_sparsity(hard, "text")))
    assert {"vision", "lambda1", "lambda2", "skipped"} <= record.keys()
    assert all(isinstance(value, float) for value in record.values())
    assert gates.histograms()["log_alpha/vision"].shape == (44,)


class Toy(nn.Module):
    """A gated hidden layer of which only the first 12 of 40 units matter."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = GateSlot(40)
        self.weight = nn.Parameter(torch.zeros(40))

    def forward(self, x: Tensor) -> Tensor:
        z = self.gate.z
        return x * (self.weight if z is None else self.weight * z)


def test_target_reached_and_useful_units_kept():
    """A toy task: hard gates land on the target, and the units that the task needs survive."""
    torch.manual_seed(0)
    toy = Toy()
    bank = GateBank({"text.0.ffn": toy.gate}, {"text.0.ffn": 3})
    prune = PruneConfig(sparsity=0.6, ramp_steps=100, lr=0.05)
    gates = GateOptimizer(bank, prune, "cpu", 1)
    model_optimizer = torch.optim.Adam(toy.parameters(), lr=0.05)
    truth = torch.cat([torch.ones(12), torch.zeros(28)])
    for step in range(500):
        gates.begin_step(step, keyed(step))
        x = torch.randn(64, 40)
        ((toy(x) - x * truth) ** 2).sum(1).mean().backward()
        model_optimizer.step()
        model_optimizer.zero_grad()
        gates.finish_step(step, applied=True)
    record = gates.metrics()
    assert record["expected"] == pytest.approx(0.6, abs=0.03)
    assert record["actual"] == pytest.approx(0.6, abs=0.06)
    final = gates.structure()["text.0.ffn"]
    assert int((final == 0).sum()) == 24 and bool((final[:12] == 1).all())


def test_gates_never_become_parameters_of_the_model():
    toy = Toy()
    bank = GateBank({"text.0.ffn": toy.gate}, {"text.0.ffn": 3})
    GateOptimizer(bank, PruneConfig(), "cpu", 1).begin_step(0, keyed(0))
    assert [name for name, _ in toy.named_parameters()] == ["weight"]
    assert list(toy.state_dict()) == ["weight"]
