"""One whole distillation step equals the published one: every term, the total and all student
gradients.

Weights and inputs are those of the other parity tests; both models score the same listed negatives.
Gradients are compared by their norm and by their product with a fixed direction, cos(0), cos(1),
...
"""

from __future__ import annotations

import dataclasses
import json
from typing import Any

import pytest
import torch

from data_pipeline.batches import PretrainBatch
from models.checkpoints import xvlm as published
from models.xvlm import XVLM
from tests.parity.test_published_outputs import DATA, build, tensors
from train.config import KdConfig
from train.losses import vl
from train.runtime.teacher import Teacher
from train.tasks.base import Losses, StepContext
from train.tasks.pretrain import PretrainTask


@pytest.fixture(scope="module")
def stored() -> dict[str, Any]:
    return json.loads((DATA / "distillation_step.json").read_text())


def general_batch(stored: dict[str, Any]) -> tuple[PretrainBatch, vl.HardNegatives]:
    case = tensors("pretrain_student")
    rows = case["in/text_ids"].shape[0]
    batch = PretrainBatch(
        images=case["in/images"],
        image_index=torch.arange(rows),
        valid=torch.ones(rows, dtype=torch.bool),
        keys=("",) * rows,
        text_ids=case["in/text_ids"],
        text_mask=case["in/text_atts"].bool(),
        mlm_ids=case["in/text_ids_masked"],
        mlm_positions=case["in/masked_pos"],
        mlm_labels=case["in/masked_ids"],
    )
    image = case["in/itm_image_idx"][rows : 2 * rows]
    text = case["in/itm_text_idx"][2 * rows :]
    return batch, vl.HardNegatives(image, text)


def region_batch(stored: dict[str, Any]) -> tuple[PretrainBatch, vl.HardNegatives]:
    case = tensors("region")
    listed = {name: torch.tensor(value) for name, value in stored["region"].items()}
    rows = case["in/text_ids"].shape[0]
    batch = PretrainBatch(
        images=case["in/images"],
        image_index=case["in/idx_to_group_img"],
        valid=torch.ones(rows, dtype=torch.bool),
        keys=("",) * rows,
        text_ids=case["in/text_ids"],
        text_mask=case["in/text_atts"].bool(),
        mlm_ids=case["in/text_ids_masked"],
        mlm_positions=case["in/masked_pos"],
        mlm_labels=listed["masked_ids"],
        region_mask=case["in/image_atts"].bool(),
        boxes=listed["target_bbox"],
        is_region=listed["is_image"] == 0,
    )
    return batch, vl.HardNegatives(listed["neg_image"], listed["neg_text"])


def run_step(
    kind: str,
    stored: dict[str, Any],
    monkeypatch: pytest.MonkeyPatch,
    keep_last: bool,
    temperature: float = 1.0,
) -> tuple[XVLM, Losses]:
    student, teacher = build(tensors("pretrain_student")), build(tensors("pretrain_teacher"))
    batch, negatives = (general_batch if kind == "general" else region_batch)(stored)
    monkeypatch.setattr(vl, "hard_negatives", lambda *args, **kwargs: negatives)
    frozen = Teacher(teacher, torch.float32, torch.device("cpu"), "torch")
    kd = KdConfig(temperature=temperature)
    task = PretrainTask({}, kd, student.config, teacher.config)
    if keep_last:
        # The published rule drops "index 6", which a two-layer student does not have: nothing is
        # dropped.
        assert task.plan is not None
        image = dataclasses.replace(task.plan.image, student_layers=-1)
        task.plan = dataclasses.replace(task.plan, image=image)
    context = StepContext(step=0, rank=0, world_size=1, generator=torch.Generator())
    return student, task.losses(student, frozen, batch, context)


def grouped(losses: Losses) -> dict[str, float]:
    terms = {name: value.item() for name, value in losses.terms.items()}
    weighted = {name: losses.weights[name] / 0.4 * value for name, value in terms.items()}
    fusion = weighted["kd_fusion_hidden"] + weighted["kd_fusion_attention"]
    image = weighted["kd_image_hidden"] + weighted["kd_image_attention"]
    text = weighted["kd_text_hidden"] + weighted["kd_text_attention"]
    return {
        "task_loss_itc": terms["itc"],
        "task_loss_itm": terms["itm"],
        "task_loss_mlm": terms["mlm"],
        "itm_logits_loss": terms["kd_itm"],
        "mlm_logits_loss": terms["kd_mlm"],
        "loss_cross_kd": fusion,
        "loss_text_kd": text,
        "loss_img_kd": image,
        "loss_kd": fusion + image + text + terms["kd_itm"] + terms["kd_mlm"],
        "loss_in_total": losses.total().item(),
    }


@pytest.mark.parametrize("kind", ["general", "region"])
def test_every_term_and_the_total(kind, stored, monkeypatch):
    _, losses = run_step(kind, stored, monkeypatch, keep_last=True)
    values = grouped(losses)
    if kind == "region":
        values["task_loss_bbox"] = losses.terms["box_l1"].item()
        values["task_loss_giou"] = losses.terms["box_giou"].item()
    for name, value in values.items():
        assert value == pytest.approx(stored["totals"][f"{kind}/{name}"], rel=1e-4), name


@pytest.mark.parametrize("kind", ["general", "region"])
def test_last_image_state_is_dropped(kind, stored, monkeypatch):
    _, losses = run_step(kind, stored, monkeypatch, keep_last=False)
    values = grouped(losses)
    for name in ("loss_img_kd", "loss_in_total"):
        expected = stored["totals"][f"{kind}/{name}_drop_last"]
        assert values[name] == pytest.approx(expected, rel=1e-4), name


@pytest.mark.parametrize("kind", ["general", "region"])
def test_temperature_of_the_logits(kind, stored, monkeypatch):
    _, losses = run_step(kind, stored, monkeypatch, keep_last=True, temperature=2.5)
    values = grouped(losses)
    for name in ("itm_logits_loss", "mlm_logits_loss", "loss_in_total"):
        expected = stored["totals"][f"{kind}/temperature_2.5/{name}"]
        assert values[name] == pytest.approx(expected, rel=1e-4), name


@pytest.mark.parametrize("kind", ["general", "region"])
def test_gradients_of_the_total(kind, stored, monkeypatch):
    student, losses = run_step(kind, stored, monkeypatch, keep_last=True)
    losses.total().backward()
    gradients = {
        name: torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        for name, parameter in student.named_parameters()
    }
    ours = published.to_published(gradients)
    compared = 0
    for name, (norm, product) in stored["gradients"].items():
        if not name.startswith(f"{kind}/"):
            continue
        key = name.removeprefix(f"{kind}/")
        gradient = ours[key].double().flatten()
        direction = torch.cos(torch.arange(gradient.numel(), dtype=torch.float64))
        # Two views of the same vector; key biases are zero but for rounding.
        assert float(gradient.norm()) == pytest.approx(norm, rel=1e-3, abs=1e-5), key
        assert float(gradient @ direction) == pytest.approx(
            product, rel=1e-3, abs=2e-3 * norm + 1e-5
        ), key
        compared += 1
    assert compared > 90
