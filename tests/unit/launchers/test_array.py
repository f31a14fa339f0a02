"""Queues: which jobs there are, what is done, what goes on, and the table; no stage runs here."""

from __future__ import annotations

import csv
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from launchers import array
from launchers.array import Job, Queue, read_jobs, run_local
from launchers.main import run
from launchers.results import results


@pytest.fixture(autouse=True)
def recipes(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Recipes are not read: NAME.yaml writes to runs/NAME."""

    def resolved(job: Job) -> Job:
        out = job.out or f"runs/{Path(job.command[1]).stem}"
        return Job(job.name, job.command, out) if job.command[0] in array.STAGES else job

    monkeypatch.setattr(array, "resolved", resolved)
    monkeypatch.chdir(tmp_path)


def jobs_of(*words: str) -> list[Job]:
    return read_jobs(words, None, Path("queue"))


def test_jobs_with_overrides_of_their_own() -> None:
    plain, mixed = jobs_of("prune", "vqa.yaml", "vqa.yaml,prune.sparsity=0.2,x=[1,2]", "seed=3")
    assert plain.command == ("prune", "vqa.yaml", "seed=3") and plain.out is None
    assert mixed.command[:5] == ("prune", "vqa.yaml", "seed=3", "prune.sparsity=0.2", "x=[1,2]")
    assert mixed.out is not None and mixed.command[5] == f"out={mixed.out}"
    assert Path(mixed.out).parent == Path("queue") and "sparsity=0.2" in mixed.out
    named = jobs_of("prune", "vqa.yaml,out=here")[0]
    assert named.out == "here" and named.command[-1] == "out=here"
    a, b = jobs_of("prune", "a/x.yaml", "b/x.yaml")
    assert a.name != b.name


def test_jobs_from_a_list(tmp_path: Path) -> None:
    (tmp_path / "list").write_text(
        "# all tasks\nfinetune vqa.yaml out='runs/a b'\n\neval runs/a --task vqa  # then\n"
    )
    first, second = read_jobs(["seed=1"], "list", Path("queue"))
    assert first.command == ("finetune", "vqa.yaml", "out=runs/a b", "seed=1")
    assert first.out == "runs/a b" and second.command[:2] == ("eval", "runs/a")
    with pytest.raises(FileNotFoundError, match="--jobs nowhere"):
        read_jobs([], "nowhere", Path("queue"))


@pytest.mark.parametrize(
    ("words", "complaint"),
    [
        (("prune",), "needs recipes"),
        (("prune", "a", "a"), "listed twice"),
        (("prune", "a,out=x", "b,out=./x"), "both write to"),
    ],
)
def test_lists_that_make_no_sense(words: tuple[str, ...], complaint: str) -> None:
    with pytest.raises(ValueError, match=complaint):
        jobs_of(*words)


def test_two_recipes_of_one_run_directory_are_found_before_a_job_starts() -> None:
    with pytest.raises(ValueError, match="both write to runs/x"):
        Queue(Path("queue")).prepare(jobs_of("prune", "x.yaml", "y.yaml,out=runs/x"))


class Machine:
    """Runs jobs by a script of exit codes, and makes their models."""

    def __init__(self, *codes: int, told_at: int | None = None) -> None:
        self.codes, self.told_at, self.ran = list(codes), told_at, []

    def __call__(self, job: Job) -> tuple[int, bool]:
        self.ran.append(Path(job.command[1]).stem)
        code = self.codes.pop(0)
        if code == 0 and job.out:
            model = Path(job.out, "model")
            model.mkdir(parents=True, exist_ok=True)
            (model / "config.json").write_text("{}")
        return code, len(self.ran) == self.told_at


def test_failures_stop_nobody_and_what_is_done_is_skipped(
    capsys: pytest.CaptureFixture[str],
) -> None:
    jobs, queue = jobs_of("prune", "a", "b", "c"), Queue(Path("queue"))
    first = Machine(0, 1, 0)
    assert run_local(queue, jobs, first) == 1 and first.ran == ["a", "b", "c"]
    out = capsys.readouterr().out
    assert "1 of 3 jobs failed: prune-b" in out
    again = Machine(0)
    assert run_local(queue, jobs, again) == 0 and again.ran == ["b"]
    assert "failed" not in capsys.readouterr().out
    # Another command is another job, and so is one whose model is gone.
    Path("runs/a/model/config.json").unlink()
    third = Machine(0, 0)
    assert run_local(queue, jobs_of("prune", "a", "b", "c,seed=2"), third) == 0
    assert third.ran == ["a", "c"]


def test_a_stopped_job_goes_on_and_a_signal_stops_the_queue() -> None:
    jobs, queue = jobs_of("prune", "a", "b"), Queue(Path("queue"))
    machine = Machine(75, 75, 0, 75, told_at=4)
    assert run_local(queue, jobs, machine) == 75
    assert machine.ran == ["a", "a", "a", "b"]
    assert queue.state(jobs[0])["starts"] == 3 and queue.state(jobs[1])["code"] == 75
    last = Machine(0)
    assert run_local(queue, jobs, last) == 0 and last.ran == ["b"]


def test_a_job_that_always_stops_does_not_keep_the_queue_for_ever() -> None:
    machine = Machine(*[75] * 100, 0)
    assert run_local(Queue(Path("queue")), jobs_of("prune", "a"), machine) == 75
    assert len(machine.ran) == array._RESUMES


def test_the_table_has_metrics_sparsity_and_speed() -> None:
    jobs, queue = jobs_of("prune", "a", "b"), Queue(Path("queue"))
    run_local(queue, jobs, Machine(0, 2))
    home = Path("runs/a")
    lines = [
        {"step": 1, "validation": {"r_mean": 0.25}},
        {"step": 2, "validation": {"r_mean": 0.5, "accuracy/colour": 1.0, "accuracy_count": 9}},
        {"step": 3, "loss": {"total": 1.0}},
    ]
    (home / "metrics.jsonl").write_text("\n".join(map(json.dumps, lines)) + '\n{"step": 4, "val')
    (home / "sparsity.json").write_text(json.dumps({"prunable": {"sparsity": 0.251}}))
    (home / "eval.json").write_text(json.dumps({"model": "x", "accuracy": 0.75}))
    bench = {
        "models": {
            "teacher": {"folder": "/elsewhere", "latency": {"32": {"median": 9.0}}},
            "slim": {"folder": str((home / "model").resolve()), "latency": {"32": {"median": 4.0}}},
        },
        "speedup": {"slim": {"32": {"whole": {"median": 2.25}}}},
    }
    (home / "bench.json").write_text(json.dumps(bench))
    text = queue.table()
    rows = json.loads(Path("queue/table.json").read_text())
    expected = {"r_mean": 0.5, "accuracy": 0.75, "sparsity": 0.251, "ms@32": 4.0, "x@32": 2.25}
    assert {name: rows[0][name] for name in expected} == expected == results(home)
    assert rows[1] == {"job": "prune-b", "state": "failed (2)", "minutes": 0.0}
    (home / "selected.json").write_text(json.dumps({"metric": "r_mean", "step": 1}))
    assert results(home) == expected | {"r_mean": 0.25}, "not of the model that was written"
    with Path("queue/table.csv").open() as file:
        assert [row["x@32"] for row in csv.DictReader(file)] == ["2.25", ""]
    head, first, second = text.splitlines()[:3]
    assert head.split() == ["job", "state", "minutes", *expected]
    assert "2.25" in first and second.split()[-1] == "-"


def test_slurm_script_of_a_queue(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """sbatch is given an array, then a job for the table; the array's script itself skips what is
    done and notes what ended.
    """
    tools = tmp_path / "tools"
    tools.mkdir()
    programs = {
        "sbatch": 'echo "$@" >> "$DIR/asked"; cat > "$DIR/script.$(wc -l < "$DIR/asked")"; echo 41',
        "srun": 'echo "$@" >> "$DIR/ran"; exit 3',
        "scontrol": "exit 0",
    }
    for name, text in programs.items():
        (tools / name).write_text(f"#!/bin/sh\n{text}\n")
        (tools / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{tools}:{os.environ['PATH']}")
    monkeypatch.setenv("DIR", str(tmp_path))
    monkeypatch.delenv("SLURM_JOB_ID", raising=False)
    assert run(["--slurm", "--array", "--queue", "queue", "--", "prune", "a", "b"]) == 0
    asked = (tmp_path / "asked").read_text().splitlines()
    assert asked[0] == "--parsable" and "--dependency=afterany:41" in asked[1]

    def task(number: int) -> int:
        environment = os.environ | {"SLURM_ARRAY_TASK_ID": str(number), "SLURM_JOB_ID": "41"}
        script = str(tmp_path / "script.1")
        return subprocess.run(["bash", script], env=environment, check=False).returncode

    queue = Queue(Path("queue"))
    first, second = queue.jobs()
    queue.ended(first, 0)
    Path("runs/a/model").mkdir(parents=True)
    Path("runs/a/model/config.json").write_text("{}")
    assert task(0) == 0 and not (tmp_path / "ran").exists()
    assert task(1) == 3 and queue.state(second)["code"] == 3
    table = subprocess.run(
        ["bash", str(tmp_path / "script.2")], capture_output=True, text=True, check=True
    )
    assert "failed (3)" in table.stdout and sys.executable in (tmp_path / "script.2").read_text()
