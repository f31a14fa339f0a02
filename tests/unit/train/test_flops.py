"""FLOPs of a step against torch's counter on a real one, and the table of devices."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from models import presets
from models.config import ModelConfig
from models.xvlm import XVLM
from train.build import build_task
from train.config import RunConfig
from train.monitor.flops import StepCost, peak_flops, step_cost
from train.recipes_io import load_run_config
from train.stages.memory import step_batch
from train.student import model_config
from train.tasks.base import StepContext

RECIPES = Path(__file__).parents[3] / "train" / "recipes"


def small(name: str, *overrides: str) -> RunConfig:
    sizes = ("data.batch=3", "data.max_tokens=12", "kd.attention=none", *overrides)
    return load_run_config(RECIPES / f"{name}.yaml", list(sizes))[0]


def counted(config: RunConfig, region: bool, model: ModelConfig | None = None) -> float:
    """What the products of one forward take, by torch."""
    student = XVLM(model or presets.config("blocksworld-student", form=config.task)).train()
    task = build_task(config, student, None, None)
    context = StepContext(0, 0, 1, torch.Generator().manual_seed(0))
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        task.losses(student, None, step_batch(config, student.config, region), context)
    return counter.get_total_flops()


@pytest.mark.parametrize("region", [False, True])
def test_pretraining_costs_what_torch_counts(region: bool) -> None:
    config = small(
        "blocksworld-distill",
        "data.region={probability: 0.5, images: 2, rows: 5}",
        "data.mlm_max=4",
    )
    cost = step_cost(config, presets.config("blocksworld-student", form="pretrain"), None)
    found = cost.region if region else cost.general
    # Similarities and heads that only touch a zero are not in ours; both are tiny.
    assert found == pytest.approx(3 * counted(config, region), rel=2e-3)


@pytest.mark.parametrize(
    "task", ["vqa", "nlvr2_pretrain", "nlvr2", "retrieval", "captioning", "grounding"]
)
def test_a_downstream_step_costs_what_torch_counts(task: str) -> None:
    rows = 2 if task in ("vqa", "grounding") else 1
    config = small("blocksworld-prune", f"task={task}", f"data.rows_per_image={rows}")
    student = presets.config("blocksworld-student", form=task)
    assert step_cost(config, student, None).general == pytest.approx(
        3 * counted(config, False), rel=2e-3
    )


@pytest.mark.parametrize("task", ["vqa", "nlvr2", "retrieval", "captioning", "grounding"])
@pytest.mark.parametrize("guided", [True, False])
def test_a_trim_step_costs_its_two_passes(task: str, guided: bool) -> None:
    rows = 2 if task in ("vqa", "grounding") else 1
    guide = [] if guided and task != "retrieval" else ["trim.guided=false"]
    config = small(
        f"blocksworld-{task}-trim", "model=blocksworld-student", f"data.rows_per_image={rows}",
        "trim.bottleneck=1", "trim.projection=1", *guide,
    )  # fmt: skip
    student = model_config(config, None)
    assert student.trimming is not None and student.trimming.guided == (not guide)
    # Masks are one more channel of attention's values, and each trimmer has a bottleneck.
    both = counted(config, False, student)
    assert step_cost(config, student, None).general == pytest.approx(3 * both, rel=0.03)
    if guide:
        plain = replace(config, trim=None, stage="finetune")
        assert step_cost(config, student, None).general == pytest.approx(
            2 * step_cost(plain, student, None).general
        )


def test_a_full_pass_that_is_only_imitated_has_no_backward() -> None:
    found = []
    for weights in ([], ["full_weight=0"], ["full_weight=0", "distil_weight=0"]):
        overrides = ["model=blocksworld-student", "trim.guided=false"]
        config = small("blocksworld-vqa-trim", *overrides, *(f"trim.{w}" for w in weights))
        found.append(step_cost(config, model_config(config, None), None).general)
    assert found == pytest.approx([found[2] * 2, found[2] * 4 / 3, found[2]])


def test_a_teacher_adds_its_forward_and_predicts_no_boxes() -> None:
    config = small("blocksworld-distill", "data.region={probability: 1, images: 2, rows: 5}")
    model = presets.config("blocksworld-student", form="pretrain")
    alone, both = step_cost(config, model, None), step_cost(config, model, model)
    assert both.general == pytest.approx(alone.general * 4 / 3)
    assert both.region is not None and alone.region is not None
    assert alone.region < both.region < alone.region * 4 / 3


def test_runs_without_region_steps_have_no_region_cost() -> None:
    config = small("blocksworld-distill", "data.region.probability=0")
    cost = step_cost(config, presets.config("blocksworld-student", form="pretrain"), None)
    assert cost.region is None and cost.of(2, 5) == 2 * cost.general
    assert StepCost(10.0, 4.0).of(2, 3) == 32.0 and StepCost(10.0, 4.0).expected(0.5) == 12.0


@pytest.mark.parametrize(
    ("name", "precision", "tf32", "peak"),
    [
        ("NVIDIA H100 80GB HBM3", "bf16", False, 989.4e12),
        ("NVIDIA H100 PCIe", "fp16", False, 756.5e12),
        ("NVIDIA H200", "bf16", False, 989.4e12),
        ("NVIDIA H200 NVL", "bf16", False, 835.5e12),
        ("NVIDIA GH200 480GB", "bf16", False, 989.4e12),
        ("NVIDIA A100-SXM4-40GB", "fp32", False, 19.5e12),
        ("NVIDIA A100-SXM4-40GB", "fp32", True, 156e12),
        ("NVIDIA A10", "bf16", False, 125e12),
        ("NVIDIA A10G", "bf16", False, None),
        ("NVIDIA L4", "bf16", False, 121e12),
        ("NVIDIA L40S", "bf16", False, 362e12),
        ("Tesla V100-SXM2-16GB", "fp16", False, 125e12),
        ("Tesla V100-SXM2-16GB", "bf16", False, None),
        ("Tesla V100-PCIE-16GB", "fp32", True, 14e12),
        ("Tesla T4", "fp16", False, 65e12),
        ("NVIDIA A100-SXM4-40GB MIG 3g.20gb", "bf16", False, None),
        ("NVIDIA GeForce RTX 3090 Ti", "bf16", False, None),
        ("something new", "bf16", False, None),
    ],
)
def test_peaks_by_name(name: str, precision: str, tf32: bool, peak: float | None) -> None:
    assert peak_flops(name, precision, tf32) == peak


def test_cost_follows_the_sizes_of_a_rank() -> None:
    config = small("blocksworld-distill")
    model = presets.config("blocksworld-student", form="pretrain")
    twice = replace(config, data=replace(config.data, batch=6))
    assert step_cost(twice, model, None).general == 2 * step_cost(config, model, None).general
