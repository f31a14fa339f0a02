"""The report of a demo-like folder: complete, self-contained, well-formed."""

from __future__ import annotations

import base64
import html.parser
import json
import re
from pathlib import Path

import pytest

from train.main import main

_PIXEL = base64.b64decode(
    "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNk+M9QDwADhgGAWjR9awAAAABJRU5ErkJggg=="
)
_VOID = {"meta", "img"}


def model(params: float, accuracy: float, one: float, many: float) -> dict:
    return {
        "params": params,
        "params_prunable": params * 0.8,
        "accuracy": accuracy,
        "blind_accuracy": 0.46,
        "macs": params * 40,
        "latency_ms": {"1": one, "32": many},
    }


@pytest.fixture
def run(tmp_path: Path) -> Path:
    folder = tmp_path / "demo"
    (folder / "examples").mkdir(parents=True)
    (folder / "examples" / "0.png").write_bytes(_PIXEL)
    models = {
        "teacher": model(2.4e6, 0.914, 7.9, 101.2),
        "student": model(1.3e6, 0.902, 4.9, 58.1),
        "pruned": model(0.9e6, 0.889, 4.1, 42.9),
    }
    example = {
        "image": "examples/0.png",
        "question": 'what is "left" of <it>?',
        "answer": "circle",
        "predictions": {"teacher": "circle", "student": "circle", "pruned": "square"},
    }
    details = {
        "questions": 10240,
        "repeats": 40,
        "threads": 2,
        "latency": {"teacher": {"1": {"median": 7.9, "q1": 7.5, "q3": 8.25}}},
        "accuracy_by_type": {n: {"colour": 0.9, "count": 0.8} for n in (*models, "blind")},
        "sparsity": {"target": 0.35, "exported": 0.347},
        "gates": {"vision": [["0 heads", 3, 4], ["0 FFN", 301, 512]]},
        "examples": [example],
        "stages": [{"name": "prune", "seconds": 240.0}],
    }
    summary = {
        "task": "vqa",
        "device": "some processor",
        "models": models,
        "retention": 0.973,
        "speedup": {"1": 1.93, "32": 2.36},
        "seconds": 812.0,
        "details": details,
    }
    (folder / "summary.json").write_text(json.dumps(summary))
    prune = folder / "prune"
    prune.mkdir()
    (prune / "run.yaml").write_text("stage: prune\nmodel: blocksworld-student\n")
    rows = [
        {"step": s, "loss": {"total": 3 / s}, "sparsity": {"target": 0.3, "expected": 0.01 * s}}
        for s in range(1, 30)
    ]
    (prune / "metrics.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n")
    return folder


class Reader(html.parser.HTMLParser):
    """Tags closed in order; every picture has words; nothing is fetched."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.images: list[dict] = []
        self.links: list[str] = []

    def handle_starttag(self, tag: str, attrs) -> None:
        values = dict(attrs)
        self.links += [values[name] for name in ("src", "href", "srcset") if name in values]
        if tag in ("img", "svg"):
            self.images.append(values)
        if tag not in _VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs) -> None:
        self.links += [value for name, value in attrs if name in ("src", "href")]

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def test_page_is_complete_well_formed_and_fetches_nothing(run: Path) -> None:
    out = run / "report.html"
    assert main(["report", str(run), "--out", str(out)]) == 0
    page = out.read_text(encoding="utf-8")
    reader = Reader()
    reader.feed(page)
    assert reader.open == []
    assert all(link.startswith("data:image/png;base64,") for link in reader.links)
    assert not re.search(r"https?://(?!www\.w3\.org/2000/svg)|@import|url\(|<script", page)
    assert len(reader.images) == 2 + 1 + 1 + 2 + 1  # speed, types, gates, curves, example
    assert all(image.get("alt") or image.get("aria-label") for image in reader.images)
    for words in (
        "keeps 97.3%",
        "2.36x",
        "34.7%",
        "7.50 to 8.25",
        "301/512",
        "10,240 test questions",
        "Prune, sparsity".lower(),
        "&#10007; square",
        "what is &quot;left&quot; of &lt;it&gt;?",
        "some processor",
    ):
        assert words in page, words


def test_page_of_plain_runs_needs_no_summary(run: Path, tmp_path: Path) -> None:
    out = tmp_path / "curves.html"
    assert main(["report", str(run / "prune"), "--out", str(out)]) == 0
    page = out.read_text(encoding="utf-8")
    assert "Training curves of prune." in page and "<table>" not in page
