"""Closed units left out of the products under an engine that partitions parameters: the same run.

Folded and selected weights are read in the forward of the layer that owns them, and their gradients
come back through it, where ZeRO-3 has gathered or scattered them.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from models.gated_linear import GatedLinear
from tests.distributed.spawn import run_ranks
from tests.distributed.test_real_stages import folder, recipe, relative_error
from tests.distributed.test_zero_stages import _gathered_state
from train.build import build
from train.runtime import loop
from train.runtime.distributed import start

__all__ = ["folder"]  # the fixture with data and models

# Stage, form, activation checkpointing. The plain form at stage 0 leads.
RUNS = ((0, "mask", False), (2, "compact", False), (3, "compact", True), (3, "fold", False))


def widths_of(model: torch.nn.Module) -> set[int]:
    """Fills with the numbers of feed-forward units that were computed."""
    seen: set[int] = set()
    for name, module in model.named_modules():
        if isinstance(module, GatedLinear) and name.endswith("ffn.fc1"):
            module.register_forward_hook(lambda _, __, output: seen.add(output.shape[-1]))
    return seen


def prune_in_all_forms(root: str) -> list[dict[str, Any]]:
    results = []
    for stage, form, recompute in RUNS:
        config = recipe(
            Path(root),
            "blocksworld-prune",
            "vqa",
            stage,
            f"out={root}/{form}-{stage}",
            f"prune.gates={form}",
            "optim.steps=5",
            "prune.ramp_steps=4",
            "prune.freeze_step=4",
            "prune.ffn_init_drop=0.9",  # about 45 of 128 units are open: 64 take part
            f"engine.activation_checkpointing={str(recompute).lower()}",
        )
        run = build(config, start())
        seen = widths_of(run.student)
        assert loop.train(run, "none") == 0
        assert run.gates is not None
        log_alpha = run.gates.bank.log_alpha.detach().clone()
        state = _gathered_state(run) | {"log_alpha": log_alpha}
        results.append({"state": state, "widths": seen})
    return results


@pytest.mark.slow
@pytest.mark.world_size(2)
def test_forms_train_alike_with_partitioned_parameters(folder: Path) -> None:
    for results in run_ranks(prune_in_all_forms, 2, str(folder), timeout=280):
        expected = results[0]["state"]
        for (stage, form, _), found in zip(RUNS, results, strict=True):
            assert (min(found["widths"]) == 64) == (form == "compact"), found["widths"]
            assert found["state"].keys() == expected.keys()
            for name, value in expected.items():
                if ".k.bias." in name:  # rounding noise: their gradient is exactly zero
                    continue
                error = relative_error(found["state"][name], value)
                assert error < 1e-3, f"{form} at stage {stage}: {name} is off by {error:.1e}"
