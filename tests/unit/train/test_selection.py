"""Which steps count for `checkpoint.best`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.distributed.stand_in import tiny_config
from train.checkpoint.retention import Best, best_first
from train.checkpoint.selection import first_judged


@pytest.mark.parametrize(
    ("sections", "first"),
    [
        ({}, 0),
        ({"prune": {"freeze_step": None}}, 20),
        ({"prune": {"freeze_step": 12}}, 13),  # at 12 the structure is not fixed yet
        ({"prune": {"freeze_step": 20}}, 20),
        ({"trim": {"warmup": 0.1, "ramp": 0.4}}, 11),
        ({"trim": {"warmup": 0.5, "ramp": 0.5}}, 20),
    ],
)
def test_the_first_step_whose_validation_counts(
    tmp_path: Path, sections: dict[str, Any], first: int
) -> None:
    config = tiny_config(tmp_path, **sections)
    assert first_judged(config) == first
    if config.trim is not None and first < 20:
        target, steps = config.trim.target, config.optim.steps
        assert target(first - 1, steps) == config.trim.budget < target(first - 2, steps)


def test_validations_before_the_first_step_that_counts_are_no_best() -> None:
    best = Best("accuracy", first=5)
    assert not best.see(4, {"accuracy": 0.9})
    assert best.score_at(4) is None and best.value is None
    assert best.see(5, {"accuracy": 0.3}) and best.see(7, {"accuracy": 0.4})
    assert (best.step, best.value) == (7, 0.4)
    later = Best("accuracy", first=8)  # more steps: the ramp ends later
    later.load_state_dict(best.state_dict())
    assert later.value is None
    manifests = [
        {"step": step, "score": {"name": "accuracy", "value": value}}
        for step, value in ((4, 0.9), (5, 0.4), (6, 0.5), (7, 0.5))
    ]
    manifests.append({"step": 8, "score": None})
    scores = best.scores_of(manifests)
    assert scores == {4: None, 5: 0.4, 6: 0.5, 7: 0.5, 8: None}
    assert best_first(scores, "accuracy") == [6, 7, 5]
    assert best_first(scores, "loss") == [5, 6, 7]
