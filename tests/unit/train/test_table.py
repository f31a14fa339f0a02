"""benchmarks/table.py: the plan, what is skipped, what is left out, and the page from the file."""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from train.recipes_io import find_recipe, load_run_config
from train.stages.check import check_stage

BENCHMARKS = Path(__file__).parents[3] / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))
import table  # noqa: E402  # pyright: ignore[reportMissingImports]
import table_page  # noqa: E402  # pyright: ignore[reportMissingImports]


def plan(work: Path, tasks: tuple[str, ...] = ("vqa", "nlvr2"), seeds: int = 2) -> list[table.Cell]:
    return table.make_plan(work, dict.fromkeys(tasks, seeds))


def test_tasks_have_seeds_of_their_own(tmp_path):
    assert table.tasks_of("vqa:3,nlvr2") == {"vqa": 3, "nlvr2": 1}
    assert table.tasks_of("all:2") == dict.fromkeys(table.TASKS, 2)
    assert table.tasks_of("all,vqa:3")["vqa"] == 3 and table.tasks_of("all,vqa:3")["nlvr2"] == 1
    for text in ("vqa:0", "vqa:", "vqa:x", "poetry", ""):
        with pytest.raises(argparse.ArgumentTypeError):
            table.tasks_of(text)
    cells = table.make_plan(tmp_path, {"vqa": 3, "nlvr2": 1})
    assert {(cell.task, cell.seed) for cell in cells if cell.kind == "pruned"} == {
        ("vqa", 0), ("vqa", 1), ("vqa", 2), ("nlvr2", 0),
    }  # fmt: skip
    # A cell is the same one in every plan that has it.
    names, alone = table.identities(cells), table.identities(plan(tmp_path, ("nlvr2",), 1))
    assert all(names[name] == identity for name, identity in alone.items())


def test_every_cell_comes_after_what_it_needs_and_its_command_is_valid(tmp_path):
    cells = plan(tmp_path, table.TASKS, 2)
    before: set[str] = set()
    for cell in cells:
        assert set(cell.after) <= before, cell.name
        before.add(cell.name)
        if cell.argv:
            verb, recipe, *overrides = cell.argv
            config, _ = load_run_config(find_recipe(recipe), [f"stage={verb}", *overrides])
            check_stage(config)
            assert config.seed == cell.seed
            assert Path(config.out) / "model" == cell.model
    assert len(before) == len(cells) == 5 + 2 * (2 + 5 * 4)
    first = [cell.name for cell in plan(tmp_path, ("vqa", "retrieval"), 1)]
    assert max(n for n, name in enumerate(first) if name.startswith("vqa/")) < min(
        n for n, name in enumerate(first) if name.startswith("retrieval/")
    )


def test_the_kinds_differ_in_what_they_are_about(tmp_path):
    found = {}
    for cell in plan(tmp_path, ("vqa",), 1):
        if cell.argv and cell.task:
            found[cell.kind] = load_run_config(find_recipe(cell.argv[1]), list(cell.argv[2:]))[0]
    pruned, uniform = found["pruned"].prune, found["uniform"].prune
    assert pruned.sparsity == uniform.sparsity == 0.35
    assert (pruned.scope, uniform.scope) == ("modal-adaptive", "uniform")
    assert found["no_kd"].teacher.path is None and found["student"].teacher.path is not None
    assert found["no_kd"].optim == found["student"].optim
    retrieval = [c for c in plan(tmp_path, ("retrieval",), 1) if c.kind == "pruned"][0]
    config, _ = load_run_config(find_recipe(retrieval.argv[1]), list(retrieval.argv[2:]))
    assert config.prune is not None and config.prune.sparsity == 0.25


def test_a_cell_is_another_one_when_what_it_is_after_changes(tmp_path):
    cells = plan(tmp_path)
    names = table.identities(cells)
    assert len(set(names.values())) == len(cells)
    at = next(n for n, cell in enumerate(cells) if cell.name == "vqa/student-0")
    longer = table.Cell(**vars(cells[at]) | {"argv": (*cells[at].argv, "optim.lr=1")})
    changed = table.identities([*cells[:at], longer, *cells[at + 1 :]])
    moved = {name for name in names if names[name] != changed[name]}
    assert moved == {"vqa/student-0", "vqa/pruned-0", "vqa/uniform-0"}


def options(work: Path, **changes: Any) -> argparse.Namespace:
    args = table.parser().parse_args(["--work", str(work)])
    args.tasks, args.command, args.began = ("vqa",), "", ""
    return argparse.Namespace(**vars(args) | changes)


def run(work: Path, monkeypatch: pytest.MonkeyPatch, codes: dict[str, int], **more: Any) -> Any:
    """Names of the cells that were run, and the exit code."""
    ran: list[str] = []

    def cell_runs(cell: Any, work: Path, identity: str, *_: Any) -> int:
        ran.append(cell.name)
        if not codes.get(cell.name):
            marker = {"identity": identity, "seconds": 2 * cell.seconds, "load_average": [0, 0, 0]}
            table.write_json(work / cell.name / "finished.json", marker)
        return codes.get(cell.name, 0)

    monkeypatch.setattr(table, "run_cell", cell_runs)
    monkeypatch.setattr(table_page, "write_results", lambda *_: None)
    cells = plan(work, ("vqa",), 1)
    return ran, table.run_all(cells, table.identities(cells), options(work, **more))


def test_a_stopped_table_goes_on_where_it_was(tmp_path, monkeypatch, capsys):
    first, code = run(tmp_path, monkeypatch, {"vqa/pruned-0": 75})
    assert code == 75 and first[-1] == "vqa/pruned-0"
    again, code = run(tmp_path, monkeypatch, {})
    assert code == 0 and again == [
        "vqa/pruned-0", "base_no_kd/0", "vqa/no_kd-0", "vqa/uniform-0",
    ]  # fmt: skip
    # The estimate has learnt that cells take twice as long.
    expected = table.hours(2 * plan(tmp_path, ("vqa",), 1)[-1].seconds)
    assert (
        f"vqa/uniform-0: about {expected}; all that is left: {expected}" in capsys.readouterr().out
    )
    assert run(tmp_path, monkeypatch, {}) == ([], 0)


def test_a_cell_that_fails_takes_only_its_followers_along(tmp_path, monkeypatch, capsys):
    ran, code = run(tmp_path, monkeypatch, {"vqa/student-0": 1})
    assert code == 1
    assert "vqa/no_kd-0" in ran and not {"vqa/pruned-0", "vqa/uniform-0"} & set(ran)
    assert "vqa/pruned-0: left out, vqa/student-0 failed" in capsys.readouterr().out


def test_no_cell_begins_that_would_not_end_in_time(tmp_path, monkeypatch, capsys):
    ran, code = run(tmp_path, monkeypatch, {}, max_hours=0.02)
    assert code == 0 and ran == []
    ran, code = run(tmp_path, monkeypatch, {}, max_hours=0.05)
    assert code == 0 and ran == ["base/0", "vqa/teacher"]
    assert "more than --max-hours leaves" in capsys.readouterr().out


def test_one_table_at_a_time_and_a_training_that_was_left_counts(tmp_path):
    script = "import sys; print('up', flush=True); sys.stdin.read()"
    with table.alone(tmp_path) as lock:
        with pytest.raises(ValueError, match="another table"), table.alone(tmp_path):
            pass
        left = subprocess.Popen(
            [sys.executable, "-c", script], pass_fds=(lock,), text=True,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE,
        )  # fmt: skip
        assert left.stdout is not None and left.stdout.readline() == "up\n"
    with pytest.raises(ValueError, match="a training that one has left"), table.alone(tmp_path):
        pass
    left.communicate("")
    with table.alone(tmp_path):
        pass


def test_the_page_says_what_the_file_says():
    kept = {"mean": 0.99, "low": 0.985, "high": 0.995, "seeds": [0.99]}
    row = {"scores": [0.9], "retention": kept, "models": [{"parameters": 1234}]}
    told = {
        "metric": "accuracy", "items": 10_894, "pictures": 1500, "blind": 0.33,
        "teacher": {"score": 0.91}, "students": {"pruned": row},
        "differences": {"modal-adaptive minus uniform": kept},
    }  # fmt: skip
    result = {
        "tasks": {"vqa": told}, "draws": 2000, "gallery": 1000, "scale_steps": 1.0,
        "not_run": ["vqa/no_kd-0"], "provenance": {"commit": "c0ffee"}, "command": "python x",
    }  # fmt: skip
    page = table_page.page(json.loads(json.dumps(result)))
    for wanted in (
        "10,894 items about 1,500", "| without looking | | 33.00 |", "99.00 [98.50, 99.50]",
        "| student with KD | not run |", "+99.00 [+98.50, +99.50] points", "98.4 %: met.",
        "Not run yet: vqa/no_kd-0.", "1,234", "c0ffee",
    ):  # fmt: skip
        assert wanted in page, wanted
    kept["low"] = 0.98
    assert "98.4 %: missed." in table_page.page(json.loads(json.dumps(result)))
