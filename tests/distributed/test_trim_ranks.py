"""Trimming on two ranks: cost, losses and gradients are those of one process with all rows,
parameters that are partitioned train alike, and a run ends with what its first rank measures.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from data_pipeline.batches import VqaBatch
from data_pipeline.blocksworld.build import build_blocksworld
from models import from_pretrained, presets
from models.trimming import with_trimming
from models.xvlm import XVLM
from tests.distributed.forked import fork_ranks
from tests.distributed.spawn import run_ranks
from tests.distributed.test_real_stages import folder, recipe, relative_error
from tests.distributed.test_zero_stages import _gathered_state
from tests.unit.train.test_trim import decisive
from train.build import build
from train.config import KdConfig
from train.losses.gather import rank_and_world
from train.runtime import loop, report
from train.runtime.distributed import start
from train.stages import walk as stage_module
from train.tasks.base import StepContext
from train.tasks.trim import TrimTask
from train.tasks.vqa import VqaTask
from train.trim_config import TrimConfig

__all__ = ["folder"]  # the fixture with data and models

ROWS, TOKENS, VOCABULARY = 4, 9, 40


def half(rank: int, world: int, side: int) -> VqaBatch:
    """This rank's questions out of four with one image and one answer each; lengths differ."""
    generator = torch.Generator().manual_seed(8)
    every: dict[str, Tensor] = {
        "images": torch.randint(
            0, 256, (ROWS, 3, side, side), dtype=torch.uint8, generator=generator
        ),
        "question_ids": torch.randint(5, VOCABULARY, (ROWS, TOKENS), generator=generator),
        "question_mask": torch.arange(TOKENS)[None] < torch.tensor([[9], [8], [4], [3]]),
        "answer_ids": torch.tensor([[2, 10 + row, 3] for row in range(ROWS)]),
    }
    count = ROWS // world
    own = {name: value[rank * count : (rank + 1) * count] for name, value in every.items()}
    return VqaBatch(
        **own,
        image_index=torch.arange(count),
        valid=torch.ones(count, dtype=torch.bool),
        keys=("k",) * count,
        answer_mask=torch.ones(count, 3, dtype=torch.bool),
        answer_row=torch.arange(count),
        answer_weight=torch.ones(count),
        answers=({"a": 1.0},) * count,
        questions=("q",) * count,
        question_types=("",) * count,
    )


def one_step(cost: str) -> dict[str, Tensor]:
    """Losses and gradients of the ranks' halves, averaged over the ranks."""
    rank, world = rank_and_world()
    torch.manual_seed(0)
    vision = {"heads": (2,) * 4, "head_dim": 16, "image_size": 24}
    text: dict[str, Any] = {"vocab_size": VOCABULARY}
    plain = presets.config("blocksworld-micro-teacher", form="vqa", vision=vision, text=text)
    # Evaluation: noise is drawn by each rank for itself.
    model = decisive(with_trimming(XVLM(plain))).eval()
    trim = TrimConfig(cost=cost, budget=0.02)  # type: ignore[arg-type]
    task = TrimTask(VqaTask({}, KdConfig(), model.config, None), trim, 10)
    context = StepContext(10, rank, world, torch.Generator().manual_seed(1))
    losses = task.losses(model, None, half(rank, world, 24), context)
    losses.total().backward()
    found = losses.logged() | {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    averaged = {}
    for name, value in found.items():
        averaged[name] = value.clone()
        if world > 1:
            dist.all_reduce(averaged[name])
            averaged[name] /= world
    return averaged


@pytest.mark.world_size(2)
@pytest.mark.parametrize("cost", ["macs", "ratio"])
def test_cost_and_gradients_are_those_of_one_process(cost: str) -> None:
    first, second = fork_ranks(one_step, 2, cost)
    alone = one_step(cost)
    assert 0.05 < alone["metrics.macs_share"].item() < 0.95
    assert alone["loss.cost"] > 1e-5
    for name, expected in alone.items():
        if not name.startswith("metrics.keep/"):  # for the record: each rank's mean
            torch.testing.assert_close(first[name], expected, rtol=1e-4, atol=1e-6, msg=name)
        assert torch.equal(first[name], second[name])


def trim_at_stages(root: str) -> list[dict[str, Tensor]]:
    results = []
    for stage in (1, 3):
        config = recipe(
            Path(root),
            "blocksworld-vqa-trim",
            "vqa",
            stage,
            f"out={root}/trim-{stage}",
            "teacher.path=null",
            "optim.steps=4",
            "optim.new_lr_multiplier=20",
            "trim.warmup=0.0",
            "trim.ramp=0.5",
            "trim.text=[1]",
        )
        run = build(config, start())
        torch.manual_seed(start().rank)  # the decisions' noise
        assert loop.train(run, "none") == 0
        results.append(_gathered_state(run))
    return results


@pytest.mark.slow
@pytest.mark.world_size(2)
def test_partitioned_parameters_train_alike(folder: Path) -> None:
    for partly, wholly in run_ranks(trim_at_stages, 2, str(folder), timeout=280):
        assert any(".trimmers." in name for name in partly)
        assert partly.keys() == wholly.keys()
        for name, expected in partly.items():
            if ".k.bias." in name:  # rounding noise: their gradient is exactly zero
                continue
            error = relative_error(wholly[name], expected)
            assert error < 1e-3, f"{name} is off by {error:.1e}"


@pytest.fixture(scope="module")
def trimmable(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Data and a tiny model of tasks whose losses ask the other ranks."""
    root = tmp_path_factory.mktemp("trimmable")
    tasks = ("vqa", "retrieval")
    build_blocksworld(root / "data", 24, val=6, test=6, image_size=48, tasks=tasks)
    torch.manual_seed(0)
    for form in tasks:
        model = presets.create("blocksworld-micro-student", form=form, text={"vocab_size": 80})
        model.save_pretrained(root / f"{form}-student")
    return root


def whole_run(root: str, task: str, breaks: bool) -> tuple[int, str | None]:
    """The exit code of a whole stage, or its error, on this rank."""
    job = Path(root) / f"job-{task}"
    job.mkdir(exist_ok=True)
    os.environ[report.FOLDER] = str(job)
    config = recipe(
        Path(root),
        f"blocksworld-{task}-trim",
        task,
        1,
        "teacher.path=null",
        f"data.val={root}/data/{task}/val",
        "data.block=4",
        "eval.batch=4",
        "optim.steps=2",
        "trim.warmup=0.0",
        "trim.ramp=0.5",
        "trim.text=[0]",
    )

    def broken(*_: Any) -> None:
        raise RuntimeError("no space left")

    if breaks:
        stage_module.finish_trimming = broken  # in a process of its own
    try:
        return stage_module.walk(config, "none"), None
    except RuntimeError as error:
        return 1, str(error)


@pytest.mark.slow
@pytest.mark.world_size(2)
@pytest.mark.parametrize("task", ["vqa", "retrieval"])
def test_a_run_ends_with_what_its_trimmers_keep(trimmable: Path, task: str) -> None:
    assert fork_ranks(whole_run, 2, str(trimmable), task, False) == [(0, None)] * 2
    out = trimmable / f"blocksworld-{task}-trim-1"
    told = json.loads((out / "trim.json").read_text())
    trimming = from_pretrained(out / "model").config.trimming
    assert trimming is not None and trimming.mode == "gather"
    assert told["keep"]["vision"] == list(trimming.vision_keep or ())
    # All held-out pictures, not one rank's: those of the last batch that is full.
    data = json.loads((trimmable / "data" / task / "val" / "manifest.json").read_text())
    assert told["full"].get("images", data["samples"]) == data["samples"]
    outcomes = {path.name: path.read_text() for path in (trimmable / f"job-{task}").glob("out*")}
    assert outcomes == {"outcome_0000": "0"}


@pytest.mark.slow
@pytest.mark.world_size(2)
def test_a_run_that_fails_at_its_very_end_does_not_report_success(trimmable: Path) -> None:
    job = trimmable / "job-vqa"
    for path in job.glob("*"):
        path.unlink()
    first, second = fork_ranks(whole_run, 2, str(trimmable), "vqa", True)
    assert first == (1, "no space left") and second == (0, None)
    assert json.loads((job / "failure.json").read_text())["rank"] == 0
    assert not list(job.glob("outcome*"))
