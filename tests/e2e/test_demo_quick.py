"""The demo at tiny sizes: every stage runs for real, and a second call has nothing left to do."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from models import from_pretrained

ROOT = Path(__file__).parents[2]


def demo(out: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "train.demo", "--quick", "--out", str(out)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=900)


@pytest.mark.slow
@pytest.mark.timeout(1000)
def test_the_whole_walk(tmp_path):
    out = tmp_path / "demo"
    first = demo(out)
    assert first.returncode == 0, first.stdout[-4000:] + first.stderr[-4000:]
    summary = json.loads((out / "summary.json").read_text())
    assert summary["task"] == "vqa"
    assert set(summary["models"]) == {"teacher", "student", "pruned"}
    for model in summary["models"].values():
        assert model["params"] > model["params_prunable"] > 0
        assert 0 <= model["accuracy"] <= 1 and 0 <= model["blind_accuracy"] <= 1
        assert set(model["latency_ms"]) == {"1", "32"}
        assert model["macs"] > 0
    assert summary["details"]["sparsity"]["exported"] == pytest.approx(0.35, abs=0.01)
    assert summary["models"]["pruned"]["macs"] < summary["models"]["student"]["macs"]

    teacher = from_pretrained(ROOT / "models" / "pretrained" / "blocksworld-teacher-vqa")
    student, pruned = from_pretrained(out / "finetune" / "model"), from_pretrained(out / "pruned")
    assert student.config.vision.layers * 2 == teacher.config.vision.layers
    assert sum(pruned.config.vision.ffn) < sum(student.config.vision.ffn)

    command = [sys.executable, "-m", "train.main", "predict", str(out / "pruned"), "--task", "vqa"]
    picture = next((out / "examples").glob("*.png"))
    command += ["--image", str(picture), "--text", "how many circles are there"]
    said = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert said.returncode == 0, said.stderr
    answers = json.loads((out / "data" / "vqa" / "answers.json").read_text())
    assert any(answer in said.stdout for answer in answers)

    page = (out / "report.html").read_text()
    assert "<svg" in page and "http://" not in page.replace("http://www.w3.org", "")

    second = demo(out)
    assert second.returncode == 0
    assert second.stdout.count("done before, skipped") == 9
