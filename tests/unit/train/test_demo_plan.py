"""The demo's plan, its resumption, and the summary's arithmetic; the stages themselves do not run
here.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import pytest

from train import demo
from train.evaluation import commands as evaluation
from train.export import commands as export
from train.export.summary import summarise
from train.recipes_io import find_recipe, load_run_config


@pytest.fixture
def plan(tmp_path: Path) -> demo.Plan:
    return demo.make_plan(tmp_path, Path("t"), Path("v"), False, [Path("t/scenes-train.npy")])


def test_every_training_stage_resolves_with_its_overrides(plan: demo.Plan, tmp_path: Path) -> None:
    stages = {stage.name: stage for stage in plan.stages if stage.recipe}
    assert list(stages) == ["distill", "finetune", "prune"]
    for quick in (False, True):
        for stage in demo.make_plan(tmp_path, Path("t"), Path("v"), quick, []).stages:
            if stage.recipe is None:
                continue
            at = stage.argv.index(stage.recipe)
            assert stage.argv[at - 1] == stage.name
            config, _ = load_run_config(find_recipe(stage.recipe), list(stage.argv[at + 1 :]))
            assert config.stage == stage.name
            assert config.out == str(tmp_path / stage.name)
            assert config.teacher.path == ("t" if stage.name == "distill" else "v")
            assert not quick or config.optim.steps < 10
    assert stages["distill"].argv[:4] == ("launch", "-n", "2", "--")
    config, _ = load_run_config(find_recipe("blocksworld-distill"), [])
    assert config.engine.config == "zero2"
    config, _ = load_run_config(find_recipe("blocksworld-prune"), [])
    assert config.prune is not None and config.prune.sparsity == 0.35


def test_every_other_stage_is_a_command_that_parses(plan: demo.Plan) -> None:
    from data_pipeline import commands as data

    parser = argparse.ArgumentParser()
    verbs = parser.add_subparsers(required=True)
    for room in (data, evaluation, export):
        room.add_parsers(verbs)
    for stage in plan.stages:
        if stage.recipe is None:
            parser.parse_args(stage.argv)


def test_test_split_holds_ten_thousand_questions(plan: demo.Plan) -> None:
    argv = plan.stages[0].argv
    assert int(argv[argv.index("--test") + 1]) * 8 >= 10_000
    assert argv[argv.index("--exclude") + 1] == "t/scenes-train.npy"
    assert argv[argv.index("--image-size") + 1] == "48"


class Recorder:
    def __init__(self, code: int = 0, makes: Path | None = None) -> None:
        self.code, self.makes, self.calls = code, makes, 0

    def __call__(self, command, log) -> int:
        assert isinstance(command, tuple) and all(isinstance(part, str) for part in command)
        self.calls += 1
        if self.makes is not None:
            self.makes.mkdir(exist_ok=True)
        return self.code


STAGE = demo.Stage("prune", "prune", ("prune", "recipe"), ("prune",))


def test_a_finished_stage_is_skipped_until_its_identity_changes(tmp_path: Path) -> None:
    run = Recorder(makes=tmp_path / "prune")
    ticks = iter([0.0, 5.0, 10.0, 17.0])
    clock = lambda: next(ticks)  # noqa: E731
    assert demo.run_stage(STAGE, tmp_path, "one", "", run, clock) == (0, 5.0)
    assert demo.run_stage(STAGE, tmp_path, "one", "", run, clock) == (0, 5.0)
    assert run.calls == 1
    (tmp_path / "prune" / "old").touch()
    assert demo.run_stage(STAGE, tmp_path, "two", "", run, clock) == (0, 7.0)
    assert run.calls == 2 and not (tmp_path / "prune" / "old").exists()


def test_an_interrupted_stage_goes_on_from_what_it_left(tmp_path: Path) -> None:
    run = Recorder(code=75, makes=tmp_path / "prune")
    assert demo.run_stage(STAGE, tmp_path, "one", "", run)[0] == 75
    (tmp_path / "prune" / "checkpoint").touch()
    run.code = 0
    assert demo.run_stage(STAGE, tmp_path, "one", "", run)[0] == 0
    assert run.calls == 2 and (tmp_path / "prune" / "checkpoint").exists()


def test_a_stage_whose_results_were_removed_runs_again(tmp_path: Path) -> None:
    run = Recorder(makes=tmp_path / "prune")
    demo.run_stage(STAGE, tmp_path, "one", "", run)
    (tmp_path / "prune").rmdir()
    demo.run_stage(STAGE, tmp_path, "one", "", run)
    assert run.calls == 2


def test_a_failing_stage_names_its_log(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert demo.run_stage(STAGE, tmp_path, "one", "", Recorder(code=3))[0] == 3
    assert str(tmp_path / "logs" / "prune.log") in capsys.readouterr().err


def test_identities_depend_on_everything_before(tmp_path: Path) -> None:
    one = demo._identities(demo.make_plan(tmp_path, Path("t"), Path("v"), False, []), [])
    two = demo._identities(demo.make_plan(tmp_path, Path("t"), Path("w"), False, []), [])
    assert one["data"] == two["data"] and one["distill"] == two["distill"]
    assert one["finetune"] != two["finetune"] and one["bench"] != two["bench"]


def test_missing_teacher_is_wrong_usage(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert demo.main(["--out", str(tmp_path), "--teacher", str(tmp_path / "none")]) == 2
    assert "--teacher" in capsys.readouterr().err


def measured(params: int, prunable: int, one: float, many: float) -> dict:
    row = {"q1": 0.0, "q3": 9.0, "repeats": 40.0, "seconds": [1.0]}
    latency = {"1": {"median": one} | row, "32": {"median": many} | row}
    counts = {"total": params, "prunable": prunable}
    return {"latency": latency, "parameters": counts, "macs": {"total": 7 * params}}


def test_summary_has_the_agreed_keys_and_numbers() -> None:
    bench = {
        "device": "cpu",
        "threads": 2,
        "repeats": 40,
        "top_k": 4,
        "models": {
            "teacher": measured(100, 80, 8.0, 90.0),
            "student": measured(60, 40, 5.0, 50.0),
            "pruned": measured(46, 26, 4.0, 30.0),
        },
    }
    scores = {
        "teacher": {"accuracy": 0.9, "accuracy/count": 0.8, "accuracy_count": 12.0}
        | {"blind_accuracy": 0.5, "blind_accuracy/count": 0.4},
        "student": {"accuracy": 0.88, "accuracy/count": 0.8, "accuracy_count": 12.0},
        "pruned": {"accuracy": 0.87, "accuracy/count": 0.7, "accuracy_count": 12.0},
    }
    found = summarise(scores, bench, 60.0)
    assert set(found) == {"task", "device", "models", "retention", "speedup", "seconds", "details"}
    assert found["models"]["pruned"] == {
        "params": 46,
        "params_prunable": 26,
        "accuracy": 0.87,
        "blind_accuracy": 0.5,
        "macs": 322,
        "latency_ms": {"1": 4.0, "32": 30.0},
    }
    assert found["retention"] == pytest.approx(0.87 / 0.9)
    assert found["speedup"] == {"1": 2.0, "32": 3.0}
    details = found["details"]
    assert details["retention_above_blind"] == pytest.approx(0.37 / 0.4)
    assert details["sparsity"]["exported"] == pytest.approx(0.35)
    assert details["accuracy_by_type"]["blind"] == {"count": 0.4}
    assert "seconds" not in details["latency"]["pruned"]["1"]
