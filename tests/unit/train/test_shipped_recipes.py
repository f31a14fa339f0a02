"""Every shipped recipe is parsed, checked and described; contradictions are refused with a remedy."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest

from train.config import RunConfig
from train.recipes_io import load_run_config
from train.runtime.engine import engine_settings
from train.stages import run
from train.stages.check import check_stage
from train.stages.memory import StepMemory

DOWNSTREAM = ("nlvr2_pretrain", "nlvr2", "retrieval", "captioning", "grounding")
RECIPES = sorted((Path(__file__).parents[3] / "train" / "recipes").glob("*.yaml"))


def load(name: str, *overrides: str) -> RunConfig:
    path = next(recipe for recipe in RECIPES if recipe.stem == name)
    return load_run_config(path, list(overrides))[0]


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_recipe_is_valid_and_describes_itself(recipe, capsys, monkeypatch, tmp_path):
    config, _ = load_run_config(recipe, [])
    check_stage(config)
    engine_settings(config)
    if isinstance(config.model, str) and "/" in config.model:
        # The folder is an earlier stage's: put the configuration there that the stage would leave.
        from models import presets

        role = "teacher" if "teacher" in recipe.stem else "student"
        form = "pretrain" if config.stage == "finetune" else config.task
        folder = tmp_path / config.model
        folder.mkdir(parents=True)
        described = presets.config(f"blocksworld-{role}", form=form).to_dict()
        (folder / "config.json").write_text(json.dumps(described))
    if config.task in DOWNSTREAM and not recipe.stem.startswith("blocksworld"):
        # Seconds each, and the same code as for blocksworld.
        step = StepMemory(activations=1, kd=1, teacher=1, gradients=1, beside=1)
        monkeypatch.setattr("train.stages.dry_run.step_memory", lambda *_, **__: step)
    monkeypatch.chdir(tmp_path)
    assert run(config, "none", dry_run=True) == 0
    printed = capsys.readouterr().out
    assert "parameters" in printed and "memory per device" in printed


def test_full_size_numbers(capsys):
    run(load("efficientvlm-4m"), "none", dry_run=True)
    printed = capsys.readouterr().out
    assert "120.12M parameters" in printed
    assert "212.27M parameters" in printed
    assert "(128, 197, 768)" in printed
    assert "1,024 images" in printed


@pytest.mark.parametrize(
    ("name", "override", "message"),
    [
        ("efficientvlm-4m", "teacher.path=null", "teacher.path"),
        ("efficientvlm-4m", "task=vqa", "task"),
        ("blocksworld-prune", "prune=null", "prune"),
        ("blocksworld-prune", "prune.sparsity=1.5", "prune.sparsity"),
        ("blocksworld-prune", "prune.freeze_step=100000", "prune.freeze_step"),
        ("blocksworld-nlvr2-prune", "task=nlvr2_pretrain", "prune task nlvr2"),
        ("blocksworld-nlvr2-trim", "task=nlvr2_pretrain", "trim task nlvr2"),
        ("blocksworld-retrieval-trim", "trim.guided=true", "trim.guided"),
        ("blocksworld-prune", "eval.annotators=0", "eval.annotators"),
        ("blocksworld-distill", 'loss={"mlmm": 1.0}', "did you mean mlm"),
    ],
)
def test_contradictions_are_refused(name, override, message):
    with pytest.raises(ValueError, match=message):
        check_stage(load(name, override))


def test_distill_does_not_prune():
    prune = load("blocksworld-prune").prune
    with pytest.raises(ValueError, match="does not prune"):
        check_stage(dataclasses.replace(load("blocksworld-distill"), prune=prune))
