"""Every shipped recipe is parsed, checked and described; contradictions are refused with a remedy."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest

from data_pipeline.mixture import period_counts
from models import presets
from models.checkpoints.build import RECORD
from train.config import RunConfig
from train.recipes_io import load_run_config
from train.runtime.engine import engine_settings
from train.runtime.optimizer import parameter_groups
from train.stages import run
from train.stages.check import check_stage
from train.stages.memory import StepMemory
from train.student import build_student

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


def weights_of(config: RunConfig) -> dict[str, float]:
    """Path -> weight of a mixture whose sets all have one."""
    assert not isinstance(config.data.train, str)
    weights = {source.path: source.weight for source in config.data.train}
    return {path: weight for path, weight in weights.items() if weight is not None}


MIXED = sorted(
    recipe.stem
    for recipe in RECIPES
    if recipe.stem.endswith(("4m", "-pretrain")) and not recipe.stem.startswith("blocksworld")
)


@pytest.mark.parametrize("name", MIXED)
def test_pre_training_draws_captions_of_each_set_as_published(name):
    config = load(name)
    weights = {Path(path).parts[1]: weight for path, weight in weights_of(config).items()}
    assert list(weights) == ["coco", "vg-captions", "sbu", "cc3m"]
    assert sum(weights.values()) == 5_114_489  # 2111.08276
    shares = period_counts(list(weights.values()), config.data.mix_period)
    assert shares == (111, 154, 168, 567)


def test_the_teacher_learns_what_no_checkpoint_filled_at_twice_the_rate(tmp_path):
    presets.create("blocksworld-micro-student").save_pretrained(tmp_path)
    fresh = ["text.layers.1.cross_attention.q.weight", "contrastive.value", "itm_head.norm.bias"]
    (tmp_path / RECORD).write_text(json.dumps({"conversions": [], "fresh": fresh}))
    start = f"initialise.source={tmp_path}"
    config = load("xvlm-clip-base-4m", "model=blocksworld-micro-student", start)
    first = build_student(config, 256, None)
    doubled = [
        group["lr"]
        for group in parameter_groups(first.model, set(first.fresh), config.optim)
        for parameter in group["params"]
        if any(parameter is first.model.get_parameter(name) for name in fresh)
    ]
    assert doubled == [2e-4] * len(fresh)


def test_the_two_streams_are_pre_trained_as_meter():
    config, after = load("meter-clip-base-pretrain"), load("meter-clip-base-vqa")
    assert after.initialise.source == f"{config.out}/model"
    assert (config.data.global_batch, config.engine.accumulate) == (512, 8)  # 4096 pairs a step
    assert (config.optim.steps, config.optim.warmup_steps) == (100_000, 10_000)
    assert (config.optim.lr, config.optim.new_lr_multiplier) == (1e-5, 5.0)
    assert config.loss == {"itc": 0.0} and config.data.mlm_probability == 0.15
    assert presets.config("meter-clip-base").vision.image_size == 288
    # Nothing of an answer decoder is fresh after pre-training, so a multiplier would do nothing.
    assert after.optim.new_lr_multiplier == 1.0


# Texts of an epoch, epochs and ranks as published; a step draws one text for each picture.
PUBLISHED = {
    "xvlm-clip-base-4m": (5_114_489, 41, 8),
    "efficientvlm-4m": (5_114_489, 41, 8),
    "xvlm-clip-base-captioning-pretrain": (5_114_489, 2, 8),
    "efficientvlm-captioning-pretrain": (5_114_489, 2, 8),
    "xvlm-clip-base-nlvr2-pretrain": (5_114_489, 2, 4),
    "efficientvlm-nlvr2-pretrain": (5_114_489, 2, 4),
    # Without VQA's val, which is held out.
    "xvlm-clip-base-vqa": (443_757 + 1_445_322, 10, 8),
    "efficientvlm-vqa": (443_757 + 1_445_322, 20, 8),
    "efficientvlm-vqa-prune": (443_757 + 1_445_322, 20, 8),
    "meter-clip-base-vqa": (443_757, 10, 1),
    "xvlm-clip-base-retrieval-coco": (566_747, 10, 8),
    "efficientvlm-retrieval-coco": (566_747, 10, 8),
    "efficientvlm-retrieval-coco-prune": (566_747, 10, 8),
    "xvlm-clip-base-retrieval-flickr30k": (145_000, 10, 8),
    "efficientvlm-retrieval-flickr30k": (145_000, 10, 8),
    "efficientvlm-retrieval-flickr30k-prune": (145_000, 10, 8),
    "xvlm-clip-base-captioning": (566_747, 5, 8),
    "efficientvlm-captioning": (566_747, 10, 8),
    "efficientvlm-captioning-prune": (566_747, 10, 8),
    "xvlm-clip-base-nlvr2": (86_373, 10, 8),
    "efficientvlm-nlvr2": (86_373, 10, 8),
    "efficientvlm-nlvr2-prune": (86_373, 10, 8),
    "xvlm-clip-base-grounding": (120_191, 10, 8),
    "efficientvlm-grounding": (120_191, 10, 8),
    "efficientvlm-grounding-prune": (120_191, 10, 8),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_steps_are_the_published_epochs(name):
    texts, epochs, ranks = PUBLISHED[name]
    config = load(name)
    assert config.data.rows_per_image == 1
    images = config.data.global_batch or ranks * config.data.batch
    epoch = round(texts / images)
    assert config.optim.steps == epochs * epoch
    assert config.eval.every in (0, epoch)
    if config.prune is not None:
        assert config.prune.ramp_steps == epoch


FULL_VQA = (
    "xvlm-clip-base-vqa",
    "efficientvlm-vqa",
    "efficientvlm-vqa-prune",
    "efficientvlm-vqa-trim",
)


@pytest.mark.parametrize("name", FULL_VQA)
def test_vqa_learns_from_all_published_questions_but_those_it_chooses_by(name):
    config = load(name)
    assert weights_of(config) == {"data/vqa/vqa/train": 443_757, "data/vg/vqa/train": 1_445_322}
    assert config.data.val == "data/vqa/vqa/val" and config.data.max_words == 30
    if config.stage != "trim":  # its schedule is ours
        assert config.optim.clip == 0.0 and config.eval.every


FULL_TASKS = ("vqa", "nlvr2", "retrieval-coco", "retrieval-flickr30k", "captioning", "grounding")


BEST = {"retrieval": "r_mean", "captioning": "cider"}


@pytest.mark.parametrize("task", FULL_TASKS)
def test_a_teacher_is_its_best_validated_step(task):
    """The students are, too, where pruning has a fixed structure to choose from."""
    teacher, pruned = load(f"xvlm-clip-base-{task}"), load(f"efficientvlm-{task}-prune")
    assert teacher.checkpoint.best == BEST.get(teacher.task, "accuracy")
    assert pruned.prune is not None
    fixed = pruned.prune.freeze_step is not None
    assert pruned.checkpoint.best == (teacher.checkpoint.best if fixed else None)


@pytest.mark.parametrize("task", FULL_TASKS)
def test_a_pruned_student_differs_from_the_distilled_one_in_pruning_alone(task):
    teacher = load(f"xvlm-clip-base-{task}")
    student, pruned = load(f"efficientvlm-{task}"), load(f"efficientvlm-{task}-prune")
    assert student.teacher.path == f"{teacher.out}/model"
    same = dataclasses.replace(pruned, stage="finetune", prune=None, out=student.out)
    assert same == student


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
