"""ZeRO stages, offload, accumulation and activation checkpointing are bookkeeping: after 20 fp32
steps the parameters are those of plain torch in one process with all rows in one batch.

CI runs a pairwise choice of the grid; `make test-full` runs all of it and records the errors in
benchmarks/results/zero_grid.json.
"""

from __future__ import annotations

import json
import os
import platform
import time
from collections.abc import Iterator
from functools import partialmethod
from pathlib import Path
from typing import Any

import pytest
import torch

from data_pipeline.batches import Batch
from tests.distributed.pool import RankPool, destroyed
from tests.distributed.stand_in import TinyLoader, TinyTask, tiny_config, tiny_run
from tests.distributed.zero_grid import (
    RANKS,
    STEPS,
    Case,
    all_cases,
    differences,
    losses_of_all_terms,
    losses_of_two_runs,
    pairwise,
    train_case,
    train_plainly,
)
from train.runtime import loop
from train.runtime.distributed import start
from train.runtime.engine import gathered
from train.runtime.step import keyed_generator, train_step
from train.tasks.base import Losses, StepContext

pytestmark = [pytest.mark.slow, pytest.mark.world_size(RANKS)]
STAGES = range(4)
RECORD = "ESPALIER_ZERO_GRID"  # file for the record of the full grid
CASES = all_cases() if RECORD in os.environ else pairwise(all_cases())


@pytest.fixture(scope="module")
def pool() -> Iterator[RankPool]:
    with RankPool(RANKS) as ranks:
        yield ranks


# --- the grid -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def plain() -> dict[str, torch.Tensor]:
    return train_plainly()


@pytest.fixture(scope="module")
def record() -> Iterator[dict[str, Any]]:
    """Errors by case; written where `make test-full` wants them."""
    cases: dict[str, Any] = {}
    yield cases
    if RECORD in os.environ:
        import deepspeed

        header = {
            "what": "largest relative error of a parameter (2-norm) against torch in one process",
            "world_size": RANKS,
            "steps": STEPS,
            "device": f"cpu, {platform.machine()}",
            "torch": torch.__version__,
            "deepspeed": deepspeed.__version__,
        }
        path = Path(os.environ[RECORD])
        path.write_text(json.dumps(header | {"cases": cases}, indent=2) + "\n", encoding="utf-8")


def test_pairwise_covers_what_occurs_together() -> None:
    chosen = pairwise(all_cases())
    assert len(all_cases()) == 42 and len(chosen) < 15

    def seen(cases: list[Case], *keys: str) -> set[tuple[Any, ...]]:
        return {tuple(getattr(case, key) for key in keys) for case in cases}

    names = ("stage", "accumulate", "checkpointing", "offload")
    for a in names:
        for b in names:
            assert seen(chosen, a, b) == seen(all_cases(), a, b)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_parameters_are_those_of_plain_torch(
    case: Case, pool: RankPool, plain: dict[str, torch.Tensor], record: dict[str, Any]
) -> None:
    started = time.perf_counter()
    ranks = pool.run(train_case, case, timeout=240)
    seconds = time.perf_counter() - started
    errors = [differences(found, plain) for found in ranks]
    worst = max(errors[0], key=errors[0].__getitem__)
    record[str(case)] = {
        "error": errors[0][worst],
        "parameter": worst,
        "seconds": round(seconds, 1),
    }
    for rank, found in enumerate(errors):
        for name, error in found.items():
            assert error < 1e-5, f"{case}, rank {rank}: {name} is off by {error:.1e}"


def test_two_runs_have_the_same_losses_bit_for_bit(pool: RankPool) -> None:
    """All losses, with dropout, hard negatives and region steps."""
    for first, second in pool.run(losses_of_two_runs):
        assert len(first) == 6 and all(loss == loss for loss in first)
        assert first == second


def losses_in_both_precisions(stage: int) -> tuple[list[float], list[float], list[float]]:
    full, _ = losses_of_all_terms(Case(stage))
    half, scales = losses_of_all_terms(Case(stage), precision="fp16", max_loss_scale=1024.0)
    return full, half, scales


@pytest.mark.skipif(
    not torch.cuda.is_available() and not torch.ops.mkldnn._is_mkldnn_fp16_supported(),
    reason="DeepSpeed trains in fp16 on CPUs with AVX512-FP16 only",
)
@pytest.mark.parametrize("stage", [1, 2, 3])
def test_fp16_follows_fp32_at_the_published_loss_scale(pool: RankPool, stage: int) -> None:
    for full, half, scales in pool.run(losses_in_both_precisions, stage):
        assert half == pytest.approx(full, rel=5e-3) and half != full
        assert scales == [1024.0] * 6


def losses_of_a_compiled_student(case: Case) -> tuple[list[float], int]:
    """And how many graphs were made. AOT's tracing without Inductor's code: that is seen elsewhere,
    here it is whether hooks that gather parameters and graphs get along.
    """
    from torch._dynamo.utils import counters

    from models.xvlm import XVLM

    compile_encoders = XVLM.compile_encoders
    counters.clear()
    XVLM.compile_encoders = partialmethod(  # type: ignore[method-assign, assignment]
        compile_encoders, backend="aot_eager"
    )
    try:
        losses, _ = losses_of_all_terms(case, compile="default")
    finally:
        XVLM.compile_encoders = compile_encoders  # type: ignore[method-assign]
    return losses, counters["stats"]["unique_graphs"]


def test_a_compiled_student_trains_alike(pool: RankPool) -> None:
    expected = pool.run(losses_of_all_terms, Case(0))
    found = pool.run(losses_of_a_compiled_student, Case(2, 1, True))
    for (plain, _), (losses, graphs) in zip(expected, found, strict=True):
        assert graphs > 0
        assert losses == pytest.approx(plain, rel=1e-5)


# --- steps that are skipped -----------------------------------------------------------------------


class LeapingTask(TinyTask):
    """Multiplies the loss of chosen micro-batches, counted from 0; on the last rank only."""

    def __init__(self, factors: dict[int, float]) -> None:
        self.factors, self.seen = factors, 0

    def losses(self, student: Any, teacher: Any, batch: Batch, context: StepContext) -> Losses:
        losses = super().losses(student, teacher, batch, context)
        if context.rank == context.world_size - 1:
            losses.terms["head"] = losses.terms["head"] * self.factors.get(self.seen, 1.0)
        self.seen += 1
        return losses


def train_past(
    folder: str, stage: int, offload: str, factors: dict[int, float], bad_step: int | None
) -> dict[str, Any]:
    """Four steps of two micro-batches; the batches of `bad_step` come between the others'."""
    config = tiny_config(
        Path(folder), engine={"config": f"zero{stage}", "accumulate": 2, "offload": offload}
    )
    place = start()
    run = tiny_run(config, place, LeapingTask(factors))
    good = iter(TinyLoader(place.rank))
    results = []
    with destroyed(run.engine) as engine:
        steps = [0, 1, 2, 3]
        if bad_step is not None:
            steps.insert(bad_step, -1)
        for step in steps:
            spare = iter(TinyLoader(place.rank, "region"))  # its batches belong to no good step

            def context_of(micro: int, step: int = step) -> StepContext:
                generator = keyed_generator(0, step, micro)
                return StepContext(max(step, 0), place.rank, place.world_size, generator)

            batches = spare if step < 0 else good
            result = train_step(engine, batches, context_of, loss_limit=1e3)
            results.append((result.applied, result.finite, result.spike))
        with gathered(run.student):
            state = {n: p.detach().clone() for n, p in run.student.named_parameters()}
    return {"state": state, "results": results}


@pytest.mark.parametrize(
    ("stage", "offload"), [(0, "none"), (1, "optimizer"), (2, "none"), (3, "optimizer")]
)
@pytest.mark.parametrize("factor", [float("nan"), 1e6], ids=["nan", "spike"])
def test_a_skipped_step_leaves_no_trace(
    tmp_path: Path, pool: RankPool, stage: int, offload: str, factor: float
) -> None:
    """The second micro-batch of the third step is bad on one rank: all ranks skip, and what both
    its micro-batches left in gradient buffers does not reach the next step.
    """
    clean = pool.run(train_past, str(tmp_path), stage, offload, {}, None)
    skipped = pool.run(train_past, str(tmp_path), stage, offload, {5: factor}, 2)
    for before, after in zip(clean, skipped, strict=True):
        assert all(applied for applied, _, _ in before["results"])
        spike = factor == factor
        expected = [(True, True, False)] * 5
        expected[2] = (False, spike, spike)
        assert after["results"] == expected
        for name, value in before["state"].items():
            torch.testing.assert_close(after["state"][name], value, rtol=0, atol=0, msg=name)


# --- parameters and moments of the stand-in -------------------------------------------------------


def _link_moments(zero: Any) -> None:
    """DeepSpeed 0.19 links Adam moments to parameters before torch's AdamW made any, and finds
    none.
    """
    for group, flat in zip(zero.bit16_groups, zero.single_partition_of_fp32_groups, strict=True):
        for parameter in group:
            if parameter._hp_mapping is not None:
                parameter._hp_mapping.set_optim_state_fragment(flat, zero.optimizer.state[flat])


def _gathered_state(run: Any) -> dict[str, torch.Tensor]:
    """Full fp32 parameters and moments by name, whatever the stage. Collective."""
    from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

    stage = run.engine.zero_optimization_stage()
    if stage in (1, 2):
        _link_moments(run.engine.optimizer)
    state = {}
    for name, parameter in run.student.named_parameters():
        full = {"value": parameter if stage == 0 else safe_get_full_fp32_param(parameter)}
        for key in ("exp_avg", "exp_avg_sq"):
            if stage == 0:
                full[key] = run.engine.optimizer.state[parameter][key]
            else:
                full[key] = safe_get_full_optimizer_state(parameter, key)
        state |= {f"{name}.{key}": tensor.detach().clone() for key, tensor in full.items()}
    return state


def train_at_all_stages(folder: str, accumulate: int) -> list[dict[str, Any]]:
    results = []
    for stage in STAGES:
        config = tiny_config(
            Path(folder) / f"stage{stage}",
            engine={"config": f"zero{stage}", "accumulate": accumulate},
            checkpoint={"every": 0},
        )
        run = tiny_run(config, start())
        with destroyed(run.engine):
            assert loop.train(run) == 0
            results.append(
                {
                    "state": _gathered_state(run),
                    "general": run.loader.position,
                    "region": run.region_loader.position,
                    "loss": [record["loss"]["total"] for record in run.monitor.records],
                    "norm": [record["grad_norm"] for record in run.monitor.records],
                }
            )
    return results


@pytest.mark.parametrize("accumulate", [1, 2])
def test_stages_agree_on_parameters_and_moments(
    tmp_path: Path, pool: RankPool, accumulate: int
) -> None:
    ranks = pool.run(train_at_all_stages, str(tmp_path), accumulate, timeout=240)
    reference = ranks[0][0]
    assert reference["general"] == 20 * accumulate
    assert 0 < reference["region"] < reference["general"], "region steps must have happened"
    for results in ranks:
        for stage, result in enumerate(results):
            assert result["loss"] == pytest.approx(reference["loss"], rel=1e-4)
            assert result["norm"] == pytest.approx(reference["norm"], rel=1e-4)
            assert result["state"].keys() == reference["state"].keys()
            for name, expected in reference["state"].items():
                error = (result["state"][name] - expected).norm() / expected.norm().clamp_min(1e-12)
                assert error < 1e-4, f"stage {stage}: {name} is off by {error:.1e}"
