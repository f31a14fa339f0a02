"""Two ranks: one measures, both hold to what it says, and both hear what went wrong there."""

from __future__ import annotations

from types import SimpleNamespace

import torch

from tests.distributed.spawn import run_ranks
from train.pruning.make import _from_rank_0


def asked_on_both() -> dict:
    rank = torch.distributed.get_rank()
    dist = SimpleNamespace(rank=rank, world_size=2, device=torch.device("cpu"))
    made = _from_rank_0(dist, lambda: {"measured": 2.0 + rank})

    def broken() -> dict:
        raise ValueError(f"too busy on rank {rank}")

    try:
        _from_rank_0(dist, broken)
    except ValueError as error:
        return made | {"told": str(error)}
    return made


def test_what_rank_0_measures_holds_on_all() -> None:
    expected = {"measured": 2.0, "told": "too busy on rank 0"}
    assert run_ranks(asked_on_both, 2) == [expected, expected]
