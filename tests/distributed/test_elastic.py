"""A checkpoint goes on with any number of ranks at any ZeRO stage.

The state is compared bit for bit with what DeepSpeed itself says it holds (`full_state`), so the
reader and the writer of layouts are not judged by one another.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

from tests.distributed import stand_in
from tests.distributed.forked import fork_ranks
from tests.distributed.stand_in import TinyModel, tiny_config, tiny_run
from train.checkpoint.shards import MOMENTS
from train.config import UserError
from train.runtime import loop
from train.runtime.distributed import start
from train.runtime.engine import gathered

pytestmark = [pytest.mark.slow, pytest.mark.world_size(3)]
STEPS = 3


class OddModel(TinyModel):
    """Sizes that no number of ranks divides, a buffer, and a frozen parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.odd = torch.nn.Parameter(torch.linspace(-1.0, 1.0, 7))
        self.frozen = torch.nn.Parameter(torch.randn(5, 3), requires_grad=False)
        self.register_buffer("seen", torch.zeros(3))

    def states(self, images: torch.Tensor, words: torch.Tensor) -> torch.Tensor:
        if self.training:
            self.seen += 1.0
        return super().states(images, words) * self.odd.square().sum() + self.frozen.mean()


def _run(folder: Path, engine: str, steps: int = STEPS, **options: Any) -> Any:
    stand_in.TinyModel = OddModel  # type: ignore[misc]  # in a process that is made for it
    config = tiny_config(
        folder,
        engine={"config": engine} | options,
        optim={"steps": steps, "schedule": "constant"},
        checkpoint={"every": 0},
    )
    run = tiny_run(config, start())
    with gathered(run.student), torch.no_grad():
        if "0" not in folder.name:  # what is not restored is seen
            run.student.frozen.fill_(9.0)
            run.student.seen.fill_(9.0)
    return run


def full_state(run: Any) -> dict[str, torch.Tensor]:
    """Weights, masters, moments, steps, buffers and settings by name, as DeepSpeed's own functions
    give them; the same on every rank.
    """
    engine, found = run.engine, {}
    stage = engine.zero_optimization_stage()
    if stage in (1, 2):  # what its next step would do
        engine.optimizer._lazy_init_hp_params_optimizer_state()
    for name, parameter in run.student.named_parameters():
        with gathered(run.student):
            found[name] = parameter.detach().clone()
        if not parameter.requires_grad:
            continue
        for key in MOMENTS:
            if stage == 0:
                found[f"{name} {key}"] = engine.optimizer.state[parameter][key].flatten()
            else:
                found[f"{name} {key}"] = safe_get_full_optimizer_state(parameter, key).flatten()
        if stage:
            found[f"{name} master"] = safe_get_full_fp32_param(parameter).flatten()
    base = engine.optimizer if stage == 0 else engine.optimizer.optimizer
    found["steps"] = torch.tensor(sorted({float(s["step"]) for s in base.state.values()}))
    found["seen"] = run.student.seen.clone()
    for group in base.param_groups:
        values = [group["lr"], group["weight_decay"], *group["betas"], group["lr_multiplier"]]
        found[f"group {group['name']}"] = torch.tensor(values)
    found["counters"] = torch.tensor([engine.global_steps, engine.global_samples])
    return found


def train_and_save(folder: str, stages: list[int]) -> dict[int, dict[str, torch.Tensor]]:
    states = {}
    for stage in stages:
        out = Path(folder) / f"from{stage}0"
        assert loop.train(_run(out, f"zero{stage}")) == 0
        again = _run(out, f"zero{stage}")
        assert loop.restore(again, "auto").step == STEPS
        states[stage] = full_state(again)
    return states


def resume(folder: str, pairs: list[tuple[int, str]]) -> list[dict[str, torch.Tensor]]:
    """State after loading, and after loading what was then saved."""
    states = []
    for number, (source, target) in enumerate(pairs):
        path = Path(folder) / f"from{source}0" / "checkpoints" / f"step_{STEPS:08d}"
        run = _run(Path(folder) / f"to-{number}-{start().world_size}" / f"from{source}0", target)
        run.checkpoints._given_id = path.parent.joinpath("run_id").read_text().strip()
        assert loop.restore(run, str(path)).step == STEPS
        states.append(full_state(run))
    return states


def _same(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    same = found.keys() & expected.keys()
    other = sorted(name for name in same if not torch.equal(found[name], expected[name]))
    assert not other, [(name, found[name], expected[name]) for name in other]
    missing = found.keys() ^ expected.keys()
    assert all(name.endswith(" master") for name in missing), missing


def test_any_stage_and_number_of_ranks_hold_the_same_state(tmp_path: Path) -> None:
    expected = fork_ranks(train_and_save, 2, str(tmp_path), [0, 1, 2, 3])[0]
    assert expected[1]["steps"].item() >= STEPS and expected[1]["seen"].min() > 0
    targets = {
        1: [(3, "zero0"), (0, "zero1"), (1, "zero3"), (2, "zero2")],
        2: [(0, "zero3"), (3, "zero2"), (1, "zero2_offload")],
        3: [(1, "zero2"), (2, "zero3"), (3, "zero3"), (3, "zero1"), (0, "zero2")],
    }
    for world, pairs in targets.items():
        for states in fork_ranks(resume, world, str(tmp_path), pairs):
            for (source, _), state in zip(pairs, states, strict=True):
                _same(state, expected[source])
