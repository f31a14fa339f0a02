"""Checkpoints with two ranks: exact resume at every stage, damage, and refusals."""

from __future__ import annotations

import json
import os
import random
import resource
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.distributed.spawn import run_ranks
from tests.distributed.stand_in import tiny_config, tiny_run
from tests.unit.train.test_checkpoint_files import mutate
from train.checkpoint import staging
from train.checkpoint.manager import SaveError
from train.checkpoint.scan import allowed_classes
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
    # Nothing but the allowed classes is in DeepSpeed's files, and what need not be allowed is not.
    # (The scalers with a memory stand in files of fp16 runs, which a CPU cannot make.)
    last = tmp_path / "parts/checkpoints/step_00000020"
    found = {
        g
        for f in last.glob("*.pt")
        for g in torch.serialization.get_unsafe_globals_in_checkpoint(f)
    }
    allowed = {f"{c.__module__}.{c.__qualname__}" for c in allowed_classes()}
    fp16 = {name for name in allowed if name.endswith(("DynamicLossScaler", "CappedLossScaler"))}
    slices = (
        {name for name in allowed if name.endswith("fragment_address")} if stage == 3 else set()
    )
    assert found == (allowed - fp16 - slices if stage else set())
    manifest = json.loads((tmp_path / "parts/checkpoints/step_00000013/MANIFEST.json").read_text())
    assert manifest["world_size"] == 2 and manifest["zero_stage"] == stage
    assert (tmp_path / "parts/checkpoints/latest").read_text().strip() == "step_00000020"


def walk_back_and_refuse(folder: str) -> dict[str, str]:
    """What resuming says to a truncated shard, another configuration, another run."""
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
        assert "100 bytes" in said["damaged"]
        assert "no checkpoint there" in said["nothing there"]
        assert "another run" in said["another run"]
        assert said["set aside"] == "True"


def save_and_die(folder: str) -> None:
    """Rank 1 dies in the middle of its second save, when one of its two files is written."""
    run = _run(Path(folder), 1)
    write = staging.write_files

    def dying(files: dict[Path, Any], target: Path) -> Any:
        if target.name == "step_00000020":
            write(dict(list(files.items())[:1]), target)
            os.kill(os.getpid(), signal.SIGKILL)
        return write(files, target)

    if run.dist.rank == 1:
        staging.write_files = dying
    loop.train(run)


def resumed_step(folder: str) -> int:
    return loop.restore(_run(Path(folder), 1), "auto").step


def test_a_rank_that_dies_while_saving_leaves_the_last_checkpoint(tmp_path: Path) -> None:
    with pytest.raises(AssertionError):
        run_ranks(save_and_die, 2, str(tmp_path))
    assert list((tmp_path / "checkpoints/step_00000020").glob("*.pt"))
    assert not (tmp_path / "checkpoints/step_00000020/MANIFEST.json").exists()
    assert (tmp_path / "checkpoints/latest").read_text().strip() == "step_00000010"
    assert run_ranks(resumed_step, 2, str(tmp_path)) == [10, 10]


MUTATIONS = 20


def mutate_and_load(folder: str) -> list[tuple[str, int, bool]]:
    """(kind, step that was resumed, weights and moments are those of that step) per mutation."""
    run = _run(Path(folder) / "run", 1)
    assert loop.train(run) == 0
    checkpoints = Path(folder) / "run/checkpoints"
    victim, good = checkpoints / "step_00000020", Path(folder) / "good"
    if run.dist.rank == 0:
        shutil.copytree(checkpoints, good)
    torch.distributed.barrier()

    def state() -> dict[str, Any]:
        moments = run.engine.optimizer.optimizer.state
        flat = {f"{i} {n}": v for i, s in enumerate(moments.values()) for n, v in s.items()}
        return {n: torch.as_tensor(v).clone() for n, v in (_weights(run) | flat).items()}

    loop.restore(run, str(good / "step_00000010"))
    expected = state()
    seen = []
    for number in range(MUTATIONS):
        kind = ("truncate", "flip", "delete", "swap")[number % 4]
        if run.dist.rank == 0:
            shutil.rmtree(victim)
            shutil.copytree(good / victim.name, victim)
            mutate(kind, victim, [good / "step_00000010"], random.Random(number))
        for value in run.student.parameters():
            value.data.fill_(7.0)
        torch.distributed.barrier()
        step = loop.restore(run, "auto").step
        found = state()
        seen.append((kind, step, all(torch.equal(found[n], v) for n, v in expected.items())))
        torch.distributed.barrier()
    return seen


def test_twenty_mutations_through_two_ranks(tmp_path: Path) -> None:
    for seen in run_ranks(mutate_and_load, 2, str(tmp_path)):
        assert len(seen) == MUTATIONS
        assert [entry for entry in seen if entry[1:] != (10, True)] == []


def save_on_a_full_disk(folder: str) -> tuple[str, int]:
    """Files of rank 1 cannot grow beyond 4 kB when step 20 is saved."""
    run = _run(Path(folder), 1)
    save = run.checkpoints.save

    def full(engine: Any, step: int, state: Any, wait: bool = True) -> Any:
        if step == 20 and run.dist.rank == 1:
            limit = resource.getrlimit(resource.RLIMIT_FSIZE)[1]
            resource.setrlimit(resource.RLIMIT_FSIZE, (4096, limit))
        return save(engine, step, state, wait)

    run.checkpoints.save = full
    with pytest.raises(SaveError) as error:
        loop.train(run)
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)[1]
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
    return str(error.value), loop.restore(_run(Path(folder), 1), "auto").step


def test_a_disk_that_is_full_on_one_rank_is_told_by_all(tmp_path: Path) -> None:
    for said, step in run_ranks(save_on_a_full_disk, 2, str(tmp_path)):
        assert "step_00000020 was not saved: rank 1: [Errno 27]" in said and ".pt" in said
        assert step == 10
    assert not (tmp_path / "checkpoints/step_00000020").exists()
