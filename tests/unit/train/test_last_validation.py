"""What a pruning run validates last is the structure that it cuts, also after a stop."""

from __future__ import annotations

import signal
from pathlib import Path
from typing import Any

import torch

from models.gate_slot import GateSlot
from models.gates import GateBank
from tests.distributed.forked import fork_ranks
from tests.distributed.stand_in import tiny_config, tiny_run
from train.config import PruneConfig
from train.runtime import loop
from train.runtime.distributed import start
from train.runtime.gate_optimizer import GateOptimizer
from train.runtime.signals import leave_if_stopped

UNITS = {"vision.0.ffn": 40, "text.0.ffn": 30}
STEPS = 6


def _run(folder: Path, steps: int = STEPS, freeze_step: int | None = None) -> Any:
    """Of gates that hardly move: they stay far from the target of 25 %."""
    prune = {"sparsity": 0.25, "ramp_steps": 2, "lr": 1e-6, "freeze_step": freeze_step}
    prune = {"stage": "prune", "task": "vqa", "prune": prune}
    config = tiny_config(
        folder, optim={"steps": steps}, data={"region": {"probability": 0.0}}, **prune
    )
    run = tiny_run(config, start())
    bank = GateBank({name: GateSlot(units) for name, units in UNITS.items()}, {n: 3 for n in UNITS})
    assert isinstance(config.prune, PruneConfig)
    run.gates = GateOptimizer(bank, config.prune, "cpu", 1)
    run.validated = []

    def validate(step: int) -> dict[str, float]:
        hard = run.gates.hard_gates()
        run.validated.append((step, hard.clone()))
        return {"removed": float(bank.actual_sparsity(hard))}

    run.validate = validate
    return run


def _whole(folder: str) -> dict[str, Any]:
    told = {}
    for freeze in (None, 3):
        run = _run(Path(folder) / str(freeze), freeze_step=freeze)
        assert loop.train(run) == 0
        gates = run.gates.bank.deterministic()
        told[freeze] = {
            "validated": run.validated,
            "structure": run.gates.bank.join(run.gates.structure()),
            "gates": float(run.gates.bank.actual_sparsity(gates)),
            "record": run.monitor.records[-1],
        }
    return told


def test_the_last_validation_is_of_the_structure_that_is_cut(tmp_path: Path) -> None:
    for told in fork_ranks(_whole, 1, str(tmp_path))[0].values():
        [(step, hard)] = told["validated"]
        assert step == STEPS and torch.equal(hard, told["structure"])
        assert abs(told["gates"] - 0.25) > 0.05, "the test needs gates that miss the target"
        removed = told["record"]["validation"]["removed"]
        assert removed == told["record"]["sparsity"]["actual"]
        assert abs(removed - 0.25) < 0.02


def _stopped(folder: str, when: str) -> dict[str, Any]:
    first = _run(Path(folder))

    def leave(step: int) -> dict[str, float]:
        signal.raise_signal(signal.SIGTERM)
        leave_if_stopped("in a validation")
        raise AssertionError("nobody was told to stop")

    if when == "validation":
        first.validate = leave
    else:
        first.loader.after = lambda position: (
            signal.raise_signal(signal.SIGTERM) if position == STEPS else None
        )
    code = loop.train(first)
    structure = first.gates.bank.join(first.gates.structure())
    second = _run(Path(folder))
    return {
        "codes": [code, loop.train(second)],
        "validated": second.validated,
        "structures": [structure, second.gates.bank.join(second.gates.structure())],
        "record": second.monitor.records[-1],
    }


def test_a_stop_at_the_last_step_comes_out_the_same(tmp_path: Path) -> None:
    for when in ("validation", "step"):
        [told] = fork_ranks(_stopped, 1, str(tmp_path / when), when)
        assert told["codes"] == [75, 0]
        [(step, hard)] = told["validated"]
        assert step == STEPS
        assert all(torch.equal(hard, structure) for structure in told["structures"])
        record = told["record"]
        assert record["validation"]["removed"] == record["sparsity"]["actual"]


def _longer(folder: str) -> list[dict[str, Any]]:
    """A run that ended at 6 steps and is given 9, and one of 9 steps."""
    states = []
    for name, lengths in (("longer", (6, 9)), ("straight", (9,))):
        for steps in lengths:
            run = _run(Path(folder) / name, steps)
            assert loop.train(run) == 0
        states.append(run.gates.state_dict())
    return states


def test_more_steps_open_the_structure_again(tmp_path: Path) -> None:
    [(longer, straight)] = fork_ranks(_longer, 1, str(tmp_path))
    for key in ("bank", "gate_optimizer", "multiplier_optimizer"):
        for name, value in straight[key].items():
            same = torch.equal if isinstance(value, torch.Tensor) else lambda a, b: a == b
            assert same(value, longer[key][name]), (key, name)
    assert torch.equal(longer["frozen"], straight["frozen"])
