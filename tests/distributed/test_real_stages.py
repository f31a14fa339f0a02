"""The real model, data and tasks at ZeRO 0 to 3: the same parameters, moments and gates.

General steps leave the box head without work, region steps give it some (2 ranks, fp32, lr 1e-3, no warm-up).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from data_pipeline.blocksworld.build import build_blocksworld
from models import presets
from tests.distributed.spawn import run_ranks
from tests.distributed.test_zero_stages import STAGES, _gathered_state
from train.build import Run, build
from train.config import RunConfig
from train.recipes_io import find_recipe, load_run_config
from train.runtime import loop
from train.runtime.distributed import start

VOCABULARY = 80


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Data, and a teacher and a student of each form."""
    root = tmp_path_factory.mktemp("stages")
    build_blocksworld(
        root / "data",
        scenes=48,
        val=8,
        test=8,
        image_size=48,
        seed=5,
        tasks=("pretrain", "vqa"),
        per_shard=24,
    )
    torch.manual_seed(0)
    for form in ("pretrain", "vqa"):
        for role in ("teacher", "student"):
            model = presets.create(
                f"blocksworld-micro-{role}", form=form, text={"vocab_size": VOCABULARY}
            )
            model.save_pretrained(root / f"{form}-{role}")
    return root


def recipe(folder: Path, name: str, task: str, stage: int, *more: str) -> RunConfig:
    data = folder / "data" / task
    overrides = [
        f"out={folder / f'{name}-{stage}'}",
        f"teacher.path={folder / f'{task}-teacher'}",
        f"model={folder / f'{task}-student'}",
        f"data.train={data / 'train'}",
        "data.val=null",
        "data.batch=4",
        "optim.lr=1e-3",
        "optim.warmup_steps=0",
        "optim.schedule=constant",
        "log.every=1",
        "checkpoint.every=0",
        f"engine.config=zero{stage}",
        *more,
    ]
    return load_run_config(find_recipe(name), overrides)[0]


def _train(config: RunConfig) -> Run:
    run = build(config, start())
    assert loop.train(run, "none") == 0
    return run


def distil_at_all_stages(folder: str) -> list[dict[str, torch.Tensor]]:
    results = []
    for stage in STAGES:
        config = recipe(
            Path(folder),
            "blocksworld-distill",
            "pretrain",
            stage,
            "initialise.source=random",
            "optim.steps=20",
            "data.region.probability=0.3",
            "data.region.images=2",
            "data.region.rows=4",
        )
        results.append(_gathered_state(_train(config)))
    return results


def prune_at_all_stages(folder: str) -> list[dict[str, Any]]:
    results = []
    for stage in STAGES:
        config = recipe(
            Path(folder),
            "blocksworld-prune",
            "vqa",
            stage,
            "optim.steps=6",
            "prune.ramp_steps=4",
            "prune.freeze_step=5",
        )
        run = _train(config)
        assert run.gates is not None
        bank = run.gates.bank
        owned = {id(parameter) for parameter in run.engine.module.parameters()}
        inside = sum(
            getattr(parameter, "ds_numel", parameter.numel())
            for parameter in run.engine.module.parameters()
        )
        results.append(
            {
                "gates_in_engine": {id(bank.log_alpha), id(bank.multipliers)} & owned,
                "engine_parameters": inside,
                "log_alpha": bank.log_alpha.detach().clone(),
                "multipliers": bank.multipliers.detach().clone(),
            }
        )
    return results


def relative_error(value: torch.Tensor, expected: torch.Tensor) -> float:
    return float((value - expected).norm() / expected.norm().clamp_min(1e-12))


@pytest.mark.slow
@pytest.mark.world_size(2)
def test_distillation_is_the_same_at_every_stage(folder: Path) -> None:
    ranks = run_ranks(distil_at_all_stages, 2, str(folder), timeout=280)
    reference = ranks[0][0]
    for results in ranks:
        for stage, state in enumerate(results):
            assert state.keys() == reference.keys()
            for name, expected in reference.items():
                # The gradient of a key bias is exactly zero (softmax ignores it); Adam scales its
                # rounding noise to full steps, so there is nothing to compare but its size.
                if ".k.bias." in name:
                    assert state[name].abs().max() < 0.05
                    continue
                error = relative_error(state[name], expected)
                assert error < 1e-4, f"stage {stage}: {name} is off by {error:.1e}"


@pytest.mark.slow
@pytest.mark.world_size(2)
def test_gates_stay_outside_the_engine_at_every_stage(folder: Path) -> None:
    student = presets.create(
        "blocksworld-micro-student", form="vqa", text={"vocab_size": VOCABULARY}
    )
    expected = sum(parameter.numel() for parameter in student.parameters())
    ranks = run_ranks(prune_at_all_stages, 2, str(folder), timeout=280)
    reference = ranks[0][0]
    for results in ranks:
        for result in results:
            assert result["gates_in_engine"] == set()
            assert result["engine_parameters"] == expected
            assert relative_error(result["log_alpha"], reference["log_alpha"]) < 1e-4
            assert relative_error(result["multipliers"], reference["multipliers"]) < 1e-4
