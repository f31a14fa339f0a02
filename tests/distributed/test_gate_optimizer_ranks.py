"""Two ranks train one set of gates: same noise, averaged task gradient, one constraint, one skip
decision."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from models.gate_slot import GateSlot
from models.gates import GateBank
from tests.distributed.spawn import run_ranks
from train.config import PruneConfig
from train.runtime.gate_optimizer import GateOptimizer

STEPS = 12


def _weights(step: int, rank: int) -> Tensor:
    """(50,) what one rank's half of the batch asks of the gates."""
    return torch.randn(50, generator=torch.Generator().manual_seed(100 * step + rank))


def _train(rank: int, world_size: int, constraint: Any, scope: Any) -> dict:
    """One rank of two with its own half of the data, or one rank (world_size 1) with all of it."""
    slots = {"vision.0.heads": GateSlot(10), "text.0.ffn": GateSlot(40)}
    bank = GateBank(slots, {"vision.0.heads": 60, "text.0.ffn": 7}, head_init=1.0)
    prune = PruneConfig(sparsity=0.4, ramp_steps=5, lr=0.05, constraint=constraint, scope=scope)
    gates = GateOptimizer(bank, prune, "cpu", world_size)
    for step in range(STEPS):
        gates.begin_step(step, torch.Generator().manual_seed(step))
        z = bank.join({name: z for name, z in bank.values().items() if z is not None})
        parts = [_weights(step, r) for r in ((0, 1) if world_size == 1 else (rank,))]
        loss = torch.stack([(z * part).mean() for part in parts]).mean()
        # One rank overflows at step 4: all must skip the gates, or they would part for good.
        (loss * (torch.inf if step == 4 and rank == 0 else 1.0)).backward()
        gates.finish_step(step, applied=step != 7)
    return gates.state_dict()


def rank_of_two(constraint: str, scope: str) -> dict:
    return _train(torch.distributed.get_rank(), 2, constraint, scope)


@pytest.mark.parametrize(
    ("constraint", "scope"),
    [("lagrangian", "modal-adaptive"), ("projection", "modal-adaptive"), ("projection", "uniform")],
)
def test_two_ranks_agree_with_each_other_and_with_one(constraint: str, scope: str) -> None:
    first, second = run_ranks(rank_of_two, 2, constraint, scope)
    alone = _train(0, 1, constraint, scope)
    assert first["skipped"] == second["skipped"] == alone["skipped"] == 2
    for key in ("log_alpha", "multipliers"):
        assert torch.equal(
            first["bank"][key], second["bank"][key]
        )  # bitwise: they never drift apart
        torch.testing.assert_close(first["bank"][key], alone["bank"][key], rtol=1e-5, atol=1e-6)
    for name, moment in first["gate_optimizer"].items():
        assert torch.equal(moment, second["gate_optimizer"][name])
