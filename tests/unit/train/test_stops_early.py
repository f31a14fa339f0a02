"""Signals outside training steps: before the first one, and in the middle of a validation. What
counts is how much is still done after a signal, in steps and batches.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from tests.distributed.forked import fork_ranks
from tests.distributed.stand_in import TinyLoader, TinyTask, tiny_config, tiny_run
from train.evaluation.runner import evaluate
from train.runtime import loop
from train.runtime.distributed import start
from train.runtime.signals import Stopped, stop_on_signals

BATCHES = 1000


class Scored(TinyTask):
    """Counts the batches that it scores, and gets the signal in the third."""

    def __init__(self) -> None:
        self.scored = 0

    def evaluate(self, model: Any, batch: Any) -> dict[str, Any]:
        self.scored += 1
        if self.scored == 3:
            os.kill(os.getpid(), signal.SIGTERM)
        return {"loss": (1.0, 1.0)}


def _held_out(rank: int = 0) -> Iterator[Any]:
    return (batch for batch, _ in zip(TinyLoader(rank), range(BATCHES), strict=False))


def test_a_validation_is_left_within_a_batch() -> None:
    place = SimpleNamespace(rank=0, world_size=1, device=torch.device("cpu"))
    task = Scored()
    with stop_on_signals(), pytest.raises(Stopped):
        evaluate(torch.nn.Linear(1, 1), task, _held_out(), place)  # type: ignore[arg-type]
    assert task.scored <= 4


def _stop_in_validation(folder: str) -> dict[str, Any]:
    keep = {"best": "loss", "keep": 1}
    config = tiny_config(
        Path(folder), eval={"every": 4}, engine={"config": "zero1"}, checkpoint=keep
    )
    run = tiny_run(config, start())
    task = Scored()
    if run.dist.rank == 1:
        task.scored = -BATCHES  # only rank 0 gets the signal
    run.validate = lambda step: evaluate(run.student, task, _held_out(run.dist.rank), run.dist)
    code = loop.train(run)
    again = tiny_run(config, start())
    calls: list[int] = []
    again.validate = lambda step: calls.append(step) or {"loss": float(step)}
    stood = loop.restore(again, "auto")
    return {
        "code": code,
        "scored": task.scored % BATCHES,
        "position": run.loader.position,
        "stands": (stood.step, stood.unvalidated),
        "next": (loop.train(again), calls),
        "kept": sorted(int(path.name[5:]) for path in Path(folder).glob("checkpoints/step_*")),
    }


def test_a_stop_in_validation_saves_the_step_it_belongs_to(tmp_path: Path) -> None:
    for said in fork_ranks(_stop_in_validation, 2, str(tmp_path)):
        assert said["code"] == 75
        assert said["scored"] <= 4, "the validation went on"
        assert said["position"] == 4, "training went on"
        assert said["stands"] == (4, True)
        assert said["next"] == (0, [4, 8, 12, 16, 20])  # what was left out is made up for
        assert said["kept"] == [4, 20], "the best one, validated late, is gone"


def _stop_before_the_first_step(folder: str) -> dict[str, Any]:
    run = tiny_run(tiny_config(Path(folder), engine={"config": "zero1"}), start())
    load = run.checkpoints.load

    def told(*args: Any, **options: Any) -> Any:
        if run.dist.rank == 1:
            os.kill(os.getpid(), signal.SIGUSR1)
        return load(*args, **options)

    run.checkpoints.load = told
    codes = [loop.train(run)]
    saved = (Path(folder) / "checkpoints").exists()
    run.checkpoints.load = load
    with stop_on_signals():  # as a stage has it, from its first line on
        if run.dist.rank == 0:
            os.kill(os.getpid(), signal.SIGTERM)
        codes.append(loop.train(run))
    return {"codes": codes, "read": run.loader.position, "saved": saved}


def test_a_stop_before_the_first_step_needs_no_checkpoint(tmp_path: Path) -> None:
    for said in fork_ranks(_stop_before_the_first_step, 2, str(tmp_path)):
        assert said == {"codes": [75, 75], "read": 0, "saved": False}
    log = (tmp_path / "events.log").read_text()
    assert "told to stop (signal on another rank) before step 0 began: nothing to save" in log


class SkippedOnce(TinyTask):
    """The general batch that loader position `bad` stands behind makes no finite loss."""

    bad, loader = 0, TinyLoader(0)

    def losses(self, student: Any, teacher: Any, batch: Any, context: Any) -> Any:
        losses = super().losses(student, teacher, batch, context)
        if batch.keys[0] == "general" and self.loader.position == self.bad:
            losses.terms["head"] = losses.terms["head"] * torch.nan
        return losses


def _stop_in_a_skipped_step(folder: str) -> dict[str, Any]:
    place = start()

    def run_in(name: str, signalled: bool = False) -> Any:
        task = SkippedOnce()
        run = tiny_run(tiny_config(Path(folder) / name), place, task)
        regions = (step for step in range(1, 20) if loop._is_region_step(run.config, step))
        step = next(step for step in regions if step % 10)  # where no checkpoint is due
        task.loader, task.bad = run.loader, step + 1
        if signalled:
            run.loader.after = lambda position: (
                os.kill(os.getpid(), signal.SIGTERM) if position == task.bad else None
            )
        return run, loop.train(run)

    runs = [run_in("whole"), run_in("parts", signalled=True), run_in("parts")]
    whole, _, parts = (run for run, _ in runs)
    return {
        "codes": [code for _, code in runs],
        "positions": [(run.loader.position, run.region_loader.position) for run in (whole, parts)],
        "weights": [run.student.state_dict() for run in (whole, parts)],
    }


def test_a_stop_in_a_skipped_step_repeats_no_region_step(tmp_path: Path) -> None:
    (said,) = fork_ranks(_stop_in_a_skipped_step, 1, str(tmp_path))
    assert said["codes"] == [0, 75, 0]
    assert said["positions"][0] == said["positions"][1] and said["positions"][0][0] == 21
    whole, parts = said["weights"]
    assert all(torch.equal(whole[name], parts[name]) for name in whole)
