"""Whether held-out answers are hidden is said by all ranks together."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from tests.distributed.forked import fork_ranks
from train.answers import check_held_out
from train.recipes_io import find_recipe, load_run_config


def share(*answers: dict[str, float], padding: bool = False) -> list[Any]:
    """One batch of a rank's questions."""
    return [SimpleNamespace(answers=answers, valid=torch.tensor([not padding] * len(answers)))]


def told(shares: list[list[Any]]) -> str:
    from train.losses.gather import rank_and_world

    config = load_run_config(find_recipe("blocksworld-finetune-teacher"), ["data.val=x/val"])[0]
    try:
        check_held_out(config, shares[rank_and_world()[0]])
    except ValueError as error:
        return str(error)
    return ""


def every_case() -> list[str]:
    known, hidden = {"red": 1.0}, {}
    return [
        told([share(hidden, known), share(known, padding=True)]),
        told([share(hidden), share(hidden, known)]),
        told([share(hidden, hidden), share(known, padding=True)]),
    ]


@pytest.mark.world_size(2)
def test_a_rank_with_padding_alone_does_not_refuse_and_all_refuse_alike() -> None:
    first, second = fork_ranks(every_case, 2)
    assert first == second
    assert first[:2] == ["", ""]
    assert "x/val" in first[2] and "hidden" in first[2]
