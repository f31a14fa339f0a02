"""From a run file to the budget that its gates are held to."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch.distributed

from models.config import ModelConfig
from models.gates import GateBank
from models.pruning.budget import Constraint, WidthCosts
from models.pruning.latency import LatencyTable
from train.config import BudgetConfig, RunConfig
from train.evaluation.workload import Workload
from train.pruning.budgets import Measured, PruneBudget, SpeedupBudget
from train.pruning.latency import Stopwatch, cached_table, measure_speedup
from train.pruning.macs import macs_per_unit

__all__ = ["make_budget", "workload_of"]


def workload_of(config: RunConfig, budget: BudgetConfig) -> Workload:
    """What one row of the timed task is: the run's own lengths unless the budget says otherwise."""
    top_k = budget.top_k or config.eval.top_k
    return Workload(
        text_tokens=budget.text_tokens or config.data.max_tokens,
        answers=top_k,
        top_k=top_k,
        beams=config.eval.beams,
        caption_tokens=config.eval.max_length,
    )


def make_budget(
    config: RunConfig,
    bank: GateBank,
    student: ModelConfig,
    teacher: ModelConfig | None,
    dist: Any,
) -> PruneBudget:
    """The budget of a pruning run. Collective: rank 0 measures (or reads its cache), all get the table.

    Args:
        dist: has .rank, .world_size, .device.

    Raises:
        ValueError: a speed-up that is met already, out of reach, or could not be measured.
    """
    prune = config.prune
    assert prune is not None
    budget = prune.budget
    if budget is None:
        return PruneBudget.parameters(bank, prune)
    work = workload_of(config, budget)
    if budget.macs is not None:
        costs = WidthCosts.linear("MACs", bank, macs_per_unit(student, work))
        return PruneBudget(Constraint(bank, costs, budget.macs, prune.scope), prune.round_to)
    assert budget.speedup is not None
    reference = student if budget.against == "student" else teacher
    if reference is None:
        raise ValueError("prune.budget.speedup: there is no teacher; set prune.budget.against")
    watch = Stopwatch(dist.device, budget.dtype, budget.threads, budget.repeats)
    folder = Path(budget.cache).expanduser()
    found = _from_rank_0(
        dist,
        lambda: cached_table(folder, student, reference, work, budget.batch, watch).to_json(),
    )
    table = LatencyTable.of_json(found | {"about": found["about"] | {"against": budget.against}})

    def measure(slim: ModelConfig) -> Measured:
        return Measured(
            **_from_rank_0(
                dist,
                lambda: vars(measure_speedup(reference, slim, work, budget.batch, watch)),
            )
        )

    return SpeedupBudget.of_table(
        bank, prune, table, budget.speedup, student, measure, budget.tolerance
    )


def _from_rank_0(dist: Any, make: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """What rank 0 makes, on all ranks; an error there is raised everywhere."""
    if dist.world_size == 1:
        return make()
    box: list[Any] = [None]
    if dist.rank == 0:
        try:
            box[0] = (make(), "")
        except ValueError as error:
            box[0] = ({}, str(error))
    torch.distributed.broadcast_object_list(box, src=0, device=dist.device)
    made, failed = box[0]
    if failed:
        raise ValueError(failed)
    return made
