"""The loop on one process: what it counts, records, skips and refuses."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from data_pipeline.batches import Batch
from data_pipeline.faults import FAULT_KINDS
from tests.distributed.spawn import run_ranks
from tests.distributed.stand_in import TinyLoader, TinyTask, tiny_config, tiny_run
from train.config import OptimConfig
from train.runtime import loop
from train.runtime.distributed import start
from train.runtime.guard import NonFiniteError, StepGuard
from train.runtime.schedules import lr_at
from train.runtime.step import keyed_generator
from train.tasks.base import Losses, StepContext


class BadTask(TinyTask):
    """Makes the loss NaN on chosen batches, counted from 0; on rank `rank` only."""

    def __init__(self, bad: set[int], rank: int = 0) -> None:
        self.bad, self.rank, self.seen = bad, rank, 0

    def losses(self, student: Any, teacher: Any, batch: Batch, context: StepContext) -> Losses:
        losses = super().losses(student, teacher, batch, context)
        if self.seen in self.bad and context.rank == self.rank:
            losses.terms["head"] = losses.terms["head"] * torch.nan
        self.seen += 1
        return losses


class FakeGates:
    """Remembers what the loop tells the gates."""

    def __init__(self) -> None:
        self.begun: list[tuple[int, int]] = []
        self.prepared: list[tuple[int, int]] = []
        self.finished: list[tuple[int, bool, float]] = []

    def begin_step(self, step: int, generator: torch.Generator) -> None:
        self.begun.append((step, generator.initial_seed()))

    def finish_step(self, step: int, applied: bool, grad_scale: float) -> None:
        self.finished.append((step, applied, grad_scale))

    def prepare(self, step: int, generator: torch.Generator) -> None:
        self.prepared.append((step, generator.initial_seed()))

    def freeze(self) -> None: ...

    def metrics(self) -> dict[str, float]:
        return {"target": 0.25}

    def state_dict(self) -> dict[str, Any]:
        return {}


def _plain(folder: Path) -> dict[str, Any]:
    run = tiny_run(tiny_config(folder, data={"region": {"probability": 0.0}}), start())
    calls = []
    run.validate = lambda step: calls.append(step) or {"accuracy": 0.5}
    run.config = run.config.__class__(**{**vars(run.config), "eval": {"every": 8}})
    code = loop.train(run)
    return {
        "code": code,
        "records": run.monitor.records,
        "validated": calls,
        "lrs": [group["lr"] for group in run.engine.optimizer.param_groups],
        "model": sorted(path.name for path in (folder / "model").iterdir()),
        "logs": sorted(path.name for path in folder.glob("*.log")),
        "training": run.student.training,
    }


def _with_nan(folder: Path, stage: int) -> dict[str, Any]:
    config = tiny_config(
        folder,
        data={"region": {"probability": 0.0}},
        engine={"config": f"zero{stage}"},
        optim={"steps": 6},
    )
    run = tiny_run(config, start(), BadTask({2, 3}))
    run.gates = FakeGates()
    loop.train(run)
    return {
        "position": run.loader.position,
        "records": run.monitor.records,
        "finished": run.gates.finished,
        "begun": run.gates.begun,
        "prepared": run.gates.prepared,
        "finite": all(bool(p.isfinite().all()) for p in run.student.parameters()),
        "model": (folder / "model").exists(),
    }


def _diverging(folder: Path) -> str:
    run = tiny_run(tiny_config(folder), start(), BadTask(set(range(99))))
    with pytest.raises(NonFiniteError) as error:
        loop.train(run)
    return f"{error.value}\n{(folder / 'events.log').read_text()}"


def everything(folder: str) -> dict[str, Any]:
    root = Path(folder)
    return {
        "plain": _plain(root / "plain"),
        "nan": [_with_nan(root / f"nan{stage}", stage) for stage in (0, 1)],
        "diverging": _diverging(root / "diverging"),
    }


@pytest.fixture(scope="module")
def ran(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return run_ranks(everything, 1, str(tmp_path_factory.mktemp("loop")))[0]


def test_records_have_the_layout_of_the_run_directory(ran: dict[str, Any]) -> None:
    plain = ran["plain"]
    assert plain["code"] == 0
    logged = [record for record in plain["records"] if "loss" in record]
    assert [record["step"] for record in logged] == [5, 10, 15, 20]
    last = json.loads(json.dumps(logged[-1]))
    assert last["samples"] == 80
    assert last["loss"].keys() == {"head", "tied", "rare", "total"}
    assert last["metrics"] == {"rows": 4.0}
    assert last["lr"] == lr_at(OptimConfig(lr=1e-3, steps=20), 19)
    assert last["samples_per_s"] > 0 and 0 <= last["data_wait"] <= 1 and last["grad_norm"] > 0
    assert set(last["lr_groups"]) == {"decay", "no_decay", "decay_new", "no_decay_new"}
    assert last["lr_groups"]["decay_new"] == pytest.approx(2 * last["lr"])
    assert "tflops" not in last and "loss_scale" not in last, "nothing is known of them here"
    assert set(last["faults"]) == {"nonfinite", "spikes", *FAULT_KINDS} and not any(
        last["faults"].values()
    )


def test_validation_runs_when_due_and_at_the_end(ran: dict[str, Any]) -> None:
    assert ran["plain"]["validated"] == [8, 16, 20]
    assert ran["plain"]["training"]
    with_values = [r["step"] for r in ran["plain"]["records"] if "validation" in r]
    assert with_values == [8, 16, 20]


def test_groups_keep_their_multiplier_to_the_end(ran: dict[str, Any]) -> None:
    last = lr_at(OptimConfig(lr=1e-3, steps=20), 19)
    assert sorted(set(ran["plain"]["lrs"])) == pytest.approx([last, 2 * last])


def test_the_run_directory_is_complete(ran: dict[str, Any]) -> None:
    assert ran["plain"]["model"] == ["weights.pt"]
    assert ran["plain"]["logs"] == ["events.log", "rank_0000.log"]


@pytest.mark.parametrize("index", [0, 1])
def test_a_non_finite_step_is_skipped_counted_and_tried_again(
    ran: dict[str, Any], index: int
) -> None:
    result = ran["nan"][index]
    assert result["position"] == 8, "two batches were lost, six steps applied"
    assert result["finite"]
    assert [(s, a) for s, a, _ in result["finished"]] == [
        (0, True), (1, True), (2, False), (2, False), (2, True), (3, True), (4, True), (5, True),
    ]  # fmt: skip
    assert {scale for _, _, scale in result["finished"]} == {1.0}
    # Gates are sampled one step ahead, as the step itself would: after a skipped one, too.
    assert result["prepared"][:-1] == result["begun"][1:]
    assert [step for step, _ in result["prepared"]] == [1, 2, 2, 2, 3, 4, 5, 6]
    assert result["records"][-1]["faults"]["nonfinite"] == 2
    assert result["records"][-1]["sparsity"] == {"target": 0.25}
    assert all(r["loss"]["total"] == r["loss"]["total"] for r in result["records"])
    assert not result["model"], "a pruned model is cut and saved by its stage"


def test_divergence_is_fatal_after_twenty_in_a_row(ran: dict[str, Any]) -> None:
    assert "20 steps in a row" in ran["diverging"] and "optim.lr" in ran["diverging"]
    assert "the run failed" in ran["diverging"]


def test_a_good_step_starts_the_count_again() -> None:
    guard = StepGuard(limit=3)
    for finite in (False, False, True, False, False):
        guard.see(finite, 0)
    assert (guard.total, guard.in_a_row) == (4, 2)
    with pytest.raises(NonFiniteError):
        guard.see(False, 5)


def test_keyed_generators_depend_on_seed_and_key_only() -> None:
    def draw(*key: Any) -> float:
        return torch.rand((), generator=keyed_generator(*key)).item()

    torch.manual_seed(1)
    first = draw(0, 5, "general", 1)
    torch.manual_seed(2)
    assert draw(0, 5, "general", 1) == first
    others = {draw(1, 5, "general", 1), draw(0, 6, "general", 1), draw(0, 5, "region", 1)}
    assert first not in others and len(others) == 3


def test_records_are_on_disk_before_a_checkpoint_says_they_are_past(tmp_path: Path) -> None:
    done: list[str] = []
    run = SimpleNamespace(
        config=tiny_config(tmp_path),
        loader=TinyLoader(0),
        region_loader=None,
        gates=None,
        engine=None,
        monitor=SimpleNamespace(flush=lambda: done.append("records")),
        checkpoints=SimpleNamespace(best=None, save=lambda *_, **__: done.append("checkpoint")),
    )
    loop.save(run, loop.Progress(step=7))  # type: ignore[arg-type]
    assert done == ["records", "checkpoint"]
