"""Keys without effect: every key that only some runs read is told to the others, and only to them."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch

from models import presets
from models.xvlm import XVLM
from train.build import build_task
from train.config import KdConfig, OptimConfig, RunConfig
from train.effects import READERS, ineffective_keys
from train.recipes_io import dump_run_yaml, load_run_config
from train.runtime.optimizer import parameter_groups
from train.runtime.teacher import Teacher
from train.stages.check import check_stage
from train.stages.memory import step_batch
from train.tasks.base import StepContext

RECIPES = sorted((Path(__file__).parents[3] / "train" / "recipes").glob("*.yaml"))
TASKS = ("pretrain", "vqa", "nlvr2_pretrain", "nlvr2", "retrieval", "captioning", "grounding")
DOWNSTREAM = TASKS[1:]
# Key and a value that is not its default -> the tasks that read it, as their code says.
READ_BY: dict[str, tuple[str, ...]] = {
    "negatives=local": ("pretrain", "nlvr2_pretrain", "retrieval"),
    "itc_scaling=published": ("pretrain", "retrieval"),
    "label_smoothing=0.1": ("captioning",),
    "data.prompt=a photo of": ("captioning",),
    "data.max_answer_tokens=3": ("vqa",),
    "data.rows_per_image=2": DOWNSTREAM,
    "data.mlm_probability=0.5": ("pretrain",),
    "data.mlm_max=3": ("pretrain",),
    "data.region.probability=0.5": ("pretrain",),
    "data.region_train=elsewhere": ("pretrain",),
    "eval.top_k=3": ("vqa", "retrieval"),
    "eval.annotators=10": ("vqa",),
    "eval.beams=2": ("captioning",),
    "eval.max_length=30": ("captioning",),
    "eval.min_length=3": ("captioning",),
    "kd.text=0.5": tuple(task for task in TASKS if task != "captioning"),
    "kd.fusion=0.5": tuple(task for task in TASKS if task != "captioning"),
    "kd.decoder=0.5": ("vqa", "captioning"),
    "kd.contrastive=0.5": ("pretrain", "retrieval"),
    "kd.temperature=2": tuple(task for task in TASKS if task != "grounding"),
    "initialise.decoder_map=[0]": ("vqa",),
    "prune.budget.top_k=3": ("vqa",),
}  # fmt: skip
# Read by every task.
ALWAYS = ("kd.task_weight=0.5", "kd.image=0.5", "kd.attention=kl", "kd.vision_map=[0]",
          "teacher.dtype=fp32", "eval.samples=3", "eval.every=3", "data.max_words=9",
          "optim.lr=3e-4", "initialise.vision_map=[0]")  # fmt: skip


def loaded(folder: Path, *overrides: str, **changes: Any) -> tuple[RunConfig, dict[str, str]]:
    """A fine-tuning run with a teacher that its student is cut from, and validation."""
    values = {"stage": "finetune", "task": "vqa", "model": "blocksworld-student"} | changes
    lines = [f"{key}: {value}" for key, value in values.items()]
    lines += [
        "out: runs/x",
        "initialise: {source: teacher}",
        "teacher: {path: runs/teacher}",
        "data: {train: data/train, val: data/val}",
    ]
    (folder / "r.yaml").write_text("\n".join(lines))
    return load_run_config(folder / "r.yaml", list(overrides))


def warned(folder: Path, *overrides: str, **changes: Any) -> list[str]:
    return ineffective_keys(*loaded(folder, *overrides, **changes))


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("override", [*READ_BY, *ALWAYS])
def test_a_key_is_told_to_the_tasks_that_do_not_read_it(tmp_path, task, override):
    key = override.partition("=")[0]
    stage = "distill" if task == "pretrain" else "finetune"
    more = ["data.region.probability=0.5"] if key == "data.region_train" else []
    found = warned(tmp_path, override, *more, stage=stage, task=task)
    about = [line for line in found if line.startswith(f"{key} has no effect: ")]
    assert len(about) == (task not in READ_BY.get(override, TASKS)), found
    assert all(task in line or "kd.decoder" in line for line in about)


def test_the_listing_above_holds_every_key_of_the_table():
    listed = [override.partition("=")[0] for override in READ_BY]
    for reader in READERS:
        for key in reader.keys if reader.tasks else ():
            assert any(name == key or name.startswith(f"{key}.") for name in listed), key


class _Recorder:
    """A KdConfig that notes which weights are asked for."""

    def __init__(self, kd: KdConfig) -> None:
        self._kd, self.read = kd, set()

    def __getattr__(self, name: str) -> Any:
        self.read.add(name)
        return getattr(self._kd, name)


@pytest.mark.parametrize("task", TASKS)
def test_the_weights_of_distillation_are_those_that_a_step_reads(tmp_path, task):
    stage = "distill" if task == "pretrain" else "finetune"
    sizes = ("data.batch=4", "data.max_tokens=6", "data.mlm_max=2")
    config, _ = loaded(tmp_path, *sizes, stage=stage, task=task)
    torch.manual_seed(0)
    student, teacher = (
        presets.create(f"blocksworld-micro-{role}", form=task, text={"vocab_size": 20})
        for role in ("student", "teacher")
    )
    kd = _Recorder(KdConfig(contrastive=0.5, cross_attention=True))
    object.__setattr__(config, "kd", kd)
    objective = build_task(config, student, teacher, None)
    frozen = Teacher(teacher, torch.float32, torch.device("cpu"), "torch")
    context = StepContext(0, 0, 1, torch.Generator().manual_seed(0))
    objective.losses(student, frozen, step_batch(config, student.config, False), context)
    assert {"task_weight", "kd_weight", "logits", "image", "image_hidden"} <= kd.read
    for name in ("text", "fusion", "decoder", "contrastive", "temperature"):
        override = next(known for known in READ_BY if known.startswith(f"kd.{name}="))
        assert (name in kd.read) == (task in READ_BY[override]), name


@pytest.mark.parametrize(
    ("idle", "overrides", "changes"),
    [
        ("kd.fusion", ["kd.fusion=0.5", "teacher.path=null"], {}),
        ("teacher.dtype", ["teacher.dtype=fp32", "teacher.path=null"], {}),
        ("teacher.inject_bound", ["teacher.inject_bound=0.1"], {}),
        ("kd.cross_attention", ["kd.cross_attention=true", "kd.attention=none"], {}),
        ("kd.temperature", ["kd.temperature=2", "teacher.path=null"], {}),
        ("initialise.vision_map", ["initialise.vision_map=[0]", "initialise.source=runs/a"], {}),
        ("initialise.text_map", ["initialise.text_map=[0]"], {"model": "runs/a/model"}),
        ("initialise.source", [], {"model": "runs/a/model"}),
        ("initialise.task_vector", ["initialise.task_vector=runs/a"], {}),
        ("eval.top_k", ["eval.top_k=3", "data.val=null"], {}),
        ("eval.every", ["eval.every=3", "data.val=null"], {}),
        ("checkpoint.best", ["checkpoint.best=accuracy", "data.val=null"], {}),
        ("data.region.images", ["data.region.images=3"], {"stage": "distill", "task": "pretrain"}),
        ("data.max_fault_rate", ["data.max_fault_rate=0.1"], {}),
        ("optim.spike_window", ["optim.spike_window=9"], {}),
        (
            "prune.sparsity",
            ["prune.sparsity=0.4", "prune.budget.macs=0.5"],
            {"stage": "prune"},
        ),
        (
            "prune.budget.batch",
            ["prune.budget.batch=4", "prune.budget.macs=0.5"],
            {"stage": "prune"},
        ),
    ],
)
def test_keys_that_other_keys_put_out_of_use(tmp_path, idle, overrides, changes):
    found = [line.partition(" ")[0] for line in warned(tmp_path, *overrides, **changes)]
    assert idle in found


@pytest.mark.parametrize(
    ("overrides", "changes"),
    [
        (["prune.sparsity=0.4"], {"stage": "prune"}),
        (["prune.budget.speedup=2", "prune.budget.batch=4"], {"stage": "prune"}),
        (["prune.budget.macs=0.5", "data.val=null", "eval.top_k=3"], {"stage": "prune"}),
        (
            ["initialise.source=random", "initialise.task_vector=runs/a", "initialise.text_map=[0]"],
            {"model": "runs/a/model"},
        ),
        (["data.val=null", "eval.samples=8", "trim.budget=0.6", "teacher.path=null",
          "initialise.source=random", "kd.temperature=2"], {"stage": "trim"}),
    ],
)  # fmt: skip
def test_what_is_read_is_not_told(tmp_path, overrides, changes):
    assert warned(tmp_path, *overrides, **changes) == []


def test_a_full_pass_that_teaches_no_one_has_no_temperature(tmp_path):
    settings = ["teacher.path=null", "kd.temperature=2", "kd.logits=2"]
    lines = warned(tmp_path, *settings, "trim.distil_weight=0.5", stage="trim")
    assert [line.partition(" ")[0] for line in lines] == ["kd.logits"]
    lines = warned(tmp_path, *settings, "trim.distil_weight=0", stage="trim")
    assert [line.partition(" ")[0] for line in lines] == ["kd.temperature", "kd.logits"]


def test_defaults_that_are_written_out_are_not_told(tmp_path):
    config, _ = loaded(tmp_path, task="nlvr2")
    dump_run_yaml(config, tmp_path / "run.yaml")
    assert ineffective_keys(*load_run_config(tmp_path / "run.yaml", [])) == []


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_no_shipped_recipe_sets_a_key_without_effect(recipe):
    assert ineffective_keys(*load_run_config(recipe, [])) == []


def test_pretraining_with_a_teacher_is_refused(tmp_path):
    config, _ = loaded(tmp_path, stage="pretrain", task="pretrain")
    with pytest.raises(ValueError, match=r"teacher\.path: stage pretrain.*stage=distill"):
        check_stage(config)
    check_stage(dataclasses.replace(config, stage="distill"))


def test_a_multiplier_for_fresh_parameters_needs_some(caplog):
    model = XVLM(presets.config("blocksworld-micro-student", text={"vocab_size": 20}))
    optim = OptimConfig(new_lr_multiplier=2.0)
    beside = {"projections": torch.nn.Linear(2, 2)}
    parameter_groups(model, {"itm_head"}, optim)
    parameter_groups(model, set(), optim, beside)
    parameter_groups(model, set(), OptimConfig())
    assert not caplog.records
    parameter_groups(model, set(), optim)
    assert "optim.new_lr_multiplier has no effect" in caplog.text
