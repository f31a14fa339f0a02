"""Gates moved back onto their constraint: against a naive search, for every scope and kind of cost."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from models.gate_slot import GateSlot
from models.gates import GateBank
from models.pruning.budget import Constraint, Scope, WidthCosts
from models.pruning.projection import check_reach, project, reach, tangent

UNITS = {"vision.0.heads": 4, "vision.0.ffn": 24, "text.0.heads": 3, "text.0.ffn": 17}
COSTS = {"vision.0.heads": 60.0, "vision.0.ffn": 7.0, "text.0.heads": 40.0, "text.0.ffn": 5.0}
SCOPES: tuple[Scope, ...] = ("modal-adaptive", "per-encoder", "uniform")
BOUND = math.log(100.0)


def crooked(bank: GateBank) -> WidthCosts:
    """Time of a device with a start-up cost of each layer, and a flat stretch."""
    points = {}
    for row in bank.rows:
        u, c = float(row.units), row.cost
        points[row.name] = [(0, 0), (1, 0.3 * u * c), (u / 2, 0.5 * u * c),
                            (0.75 * u, 0.5 * u * c), (u, u * c)]  # fmt: skip
    return WidthCosts("seconds", points, constant=10.0)


def macs(bank: GateBank) -> WidthCosts:
    """Straight lines of other slopes, and a total that is not their sum."""
    costs = {row.name: (9.0 if row.is_heads else 2.0) for row in bank.rows}
    whole = sum(row.units * costs[row.name] for row in bank.rows)
    return WidthCosts.linear("MACs", bank, costs, total=1.05 * whole)


KINDS = {"parameters": WidthCosts.parameters, "MACs": macs, "seconds": crooked}


def make(kind: str, scope: Scope, seed: int, spread: float = 2.0, share: float = 0.6) -> Constraint:
    bank = GateBank({n: GateSlot(u) for n, u in UNITS.items()}, COSTS)
    noise = torch.randn(bank.gates, generator=torch.Generator().manual_seed(seed))
    bank.log_alpha.data.copy_(spread * noise)
    bank.clamp()
    return Constraint(bank, KINDS[kind](bank), share, scope)


def naive_shares(rule: Constraint, log_alpha: list[float]) -> list[float]:
    """Share that each group removes, in plain Python."""
    kept = {}
    for row in rule.bank.rows:
        values = log_alpha[row.start : row.stop]
        width = sum(1 / (1 + math.exp(-(x - 2 / 3 * math.log(0.1 / 1.1)))) for x in values)
        index = [r.name for r in rule.bank.rows].index(row.name)
        kept[row.name] = width if rule.scope == "uniform" else rule.costs.size_at(index, width)
    full = dict(zip(kept, rule.costs.full.tolist(), strict=True))
    if rule.scope == "uniform":
        return [1 - kept[name] / UNITS[name] for name in kept]
    if rule.scope == "modal-adaptive":
        return [1 - sum(kept.values()) / rule.costs.total]
    return [
        1 - sum(kept[n] for n in names) / sum(full[n] for n in names)
        for names in rule.groups.values()
    ]


@settings(max_examples=60, deadline=None)
@given(
    kind=st.sampled_from(sorted(KINDS)), scope=st.sampled_from(SCOPES), ramp=st.floats(0.3, 1.0),
    seed=st.integers(0, 10**6), spread=st.floats(0.0, 4.0), share=st.floats(0.2, 0.85),
)  # fmt: skip
def test_expected_is_the_target_for_any_gates(kind, scope, ramp, seed, spread, share):
    rule = make(kind, scope, seed, spread, share)
    project(rule, ramp)
    found = naive_shares(rule, rule.bank.log_alpha.tolist())
    assert found == pytest.approx([rule.target(ramp)] * len(rule.groups), abs=1e-6)
    if scope == "modal-adaptive":
        assert rule.expected().item() == pytest.approx(ramp * share, abs=1e-6)


@pytest.mark.parametrize("scope", SCOPES)
@pytest.mark.parametrize("kind", sorted(KINDS))
def test_shift_is_that_of_a_naive_search(kind, scope):
    """Every group by itself: walk in small steps until the share removed passes the target."""
    rule = make(kind, scope, 3)
    before = rule.bank.log_alpha.detach().double().tolist()
    shifts = project(rule, 0.5).tolist()
    step, target = 1e-3, rule.target(0.5)
    names = list(rule.groups)
    for index, members in enumerate(rule.groups.values()):

        def removed(shift: float, index: int = index, members: list[str] = members) -> float:
            moved = list(before)
            for row in rule.bank.rows:
                if row.name in members:
                    for i in range(row.start, row.stop):
                        moved[i] = min(max(before[i] + shift, -BOUND), BOUND)
            return naive_shares(rule, moved)[index]

        walked = next(s * step for s in range(-9000, 9001) if removed(s * step) <= target)
        assert shifts[index] == pytest.approx(walked, abs=1.1 * step), names[index]


@pytest.mark.parametrize("scope", SCOPES)
def test_only_the_groups_shift_moves_gates(scope):
    """One number for each group, cut off at the bounds: order stays, and a second call does
    nothing."""
    rule = make("parameters", scope, 5)
    before = rule.bank.log_alpha.detach().double()
    shift = project(rule, 1.0)
    after = rule.bank.log_alpha.detach().clone()
    for index, members in enumerate(rule.groups.values()):
        for row in rule.bank.rows:
            if row.name in members:
                here = slice(row.start, row.stop)
                wanted = (before[here] + float(shift[index])).clamp(-BOUND, BOUND)
                torch.testing.assert_close(after[here], wanted.float(), rtol=0, atol=1e-6)
    again = project(rule, 1.0)
    assert float(again.abs().max()) < 1e-6
    torch.testing.assert_close(rule.bank.log_alpha.detach(), after, rtol=0, atol=1e-6)


@settings(max_examples=25, deadline=None)
@given(
    seed=st.integers(0, 10**6), scope=st.sampled_from(SCOPES), kind=st.sampled_from(sorted(KINDS))
)
def test_a_higher_target_needs_a_lower_shift(seed, scope, kind):
    shifts = []
    for ramp in (0.2, 0.5, 1.0):
        shifts.append(project(make(kind, scope, seed), ramp))
    assert bool((shifts[0] >= shifts[1]).all()) and bool((shifts[1] >= shifts[2]).all())
    if kind == "parameters":  # costs without flat stretches have one solution each
        assert bool((shifts[0] > shifts[1]).all()) and bool((shifts[1] > shifts[2]).all())


def test_a_target_below_reach_opens_all_gates_to_the_bound():
    """The first steps of a ramp: 0.2 % is what gates at the upper bound are expected to remove."""
    rule = make("parameters", "modal-adaptive", 1)
    project(rule, 0.0)
    assert rule.bank.log_alpha.min().item() == pytest.approx(BOUND)
    assert rule.expected().item() == pytest.approx(reach(rule)[0].item(), abs=1e-7)
    assert rule.expected().item() == pytest.approx(0.0020, abs=1e-4)


def test_gates_beyond_the_bounds_are_as_those_at_them():
    """Heads start at 10: no step down of a ramp would otherwise find them."""
    one, two = make("parameters", "uniform", 1), make("parameters", "uniform", 1)
    one.bank.log_alpha.data[:4], two.bank.log_alpha.data[:4] = 10.0, BOUND
    assert reach(one)[1].tolist() == reach(two)[1].tolist()
    project(one, 1.0)
    project(two, 1.0)
    assert torch.equal(one.bank.log_alpha, two.bank.log_alpha)


def test_reach_is_refused_with_key_and_remedy():
    check_reach(make("parameters", "per-encoder", 0, share=0.94), "prune.sparsity")
    message = r"prune\.sparsity: 97\.0%.*at most 95\.3%.*prune\.constraint=lagrangian"
    with pytest.raises(ValueError, match=message):
        check_reach(make("parameters", "per-encoder", 0, share=0.97), "prune.sparsity")


@pytest.mark.parametrize("scope", SCOPES)
@pytest.mark.parametrize("kind", ["parameters", "MACs"])
def test_tangent_is_the_gradient_through_the_projection(kind, scope):
    """Central differences of a loss that only sees projected gates."""
    rule = make(kind, scope, 7, spread=0.7, share=0.4)
    bank, step = rule.bank, 0.01
    weights = torch.randn(bank.gates, generator=torch.Generator().manual_seed(2))
    project(rule, 1.0)
    start = bank.log_alpha.detach().clone()

    def loss(index: int, change: float) -> float:
        bank.log_alpha.data.copy_(start)
        bank.log_alpha.data[index] += change
        project(rule, 1.0)
        return float(weights.double() @ bank.log_alpha.detach().double())

    naive = [(loss(i, step) - loss(i, -step)) / (2 * step) for i in range(bank.gates)]
    bank.log_alpha.data.copy_(start)
    found = tangent(rule, weights)
    torch.testing.assert_close(found, torch.tensor(naive), rtol=5e-3, atol=5e-3)


@pytest.mark.parametrize("scope", SCOPES)
def test_tangent_has_nothing_left_along_the_shift(scope):
    """Also where a table is flat (the tilt of its slope); an open-all wish comes to nothing."""
    rule = make("seconds", scope, 7)
    gradient = torch.randn(rule.bank.gates, generator=torch.Generator().manual_seed(2))
    left = tangent(rule, gradient)
    for members in rule.groups.values():
        rows = [row for row in rule.bank.rows if row.name in members]
        total = sum(left[row.start : row.stop].double().sum().item() for row in rows)
        assert total == pytest.approx(0.0, abs=1e-5)
    assert not torch.allclose(left, gradient)
    torch.testing.assert_close(tangent(rule, left), left, rtol=1e-4, atol=1e-6)
