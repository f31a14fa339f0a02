"""Costs by width, latency tables, scopes and rounded structures against naive computations."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from models.gate_slot import GateSlot
from models.gates import GateBank
from models.pruning.budget import (
    Constraint,
    WidthCosts,
    bank_widths,
    expected_widths,
    uniform_share,
)
from models.pruning.latency import LatencyTable, kind_of, rising
from models.pruning.structure import allowed_widths, meet_budget

UNITS = {"vision.0.heads": 4, "vision.0.ffn": 48, "text.0.heads": 3, "text.0.ffn": 32}
COSTS = {"vision.0.heads": 60.0, "vision.0.ffn": 7.0, "text.0.heads": 40.0, "text.0.ffn": 5.0}


def make_bank(seed: int = 0, units: dict[str, int] | None = None) -> GateBank:
    units = UNITS if units is None else units
    bank = GateBank({n: GateSlot(u) for n, u in units.items()}, {n: COSTS[n] for n in units})
    noise = torch.randn(bank.gates, generator=torch.Generator().manual_seed(seed))
    bank.log_alpha.data.copy_(2 * noise)
    bank.clamp()
    return bank


def crooked(bank: GateBank) -> WidthCosts:
    """Time of a device with a start-up cost of each layer, and a flat stretch."""
    points = {}
    for row in bank.rows:
        u, c = float(row.units), row.cost
        points[row.name] = [(0, 0), (1, 0.3 * u * c), (u / 2, 0.5 * u * c),
                            (0.75 * u, 0.5 * u * c), (u, u * c)]  # fmt: skip
    return WidthCosts("seconds", points, constant=10.0)


# --- costs ----------------------------------------------------------------------------------------


@settings(max_examples=40, deadline=None)
@given(st.lists(st.floats(0, 1), min_size=4, max_size=4))
def test_sizes_are_interpolated(shares):
    bank = make_bank()
    costs = crooked(bank)
    widths = costs.units * torch.tensor(shares, dtype=torch.float64)
    found = costs.sizes(widths)
    for index, row in enumerate(bank.rows):
        table, x = costs.points[row.name], float(widths[index])
        (a, low), (b, high) = next(p for p in itertools.pairwise(table) if x <= p[1][0])
        wanted = low + (high - low) * (x - a) / (b - a)
        assert float(found[index]) == pytest.approx(wanted, abs=1e-9)
        assert costs.size_at(index, x) == pytest.approx(wanted, abs=1e-9)


def test_gradient_is_the_tables_slope_and_never_nothing():
    bank = make_bank()
    costs = crooked(bank)
    widths = (costs.units * 0.6).requires_grad_()  # where the table is flat
    costs.sizes(widths).sum().backward()
    chord = costs.full / costs.units
    torch.testing.assert_close(widths.grad, 0.1 * chord)
    steep = (costs.units * 0.9).requires_grad_()
    costs.sizes(steep).sum().backward()
    torch.testing.assert_close(steep.grad, 0.9 * 2.0 * chord + 0.1 * chord)


def test_straight_lines_are_the_banks_own_sparsity():
    bank = make_bank(3)
    rule = Constraint(bank, WidthCosts.parameters(bank), 0.4)
    assert float(rule.expected()) == pytest.approx(float(bank.expected_sparsity()), abs=1e-12)
    z = bank.deterministic()
    for modality in (None, "vision", "text"):
        ours, theirs = rule.actual(z, modality), bank.actual_sparsity(z, modality)
        assert float(ours) == pytest.approx(float(theirs), abs=1e-12)
    (one,) = torch.autograd.grad(rule.expected(), bank.log_alpha)
    (two,) = torch.autograd.grad(bank.expected_sparsity(), bank.log_alpha)
    torch.testing.assert_close(one, two)


@pytest.mark.parametrize(
    "points", [[(0, 0)], [(1, 0), (2, 1)], [(0, 1), (2, 2)], [(0, 0), (2, 3), (4, 2)]]
)
def test_tables_that_fall_or_do_not_begin_at_nothing_are_refused(points):
    with pytest.raises(ValueError, match="rise from"):
        WidthCosts("seconds", {"vision.0.ffn": points})


def test_costs_survive_a_checkpoint():
    costs = crooked(make_bank())
    again = WidthCosts.of_state(costs.state_dict())
    assert again.points == costs.points and again.total == costs.total
    assert (again.constant, again.unit) == (10.0, "seconds")


# --- scopes ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("table", [WidthCosts.parameters, crooked])
@pytest.mark.parametrize("scope", ["modal-adaptive", "per-encoder", "uniform"])
def test_penalty_is_that_of_a_loop_over_groups(scope, table):
    bank = make_bank(5)
    costs = table(bank)
    rule = Constraint(bank, costs, 0.4, scope)
    bank.multipliers.data.normal_(generator=torch.Generator().manual_seed(1))
    first, second = bank.multipliers.detach().double().reshape(2, -1)
    ramp, total, open_ = 0.5, 0.0, bank.probabilities_open().double()
    groups = {
        "modal-adaptive": [UNITS.keys()],
        "per-encoder": [["vision.0.heads", "vision.0.ffn"], ["text.0.heads", "text.0.ffn"]],
        "uniform": [[name] for name in UNITS],
    }[scope]
    target = ramp * (uniform_share(costs, 0.4) if scope == "uniform" else 0.4)
    for g, names in enumerate(groups):
        kept = full = 0.0
        for index, row in enumerate(bank.rows):
            if row.name in names:
                width = float(open_[row.start : row.stop].sum())
                by_units = scope == "uniform"
                kept += width if by_units else costs.size_at(index, width)
                full += row.units if by_units else costs.size_at(index, row.units)
        gap = 1.0 - kept / full - target
        total += float(first[g] * gap + second[g] * gap**2)
    assert float(rule.penalty(ramp)) == pytest.approx(total, rel=1e-6)


def test_uniform_share_removes_the_budget():
    bank = make_bank()
    straight, bent = WidthCosts.parameters(bank), crooked(bank)
    assert uniform_share(straight, 0.37) == pytest.approx(0.37)
    share = uniform_share(bent, 0.37)
    left = float(bent.sizes(bent.units * (1 - share)).sum())
    assert 1 - left / bent.total == pytest.approx(0.37)


def test_targets_by_modality():
    bank = make_bank()
    costs = WidthCosts.parameters(bank)
    assert Constraint(bank, costs, 0.4).modality_target("text") is None
    assert Constraint(bank, costs, 0.4, "per-encoder").modality_target("text", 0.5) == 0.2
    uniform = Constraint(bank, costs, 0.4, "uniform").modality_target("vision", 0.5)
    assert uniform == pytest.approx(0.2)


def test_a_checkpoint_of_another_scope_is_refused():
    bank = make_bank()
    state = Constraint(bank, WidthCosts.parameters(bank), 0.4).state_dict()
    other = Constraint(make_bank(), WidthCosts.parameters(bank), 0.4, "uniform")
    with pytest.raises(ValueError, match=r"prune\.scope"):
        other.load_state_dict(state)


# --- structures -----------------------------------------------------------------------------------


def most_open(bank: GateBank, z: torch.Tensor) -> bool:
    """In every row, no closed gate is more open than one that is kept."""
    for name, part in bank.split(z).items():
        score = bank.split(bank.log_alpha.detach())[name]
        open_, closed = score[part == 1], score[part == 0]
        if len(open_) and len(closed) and open_.min() < closed.max():
            return False
    return True


@settings(max_examples=60, deadline=None)
@given(
    st.integers(0, 1000),
    st.floats(0.05, 0.85),
    st.sampled_from([1, 8, 16]),
    st.sampled_from(["modal-adaptive", "per-encoder", "uniform"]),
    st.booleans(),
)
def test_rounded_structures(seed, sparsity, multiple, scope, bent):
    bank = make_bank(seed)
    costs = crooked(bank) if bent else WidthCosts.parameters(bank)
    z = meet_budget(bank, sparsity, costs=costs, scope=scope, multiple=multiple)
    widths = bank_widths(bank, z)
    for row, width in zip(bank.rows, widths.tolist(), strict=True):
        assert int(width) in allowed_widths(row, multiple)
        assert row.is_heads or int(width) % multiple == 0  # full widths here are multiples
    assert set(z.tolist()) <= {0.0, 1.0} and most_open(bank, z)
    removed = costs.full - costs.sizes(widths)
    groups = [[0, 1, 2, 3]] if scope != "per-encoder" else [[0, 1], [2, 3]]
    for group in groups:
        missing = abs(float(removed[group].sum()) - sparsity * float(costs.full[group].sum()))
        # One step of the coarsest row: never further off than a whole step of what is there.
        steps = [
            costs.size_at(i, b) - costs.size_at(i, a)
            for i in group
            for a, b in itertools.pairwise(allowed_widths(bank.rows[i], multiple))
        ]
        assert missing <= max(steps) / 2 + 1e-6


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 1000), st.floats(0.1, 0.8))
def test_no_single_step_comes_closer(seed, sparsity):
    """Against brute force: no other width of any one row would meet the budget better, beyond half
    a cheapest unit."""
    units = {"vision.0.heads": 4, "text.0.ffn": 32}
    bank = make_bank(seed, units)
    costs = WidthCosts.parameters(bank)
    widths = bank_widths(bank, meet_budget(bank, sparsity, multiple=8)).tolist()
    per_unit, wanted = [60.0, 5.0], (1 - sparsity) * bank.total

    def missing(these: list[float]) -> float:
        return abs(sum(w * c for w, c in zip(these, per_unit, strict=True)) - wanted)

    best = min(
        missing([a, b])
        for a, b in itertools.product(range(5), range(0, 33, 8))
        if (a == widths[0]) != (b == widths[1])
    )
    assert missing(widths) <= best + min(60.0, 8 * 5.0) / 2
    assert costs.total == bank.total


def test_uniform_structures_take_the_same_share_of_every_row():
    bank = make_bank(9)
    z = meet_budget(bank, 0.25, scope="uniform")
    shares = [float((part == 0).float().mean()) for part in bank.split(z).values()]
    assert shares[0] == 0.25 and round(3 * shares[2]) == 1  # one of four, one of three heads
    assert shares[1] == pytest.approx(0.25, abs=0.08) and shares[3] == pytest.approx(0.25, abs=0.08)


def test_layers_that_are_not_cut_keep_a_width_that_is_no_multiple():
    bank = GateBank({"text.0.ffn": GateSlot(20)}, {"text.0.ffn": 1.0})
    assert allowed_widths(bank.rows[0], 8) == [0, 8, 16, 20]
    assert int(meet_budget(bank, 0.0, multiple=8).sum()) == 20


# --- latency --------------------------------------------------------------------------------------


@settings(max_examples=40, deadline=None)
@given(st.lists(st.integers(0, 6), min_size=1, max_size=5))
def test_rising_is_the_closest_that_never_falls(values):
    found = rising(values)
    assert all(a <= b + 1e-12 for a, b in itertools.pairwise(found))
    loss = sum((a - b) ** 2 for a, b in zip(found, values, strict=True))
    grid = [k / 4 for k in range(25)]
    brute = min(
        sum((a - b) ** 2 for a, b in zip(fit, values, strict=True))
        for fit in itertools.combinations_with_replacement(grid[:: 1 if len(values) < 4 else 2],
                                                           len(values))
    )  # fmt: skip
    assert loss <= brute + 1e-9


def make_table(bank: GateBank) -> LatencyTable:
    kinds = {
        kind_of(row.name): [(0.0, 0.5)] + [(row.units / 2, 2.0), (float(row.units), 3.5)]
        for row in bank.rows
    }
    return LatencyTable(kinds, UNITS, dense=30.0, empty=6.0, reference=60.0)


def test_table_is_scaled_to_whole_models():
    """Four layers of 3 alone, 24 between the whole model and the empty one: everything doubles."""
    bank = make_bank()
    table = make_table(bank)
    costs = table.costs(bank)
    assert costs.total == pytest.approx(24.0) and costs.constant == pytest.approx(6.0)
    assert table.speedup(costs, costs.units) == pytest.approx(2.0)
    assert table.speedup(costs, 0 * costs.units) == pytest.approx(10.0)
    half = costs.units / 2
    assert table.speedup(costs, half) == pytest.approx(60.0 / (6.0 + 4 * 2 * 1.5))
    share = table.share_for(costs, 60.0 / 18.0)
    assert share == pytest.approx(0.5)
    assert table.share_for(costs, 2.0) == pytest.approx(0.0)
    assert LatencyTable.of_json(table.to_json()) == table


def test_layers_without_gates_are_constant():
    bank = make_bank(units={name: UNITS[name] for name in ("text.0.heads", "text.0.ffn")})
    costs = make_table(make_bank()).costs(bank)
    assert costs.total == pytest.approx(12.0) and costs.constant == pytest.approx(18.0)


def test_narrower_layers_are_cut_from_their_kinds_row():
    units = UNITS | {"vision.1.ffn": 24}
    table = make_table(make_bank())
    wide = LatencyTable(table.kinds, units, 33.0, 6.0, 60.0)
    bank = GateBank(
        {name: GateSlot(count) for name, count in units.items()}, COSTS | {"vision.1.ffn": 7.0}
    )
    points = wide.costs(bank).points
    # Alone: 12 in four whole layers, 1.5 in half a one; 27 between whole and empty.
    assert points["vision.1.ffn"] == ((0.0, 0.0), (24.0, pytest.approx(3.0)))
    assert points["vision.0.ffn"][-1] == (48.0, pytest.approx(6.0))


def test_broken_tables_are_refused(tmp_path):
    path = tmp_path / "table.json"
    path.write_text('{"version": 1}')
    with pytest.raises(ValueError, match=r"table\.json.*remove it"):
        LatencyTable.load(path)
    with pytest.raises(ValueError, match="without heads and units"):
        LatencyTable({}, {}, dense=1.0, empty=2.0, reference=3.0)


def test_expected_widths_are_sums_of_probabilities():
    bank = make_bank(2)
    wanted = [float(bank.probabilities_open()[row.start : row.stop].sum()) for row in bank.rows]
    assert expected_widths(bank).tolist() == pytest.approx(wanted)
