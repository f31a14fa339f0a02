"""The job folder: what ranks report, and the verdict; words and variables that travel."""

import json
import os
import subprocess
import sys
from argparse import Namespace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from launchers import hostfile, job
from launchers.main import _lost_hosts
from launchers.processes import ranks_of
from launchers.supervise import Plan, supervise
from tests.distributed.spawn import ROOT
from train.runtime import report


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv(job.JOB, str(tmp_path))
    return tmp_path


def as_rank(monkeypatch: pytest.MonkeyPatch, rank: int, text: str) -> None:
    monkeypatch.setenv("RANK", str(rank))
    monkeypatch.setattr(report, "_PLACE", report._Place())
    report.at(text)


def test_a_launcher_that_says_0_is_not_believed(folder: Path) -> None:
    verdict = job.judge(folder, 0)
    assert verdict.code == 1
    assert "no rank reported the end" in verdict.lines[-1]
    assert job.judge(folder, 0, ranks_report=False).code == 0


@pytest.mark.parametrize(("told", "launcher"), [(0, 250), (75, 1), (75, 0), (0, -9)])
def test_the_ranks_outcome_counts(folder: Path, told: int, launcher: int) -> None:
    report.ended(told)
    assert job.judge(folder, launcher).code == told


def test_only_the_first_rank_of_a_machine_reports(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LOCAL_RANK", "1")
    report.ended(0)
    assert job.judge(folder, 0).code == 1


def test_a_verb_without_a_group_leaves_in_order(folder: Path) -> None:
    report.left(0)
    assert job.judge(folder, 0).code == 0
    assert job.judge(folder, 1).code == 1  # another rank did not


def test_the_first_failure_is_told_with_its_traceback(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "excepthook", sys.__excepthook__)
    as_rank(monkeypatch, 1, "general step 7")
    assert report.failed(ArithmeticError("the true cause"))
    assert "the true cause" in capsys.readouterr().err
    as_rank(monkeypatch, 0, "general step 7")
    echo = RuntimeError("Connection closed by peer")
    assert not report.failed(echo)
    sys.excepthook(RuntimeError, echo, None)
    told = capsys.readouterr().err
    assert "another rank failed" in told
    assert "Traceback" not in told
    lines = job.judge(folder, 1).lines
    assert lines[0].startswith("rank 1 on ")
    assert lines[0].endswith("failed first, at: general step 7")
    assert "the true cause" in lines[1]
    assert len(lines) == 2


def test_a_killed_rank_is_named_before_its_echo(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "excepthook", sys.__excepthook__)
    as_rank(monkeypatch, 3, "the checkpoint of step 20")
    as_rank(monkeypatch, 0, "the checkpoint of step 20")
    report.failed(RuntimeError("gloo: Connection reset by peer"))
    silent, echo = job.judge(folder, 137).lines
    assert silent.startswith("rank 3 (pid ")
    assert "last seen at: the checkpoint of step 20" in silent
    assert echo.startswith("rank 0 on ")


def test_a_timeout_says_where_every_rank_was(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "excepthook", sys.__excepthook__)
    as_rank(monkeypatch, 1, "the validation of step 100")
    as_rank(monkeypatch, 0, "general step 100")
    report.failed(RuntimeError("Timed out waiting 600000ms for recv operation"))
    told = capsys.readouterr().err
    assert "rank 0" in told and "at: general step 100" in told
    assert "rank 1" in told and "at: the validation of step 100" in told


def test_a_place_is_always_one_whole_line(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    as_rank(monkeypatch, 2, "x" * 1000)
    report.at("short")
    assert json.loads((folder / "rank_0002").read_text())["at"] == "short"


def test_without_a_job_folder_nothing_breaks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(job.JOB, "/nowhere/at/all")
    as_rank(monkeypatch, 0, "general step 1")
    report.ended(0)
    assert report.places()[0].endswith("at: general step 1")


def test_ranks_are_found_without_their_workers(tmp_path: Path) -> None:
    worker = "import os, signal; print(os.getpid(), flush=True); signal.pause()"
    rank = (
        "import os, subprocess, sys; print(os.getpid(), flush=True);"
        f"subprocess.run([sys.executable, '-c', {worker!r}])"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", rank],
        env=os.environ | {"RANK": "1", job.JOB: str(tmp_path)},
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    pids = [int(process.stdout.readline()) for _ in range(2)]
    try:
        assert ranks_of(tmp_path) == pids[:1]
        assert ranks_of(tmp_path / "other") == []
        told = [sys.executable, "-m", "launchers.tell", str(tmp_path), "SIGKILL"]
        assert subprocess.run(told, cwd=ROOT, check=False).returncode == 0
        assert process.wait(30) == -9
    finally:
        process.kill()
        os.kill(pids[1], 9)
        process.stdout.close()


def arrived(word: str) -> str:
    """The word after DeepSpeed's quoting, pdsh's replacements and the other machine's shell."""
    given_ = hostfile.remote_word(word)
    if " " in given_:  # PDSHRunner.parse_user_args
        given_ = '"{}"'.format(given_.replace('"', '\\"'))
    line = given_.replace("%%", "\0")
    assert "%" not in line  # pdsh would replace it
    line = line.replace("\0", "%")
    done = subprocess.run(
        ["/bin/sh", "-c", f"printf %s {line}"], capture_output=True, text=True, check=True
    )
    return done.stdout


@pytest.mark.parametrize(
    "word",
    ["a=b", "x y", "%n", "50% $HOME `id`", "a;b", "it's", 'say "hi" \\', "a\\b", "[{a: 1}]", "*"],
)
def test_words_arrive_unchanged(word: str) -> None:
    assert arrived(word) == word


@settings(max_examples=25, deadline=None)
@given(st.text(st.characters(min_codepoint=32, max_codepoint=126), min_size=1, max_size=12))
def test_any_word_arrives_unchanged(word: str) -> None:
    assert arrived(word) == word


def test_the_environment_travels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    users = tmp_path / "users"
    users.write_text("# a comment\n\nNCCL_DEBUG = INFO\nMY_NAME=a=b\n")
    for name, value in {"DS_ENV_FILE": str(users), "NCCL_IB_HCA": "mlx5", "HF_HOME": "/a $b",
                        "NCCL_DEBUG": "WARN", "SECRET": "x"}.items():  # fmt: skip
        monkeypatch.setenv(name, value)
    path = hostfile._environment_file({"PYTHONPATH": "/p"}, tmp_path)
    lines = dict(line.split("=", 1) for line in Path(path).read_text().splitlines())
    assert lines["NCCL_DEBUG"] == "INFO"  # the user's file wins
    assert lines["MY_NAME"] == "a=b"
    assert lines["NCCL_IB_HCA"] == "mlx5"
    assert lines["HF_HOME"] == "/a \\$b"
    assert lines[job.JOB] == str(tmp_path)
    assert "SECRET" not in lines
    assert job.LAUNCHER not in lines  # its number means nothing on another machine
    monkeypatch.setenv("HF_HOME", "a\nb")
    with pytest.raises(ValueError, match="HF_HOME has a line break"):
        hostfile._environment_file({}, tmp_path)


def test_secrets_do_not_travel(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    """DeepSpeed would put them into command lines, which every user of the machine can read."""
    users = tmp_path / "users"
    users.write_text("MY_SECRET_NAME=hidden\nmy_password=hidden\n")
    for name in ("HF_TOKEN", "WANDB_API_KEY", "HF_hub_token"):
        monkeypatch.setenv(name, "hidden")
    monkeypatch.setenv("DS_ENV_FILE", str(users))
    monkeypatch.setenv("HF_TOKEN_PATH", "/home/me/token")
    hostfile._tell_secrets.cache_clear()
    for _ in range(2):  # a start and a restart
        text = Path(hostfile._environment_file({}, tmp_path)).read_text()
        assert "hidden" not in text and "HF_TOKEN_PATH=/home/me/token" in text
    said = capsys.readouterr().err
    assert said.count("not sent to the other machines") == 1 and "hidden" not in said
    for name in ("HF_TOKEN", "WANDB_API_KEY", "HF_hub_token", "MY_SECRET_NAME", "my_password"):
        assert name in said


def test_a_restart_leaves_out_lost_machines(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "machines"
    path.write_text("a slots=2\nb slots=2\nc slots=2\n")
    options = Namespace(hostfile=str(path), min_nodes=2, node_rank=None, per_node=None,
                        processes=6, master_addr="a", port=None, launcher_option=[],
                        dry_run=True)  # fmt: skip
    monkeypatch.setattr(hostfile, "answering", lambda hosts: {"a", "c"})
    lost = _lost_hosts(options)
    assert lost == {"b"}
    argv = hostfile.plan(options, ["distill", "x"], tmp_path, lost).argv
    assert argv[argv.index("--num_nodes") + 1] == "2"
    assert Path(argv[argv.index("--hostfile") + 1]).read_text() == "a slots=2\nc slots=2\n"
    monkeypatch.setattr(hostfile, "answering", lambda hosts: {"a"})
    with pytest.raises(ValueError, match="only 1 of 3 machines answer"):
        _lost_hosts(options)


def test_each_start_has_a_new_folder_that_goes_away(tmp_path: Path) -> None:
    seen: list[Path] = []

    def make(folder: Path) -> Plan:
        assert folder.is_dir()
        seen.append(folder)
        return Plan([sys.executable, "-c", "raise SystemExit(3)"])

    assert supervise(make, restarts=1, jobs=tmp_path / "jobs") == 3
    assert len(set(seen)) == 2
    assert not (tmp_path / "jobs").exists()
