"""The pool of ranks: the processes stay, results come by rank, and a failure does not spread."""

import os

import pytest

from tests.distributed.pool import RankPool
from tests.distributed.spawn import RanksFailed
from train.runtime.distributed import all_reduce_flag, barrier

pytestmark = pytest.mark.world_size(2)


def who() -> tuple[int, int, bool]:
    rank = int(os.environ["RANK"])
    return os.getpid(), rank, all_reduce_flag(rank == 1)


def fail_on_one() -> None:
    if os.environ["RANK"] == "1":
        raise ValueError("rank one is unwell")
    barrier("a place rank 1 never reaches")


def hang() -> None:
    if os.environ["RANK"] == "0":
        _wait_forever()


def die() -> None:
    os._exit(3)


def _wait_forever() -> None:
    import threading

    threading.Event().wait()


def test_ranks_stay_and_a_failure_brings_new_ones() -> None:
    with RankPool(2) as pool:
        first, second = pool.run(who), pool.run(who)
        assert first == second and [entry[1:] for entry in first] == [(0, True), (1, True)]
        with pytest.raises(RanksFailed, match=r"rank 1 of 2(.|\n)*rank one is unwell"):
            pool.run(fail_on_one)
        third = pool.run(who)
        assert {entry[0] for entry in third}.isdisjoint(entry[0] for entry in first)
        with pytest.raises(RanksFailed, match=r"rank 0 of 2(.|\n)*_wait_forever"):
            pool.run(hang, timeout=3)
        with pytest.raises(RanksFailed, match="the process is gone"):
            pool.run(die)
    assert not pool._processes
