"""The commands `espalier launch` starts, and its complaints."""

import shlex
import subprocess
from pathlib import Path

import pytest

from launchers import local
from launchers.hostfile import read_hostfile
from launchers.main import run


@pytest.fixture(autouse=True)
def plain_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    """No GPU, no scheduler, whatever this machine has."""
    monkeypatch.setattr(local, "has_gpu", lambda: False)
    for name in ("SLURM_JOB_ID", "CUDA_VISIBLE_DEVICES", "DS_ACCELERATOR", "OMP_NUM_THREADS"):
        monkeypatch.delenv(name, raising=False)


def printed(capsys: pytest.CaptureFixture[str], *arguments: str) -> list[str]:
    assert run([*arguments]) == 0
    return shlex.split(capsys.readouterr().out)


def test_local(capsys: pytest.CaptureFixture[str]) -> None:
    words = printed(
        capsys, "-n", "2", "--dry-run", "--", "distill", "demo", "optim.lr=1e-4", "--resume", "auto"
    )
    start = words.index("--num_accelerators")
    assert words[start - 1].endswith("deepspeed")
    assert words[start + 1] == "2"
    module = words.index("--module")
    assert words[module + 1 :] == [
        "train.main",
        "distill",
        "demo",
        "optim.lr=1e-4",
        "--resume",
        "auto",
    ]
    assert "DS_ACCELERATOR=cpu" in words
    assert any(word.startswith("OMP_NUM_THREADS=") for word in words)


def test_command_without_the_dashes(capsys: pytest.CaptureFixture[str]) -> None:
    assert printed(capsys, "-n", "2", "--dry-run", "distill", "demo")[-2:] == ["distill", "demo"]


def test_gpu_choice_is_kept(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(local, "has_gpu", lambda: True)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,6,7")
    words = printed(capsys, "-n", "2", "--dry-run", "--", "distill", "demo")
    assert words[words.index("--include") + 1] == "localhost:4,6"
    assert not any(word.startswith("DS_ACCELERATOR") for word in words)
    assert run(["-n", "4", "--dry-run", "--", "distill", "demo"]) == 2
    assert "CUDA_VISIBLE_DEVICES shows 3" in capsys.readouterr().err


def test_mpi(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    words = printed(capsys, "--mpi", "-n", "3", "--dry-run", "--", "distill", "demo")
    assert words[words.index("-n") + 1] == "3"
    assert words[-4:] == ["-m", "train.main", "distill", "demo"]
    assert "PYTHONPATH" in words


def test_data_verbs_spread_through_mpi_only(capsys: pytest.CaptureFixture[str]) -> None:
    words = printed(capsys, "--mpi", "-n", "4", "--dry-run", "--", "data", "index", "folder")
    assert words[words.index("-n") + 1] == "4"
    assert words[-5:] == ["-m", "train.main", "data", "index", "folder"]
    for arguments, complaint in (
        (["-n", "2", "--dry-run", "--", "data", "index", "folder"], "launch --mpi -- data index"),
        (["--slurm", "--dry-run", "--", "data", "index", "folder"], "launch --mpi -- data index"),
        (["--mpi", "-n", "2", "--dry-run", "--", "data", "verify", "x"], "espalier data verify x"),
    ):
        assert run(arguments) == 2
        assert complaint in capsys.readouterr().err


def test_slurm_script(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = [
        "--slurm",
        "-n",
        "16",
        "--per-node",
        "8",
        "--max-restarts",
        "3",
        "--sbatch",
        "time=4:00:00",
    ]
    assert (
        run(
            [
                *arguments,
                "--array",
                "--dry-run",
                "--",
                "distill",
                "a.yaml",
                "b.yaml",
                "log.wandb=x y",
            ]
        )
        == 0
    )
    script = capsys.readouterr().out
    for line in (
        "#SBATCH --ntasks=16",
        "#SBATCH --ntasks-per-node=8",
        "#SBATCH --array=0-1",
        "#SBATCH --time=4:00:00",
        "#SBATCH --signal=TERM@300",
        "#SBATCH --requeue",
    ):
        assert line in script.splitlines()
    assert "@" not in script.replace("TERM@300", "")
    assert "DS_ACCELERATOR" not in script  # the node decides
    assert "-m train.main distill b.yaml 'log.wandb=x y' ;;" in script


STAND_INS = {
    "srun": 'n=$(cat "$DIR/n"); echo $((n + 1)) > "$DIR/n"; exit $(sed -n "$((n + 1))p" "$DIR/codes")',
    "scontrol": 'echo "$@" > "$DIR/queued"',
}


@pytest.mark.parametrize(
    ("codes", "starts", "code", "requeued"),
    [
        ((0,), 1, 0, False),
        ((75,), 1, 75, True),
        ((2,), 1, 2, False),
        ((1, 137, 75), 3, 75, True),
        ((1, 1, 1, 0), 3, 1, False),
    ],
)
def test_slurm_script_runs(
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    codes: tuple[int, ...],
    starts: int,
    code: int,
    requeued: bool,
) -> None:
    """The script itself, with srun and scontrol replaced: two restarts, a stop is queued again."""
    arguments = ["--slurm", "-n", "2", "--max-restarts", "2", "--dry-run"]
    assert run([*arguments, "--", "distill", "a.yaml"]) == 0
    (tmp_path / "job.sh").write_text(capsys.readouterr().out)
    for name, text in STAND_INS.items():
        (tmp_path / name).write_text(f"#!/bin/sh\n{text}\n")
        (tmp_path / name).chmod(0o755)
    (tmp_path / "n").write_text("0")
    (tmp_path / "codes").write_text("".join(f"{c}\n" for c in codes))
    environment = {"PATH": f"{tmp_path}:/usr/bin:/bin", "DIR": str(tmp_path), "SLURM_JOB_ID": "7"}
    done = subprocess.run(["bash", str(tmp_path / "job.sh")], env=environment, check=False)
    assert done.returncode == code
    assert int((tmp_path / "n").read_text()) == starts
    assert (tmp_path / "queued").exists() == requeued
    if requeued:
        assert (tmp_path / "queued").read_text() == "requeue 7\n"


def test_slurm_inside_an_allocation(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SLURM_JOB_ID", "1")
    words = printed(capsys, "--slurm", "-n", "4", "--dry-run", "--", "distill", "demo")
    assert "srun" in words
    assert "--ntasks=4" in words
    assert "--wait=0" in words  # a rank may measure on when the others have left


def test_array_makes_one_job_per_recipe(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["--array", "--dry-run", "--", "distill", "a", "b", "seed=3"]) == 0
    lines = [shlex.split(line) for line in capsys.readouterr().out.splitlines()]
    assert [line[-3:] for line in lines] == [["distill", "a", "seed=3"], ["distill", "b", "seed=3"]]


def test_hostfile(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "hosts"
    path.write_text("# two machines\nnode0 slots=4\n\nnode1 slots=4  # the other\n")
    assert read_hostfile(path) == {"node0": 4, "node1": 4}
    words = printed(
        capsys, "--hostfile", str(path), "-n", "8", "--dry-run", "--", "distill", "demo"
    )
    assert words[words.index("--num_nodes") + 1] == "2"
    assert words[words.index("--num_accelerators") + 1] == "4"
    assert run(["--hostfile", str(path), "-n", "6", "--dry-run", "--", "distill", "demo"]) == 2


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("node0\n", "hosts:1: expected `host slots=N`, found 'node0'"),
        ("node0 slots=0\n", "hosts:1"),
        ("node0 slots=2\nnode0 slots=2\n", "hosts:2: host node0 is named twice"),
        ("# nobody\n", "no host in it"),
    ],
)
def test_bad_hostfile(
    tmp_path: Path, text: str, complaint: str, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "hosts"
    path.write_text(text)
    assert run(["--hostfile", str(path), "--", "distill", "demo"]) == 2
    assert complaint in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["--hostfile", "/nowhere/hosts", "--", "distill", "x"], "/nowhere/hosts does not exist"),
        (["-n", "2"], "expected a verb"),
        (["-n", "2", "--", "train", "x"], "not 'train'"),
        (["--array", "--", "distill", "seed=1"], "--array needs recipes"),
    ],
)
def test_wrong_usage(
    arguments: list[str], complaint: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(arguments) == 2
    assert complaint in capsys.readouterr().err
