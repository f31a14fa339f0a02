"""A queue of real jobs through the command line: one ends well, one fails, and the table tells."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from data_pipeline.blocksworld.build import build_blocksworld
from data_pipeline.text import load_tokenizer
from models import presets

ROOT = Path(__file__).resolve().parents[2]


def launched(cwd: Path, *words: str) -> subprocess.CompletedProcess[str]:
    argv = [sys.executable, "-m", "train.main", "launch", "--array", "--queue", "queue", *words]
    return subprocess.run(
        argv, cwd=cwd, capture_output=True, text=True, env=_environment(), check=False
    )


def _environment() -> dict[str, str]:
    return os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}


@pytest.mark.slow
def test_a_queue_ends_in_a_table(tmp_path: Path) -> None:
    build_blocksworld(tmp_path / "data", 16, val=4, test=4, image_size=48, tasks=("grounding",))
    tokenizer = load_tokenizer(tmp_path / "data" / "tokenizer")
    torch.manual_seed(0)
    model = presets.create("blocksworld-micro-student", text={"vocab_size": len(tokenizer)})
    model.save_pretrained(tmp_path / "start", tokenizer=tokenizer)
    words = [
        "--", "finetune", "blocksworld-grounding-teacher,out=runs/a",
        "blocksworld-grounding-teacher,model=nowhere",
        f"model={tmp_path / 'start'}", "data.train=data/grounding/train",
        "data.val=data/grounding/val", "data.batch=4", "eval.batch=4", "optim.steps=2",
        "optim.warmup_steps=0", "log.every=1", "checkpoint.every=0", "data.block=4",
    ]  # fmt: skip
    done = launched(tmp_path, *words)
    assert done.returncode == 2, done.stderr
    assert "1 of 2 jobs failed" in done.stdout and "nowhere" in done.stderr
    good, bad = json.loads((tmp_path / "queue" / "table.json").read_text())
    assert good["state"] == "done" and 0 <= good["iou"] <= 1
    assert bad["state"] == "failed (2)" and "iou" not in bad
    wrong = launched(tmp_path, "--", "finetune", "blocksworld-grounding-teacher,optim.stepz=2")
    assert wrong.returncode == 2 and 'did you mean "steps"' in wrong.stderr
