"""Which losses are spikes, and when skipped steps end a run."""

from __future__ import annotations

import json
import math

import pytest

from train.config import OptimConfig
from train.runtime.guard import NonFiniteError, StepGuard


def fed(guard: StepGuard, losses: list[float], kind: str = "general") -> StepGuard:
    for loss in losses:
        guard.see(True, 0, kind=kind, loss=loss)
    return guard


def test_the_limit_is_a_factor_above_the_median_of_the_last_losses() -> None:
    guard = fed(StepGuard(spike_factor=3.0, spike_window=25), [100.0] * 10 + [2.0] * 24 + [9.0])
    assert guard.loss_limit() == 6.0
    assert guard.loss_limit("region") == math.inf, "each kind of step has its own median"


def test_nothing_is_a_spike_before_there_is_a_median_or_when_it_is_off() -> None:
    assert fed(StepGuard(spike_factor=3.0), [1.0] * 19).loss_limit() == math.inf
    assert fed(StepGuard(spike_factor=3.0), [1.0] * 20).loss_limit() == 3.0
    assert fed(StepGuard(spike_factor=3.0, spike_window=4), [1.0] * 4).loss_limit() == 3.0
    assert fed(StepGuard(), [1.0] * 200).loss_limit() == math.inf


def test_skipped_steps_do_not_move_the_median() -> None:
    guard = fed(StepGuard(spike_factor=2.0), [1.0] * 20)
    for _ in range(15):
        guard.see(True, 0, loss=50.0, spike=True)
    assert guard.loss_limit() == 2.0
    assert (guard.spikes, guard.nonfinite, guard.total) == (15, 0, 15)


def test_skips_of_both_reasons_and_kinds_count_together_in_a_row() -> None:
    guard = StepGuard(limit=4)
    guard.see(False, 1)
    guard.see(True, 1, loss=9.0, spike=True)
    guard.see(True, 1, loss=1.0)
    guard.see(False, 2, kind="region")
    guard.see(True, 2, loss=9.0, spike=True)
    guard.see(False, 2)
    assert guard.in_a_row == 3
    with pytest.raises(NonFiniteError, match=r"4 steps in a row.*a spike \(general step 7\)"):
        guard.see(True, 7, loss=9.0, spike=True)


@pytest.mark.parametrize(
    ("key", "value"), [("skip_limit", 0), ("spike_window", 0), ("spike_factor", 0.5)]
)
def test_settings_that_cannot_work_are_refused_by_name(key: str, value: float) -> None:
    with pytest.raises(ValueError, match=rf"optim.{key} \({value}\)"):
        StepGuard.of(OptimConfig(**{key: value}))


def test_the_run_file_decides() -> None:
    guard = StepGuard.of(OptimConfig(skip_limit=3, spike_factor=4.0, spike_window=7))
    assert (guard.limit, guard.factor, guard.window) == (3, 4.0, 7)


def test_a_resumed_guard_decides_as_the_first_one_would() -> None:
    guard = fed(StepGuard(limit=3, spike_factor=2.0), [float(i) for i in range(30)])
    fed(guard, [5.0] * 25, "region")
    guard.see(False, 0)
    guard.see(True, 0, spike=True)
    resumed = StepGuard(limit=3, spike_factor=2.0)
    resumed.load_state_dict(json.loads(json.dumps(guard.state_dict())))
    for kind in ("general", "region"):
        assert resumed.loss_limit(kind) == guard.loss_limit(kind) < math.inf
    assert (resumed.nonfinite, resumed.spikes) == (1, 1)
    with pytest.raises(NonFiniteError):
        resumed.see(False, 1)
