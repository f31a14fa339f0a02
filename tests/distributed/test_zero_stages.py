"""ZeRO stages are bookkeeping: after 20 fp32 steps parameters and Adam moments must be the same at
every stage.

The task has a head that does nothing on every third step, a tied head, and region steps (see
stand_in.py).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.distributed.spawn import run_ranks
from tests.distributed.stand_in import tiny_config, tiny_run
from train.runtime import loop
from train.runtime.distributed import start

STAGES = range(4)


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


@pytest.mark.slow
@pytest.mark.world_size(2)
@pytest.mark.parametrize("accumulate", [1, 2])
def test_stages_agree_on_parameters_and_moments(tmp_path: Path, accumulate: int) -> None:
    ranks = run_ranks(train_at_all_stages, 2, str(tmp_path), accumulate, timeout=240)
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
