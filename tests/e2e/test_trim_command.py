"""`espalier trim` for every task on 24 scenes, by the shipped recipes: three steps, then the trimmed
model is loaded, evaluated and asked; a run that goes on in the middle of the curriculum; and what
comes before and after trimming.
"""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from data_pipeline.blocksworld.build import build_blocksworld
from data_pipeline.text import load_tokenizer
from models import from_pretrained, presets
from models.pruning.surgery import prune
from models.xvlm import XVLM
from train.main import main

# Task -> a metric of its validation, and what predict is asked.
TASKS: dict[str, tuple[str, list[str]]] = {
    "vqa": ("accuracy", ["--text", "how many circles are there?"]),
    "nlvr2": ("accuracy", ["--text", "the left picture has two circles"]),
    "retrieval": ("r_mean", ["--text", "a red circle"]),
    "captioning": ("cider", []),
    "grounding": ("iou", ["--text", "the red circle"]),
}
STEPS = 3


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Data of all tasks, a tiny model of each form, and a picture."""
    root = tmp_path_factory.mktemp("world")
    build_blocksworld(root / "data", 24, val=6, test=6, image_size=48, tasks=tuple(TASKS))
    tokenizer = load_tokenizer(root / "data" / "tokenizer")
    for task in TASKS:
        torch.manual_seed(0)
        text = {"vocab_size": len(tokenizer)}
        model = presets.create("blocksworld-micro-student", form=task, text=text)
        model.save_pretrained(root / task, tokenizer=tokenizer)
    Image.new("RGB", (60, 40), "red").save(root / "picture.png")
    return root


def trim(world: Path, task: str, out: Path, *more: str) -> None:
    data = world / "data" / task
    code = main([
        "trim", f"blocksworld-{task}-trim", f"out={out}", f"model={world / task}",
        f"data.train={data / 'train'}", f"data.val={data / 'val'}", "data.batch=4", "eval.batch=4",
        f"optim.steps={STEPS}", "optim.warmup_steps=0", "log.every=1", "checkpoint.every=0",
        "data.block=4", "trim.warmup=0.3", "trim.ramp=0.4", *more,
    ])  # fmt: skip
    assert code == 0


def records(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("task", list(TASKS))
def test_trim_of_a_task_from_the_command_to_the_answer(
    world: Path, tmp_path: Path, task: str, capsys: pytest.CaptureFixture[str]
) -> None:
    metric, question = TASKS[task]
    out = tmp_path / "trimmed"
    trim(world, task, out)
    steps = [record for record in records(out) if "loss" in record]
    assert len(steps) == STEPS
    for record in steps:
        assert all(math.isfinite(value) for value in record["loss"].values())
    kinds = {name.split("_")[0] for name in steps[-1]["loss"]}
    assert {"cost", "self", "full"} <= kinds
    assert [record["metrics"]["target_share"] for record in steps] == pytest.approx(
        [1.0, 1 - 0.5 * (0.1 / 1.2), 1 - 0.5 * (1.1 / 1.2)]
    )

    assert f"{task}/kept" in "".join(
        path.read_bytes().decode("latin-1") for path in (out / "tensorboard").iterdir()
    )
    model = from_pretrained(out / "model")
    trimming = model.config.trimming
    assert trimming is not None and trimming.mode == "gather" and trimming.vision_keep
    assert trimming.guided == (task != "retrieval")
    told = json.loads((out / "trim.json").read_text())
    assert metric in told["full"] and metric in told["trimmed"]
    assert told["keep"]["vision"] == list(trimming.vision_keep)
    assert set(told["sites"]) >= {f"vision.{layer}" for layer in trimming.vision}
    fresh = json.loads((out / "origin.json").read_text())["fresh"]
    assert fresh and all(".trimmers." in name for name in fresh)

    scores = tmp_path / "scores.json"
    argv = ["eval", str(out / "model"), "--task", task, "--data", str(world / "data")]
    assert main([*argv, "--batch", "4", "--no-blind", "--json", str(scores)]) == 0
    assert math.isfinite(json.loads(scores.read_text())[metric])
    pictures = ["--image", str(world / "picture.png")] * (2 if task == "nlvr2" else 1)
    capsys.readouterr()
    argv = ["predict", str(out / "model"), "--task", task, *pictures, *question, "--json"]
    assert main(argv) == 0
    assert json.loads(capsys.readouterr().out)

    if task not in ("vqa", "nlvr2"):
        return
    modes = tmp_path / "modes.json"
    argv = ["bench", str(out / "model"), "--modes", "--data", str(world / "data"), "--batch", "1,2"]
    argv += ["--repeats", "2", "--answers", "4", "--json", str(modes), "--write-mode", "2"]
    assert main(argv) == 0
    found = json.loads(modes.read_text())
    assert found["inputs"].endswith(f"data/{task}") and found["modes"][0] == "off"
    trimming = from_pretrained(out / "model").config.trimming
    assert trimming is not None and trimming.mode == found["best"]["2"]


def test_a_run_goes_on_in_the_middle_of_the_curriculum(world: Path, tmp_path: Path) -> None:
    whole, again = tmp_path / "a" / "run", tmp_path / "b" / "run"
    options = ("checkpoint.every=2", "optim.steps=4", "trim.ramp=0.7", "data.val=null")
    trim(world, "vqa", whole, *options)
    (again / "checkpoints").mkdir(parents=True)
    saved = sorted((whole / "checkpoints").glob("*2"))
    assert saved, list((whole / "checkpoints").iterdir())
    shutil.copytree(saved[0], again / "checkpoints" / saved[0].name)
    trim(world, "vqa", again, *options)
    assert "resumed at step 2" in (again / "events.log").read_text()
    targets = [record["metrics"]["target_share"] for record in records(again) if "loss" in record]
    assert targets == pytest.approx([1 - 0.5 * 0.8 / 2.8, 1 - 0.5 * 1.8 / 2.8])
    expected, found = (from_pretrained(run / "model").state_dict() for run in (whole, again))
    for name, value in expected.items():
        assert torch.equal(found[name], value), name


def test_a_pruned_student_is_trimmed(world: Path, tmp_path: Path) -> None:
    """Slim widths, one layer of them without any head and one without units."""
    dense = from_pretrained(world / "vqa")
    structure = {name: torch.ones(slot.units) for name, slot in dense.gate_slots().items()}
    for name, open_ in structure.items():
        if name.endswith("ffn"):
            open_[3:] = 0
    structure["vision.1.heads"][:] = 0
    structure["fusion.0.ffn"][:] = 0
    prune(dense, structure).save_pretrained(
        tmp_path / "slim", tokenizer=load_tokenizer(world / "data" / "tokenizer")
    )
    trim(world, "vqa", tmp_path / "run", f"model={tmp_path / 'slim'}", "trim.heads=[vision]")
    model = from_pretrained(tmp_path / "run" / "model")
    assert model.config.vision.ffn == (3, 3) and model.config.text.ffn == (3, 0)
    assert model.config.vision.heads == (1, 0)
    assert model.config.trimming is not None
    images = torch.zeros(1, 3, 48, 48, dtype=torch.uint8)
    ids = torch.tensor([[1, 5, 6, 2]])
    outputs = [fused(model, mode, images, ids) for mode in ("mask", "gather", "packed")]
    for found in outputs[1:]:
        torch.testing.assert_close(found, outputs[0], atol=1e-5, rtol=1e-4)


def test_a_trimmed_model_is_finetuned_and_pruned_with_its_trimmers_at_rest(
    world: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    trim(world, "vqa", tmp_path / "trimmed")
    before = from_pretrained(tmp_path / "trimmed" / "model")
    data = world / "data" / "vqa"
    common = [
        f"model={tmp_path / 'trimmed' / 'model'}", f"data.train={data / 'train'}",
        "data.val=null", "teacher.path=null", "data.batch=4", "data.block=4", "optim.steps=2",
        "optim.warmup_steps=0", "log.every=1", "checkpoint.every=0",
    ]  # fmt: skip
    for stage, recipe, more in (
        ("finetune", "blocksworld-finetune-student", ["initialise.task_vector=null"]),
        (
            "prune",
            "blocksworld-prune",
            ["prune.sparsity=0.4", "prune.freeze_step=2", "prune.ramp_steps=1"],
        ),
    ):
        out = tmp_path / stage
        argv = [stage, recipe, f"out={out}", *common, *more]
        assert main([*argv, "--dry-run"]) == 0
        caplog.clear()
        assert main(argv) == 0
        assert "trimmers of the model are off and frozen" in caplog.text
        model = from_pretrained(out / "model")
        assert model.config.trimming == before.config.trimming
        assert model.vision.trimmers is not None and model.vision.trimmers.mode == "gather"
        expected, changed = before.state_dict(), False
        for name, value in model.state_dict().items():
            same = value.shape == expected[name].shape and torch.equal(value, expected[name])
            assert same or ".trimmers." not in name, name
            changed |= not same
        assert changed
    trim(
        world, "vqa", tmp_path / "again", f"model={tmp_path / 'prune' / 'model'}", "trim.budget=0.3"
    )
    assert not json.loads((tmp_path / "again" / "origin.json").read_text())["fresh"]
    rates = records(tmp_path / "again")[-1]["lr_groups"]
    assert rates["decay_new"] == pytest.approx(33 * rates["decay"])


@torch.inference_mode()
def fused(model: XVLM, mode: str, images: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    model.set_trimming(mode)
    image = model.encode_image(images, guide=model.encode_text(ids, None).last[:, 0])
    return model.multimodal(ids, None, image.last, image.mask).last
