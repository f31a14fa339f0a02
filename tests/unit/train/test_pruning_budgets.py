"""Budgets beside parameters: reached in training, resumed, verified and corrected; run file checks.

The device is made up: its table is exact, or off by a known amount, so nothing depends on the clock.
"""

from __future__ import annotations

import copy
import logging
from types import SimpleNamespace

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from models import presets
from models.config import ModelConfig
from models.gates import GateBank
from models.pruning.budget import Constraint, WidthCosts, bank_widths
from models.pruning.latency import LatencyTable, kind_of
from models.pruning.surgery import pruned_config, widths, with_widths
from models.xvlm import XVLM
from train.config import BudgetConfig, EvalConfig, PruneConfig, RunConfig
from train.data_config import DataConfig
from train.evaluation.workload import Workload
from train.pruning import make
from train.pruning.budgets import Measured, PruneBudget, SpeedupBudget
from train.pruning.check import budget_line, check_budget
from train.pruning.latency import Stopwatch, cached_table, measure_speedup, measure_table
from train.pruning.macs import macs_per_unit, workload_macs
from train.runtime.gate_optimizer import GateOptimizer

CONFIG = presets.config("blocksworld-student", form="vqa")
WORK = Workload(text_tokens=7, answers=4, top_k=4)
STEPS = 300


def layer_seconds(slot: str, width: float, units: int) -> float:
    """A device: starting a layer costs as much as a third of it, vision layers cost double."""
    whole = 2.0 if slot.startswith("vision") else 1.0
    return whole * (0.0 if not width else 1 / 3 + 2 / 3 * width / units)


def model_seconds(config: ModelConfig) -> float:
    full = widths(CONFIG)
    return 2.0 + sum(layer_seconds(name, w, full[name]) for name, w in widths(config).items())


def make_table() -> LatencyTable:
    full, kinds = widths(CONFIG), {}
    for name, units in full.items():
        kinds[kind_of(name)] = [
            (float(w), layer_seconds(name, w, units)) for w in range(0, units + 1)
        ]
    dense = model_seconds(CONFIG)
    return LatencyTable(kinds, full, dense, 2.0, 1.5 * dense, {"device": "made up"})


def make_bank(config: ModelConfig = CONFIG) -> GateBank:
    with torch.device("meta"):
        model = XVLM(config)
    return GateBank.of_model(model, seed=3)


def speedup_budget(bank: GateBank, prune: PruneConfig, target: float, slower: float = 1.0):
    """`slower`: the device saves so much less than the table says."""
    table = make_table()

    def measure(slim: ModelConfig) -> Measured:
        saved = slower * (table.dense - model_seconds(slim))
        return Measured(*3 * (table.reference / (table.dense - saved),))

    return SpeedupBudget.of_table(bank, prune, table, target, CONFIG, measure, 0.05)


def make_gates(kind: str, **options) -> GateOptimizer:
    prune = PruneConfig(
        **{"sparsity": 0.4, "ramp_steps": 60, "lr": 0.1, "head_init": 2.0} | options
    )
    bank = make_bank()
    if kind == "parameters":
        budget = PruneBudget.parameters(bank, prune)
    elif kind == "macs":
        costs = WidthCosts.linear("MACs", bank, macs_per_unit(CONFIG, WORK))
        budget = PruneBudget(Constraint(bank, costs, 0.4, prune.scope), prune.round_to)
    else:
        budget = speedup_budget(bank, prune, 2.2)
    return GateOptimizer(bank, prune, "cpu", 1, budget)


def run(gates: GateOptimizer, first: int, last: int) -> None:
    """A task to which half of the gates matter, the same ones in every row."""
    matters = torch.linspace(0.0, 1.0, 97).repeat(60)[: gates.bank.gates] * 2e-3
    for step in range(first, last):
        gates.begin_step(step, torch.Generator().manual_seed(step))
        if not gates.frozen:
            z = gates.bank.join({k: v for k, v in gates.bank.values().items() if v is not None})
            (matters * (1.0 - z) ** 2).sum().backward()
        gates.finish_step(step, applied=True)


# --- training -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "scope"),
    [("parameters", "modal-adaptive"), ("macs", "modal-adaptive"), ("speedup", "modal-adaptive"),
     ("speedup", "per-encoder"), ("macs", "uniform")],
)  # fmt: skip
@pytest.mark.parametrize(("constraint", "steps"), [("lagrangian", STEPS), ("projection", 70)])
def test_target_expected_and_actual_agree_at_the_end(kind, scope, constraint, steps):
    gates = make_gates(kind, scope=scope, constraint=constraint, freeze_step=steps)
    run(gates, 0, steps + 1)
    record = gates.metrics()
    assert record["expected"] == pytest.approx(record["target"], abs=0.01)
    assert record["actual"] == pytest.approx(record["target"], abs=0.01)
    if scope == "per-encoder":
        for name in gates.bank.modalities:
            assert record[f"{name}_target"] == pytest.approx(record["target"])
            assert record[f"{name}_expected"] == pytest.approx(record["target"], abs=0.01)
    assert ("parameters" in record) == (kind != "parameters")
    if kind == "speedup":
        assert record["speedup"] == pytest.approx(2.2, rel=0.02)


@pytest.mark.parametrize("scope", ["modal-adaptive", "per-encoder"])
@pytest.mark.parametrize("kind", ["parameters", "macs", "speedup"])
def test_projected_gates_stand_on_the_target_in_every_step(kind, scope):
    """Whatever the task asks of them; from the first step whose target gates can reach."""
    gates = make_gates(kind, scope=scope, constraint="projection", ramp_steps=12)
    for step in range(20):
        run(gates, step, step + 1)
        record = gates.metrics()
        miss = 0.003 if step == 0 else 1e-6  # target 0: no gate is ever surely open
        assert record["expected"] == pytest.approx(record["target"], abs=miss)
        if scope == "per-encoder":
            for name in gates.bank.modalities:
                assert record[f"{name}_expected"] == pytest.approx(record["target"], abs=miss)
    assert "lambda1" not in record and "lambda2" not in record
    assert not gates.bank.multipliers.any()


def test_projected_gates_stand_still_once_frozen():
    """A fixed structure is no gate's to move, and a skipped step moves none."""
    gates = make_gates("parameters", constraint="projection", ramp_steps=4, freeze_step=6)
    run(gates, 0, 5)
    before = gates.bank.log_alpha.detach().clone()
    gates.begin_step(5, torch.Generator().manual_seed(5))
    gates.finish_step(5, applied=False)
    assert torch.equal(before, gates.bank.log_alpha)
    run(gates, 6, 9)
    assert gates.frozen and torch.equal(before, gates.bank.log_alpha)


def test_gates_drawn_ahead_are_those_of_the_projected_log_alphas():
    """Compact products take their sizes from gates drawn between two steps: after the shift."""
    gates = make_gates("parameters", constraint="projection", ramp_steps=12, gates="compact")
    run(gates, 0, 5)
    gates.prepare(5, torch.Generator().manual_seed(5))
    gates.begin_step(5, torch.Generator().manual_seed(5))
    written = gates.bank.join({k: v for k, v in gates.bank.values().items() if v is not None})
    drawn = gates.bank.sample(torch.Generator().manual_seed(5))
    assert torch.equal(written, drawn)
    for name, slot in gates.bank._slots.items():
        kept = slot.kept
        open_ = drawn.detach()[next(r.start for r in gates.bank.rows if r.name == name) :]
        if kept is not None:
            assert set(open_[: slot.units].nonzero().flatten().tolist()) <= set(kept.tolist())


@pytest.mark.parametrize(
    ("kind", "key"), [("parameters", r"prune\.sparsity"), ("macs", r"prune\.budget\.macs")]
)
def test_a_target_out_of_the_gates_reach_is_refused(kind, key):
    prune = PruneConfig(
        sparsity=0.97,
        constraint="projection",
        budget=BudgetConfig(macs=0.97) if kind == "macs" else None,
    )
    bank = make_bank()
    costs = WidthCosts.parameters(bank)
    with pytest.raises(ValueError, match=key + r".*prune\.constraint=lagrangian"):
        GateOptimizer(bank, prune, "cpu", 1, PruneBudget(Constraint(bank, costs, 0.97)))


@pytest.mark.parametrize(
    ("kind", "scope"), [("macs", "uniform"), ("speedup", "modal-adaptive"), ("speedup", "uniform")]
)
@pytest.mark.parametrize("stop", [7, 25])
@pytest.mark.parametrize("constraint", ["lagrangian", "projection"])
def test_resume_continues_the_ramp(kind, scope, stop, constraint):
    """Stopped in the middle of the ramp, and after the structure was fixed."""
    whole, part, resumed = (
        make_gates(kind, scope=scope, ramp_steps=16, freeze_step=22, constraint=constraint)
        for _ in range(3)
    )
    run(whole, 0, 28)
    run(part, 0, stop)
    state = copy.deepcopy(part.state_dict())
    resumed.bank.log_alpha.data.add_(1.0)
    if kind == "speedup":  # this machine would have measured something else
        rule = resumed.budget.constraint
        rule.replace(WidthCosts.parameters(resumed.bank), 0.9)
        rule.costs.unit = "seconds"
    resumed.load_state_dict(state)
    assert resumed.metrics() == part.metrics()
    run(resumed, stop, 28)
    assert torch.equal(whole.bank.log_alpha, resumed.bank.log_alpha)
    assert torch.equal(whole.bank.multipliers, resumed.bank.multipliers)
    assert torch.equal(whole.hard_gates(), resumed.hard_gates())
    assert whole.metrics() == resumed.metrics()
    assert whole.budget.report(whole.hard_gates()) == resumed.budget.report(resumed.hard_gates())


def test_a_checkpoint_of_another_budget_is_refused():
    with pytest.raises(ValueError, match=r"prune\.budget counts MACs.*parameters"):
        make_gates("macs").load_state_dict(make_gates("parameters").state_dict())


def test_macs_budget_is_that_of_the_cut_model():
    gates = make_gates("macs", round_to=8)
    z = gates.bank.join(gates.structure())
    slim = pruned_config(CONFIG, gates.bank.split(z))
    removed = workload_macs(CONFIG, WORK) - workload_macs(slim, WORK)
    total = gates.budget.constraint.costs.total
    assert removed / total == pytest.approx(float(gates.budget.constraint.actual(z)), rel=1e-9)
    assert removed / total == pytest.approx(0.4, abs=0.01)
    assert all(w % 8 == 0 for name, w in widths(slim).items() if name.endswith("ffn"))


# --- verifying ------------------------------------------------------------------------------------


def test_a_table_that_is_right_needs_no_correction():
    budget = speedup_budget(make_bank(), PruneConfig(), 2.2)
    z = budget.structure()
    assert len(budget.tries) == 1
    report = budget.report(z)["speedup"]
    assert report["measured"] == pytest.approx(2.2, rel=0.02)
    assert report["predicted"] == pytest.approx(report["measured"], rel=1e-6)
    assert report["device"] == "made up"


@pytest.mark.parametrize("slower", [0.8, 1.15])
def test_a_miss_is_corrected_and_told(caplog, slower):
    budget = speedup_budget(make_bank(), PruneConfig(), 2.2, slower)
    with caplog.at_level(logging.WARNING):
        z = budget.structure()
    assert "correcting the structure" in caplog.text
    first, *_, last = budget.tries
    assert abs(first["measured"] / 2.2 - 1) > 0.05 > abs(last["measured"] / 2.2 - 1)
    assert (last["share"] > first["share"]) == (slower < 1) and last["chosen"]
    report = budget.report(z)
    assert report["target"] == last["share"] == pytest.approx(report["actual"], abs=0.01)
    assert report["speedup"]["measured"] == last["measured"]


def test_more_steps_ask_for_the_target_before_the_correction():
    """A run that ended, with a structure corrected on the clock, and is given more steps."""
    budget = speedup_budget(make_bank(), PruneConfig(), 2.2, slower=0.8)
    gates = GateOptimizer(budget.constraint.bank, PruneConfig(), "cpu", 1, budget)
    asked = budget.constraint.sparsity
    gates.freeze()
    assert budget.constraint.sparsity > asked
    longer = GateOptimizer(budget.constraint.bank, PruneConfig(), "cpu", 1, budget)
    longer.load_state_dict(gates.state_dict())
    assert longer.frozen and budget.constraint.sparsity > asked
    longer.begin_step(7, torch.Generator().manual_seed(7))
    assert not longer.frozen and budget.constraint.sparsity == asked


def test_what_correcting_cannot_reach_is_told(caplog):
    budget = speedup_budget(make_bank(), PruneConfig(), 2.2, slower=0.3)
    with caplog.at_level(logging.WARNING):
        budget.structure()
    assert len(budget.tries) == 3 and "the best structure is" in caplog.text


@pytest.mark.parametrize(("target", "told"), [(1.2, "already"), (60.0, "out of reach")])
def test_targets_that_cannot_be(target, told):
    with pytest.raises(ValueError, match=rf"prune\.budget\.speedup: .*{told}"):
        speedup_budget(make_bank(), PruneConfig(), target)


# --- measuring ------------------------------------------------------------------------------------


SMALL = Workload(text_tokens=6, answers=4, top_k=2, beams=2, caption_tokens=6)


@pytest.mark.parametrize(
    ("form", "cut"), [("vqa", {}), ("nlvr2", {}), ("captioning", {}),
                      ("nlvr2", {"fusion.0.cross_heads": 0})],
)  # fmt: skip
def test_every_layer_is_timed_on_what_it_gets(form, cut, monkeypatch):
    """With a clock that counts multiply-accumulates a table must say what the formulas say."""
    monkeypatch.setattr("train.pruning.latency._STEPS", 2)
    monkeypatch.setattr("train.pruning.latency._SHORT", 0.0)  # nothing is repeated
    student = with_widths(presets.config("blocksworld-micro-student", form=form), cut)
    teacher = presets.config("blocksworld-micro-teacher", form=form)
    with FlopCounterMode(display=False) as counter:
        watch = Stopwatch(repeats=2, clock=lambda: counter.get_total_flops() / 2.0)
        table = measure_table(student, teacher, SMALL, 3, watch)
        seen = measure_speedup(teacher, student, SMALL, 3, watch)
    dense, reference = workload_macs(student, SMALL), workload_macs(teacher, SMALL)
    assert (table.dense, table.reference) == (3 * dense, 3 * reference)
    assert seen == Measured(*3 * (reference / dense,))
    bank = make_bank(student)
    costs = table.costs(bank)
    units = macs_per_unit(student, SMALL)
    for index, row in enumerate(bank.rows):
        for width in (row.units, row.units // 2):
            assert costs.size_at(index, width) == pytest.approx(3 * units[row.name] * width)


def test_tables_are_measured_once_and_kept(tmp_path, monkeypatch):
    """The clock is real, so only what holds on any machine is asserted."""
    teacher = presets.config("blocksworld-micro-teacher", form="vqa")
    watch = Stopwatch(repeats=3, seconds=0.1)
    state = torch.get_rng_state()
    table = cached_table(tmp_path, CONFIG, teacher, SMALL, 2, watch)
    assert torch.equal(torch.get_rng_state(), state)
    assert [w for w, _ in table.kinds["vision.heads"]] == list(range(CONFIG.vision.heads[0] + 1))
    assert all(seconds > 0 for row in table.kinds.values() for _, seconds in row)
    assert table.about["batch"] == 2
    monkeypatch.setattr("train.pruning.latency.measure_table", None)
    assert cached_table(tmp_path, CONFIG, teacher, SMALL, 2, watch) == table
    with pytest.raises(TypeError):  # another batch is another table
        cached_table(tmp_path, CONFIG, teacher, SMALL, 3, watch)
    seen = measure_speedup(teacher, CONFIG, SMALL, 2, watch)
    assert 0 < seen.q1 <= seen.median <= seen.q3


# --- run files ------------------------------------------------------------------------------------


def run_file(**prune) -> RunConfig:
    return RunConfig(
        stage="prune", task="vqa", out="runs/x", model="blocksworld-micro-student",
        data=DataConfig(train="data/x/vqa/train", max_tokens=9), eval=EvalConfig(top_k=5),
        prune=PruneConfig(**prune),
    )  # fmt: skip


@pytest.mark.parametrize(
    ("budget", "told"),
    [
        ({}, "either macs or speedup"),
        ({"macs": 0.3, "speedup": 2.0}, "either macs or speedup"),
        ({"macs": 1.2}, r"budget\.macs"),
        ({"speedup": -1.0, "against": "student"}, "must be positive"),
        ({"speedup": 2.0}, r"teacher\.path"),
        ({"macs": 0.3, "batch": 0}, r"budget\.batch"),
        ({"speedup": 2.0, "against": "student", "tolerance": 0.0}, "tolerance"),
    ],
)
def test_budgets_that_contradict_themselves(budget, told):
    with pytest.raises(ValueError, match=told):
        check_budget(run_file(budget=BudgetConfig(**budget)))
    with pytest.raises(ValueError, match="round_to"):
        check_budget(run_file(round_to=0))


def test_a_projection_frozen_before_its_ramp_ends_is_refused():
    late = {"ramp_steps": 50, "freeze_step": 49}
    check_budget(run_file(**late))
    check_budget(run_file(constraint="projection", ramp_steps=50, freeze_step=50))
    with pytest.raises(ValueError, match=r"prune\.freeze_step: 49.*Freeze later"):
        check_budget(run_file(constraint="projection", **late))


def test_budget_in_one_line():
    line = budget_line(run_file(budget={"speedup": 2.2, "against": "student"}, round_to=64))
    assert "2.2 times the student's speed at batch 32" in line and "multiples of 64" in line
    assert "30% of the prunable multiply" in budget_line(run_file(budget={"macs": 0.3}))


def test_the_run_file_decides(monkeypatch):
    """Which budget, which reference, and what is measured; all ranks get what rank 0 has."""
    asked = []

    def table(folder, student, reference, work, batch, watch):
        asked.append((reference.name, work, batch, watch.dtype))
        return make_table()

    monkeypatch.setattr(make, "cached_table", table)
    dist = SimpleNamespace(rank=0, world_size=1, device=torch.device("cpu"))
    teacher = presets.config("blocksworld-micro-teacher", form="vqa")

    def made(**prune):
        return make.make_budget(run_file(**prune), make_bank(), CONFIG, teacher, dist)

    assert made(sparsity=0.3).constraint.costs.unit == "parameters"
    macs = made(budget={"macs": 0.3}, scope="uniform", round_to=4)
    assert (macs.constraint.costs.unit, macs.constraint.scope, macs.multiple) == (
        "MACs", "uniform", 4,
    )  # fmt: skip
    faster = made(budget={"speedup": 2.5, "batch": 8, "dtype": "bf16"})
    assert isinstance(faster, SpeedupBudget) and faster.table.about["against"] == "teacher"
    made(budget={"speedup": 2.5, "against": "student", "text_tokens": 3, "top_k": 2})
    assert [name for name, *_ in asked] == [teacher.name, CONFIG.name]
    assert asked[0][1].text_tokens == 9 and asked[0][1].top_k == 5
    assert asked[0][2:] == (8, "bf16") and asked[1][1].text_tokens == 3
    z = bank_widths(faster.constraint.bank, faster.constraint.bank.deterministic())
    assert len(z) == len(widths(CONFIG))
