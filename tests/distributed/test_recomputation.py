"""Activation checkpointing under an engine that partitions parameters: blocks run again in the
backward, where their hooks must gather the parameters again.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from models.layers import BertLayer, ViTBlock
from tests.distributed.spawn import run_ranks
from tests.distributed.test_real_stages import folder, recipe, relative_error
from tests.distributed.test_zero_stages import _gathered_state
from train.build import build
from train.runtime import loop
from train.runtime.distributed import start

__all__ = ["folder"]  # the fixture with data and models

# Stage, and whether the student's blocks run again in the backward. The plain stage 0 leads.
RUNS = ((0, False), (0, True), (3, True))


def counted(model: torch.nn.Module) -> list[str]:
    """Grows by a name whenever a block of the model starts."""
    calls: list[str] = []
    for block in model.modules():
        if isinstance(block, ViTBlock | BertLayer):
            block.register_forward_pre_hook(lambda module, _: calls.append(type(module).__name__))
    return calls


def train_with_and_without(root: str) -> list[dict[str, Any]]:
    results = []
    for stage, enabled in RUNS:
        config = recipe(
            Path(root),
            "blocksworld-distill",
            "pretrain",
            stage,
            f"out={root}/recompute-{stage}-{enabled}",
            "initialise.source=random",
            "optim.steps=6",
            "data.region.probability=0.5",
            "data.region.images=2",
            "data.region.rows=4",
        )
        run = build(config, start())
        run.student.set_activation_checkpointing(enabled)
        calls = counted(run.student)
        assert loop.train(run, "none") == 0
        results.append({"state": _gathered_state(run), "calls": len(calls)})
    return results


@pytest.mark.slow
@pytest.mark.world_size(2)
def test_recomputed_blocks_train_alike_with_partitioned_parameters(folder: Path) -> None:
    for results in run_ranks(train_with_and_without, 2, str(folder), timeout=280):
        plain = results[0]
        for (stage, _), again in zip(RUNS[1:], results[1:], strict=True):
            assert again["calls"] > 1.5 * plain["calls"]
            assert again["state"].keys() == plain["state"].keys()
            for name, expected in plain["state"].items():
                if ".k.bias." in name:  # rounding noise: their gradient is exactly zero
                    continue
                assert torch.isfinite(expected).all()
                error = relative_error(again["state"][name], expected)
                assert error < 1e-4, f"stage {stage}: {name} is off by {error:.1e}"
