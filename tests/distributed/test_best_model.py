"""With `checkpoint.best` a run ends with the weights of its best validated step."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from models.gate_slot import GateSlot
from models.gates import GateBank
from tests.distributed.forked import fork_ranks
from tests.distributed.stand_in import tiny_config, tiny_run
from train.checkpoint.selection import SELECTED
from train.runtime import loop
from train.runtime.distributed import start
from train.runtime.engine import gathered
from train.runtime.gate_optimizer import GateOptimizer

STEPS = 6
LOSSES = {2: 0.5, 4: 0.25, 6: 0.75}  # worse in the end


def _weights(run: Any) -> dict[str, torch.Tensor]:
    with gathered(run.student):
        return {name: value.clone() for name, value in run.student.state_dict().items()}


def _run(folder: Path, engine: str, **sections: Any) -> Any:
    """Its `seen`: the weights at each validation."""
    kept = {"best": "loss", "keep": 1, "every": 0} | sections.pop("checkpoint", {})
    config = tiny_config(
        folder, optim={"steps": STEPS, "lr": 0.01}, eval={"every": 2}, checkpoint=kept,
        engine={"config": engine}, data={"region": {"probability": 0.0}}, **sections,
    )  # fmt: skip
    run = tiny_run(config, start())
    run.seen = {}

    def validate(step: int) -> dict[str, float]:
        run.seen[step] = _weights(run)
        return {"loss": LOSSES[step]}

    run.validate = validate
    return run


def _written(run: Any) -> dict[str, torch.Tensor]:
    torch.distributed.barrier()
    return torch.load(run.directory / "model/weights.pt")


def _steps_of(weights: dict[str, torch.Tensor], seen: dict[int, Any]) -> list[int]:
    return [
        step
        for step, values in seen.items()
        if all(torch.equal(value, values[name]) for name, value in weights.items())
    ]


def _end_and_end_again(folder: str, engine: str, again: str) -> dict[str, Any]:
    run = _run(Path(folder), engine)
    codes = [loop.train(run)]
    told = {"first": _steps_of(_written(run), run.seen)}
    selected = json.loads((run.directory / SELECTED).read_text())
    torch.distributed.barrier()
    if run.dist.rank == 0:
        shutil.rmtree(run.directory / "model")
        (run.directory / SELECTED).unlink()
    second = _run(Path(folder), again)
    codes.append(loop.train(second))
    told["again"] = _steps_of(_written(second), run.seen)
    same = json.loads((run.directory / SELECTED).read_text()) == selected
    return told | {"codes": codes, "selected": selected, "same": same, "validated": second.seen}


@pytest.mark.parametrize(
    ("engine", "again"),
    [("zero0", "zero2"), ("zero1", "zero3"), ("zero2", "zero1"), ("zero3", "zero0")],
)
def test_the_model_is_of_the_best_step_also_when_ended_twice(
    tmp_path: Path, engine: str, again: str
) -> None:
    for told in fork_ranks(_end_and_end_again, 2, str(tmp_path), engine, again):
        assert told["codes"] == [0, 0] and not told["validated"], "the second run trained"
        assert told["first"] == told["again"] == [4]
        assert told["same"] and told["selected"] == {
            "metric": "loss", "step": 4, "value": 0.25, "last_step": 6, "last_value": 0.75,
        }  # fmt: skip
    log = (tmp_path / "events.log").read_text()
    assert "model/ is of step 4 (loss 0.25), the best; the last step, 6, has 0.75" in log


def _one_rank(folder: str) -> dict[str, Any]:
    root, found = Path(folder), {}
    run = _run(root / "plain", "zero1", checkpoint={"best": None})
    loop.train(run)
    found["plain"] = _steps_of(_written(run), run.seen), (run.directory / SELECTED).exists()

    run = _run(root / "damaged", "zero1", checkpoint={"keep": 3, "every": 2})
    loop.train(run)
    states = next((run.directory / "checkpoints/step_00000004").glob("mp_rank_*"))
    states.write_bytes(states.read_bytes()[:-1])
    loop.train(_run(root / "damaged", "zero1", checkpoint={"keep": 3, "every": 2}))
    found["damaged"] = _steps_of(_written(run), run.seen)

    run = _run(root / "unvalidated", "zero1")
    run.validate = None
    loop.train(run)
    found["unvalidated"] = json.loads((run.directory / SELECTED).read_text())
    return found


def test_without_a_best_checkpoint_the_model_is_of_the_last_step(tmp_path: Path) -> None:
    [found] = fork_ranks(_one_rank, 1, str(tmp_path))
    assert found["plain"] == ([6], False)
    assert found["damaged"] == [2], "the next best"
    assert "passed over" in (tmp_path / "damaged/events.log").read_text()
    assert found["unvalidated"] == {
        "metric": "loss", "step": 6, "value": None, "last_step": 6, "last_value": None,
    }  # fmt: skip
    log = (tmp_path / "unvalidated/events.log").read_text()
    assert "WARNING" in log and "no checkpoint has a loss that counts" in log


def _pruning(folder: str, freeze_step: int | None) -> dict[str, Any]:
    """The best value is of a step whose gates are open."""
    prune = {"sparsity": 0.25, "ramp_steps": 1, "lr": 0.01, "freeze_step": freeze_step}
    run = _run(Path(folder), "zero1", stage="prune", task="vqa", prune=prune)
    bank = GateBank({"text.0.ffn": GateSlot(30)}, {"text.0.ffn": 3})
    run.gates = GateOptimizer(bank, run.config.prune, "cpu", 1)
    losses = {2: 0.1, 4: 0.5, 6: 0.75}
    gates = {}

    def validate(step: int) -> dict[str, float]:
        run.seen[step], gates[step] = _weights(run), run.gates.hard_gates().clone()
        return {"loss": losses[step]}

    run.validate = validate
    loop.train(run)
    [step] = _steps_of(_weights(run), run.seen)
    structure = bank.join(run.gates.structure())
    return {
        "step": step,
        "same": torch.equal(structure, gates[step]),
        "kept": sorted(path.name for path in run.directory.glob("checkpoints/step_*")),
    }


@pytest.mark.parametrize(("freeze_step", "step"), [(2, 4), (None, 6)])
def test_only_steps_with_the_final_structure_count(
    tmp_path: Path, freeze_step: int | None, step: int
) -> None:
    [told] = fork_ranks(_pruning, 1, str(tmp_path), freeze_step)
    assert told["step"] == step and told["same"]
    assert told["kept"] == [f"step_{kept:08d}" for kept in sorted({step, 6})]
