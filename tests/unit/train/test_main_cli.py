"""The command line: exit codes, one message for bad input, lazy imports."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from train import main as cli

VERBS = [
    "data", "pretrain", "distill", "finetune", "prune", "launch",
    "eval", "bench", "predict", "export", "report", "doctor", "config",
]  # fmt: skip


def test_help_lists_every_verb(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["--help"]) == 0
    shown = capsys.readouterr().out
    assert all(f"\n  {verb} " in shown for verb in VERBS)
    assert "local_rank" not in shown


@pytest.mark.parametrize("verb", VERBS)
def test_each_verb_explains_itself_with_an_example(
    verb: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main([verb, "--help"]) == 0
    shown = capsys.readouterr().out
    assert "example" in shown and f"espalier {verb}" in shown


@pytest.mark.parametrize("arguments", [["--help"], ["distill", "--help"], ["config", "show", "x"]])
def test_asking_imports_no_torch(arguments: list[str]) -> None:
    program = (
        "import sys; from train.main import main; main(sys.argv[1:]);"
        "sys.exit('torch' in sys.modules or 'deepspeed' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", program, *arguments], capture_output=True)
    assert done.returncode == 0, done.stderr.decode()


@pytest.mark.parametrize(
    ("arguments", "part"),
    [
        (["distil"], 'did you mean "distill"?'),
        (["distill", "no-such-recipe"], "shipped are"),
        (["distill", "blocksworld-distill", "optim.lrr=1"], '"lr"'),
        (["prune", "blocksworld-distill"], "espalier distill"),
        (["distill"], "required"),
        (["distill", "blocksworld-distill", "--resum"], "--resum"),
        (["config", "show"], "takes 1 recipe"),
        (["--local_rank", "x", "distill"], "local_rank"),
    ],
)
def test_wrong_usage_is_one_message_and_2(
    arguments: list[str], part: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(arguments) == 2
    said = capsys.readouterr().err
    assert part in said and "Traceback" not in said


def test_other_ranks_keep_quiet_about_the_same_mistake(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("RANK", "1")
    assert cli.main(["distill", "no-such-recipe"]) == 2
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("local_rank", [["--local_rank=1"], ["--local_rank", "1"], []])
@pytest.mark.parametrize("code", [0, 1, 75])
def test_a_stage_gets_its_configuration_and_its_code_comes_back(
    local_rank: list[str], code: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    from train import stages

    seen = []
    monkeypatch.setattr(stages, "run", lambda *arguments: seen.append(arguments) or code)
    rest = [
        "distill",
        "blocksworld-distill",
        "optim.lr=0.5",
        "--dry-run",
        "seed=3",
        "--rebase",
        "--resume",
        "x",
    ]
    assert cli.main([*local_rank, *rest]) == code
    config, resume, dry_run, rebase, plan = seen[0]
    assert not any(plan.values())
    assert (config.optim.lr, config.seed, resume, dry_run, rebase) == (0.5, 3, "x", True, True)


def test_a_dry_run_passes_on_what_it_was_asked(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from train import stages

    seen: list[Any] = []
    monkeypatch.setattr(stages, "run", lambda *arguments: seen.append(arguments) or 0)
    asked = ["--ranks", "4,16", "--like", "runs/x"]
    assert cli.main(["distill", "blocksworld-distill", "--dry-run", *asked]) == 0
    assert seen[0][-1] == {"ranks": (4, 16), "samples_per_s": None, "like": "runs/x"}
    assert cli.main(["distill", "blocksworld-distill", "--samples-per-s", "3"]) == 2
    assert "belong to --dry-run" in capsys.readouterr().err and len(seen) == 1
    assert cli.main(["distill", "blocksworld-distill", "--dry-run", "--ranks", "two"]) == 2


@pytest.mark.parametrize("error", [ValueError("key: bad"), FileNotFoundError("data: gone")])
def test_bad_input_found_later_is_2_too(
    error: Exception, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from train import stages

    def fail(*arguments: object) -> int:
        raise error

    monkeypatch.setattr(stages, "run", fail)
    assert cli.main(["distill", "blocksworld-distill"]) == 2
    assert str(error) in capsys.readouterr().err


def test_unexpected_errors_keep_their_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    from train import stages

    monkeypatch.setattr(stages, "run", lambda *a: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        cli.main(["distill", "blocksworld-distill"])


def test_config_shows_sources_and_differences(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["config", "show", "blocksworld-distill", "optim.lr=0.125"]) == 0
    rows = {line.split()[0]: line.split() for line in capsys.readouterr().out.splitlines()}
    assert rows["optim.lr"][1:] == ["0.125", "override"]
    assert rows["stage"][1:] == ['"distill"', "recipe"]
    assert rows["optim.eps"][-1] == "default"
    assert cli.main(["config", "diff", "blocksworld-distill", "blocksworld-prune"]) == 0
    assert "stage" in capsys.readouterr().out
    assert cli.main(["config", "schema"]) == 0
    assert '"properties"' in capsys.readouterr().out
