"""What a report says about budgets, from the files of a run."""

from __future__ import annotations

import json

import pytest

from train.export.budgets import budget_section, modality_chart
from train.export.collect import Curve, collect
from train.export.report import write_report

BUDGET = {
    "unit": "seconds", "scope": "per-encoder", "round_to": 64,
    "target": 0.4, "expected": 0.41, "actual": 0.395,
    "modalities": {"vision": {"target": 0.4, "expected": 0.42, "actual": 0.38},
                   "text": {"target": None, "expected": 0.3, "actual": 0.31}},
    "speedup": {"target": 2.2, "predicted": 2.21, "measured": 2.15, "q1": 2.1, "q3": 2.3,
                "against": "teacher", "batch": 32, "device": "<a device>", "tries": [{}, {}]},
}  # fmt: skip
RECORDS = tuple(
    {"step": step, "sparsity": {"vision": 0.1 * step, "vision_expected": 0.2, "target": 0.4}}
    for step in range(3)
)


def test_every_share_and_the_speed_are_told():
    page = budget_section({"prune": BUDGET})
    for told in ("40.0 %", "41.0 %", "39.5 %", "38.0 %", "31.0 %", "per-encoder", "of 64"):
        assert told in page
    assert "target 2.20x, predicted 2.21x, measured 2.15x (quartiles 2.10 to 2.30)" in page
    assert "corrected 1 time" in page and "&lt;a device&gt;" in page
    assert "<td>vision</td><td>40.0 %</td>" in page and "<td>text</td><td></td>" in page
    assert budget_section({}) == ""


def test_a_speed_that_was_not_measured_is_not_made_up():
    speed = BUDGET["speedup"] | {"measured": None, "q1": None, "tries": []}
    page = budget_section({"prune": BUDGET | {"speedup": speed}})
    assert "measured not measured." in page and "quartiles" not in page


def test_modalities_are_drawn():
    chart = modality_chart(Curve("prune", "prune", RECORDS).series, "prune")
    assert "vision, expected" in chart and "fusion" not in chart
    assert modality_chart(Curve("x", "prune", ({"step": 1},)).series, "x") == ""


@pytest.mark.parametrize("with_budget", [True, False])
def test_a_run_directory_brings_its_budget(tmp_path, with_budget):
    run = tmp_path / "prune"
    run.mkdir()
    (run / "metrics.jsonl").write_text("\n".join(map(json.dumps, RECORDS)) + "\n")
    found = {"prunable": {}} | ({"budget": BUDGET} if with_budget else {})
    (run / "sparsity.json").write_text(json.dumps(found))
    assert list(collect([run]).budgets) == (["prune"] if with_budget else [])
    page = write_report([run], tmp_path / "page.html").read_text()
    assert ("<h2>Budgets</h2>" in page) == with_budget and "removed by modality" in page
