"""Tasks: every parameter is reached in every kind of step, KD vanishes for equal models, weights
add up.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from data_pipeline.batches import PretrainBatch, VqaBatch
from models import presets
from models.xvlm import XVLM
from train.config import KdConfig
from train.runtime.teacher import Teacher
from train.tasks.base import Losses, StepContext
from train.tasks.pretrain import PretrainTask
from train.tasks.vqa import VqaTask

VOCABULARY, TOKENS, ROWS = 40, 9, 4


def model(name: str, form: str, seed: int = 0) -> XVLM:
    torch.manual_seed(seed)
    return presets.create(name, form=form, text={"vocab_size": VOCABULARY})


def context(step: int = 0) -> StepContext:
    generator = torch.Generator().manual_seed(step)
    return StepContext(step=step, rank=0, world_size=1, generator=generator)


def pretrain_batch(config, region: bool = False) -> PretrainBatch:
    generator = torch.Generator().manual_seed(7)
    size, patches = config.vision.image_size, config.vision.tokens
    images = 2 if region else ROWS
    ids = torch.randint(5, VOCABULARY, (ROWS, TOKENS), generator=generator)
    mask = torch.ones(ROWS, TOKENS, dtype=torch.bool)
    for row in range(ROWS):  # a length of its own for each text
        mask[row, TOKENS - row :] = False
    labels = torch.full((ROWS, 3), -100)
    labels[:, 0] = ids[:, 2]
    extra = {}
    if region:
        visible = torch.zeros(ROWS, patches, dtype=torch.bool)
        visible[:, :4] = True
        boxes = torch.tensor([[0.5, 0.5, 0.2, 0.3]]).repeat(ROWS, 1)
        is_region = torch.tensor([True, True, False, True])
        extra = {"region_mask": visible, "boxes": boxes, "is_region": is_region}
    return PretrainBatch(
        images=torch.randint(
            0, 256, (images, 3, size, size), dtype=torch.uint8, generator=generator
        ),
        image_index=torch.arange(ROWS) % images,
        valid=torch.ones(ROWS, dtype=torch.bool),
        keys=("k",) * ROWS,
        text_ids=ids,
        text_mask=mask,
        mlm_ids=ids.clone().index_fill_(1, torch.tensor([2]), 4),
        mlm_positions=torch.tensor([[2, 0, 0]]).repeat(ROWS, 1),
        mlm_labels=labels,
        **extra,
    )


def vqa_batch(config) -> VqaBatch:
    generator = torch.Generator().manual_seed(8)
    size = config.vision.image_size
    answers = torch.tensor([[2, 10, 3], [2, 11, 3], [2, 12, 3], [2, 13, 3], [2, 14, 3]])
    return VqaBatch(
        images=torch.randint(0, 256, (2, 3, size, size), dtype=torch.uint8, generator=generator),
        image_index=torch.tensor([0, 0, 1, 1]),
        valid=torch.ones(ROWS, dtype=torch.bool),
        keys=("k",) * ROWS,
        question_ids=torch.randint(5, VOCABULARY, (ROWS, TOKENS), generator=generator),
        question_mask=torch.ones(ROWS, TOKENS, dtype=torch.bool),
        answer_ids=answers,
        answer_mask=torch.ones(5, 3, dtype=torch.bool),
        answer_row=torch.tensor([0, 1, 2, 3, 3]),
        answer_weight=torch.tensor([1.0, 1.0, 1.0, 0.6, 0.4]),
        answers=({"a": 1.0},) * ROWS,
        questions=("q",) * ROWS,
        question_types=("",) * ROWS,
    )


def frozen(teacher: XVLM) -> Teacher:
    return Teacher(teacher, torch.float32, torch.device("cpu"), "torch")


def total_of(losses: Losses) -> float:
    return sum(losses.weights[name] * term.item() for name, term in losses.terms.items())


@pytest.mark.parametrize("region", [False, True])
@pytest.mark.parametrize("distil", [False, True])
def test_every_parameter_gets_a_gradient_in_every_kind_of_step(region, distil):
    student = model("blocksworld-micro-student", "pretrain")
    teacher = frozen(model("blocksworld-micro-teacher", "pretrain", 1)) if distil else None
    theirs = teacher.model.config if teacher else None
    task = PretrainTask({}, KdConfig(), student.config, theirs)
    task.losses(
        student, teacher, pretrain_batch(student.config, region), context()
    ).total().backward()
    missing = [name for name, parameter in student.named_parameters() if parameter.grad is None]
    assert missing == []


@pytest.mark.parametrize("kind", ["probabilities", "kl", "scores", "none"])
def test_every_kind_of_attention_trains_every_parameter(kind):
    student = model("blocksworld-micro-student", "pretrain")
    teacher = frozen(model("blocksworld-micro-teacher", "pretrain", 1))
    kd = KdConfig(attention=kind, cross_attention=True)
    task = PretrainTask({}, kd, student.config, teacher.model.config)
    losses = task.losses(student, teacher, pretrain_batch(student.config, True), context())
    losses.total().backward()
    assert all(parameter.grad is not None for parameter in student.parameters())
    maps = {name for name in losses.terms if "attention" in name}
    assert maps == (
        set()
        if kind == "none"
        else {
            "kd_image_attention",
            "kd_text_attention",
            "kd_fusion_attention",
            "kd_fusion_cross_attention",
        }
    )


def test_similarities_are_distilled_when_they_weigh_something():
    student = model("blocksworld-micro-student", "pretrain").eval()
    teacher = frozen(model("blocksworld-micro-teacher", "pretrain", 1))

    def run(weight: float, target: Teacher) -> Losses:
        kd = KdConfig(contrastive=weight)
        task = PretrainTask({}, kd, student.config, target.model.config)
        return task.losses(student, target, pretrain_batch(student.config), context())

    assert "kd_itc" not in run(0.0, teacher).terms
    losses = run(0.5, teacher)
    assert losses.weights["kd_itc"] == pytest.approx(0.4 * 0.5)
    assert losses.terms["kd_itc"] > 1e-4
    twin = frozen(model("blocksworld-micro-student", "pretrain"))
    assert run(0.5, twin).terms["kd_itc"].item() == pytest.approx(0.0, abs=1e-6)


def test_terms_are_logged_raw_and_weighted():
    values = Losses(
        {"a": torch.tensor(2.0, requires_grad=True), "b": torch.tensor(3.0)},
        {"a": 0.5, "b": 0.0},
        {"accuracy": torch.tensor(0.25)},
    ).logged()
    assert {name: value.item() for name, value in values.items()} == {
        "loss.a": 2.0,
        "loss.b": 3.0,
        "weighted.a": 1.0,
        "weighted.b": 0.0,
        "metrics.accuracy": 0.25,
    }
    assert not any(value.requires_grad for value in values.values())


def test_means_are_weighed_by_the_counts_of_the_whole_step():
    """3 of the 4 region rows of this batch are regions, 4 slots are masked; the step's mean is
    twice that.
    """
    student = model("blocksworld-micro-student", "pretrain").eval()
    task = PretrainTask({}, KdConfig(), student.config, None)
    batch = pretrain_batch(student.config, True)
    counts = {name: count.item() for name, count in task.counts(batch).items()}
    assert counts == {"mlm": ROWS, "boxes": 3}
    alone = task.losses(student, None, batch, context())
    twice = {name: 2 * torch.tensor(float(count)) for name, count in counts.items()}
    shared = task.losses(student, None, batch, replace(context(), mean_counts=twice))
    for name, term in alone.terms.items():
        factor = 0.5 if name in ("mlm", "box_l1", "box_giou") else 1.0
        torch.testing.assert_close(shared.terms[name], factor * term)


def test_every_vqa_parameter_gets_a_gradient():
    student = model("blocksworld-micro-student", "vqa")
    teacher = frozen(model("blocksworld-micro-teacher", "vqa", 1))
    task = VqaTask({}, KdConfig(cross_attention=True), student.config, teacher.model.config)
    losses = task.losses(student, teacher, vqa_batch(student.config), context())
    losses.total().backward()
    assert all(parameter.grad is not None for parameter in student.parameters())
    assert losses.total().item() == pytest.approx(total_of(losses), rel=1e-5)


def test_a_student_that_is_the_teacher_has_no_distillation_loss():
    student = model("blocksworld-micro-student", "vqa").eval()
    twin = frozen(model("blocksworld-micro-student", "vqa"))
    task = VqaTask({}, KdConfig(cross_attention=True), student.config, twin.model.config)
    losses = task.losses(student, twin, vqa_batch(student.config), context())
    for name, term in losses.terms.items():
        if name.startswith("kd_"):
            assert term.item() == pytest.approx(0.0, abs=1e-9), name


def test_task_weight_applies_only_beside_a_teacher():
    student = model("blocksworld-micro-student", "vqa")
    alone = VqaTask({"answer": 2.0}, KdConfig(), student.config, None)
    assert alone.losses(student, None, vqa_batch(student.config), context()).weights == {
        "answer": 2.0
    }
    teacher = frozen(model("blocksworld-micro-teacher", "vqa", 1))
    both = VqaTask({"answer": 2.0}, KdConfig(task_weight=0.5), student.config, teacher.model.config)
    losses = both.losses(student, teacher, vqa_batch(student.config), context())
    assert losses.weights["answer"] == 1.0


def test_fusion_part_of_the_question_pass_excludes_the_text_layers():
    student = model("blocksworld-micro-student", "vqa")
    teacher = model("blocksworld-micro-teacher", "vqa", 1)
    task = VqaTask({}, KdConfig(), student.config, teacher.config)
    assert task.plan is not None
    text = student.config.text.text_layers
    assert all(mine >= text for mine, _ in task.plan.fusion.attention)
    assert all(mine > text for mine, _ in task.plan.fusion.hidden)
    covered = set(task.plan.text.hidden) | set(task.plan.fusion.hidden)
    assert covered == set(task.plan.question.hidden)


def test_teacher_and_student_score_the_same_negatives(monkeypatch):
    student = model("blocksworld-micro-student", "pretrain")
    teacher = frozen(model("blocksworld-micro-teacher", "pretrain", 1))
    seen: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}

    def watch(name: str, owner: XVLM) -> None:
        original = owner.fuse

        def fuse(states, mask, images, image_mask, *rest, **more):
            own = images[:ROWS].flatten(1)
            same = (images.flatten(1)[:, None] == own[None]).all(-1)
            seen.setdefault(name, (mask.sum(1), same.int().argmax(1)))
            return original(states, mask, images, image_mask, *rest, **more)

        monkeypatch.setattr(owner, "fuse", fuse)

    watch("student", student)
    watch("teacher", teacher.model)
    task = PretrainTask({}, KdConfig(), student.config, teacher.model.config)
    task.losses(student, teacher, pretrain_batch(student.config), context())
    # Lengths tell which text each of the 3B rows got, equal states which image.
    for ours, theirs in zip(seen["student"], seen["teacher"], strict=True):
        assert torch.equal(ours, theirs)
    texts, images = seen["student"]
    own = torch.arange(ROWS)
    assert not (images[ROWS : 2 * ROWS] == own).any(), "a negative image is another's"
    assert not (texts[2 * ROWS :] == TOKENS - own).any(), "a negative text is another's"


def test_a_teacher_without_a_decoder_is_refused():
    student = model("blocksworld-micro-student", "vqa")
    teacher = model("blocksworld-micro-teacher", "pretrain", 1)
    with pytest.raises(ValueError, match=r"teacher\.path"):
        VqaTask({}, KdConfig(), student.config, teacher.config)


def test_the_teacher_is_frozen_and_in_evaluation_mode():
    teacher = frozen(model("blocksworld-micro-teacher", "vqa"))
    assert not teacher.model.training
    assert not any(parameter.requires_grad for parameter in teacher.model.parameters())
    with teacher.running() as running:
        assert not torch.is_grad_enabled()
        assert running is teacher.model


@pytest.mark.parametrize("form", ["pretrain", "vqa"])
def test_a_wider_teacher_is_reached_through_learned_projections(form):
    """Projections are trained beside the student, start alike everywhere, and are no part of it."""
    torch.manual_seed(1)
    name = "blocksworld-micro-teacher"
    slim = presets.config(name, form=form, text={"vocab_size": VOCABULARY})
    student = XVLM(slim)
    shape = {
        "vision": {"width": 24 * slim.vision.heads[0], "head_dim": 24},
        "text": {"width": 24 * slim.text.heads[0], "head_dim": 24, "vocab_size": VOCABULARY},
    }
    teacher_model = presets.create(name, form=form, **shape)
    teacher = Teacher(teacher_model, torch.float32, torch.device("cpu"), "torch")
    kinds = {"pretrain": (PretrainTask, pretrain_batch), "vqa": (VqaTask, vqa_batch)}
    task_class, batch_of = kinds[form]
    task = task_class({}, KdConfig(), student.config, teacher_model.config)
    again = task_class({}, KdConfig(), student.config, teacher_model.config)
    modules = task.trainable_modules()["projections"]
    expected = {"vision", "text"} | ({"decoder"} if form == "vqa" else set())
    assert set(modules) == expected
    for one, two in zip(
        modules.parameters(), again.trainable_modules()["projections"].parameters(), strict=True
    ):
        assert torch.equal(one, two)
    losses = task.losses(student, teacher, batch_of(student.config), context())
    losses.total().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in modules.parameters())
    assert not any("projections" in key for key in student.state_dict())
    equal = task_class({}, KdConfig(), student.config, student.config)
    assert equal.trainable_modules() == {}
