"""A checkpoint goes on with any number of ranks at any ZeRO stage.

The state is compared bit for bit with what DeepSpeed itself says it holds (`full_state`), so the
reader and the writer of layouts are not judged by one another.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

from tests.distributed import stand_in
from tests.distributed.chaos_life import make_inputs, run_config
from tests.distributed.forked import fork_ranks
from tests.distributed.stand_in import TinyModel, tiny_config, tiny_run, with_changes
from train.build import build
from train.checkpoint.shards import MOMENTS
from train.checkpoint.state import seed_rng
from train.config import per_rank
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
    return tiny_run(config, start())


def _spoil(run: Any) -> None:
    """What no optimizer owns is wrong now, so that it is seen when it is not restored."""
    run.student.seen.fill_(9.0)
    frozen = run.student.frozen
    getattr(frozen, "ds_tensor", frozen).data.fill_(9.0)


def full_state(run: Any) -> dict[str, torch.Tensor]:
    """Weights, masters, moments, steps, buffers and settings by name, as DeepSpeed's own functions
    give them; the same on every rank.
    """
    engine, found = run.engine, {}
    moment: Any = safe_get_full_optimizer_state
    master: Any = safe_get_full_fp32_param
    stage = engine.zero_optimization_stage()
    if stage in (1, 2):  # DeepSpeed does it in the first step, when there are no moments yet
        engine.optimizer._hp_optimizer_states_linked = False
        engine.optimizer._lazy_init_hp_params_optimizer_state()
    with gathered(run.student):
        found |= {name: p.detach().clone() for name, p in run.student.named_parameters()}
    for name, parameter in run.student.named_parameters():
        if not parameter.requires_grad:
            continue
        for key in MOMENTS:
            if stage == 0:
                found[f"{name} {key}"] = engine.optimizer.state[parameter][key].flatten()
            else:
                found[f"{name} {key}"] = moment(parameter, key).flatten()
        if stage:
            found[f"{name} master"] = master(parameter).flatten()
    base = engine.optimizer if stage == 0 else engine.optimizer.optimizer
    found["steps"] = torch.tensor(sorted({float(s["step"]) for s in base.state.values()}))
    found |= {name: buffer.clone() for name, buffer in run.student.named_buffers()}
    for group in base.param_groups:
        values = [group["lr"], group["weight_decay"], *group["betas"], group["lr_multiplier"]]
        found[f"group {group['name']}"] = torch.tensor(values)
    found["counters"] = torch.tensor([engine.global_steps, engine.global_samples])
    return found


def train_and_save(folder: str, stages: list[int]) -> dict[int, dict[str, torch.Tensor]]:
    states = {}
    for stage in stages:
        out = Path(folder) / f"from{stage}"
        assert loop.train(_run(out, f"zero{stage}")) == 0
        again = _run(out, f"zero{stage}")
        assert loop.restore(again, "auto").step == STEPS
        drawn = torch.rand(4)
        states[stage] = full_state(again) | {"random": drawn}
    return states


def resume(folder: str, pairs: list[tuple[int, str]]) -> list[dict[str, torch.Tensor]]:
    """State after loading each."""
    states = []
    for number, (source, target) in enumerate(pairs):
        path = Path(folder) / f"from{source}" / "checkpoints" / f"step_{STEPS:08d}"
        run = _run(Path(folder) / f"to-{number}-{start().world_size}", target)
        _spoil(run)
        run.checkpoints._given_id = path.parent.joinpath("run_id").read_text().strip()
        assert loop.restore(run, str(path)).step == STEPS
        drawn = torch.rand(4)
        states.append(full_state(run) | {"random": drawn})
    return states


def _same(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    same = found.keys() & expected.keys()
    other = sorted(name for name in same if not torch.equal(found[name], expected[name]))
    assert not other, [(name, found[name], expected[name]) for name in other]
    missing = found.keys() ^ expected.keys()
    assert all(name.endswith(" master") for name in missing), missing


def test_any_stage_and_number_of_ranks_hold_the_same_state(tmp_path: Path) -> None:
    saved = fork_ranks(train_and_save, 2, str(tmp_path), [0, 1, 2, 3])
    expected = saved[0]
    seed_rng(tiny_config(tmp_path).seed, 2)
    new = torch.rand(4)  # what a rank begins with that did not exist
    assert expected[1]["steps"].item() >= STEPS and expected[1]["seen"].min() > 0
    targets = {
        1: [(3, "zero0"), (0, "zero1"), (1, "zero3")],
        2: [(0, "zero3"), (3, "zero2"), (1, "zero2_offload")],
        3: [(1, "zero2"), (2, "zero3"), (3, "zero3"), (3, "zero1")],
    }
    for world, pairs in targets.items():
        for rank, states in enumerate(fork_ranks(resume, world, str(tmp_path), pairs)):
            for (source, _), state in zip(pairs, states, strict=True):
                random = saved[rank][source]["random"] if rank < 2 else new
                _same(state, expected[source] | {"random": random})


# A run whose number of ranks and stage change on the way

LIVES = [(2, "zero1"), (1, "zero2"), (3, "zero3"), (2, "zero1")]
EACH = 2


class Told:
    """A loader that remembers what it delivered: keys and pixels of every row."""

    def __init__(self, loader: Any) -> None:
        self._loader = loader
        self.batches: list[list[str]] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(self._loader, name)

    def __iter__(self) -> Any:
        for batch in self._loader:
            sums = batch.images[batch.image_index].double().sum((1, 2, 3)).tolist()
            rows = zip(batch.keys, sums, batch.answer_ids.tolist(), strict=True)
            self.batches.append([str(row) for row in rows])
            yield batch


def live(folder: str, out: str, engine: str, steps: int) -> dict[str, Any]:
    """Trains up to `steps`: what was delivered, the losses, the state at the end."""
    place = start()
    config = run_config(Path(folder), Path(out))
    config = with_changes(
        config,
        data={"global_batch": 12},
        engine={"config": engine},
        optim={"steps": steps, "schedule": "constant"},
        log={"every": 1},
        checkpoint={"every": 0},
    )
    run: Any = build(per_rank(config, place.world_size), place)
    told = run.loader = Told(run.loader)
    assert loop.train(run) == 0
    state = full_state(run) | {"log_alpha": run.gates.bank.log_alpha.detach().clone()}
    state |= {f"gates {n}": v for n, v in run.gates.state_dict()["gate_optimizer"].items()}
    return {"batches": told.batches, "state": state}


def _global(results: list[dict[str, Any]]) -> list[list[str]]:
    """Rows of each step over all ranks."""
    return [sum(parts, []) for parts in zip(*(r["batches"] for r in results), strict=True)]


def _losses(out: Path) -> list[float]:
    lines = (out / "metrics.jsonl").read_text().splitlines()
    return [entry["loss"]["total"] for entry in map(json.loads, lines) if "loss" in entry]


def test_a_run_whose_ranks_and_stage_change_is_the_straight_run(tmp_path: Path) -> None:
    make_inputs(tmp_path)
    whole = fork_ranks(live, 2, str(tmp_path), str(tmp_path / "whole"), "zero1", EACH * len(LIVES))
    delivered: list[list[str]] = []
    for number, (world, engine) in enumerate(LIVES, start=1):
        parts = fork_ranks(live, world, str(tmp_path), str(tmp_path / "run"), engine, EACH * number)
        delivered += _global(parts)
        assert all(part["batches"] and len(part["batches"]) == EACH for part in parts)
    assert delivered == _global(whole)
    assert _losses(tmp_path / "run") == pytest.approx(_losses(tmp_path / "whole"), rel=1e-4)
    for name, expected in whole[0]["state"].items():
        found = parts[0]["state"][name]
        torch.testing.assert_close(found, expected, rtol=2e-3, atol=2e-5, msg=name)
