"""State outside DeepSpeed: a round trip through a file that needs no pickle."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch

from tests.distributed.stand_in import TinyLoader, tiny_config
from train.checkpoint import state
from train.config import UserError


class _Gates:
    def __init__(self) -> None:
        self.values: dict[str, Any] = {"log_alpha": torch.arange(3.0), "step": 4}

    def state_dict(self) -> dict[str, Any]:
        return self.values

    def load_state_dict(self, values: dict[str, Any], rebase: bool = False) -> None:
        self.values = values


def _draws() -> list[float]:
    return [random.random(), random.gauss(0, 1), float(numpy.random.rand()), torch.rand(()).item()]


def test_everything_comes_back_without_pickle(tmp_path: Path) -> None:
    random.gauss(0, 1)
    loader, region, gates = TinyLoader(0), TinyLoader(0, "region"), _Gates()
    loader.position, region.position = 5, 2
    collected = state.collect(
        tiny_config(tmp_path), step=7, samples=28, loader=loader, region_loader=region, gates=gates
    )
    torch.save(collected, tmp_path / "s.pt")
    expected = _draws()
    loaded = torch.load(tmp_path / "s.pt", weights_only=True)
    loader.position = region.position = 0
    gates.values = {}
    _draws()
    state.restore(loaded, loader=loader, region_loader=region, gates=gates)
    assert _draws() == expected
    assert (loader.position, region.position, loaded["step"], loaded["samples"]) == (5, 2, 7, 28)
    assert torch.equal(gates.values["log_alpha"], torch.arange(3.0))


def test_another_version_is_refused() -> None:
    with pytest.raises(UserError, match="version 99"):
        state.restore({"version": 99}, loader=TinyLoader(0))
