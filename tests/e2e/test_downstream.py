"""Fine-tuning and pruning of NLVR2, retrieval, captioning and grounding, by the shipped recipes, on 24
scenes: three steps each, with validation and a teacher.
"""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch

from data_pipeline.blocksworld.build import build_blocksworld
from data_pipeline.text import load_tokenizer
from models import from_pretrained, presets
from train.main import main

# Task -> metrics of its validation.
METRICS = {
    "nlvr2": {"accuracy"},
    "retrieval": {"image_to_text_r1", "text_to_image_r10", "r_mean"},
    "captioning": {"bleu4", "cider"},
    "grounding": {"accuracy", "iou"},
}


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Data of all tasks, and a tiny pre-trained model for teacher and student."""
    root = tmp_path_factory.mktemp("world")
    tasks = ("pretrain", *METRICS)
    build_blocksworld(root / "data", 24, val=6, test=6, image_size=48, tasks=tasks)
    tokenizer = load_tokenizer(root / "data" / "tokenizer")
    for role in ("teacher", "student"):
        torch.manual_seed(0)
        model = presets.create(f"blocksworld-micro-{role}", text={"vocab_size": len(tokenizer)})
        model.save_pretrained(root / role, tokenizer=tokenizer)
    return root


def stage(world: Path, verb: str, recipe: str, task: str, out: Path, *more: str) -> None:
    data = world / "data" / task
    code = main([
        verb, recipe, f"out={out}", f"data.train={data / 'train'}", f"data.val={data / 'val'}",
        f"data.tokenizer={world / 'data' / 'tokenizer'}", "data.batch=4", "eval.batch=4",
        "optim.steps=3", "optim.warmup_steps=0", "log.every=1", "checkpoint.every=0",
        "data.block=4", *more,
    ])  # fmt: skip
    assert code == 0


def recorded(out: Path) -> dict[str, float]:
    """Every number of every record, the last one of each name."""
    found: dict[str, float] = {}

    def walk(prefix: str, value: object) -> None:
        if isinstance(value, dict):
            for name, inner in value.items():
                walk(f"{prefix}.{name}" if prefix else str(name), inner)
        elif isinstance(value, int | float):
            found[prefix] = value

    for line in (out / "metrics.jsonl").read_text().splitlines():
        walk("", json.loads(line))
    return found


@pytest.mark.parametrize("task", list(METRICS))
def test_teacher_student_and_pruned_model_of_a_task(world, tmp_path, task):
    teacher, pruned = tmp_path / "teacher", tmp_path / "pruned"
    start = f"model={world / 'teacher'}"
    stage(world, "finetune", f"blocksworld-{task}-teacher", task, teacher, start)
    stage(
        world, "prune", f"blocksworld-{task}-prune", task, pruned,
        f"model={world / 'student'}", f"teacher.path={teacher / 'model'}",
        "prune.ramp_steps=1", "prune.freeze_step=2", "prune.lr=1.0",
    )  # fmt: skip
    numbers = recorded(pruned)
    assert all(math.isfinite(value) for value in numbers.values())
    assert {f"validation.{name}" for name in METRICS[task]} <= numbers.keys()
    assert any(name.startswith("loss.kd_") for name in numbers)
    assert any("cross_attention" in name for name in numbers)
    slim = from_pretrained(pruned / "model")
    assert slim.config.form == task
    assert sum(slim.config.text.ffn) < sum(from_pretrained(world / "student").config.text.ffn) * (
        2 if task == "nlvr2" else 1
    )

    out = tmp_path / "scores.json"
    argv = ["eval", str(pruned / "model"), "--task", task, "--data", str(world / "data")]
    assert main([*argv, "--batch", "4", "--json", str(out)]) == 0
    scores = json.loads(out.read_text())
    assert METRICS[task] <= scores.keys() and scores["task"] == task
    assert all(0 <= scores[name] <= 1 for name in METRICS[task] - {"cider"})


@pytest.mark.parametrize(
    ("task", "metrics"), [("nlvr2", {"accuracy"}), ("captioning", {"bleu4", "cider"})]
)
def test_a_domain_stage_and_the_fine_tuning_that_starts_from_it(world, tmp_path, task, metrics):
    domain, tuned = tmp_path / "domain", tmp_path / "tuned"
    start = f"model={world / 'teacher'}"
    stage(world, "finetune", f"blocksworld-{task}-pretrain", "pretrain", domain, start)
    numbers = recorded(domain)
    assert all(math.isfinite(value) for value in numbers.values())
    assert {f"validation.{name}" for name in metrics} <= numbers.keys()
    before, after = from_pretrained(world / "teacher"), from_pretrained(domain / "model")
    assert after.config.form == {"nlvr2": "nlvr2_pretrain"}.get(task, task)
    if task == "nlvr2":  # it finds hard negatives, and nothing trains it
        for name, value in before.image_projection.state_dict().items():
            assert torch.equal(after.image_projection.state_dict()[name], value)
    moved = before.vision.state_dict()["blocks.0.ffn.fc1.weight"]
    assert not torch.equal(after.vision.state_dict()["blocks.0.ffn.fc1.weight"], moved)

    recipe = f"blocksworld-{task}-teacher"
    stage(world, "finetune", recipe, task, tuned, f"model={domain / 'model'}")
    assert from_pretrained(tuned / "model").config.form == task
    origin = json.loads((tuned / "origin.json").read_text())
    assert origin["source"] == str(domain / "model")
    assert {name.split(".")[0] for name in origin["fresh"]} == (
        {"cls_head"} if task == "nlvr2" else set()
    )
