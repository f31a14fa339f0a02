"""The rank helper itself: results by rank, the failing rank's traceback, and hangs."""

import os

import pytest

from tests.distributed.spawn import RanksFailed, run_ranks
from train.runtime.distributed import all_reduce_flag, barrier, broadcast_object


def talk(offset: int) -> tuple[int, bool, bool, str]:
    rank = int(os.environ["RANK"])
    barrier("here")
    return (
        rank + offset,
        all_reduce_flag(rank == 1),
        all_reduce_flag(False),
        broadcast_object(f"from {rank}", 1),
    )


def fail_on_one() -> None:
    if os.environ["RANK"] == "1":
        raise ValueError("rank one is unwell")
    barrier("a place rank 1 never reaches")


def hang() -> None:
    if os.environ["RANK"] == "0":
        barrier("nobody else comes")
    _wait_forever()


def _wait_forever() -> None:
    import threading

    threading.Event().wait()


def where() -> tuple[str | None, str | None]:
    return os.environ.get("CUDA_VISIBLE_DEVICES"), os.environ.get("DS_ACCELERATOR")


@pytest.fixture(scope="module")
def place() -> tuple[str | None, str | None]:
    return run_ranks(where, 1, init=False)[0]


def test_ranks_run_on_the_cpu_whatever_the_machine_has(
    place: tuple[str | None, str | None],
) -> None:
    assert place == ("", "cpu")


def test_results_by_rank_and_collectives() -> None:
    assert run_ranks(talk, 2, 10) == [(10, True, False, "from 1"), (11, True, False, "from 1")]


def test_failure_names_rank_and_shows_traceback() -> None:
    with pytest.raises(
        RanksFailed, match=r"failed on rank 1[^-]*--- rank 1(.|\n)*rank one is unwell"
    ):
        run_ranks(fail_on_one, 2)


def test_hang_shows_where() -> None:
    with pytest.raises(RanksFailed, match="_wait_forever"):
        run_ranks(hang, 2, timeout=20)
