"""Three rounds of `make chaos`: killed while training, while the files are written and while the
checkpoint is made public, on one and two ranks.
"""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from tests.distributed.chaos import Chaos, Plan, delivered, summary

KILLS = [
    (1, Plan("save write", 2, 0.001)),
    (2, Plan("train", 8, 0.01, victim=1)),
    (1, Plan("save latest", 1, 0.0)),
]


@pytest.mark.slow
@pytest.mark.world_size(2)
@pytest.mark.timeout(600)
def test_killed_runs_end_as_the_undisturbed_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    chaos = Chaos(tmp_path, random.randrange(2**32))
    rounds = []
    for number, (ranks, plan) in enumerate(KILLS):
        monkeypatch.setattr(chaos, "plan", lambda _, plan=plan: plan)
        rounds.append(chaos.round(number, ranks, kills=1))
    result = summary(rounds)
    assert result["problems"] == []
    assert result["kills"] == len(KILLS), "a run was through before its moment came"
    assert result["kills_inside_saving"] >= 1
    assert result["kills_after_the_first_checkpoint"] >= 2


def test_a_batch_that_came_again_and_is_another_is_found(tmp_path: Path) -> None:
    (tmp_path / "delivered_0.log").write_text(f"0 {'a' * 16}\n4 {'b' * 16}\n4 {'b' * 9}")
    assert delivered(tmp_path, 1) == {0: [f"0 {'a' * 16}", f"4 {'b' * 16}"]}
    (tmp_path / "delivered_0.log").write_text(f"0 {'a' * 16}\n4 {'b' * 16}\n4 {'c' * 16}\n")
    with pytest.raises(ValueError, match="position 4 of rank 0"):
        delivered(tmp_path, 1)
