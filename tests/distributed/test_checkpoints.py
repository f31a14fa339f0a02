"""Checkpoints with two ranks: exact resume at every stage, damage, and refusals."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.distributed.spawn import run_ranks
from tests.distributed.stand_in import tiny_config, tiny_run
from train.config import UserError
from train.runtime import loop
from train.runtime.distributed import start
from train.runtime.engine import gathered

pytestmark = [pytest.mark.slow, pytest.mark.world_size(2)]


def _weights(run: Any) -> dict[str, torch.Tensor]:
    with gathered(run.student):
        return {n: p.detach().clone() for n, p in run.student.named_parameters()}


def _run(folder: Path, stage: int, lr: float = 1e-3, steps: int = 20) -> Any:
    return tiny_run(
        tiny_config(
            folder,
            engine={"config": f"zero{stage}"},
            optim={"lr": lr, "steps": steps, "schedule": "constant"},
        ),
        start(),
    )


def stop_and_resume(folder: str, stage: int) -> list[Any]:
    """Weights of an uninterrupted run, and of one that rank 1 was told to stop after 13 batches."""
    whole = _run(Path(folder) / "whole", stage)
    assert loop.train(whole) == 0

    def tell(position: int) -> None:
        if position == 13:
            os.kill(os.getpid(), signal.SIGTERM)

    first = _run(Path(folder) / "parts", stage)
    if first.dist.rank == 1:
        first.loader.after = tell
    stopped = loop.train(first)
    second = _run(Path(folder) / "parts", stage)
    torch.manual_seed(99)  # must not matter: the checkpoint brings the random state
    finished = loop.train(second)
    return [stopped, finished, second.loader.position, _weights(whole), _weights(second)]


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_a_stopped_run_goes_on_exactly(tmp_path: Path, stage: int) -> None:
    for stopped, finished, position, whole, resumed in run_ranks(
        stop_and_resume, 2, str(tmp_path), stage
    ):
        assert (stopped, finished, position) == (75, 0, 20)
        for name, expected in whole.items():
            torch.testing.assert_close(resumed[name], expected, rtol=0, atol=0, msg=name)
    manifest = json.loads((tmp_path / "parts/checkpoints/step_00000013/MANIFEST.json").read_text())
    assert manifest["world_size"] == 2 and manifest["zero_stage"] == stage
    assert (tmp_path / "parts/checkpoints/latest").read_text().strip() == "step_00000020"


def walk_back_and_refuse(folder: str) -> dict[str, str]:
    """What resuming says to a truncated shard, another configuration, another stage, another run."""
    path = Path(folder) / "run"
    run = _run(path, 1)
    assert loop.train(run) == 0
    if run.dist.rank == 0:
        shard = next((path / "checkpoints/step_00000020").glob("*zero_pp_rank_1*"))
        shard.write_bytes(shard.read_bytes()[:100])
    torch.distributed.barrier()
    said = {}
    again = _run(path, 1, steps=25)
    said["walked back to"] = str(loop.restore(again, "auto").step)
    attempts = {
        "configuration": (_run(path, 1, lr=0.5), "auto"),
        "stage": (_run(path, 2), "auto"),
        "damaged": (again, str(path / "checkpoints/step_00000020")),
        "nothing there": (again, str(path / "elsewhere")),
        "another run": (_run(Path(folder) / "other", 1), str(path)),
    }
    for name, (attempt, which) in attempts.items():
        with pytest.raises(UserError) as error:
            loop.restore(attempt, which)
        said[name] = str(error.value)
    assert loop.restore(_run(path, 1), "none").step == 0
    said["set aside"] = str((path / "checkpoints-before-1/step_00000010/MANIFEST.json").exists())
    return said


def test_damage_is_passed_over_and_strangers_are_refused(tmp_path: Path) -> None:
    for said in run_ranks(walk_back_and_refuse, 2, str(tmp_path)):
        assert said["walked back to"] == "10"
        assert "optim.lr: 0.001 -> 0.5" in said["configuration"]
        assert "ZeRO stage 1" in said["stage"]
        assert "100 bytes" in said["damaged"]
        assert "no checkpoint there" in said["nothing there"]
        assert "another run" in said["another run"]
        assert said["set aside"] == "True"


def save_and_die(folder: str) -> None:
    """Rank 1 dies in the middle of its second save."""
    run = _run(Path(folder), 1)
    if run.dist.rank == 1:
        save = run.checkpoints.save

        def dying(engine: Any, step: int, state: Any, wait: bool = True) -> Any:
            if step == 20:
                os.kill(os.getpid(), signal.SIGKILL)
            return save(engine, step, state, wait)

        run.checkpoints.save = dying
    loop.train(run)


def resumed_step(folder: str) -> int:
    return loop.restore(_run(Path(folder), 1), "auto").step


def test_a_rank_that_dies_while_saving_leaves_the_last_checkpoint(tmp_path: Path) -> None:
    with pytest.raises(AssertionError):
        run_ranks(save_and_die, 2, str(tmp_path))
    assert not (tmp_path / "checkpoints/step_00000020/MANIFEST.json").exists()
    assert (tmp_path / "checkpoints/latest").read_text().strip() == "step_00000010"
    assert run_ranks(resumed_step, 2, str(tmp_path)) == [10, 10]
