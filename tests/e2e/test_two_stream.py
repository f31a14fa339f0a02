"""A two-stream model from the command line on 24 scenes, by the shipped recipes, three steps each:
fine-tuned, trimmed, pruned with a teacher, evaluated, asked and timed.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from data_pipeline.blocksworld.build import build_blocksworld
from models import from_pretrained
from train.main import main

SMALL = "model=blocksworld-meter-micro"


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Data, a picture, and the model fine-tuned by the recipe."""
    root = tmp_path_factory.mktemp("world")
    build_blocksworld(root / "data", 24, val=6, test=6, image_size=48, tasks=("vqa",))
    Image.new("RGB", (60, 40), "red").save(root / "picture.png")
    stage(root, "finetune", "blocksworld-meter-vqa", root / "tuned", SMALL)
    return root


def stage(world: Path, verb: str, recipe: str, out: Path, *more: str) -> None:
    data = world / "data" / "vqa"
    code = main([
        verb, recipe, f"out={out}", f"data.train={data / 'train'}", f"data.val={data / 'val'}",
        "data.batch=4", "eval.batch=4", "optim.steps=3", "optim.warmup_steps=0", "log.every=1",
        "checkpoint.every=0", "data.block=4", *more,
    ])  # fmt: skip
    assert code == 0


def losses(out: Path) -> list[dict[str, Any]]:
    found = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    found = [record["loss"] for record in found if "loss" in record]
    assert all(math.isfinite(value) for record in found for value in record.values())
    return found


def test_fine_tuned_trimmed_evaluated_and_asked(world, tmp_path, capsys):
    assert len(losses(world / "tuned")) == 3
    tuned = from_pretrained(world / "tuned" / "model")
    assert tuned.config.image_fusion is not None and tuned.config.form == "vqa"

    out = tmp_path / "trimmed"
    start = f"model={world / 'tuned' / 'model'}"
    more = ("trim.warmup=0.3", "trim.ramp=0.4")
    stage(world, "trim", "blocksworld-meter-vqa-trim", out, start, *more)
    assert {"cost", "self_answer", "full_answer"} <= losses(out)[-1].keys()
    model = from_pretrained(out / "model")
    trimming = model.config.trimming
    assert trimming is not None and trimming.mode == "gather" and trimming.guided
    assert (trimming.fusion, trimming.text) == ((0, 1), (2, 3))
    assert trimming.fusion_keep and trimming.text_keep
    told = json.loads((out / "trim.json").read_text())
    assert {"vision.1", "image.2", "image.3", "text.2", "text.3"} <= told["sites"].keys()
    changed = "image_fusion.layers.0.cross_attention.q.weight"
    assert not torch.equal(model.state_dict()[changed], tuned.state_dict()[changed])

    scores = tmp_path / "scores.json"
    argv = ["eval", str(out / "model"), "--task", "vqa", "--data", str(world / "data")]
    assert main([*argv, "--batch", "4", "--no-blind", "--json", str(scores)]) == 0
    assert 0 <= json.loads(scores.read_text())["accuracy"] <= 1
    capsys.readouterr()
    picture = str(world / "picture.png")
    asked = ["predict", str(out / "model"), "--task", "vqa", "--image", picture]
    assert main([*asked, "--text", "how many circles are there?"]) == 0
    assert capsys.readouterr().out.strip()


def test_pruned_with_a_teacher_and_timed_beside_it(world, tmp_path, capsys):
    out, teacher = tmp_path / "pruned", world / "tuned" / "model"
    stage(
        world, "prune", "blocksworld-prune", out, f"model={teacher}", f"teacher.path={teacher}",
        "prune.ramp_steps=1", "prune.freeze_step=2", "prune.lr=1.0",
    )  # fmt: skip
    assert any(name.startswith("kd_fusion") for name in losses(out)[-1])
    slim, dense = (from_pretrained(path).config for path in (out / "model", teacher))
    assert slim.image_fusion is not None and dense.image_fusion is not None
    assert sum(slim.image_fusion.ffn) < sum(dense.image_fusion.ffn)
    report = json.loads((out / "sparsity.json").read_text())
    assert "image_fusion" in report["modalities"]
    capsys.readouterr()
    timed = tmp_path / "bench.json"
    code = main([
        "bench", str(teacher), str(out / "model"), "--names", "dense,slim", "--batch", "1,2",
        "--repeats", "2", "--json", str(timed),
    ])  # fmt: skip
    assert code == 0
    found = json.loads(timed.read_text())
    assert found["macs_ratio"]["slim"] > 1.0
