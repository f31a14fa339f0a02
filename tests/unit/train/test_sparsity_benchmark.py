"""benchmarks/sparsity.py: its runs can start, its outcome is the files', and the docs have its table."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from train.recipes_io import find_recipe, load_run_config
from train.stages.check import check_stage

ROOT = Path(__file__).parents[3]
sys.path.insert(0, str(ROOT / "benchmarks"))
import sparsity  # noqa: E402  # pyright: ignore[reportMissingImports]


def recorded() -> dict:
    return json.loads(sparsity.RESULTS.read_text())


@pytest.mark.parametrize("case", sparsity.CASES, ids=lambda case: case.name)
def test_every_case_is_a_run_that_can_start(case, tmp_path):
    verb, recipe, *overrides = sparsity.command(case, tmp_path, 0.1)
    config, _ = load_run_config(find_recipe(recipe), overrides)
    check_stage(config)
    assert (verb, config.task, config.stage) == ("prune", case.task, "prune")
    prune = config.prune
    assert prune is not None and prune.freeze_step is not None
    assert prune.constraint == case.constraint and prune.scope == case.scope
    assert prune.ramp_steps <= prune.freeze_step <= config.optim.steps


def test_actual_is_counted_from_the_files(tmp_path):
    """A resume repeats steps: the last record of a step is the one that counts."""
    for name, width in (("dense", 10), ("model", 7)):
        (tmp_path / name).mkdir()
        tensors = {"a": torch.zeros(4, width), "b": torch.zeros(5)}
        save_file(tensors, tmp_path / name / "model.safetensors", {"who": "a test"})
    told = {"target": None, "expected": 0.3, "actual": 0.1}
    report = {
        "prunable": {"total": 40},
        "modalities": {"text": {"sparsity": 0.29}},
        "budget": {"target": 0.3, "modalities": {"text": told}},
    }
    (tmp_path / "sparsity.json").write_text(json.dumps(report))
    steps = [(1, 0.1, 0.0), (2, 0.9, 0.2), (2, 0.22, 0.2), (3, 0.31, 0.3)]
    lines = [
        json.dumps({"step": step, "sparsity": {"expected": expected, "target": target}})
        for step, expected, target in steps
    ]
    (tmp_path / "metrics.jsonl").write_text("\n".join([*lines, json.dumps({"step": 3})]))
    found = sparsity.outcome(sparsity.Case("vqa"), tmp_path)
    assert found["actual"] == pytest.approx(12 / 40)
    assert (found["target"], found["expected"], found["steps"]) == (0.3, 0.31, 3)
    assert found["largest_gap"] == pytest.approx(0.1)
    assert found["largest_gap_after_first"] == pytest.approx(0.02)
    assert found["modalities"]["text"] == {"target": None, "expected": 0.3, "actual": 0.29}


def test_the_docs_have_the_table_of_the_file():
    assert sparsity.page_table(recorded()) in (ROOT / "docs/pruning.md").read_text()


def test_target_expected_and_actual_are_within_a_point_for_every_task():
    """The acceptance, on the recorded runs: all tasks, all scopes of VQA, by projection."""
    held = [case for case in recorded()["cases"] if case["constraint"] == "projection"]
    assert {case["task"] for case in held} == set(sparsity.TASKS)
    assert {case["scope"] for case in held} == {"modal-adaptive", "per-encoder", "uniform"}
    for case in held:
        shares = [case[key] for key in ("target", "expected", "actual")]
        assert max(shares) - min(shares) < 0.01
        assert case["largest_gap_after_first"] < 1e-3
        if case["scope"] == "per-encoder":  # uniform: 35 % of four heads are one or two
            for told in case["modalities"].values():
                assert max(told.values()) - min(told.values()) < 0.01
