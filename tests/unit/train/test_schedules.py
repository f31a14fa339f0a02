"""The learning rate is a pure function of the general step."""

from __future__ import annotations

import pytest

from train.config import OptimConfig
from train.runtime.schedules import lr_at, set_lr


@pytest.mark.parametrize("schedule", ["linear", "cosine"])
def test_warms_up_to_the_peak_and_ends_at_zero(schedule: str) -> None:
    optim = OptimConfig(lr=2.0, steps=110, warmup_steps=10, schedule=schedule)
    assert lr_at(optim, 0) == pytest.approx(0.2)
    assert lr_at(optim, 9) == lr_at(optim, 10) == pytest.approx(2.0)
    assert lr_at(optim, 60) == pytest.approx(1.0)
    assert lr_at(optim, 110) == lr_at(optim, 500) == 0.0


def test_without_warm_up_the_first_step_is_at_the_peak() -> None:
    assert lr_at(OptimConfig(lr=0.5, steps=4), 0) == 0.5
    assert lr_at(OptimConfig(lr=0.5, steps=4), 3) == 0.125


def test_constant_stays() -> None:
    optim = OptimConfig(lr=0.5, steps=4, schedule="constant")
    assert [lr_at(optim, step) for step in (0, 3, 4, 9)] == [0.5] * 4


def test_each_group_keeps_its_multiplier() -> None:
    groups = [{"lr": 0.0, "lr_multiplier": 2.0}, {"lr": 0.0}]
    set_lr(groups, 0.25)
    assert [group["lr"] for group in groups] == [0.5, 0.25]
