"""Two-stream models through the tasks: losses, distillation of both streams, trimming, bench, MACs."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from data_pipeline.batches import Batch
from models import presets
from models.summary import summarise
from models.trimming import with_trimming
from models.xvlm import XVLM
from tests.unit.models.test_trimming import decisive
from tests.unit.train import test_downstream_tasks as downstream
from tests.unit.train import test_tasks as answering
from tests.unit.train.synthetic import synthetic_batch
from train.config import KdConfig
from train.evaluation import bench
from train.evaluation.macs import count_macs
from train.evaluation.vqa import AnswerList, rank_answers
from train.evaluation.workload import Workload
from train.export.graphs import graphs_of
from train.runtime.teacher import Teacher
from train.tasks.base import Losses, StepContext
from train.tasks.pretrain import PretrainTask
from train.tasks.trim import TrimTask
from train.tasks.vqa import VqaTask
from train.trim_config import TrimConfig

KINDS: dict[str, Any] = {
    "vqa": VqaTask,
    "pretrain": PretrainTask,
    **{name: downstream.TASKS[name] for name in ("nlvr2", "retrieval", "grounding")},
}
TRIMMED = ("vqa", "nlvr2", "retrieval", "grounding")
SHALLOW: dict[str, Any] = {
    "vision": {"heads": (1,) * 2, "ffn": (128,) * 2, "region_layers": 1},
    "text": {"text_layers": 1, "heads": (1,) * 2, "cross_heads": (1,), "ffn": (128,) * 2},
    "image_fusion": {"heads": (1,), "cross_heads": (1,), "ffn": (128,)},
}


def model(task: str, seed: int = 0, student: bool = False) -> XVLM:
    torch.manual_seed(seed)
    values: dict[str, Any] = {
        key: dict(value) for key, value in (SHALLOW if student else {}).items()
    }
    values["text"] = values.get("text", {}) | {"vocab_size": downstream.VOCABULARY}
    return XVLM(presets.config("blocksworld-meter-micro", **values).as_form(task))


def batch(task: str, config: Any) -> Batch:
    if task == "pretrain":
        return answering.pretrain_batch(config, region=True)
    return answering.vqa_batch(config) if task == "vqa" else downstream.batch(task, config)


def losses_of(
    task: str, student: XVLM, teacher: Teacher | None, kd: KdConfig | None = None
) -> Losses:
    kd = kd or KdConfig(cross_attention=True)
    made = KINDS[task]({}, kd, student.config, None if teacher is None else teacher.model.config)
    return made.losses(student, teacher, batch(task, student.config), downstream.context())


@pytest.mark.parametrize("distil", [False, True])
@pytest.mark.parametrize("task", KINDS)
def test_every_parameter_gets_a_gradient(task, distil):
    student = model(task, student=True)
    teacher = downstream.frozen(model(task, 1)) if distil else None
    losses = losses_of(task, student, teacher)
    losses.total().backward()
    assert [n for n, p in student.named_parameters() if p.grad is None] == []
    assert any(name.startswith("kd_fusion") for name in losses.terms) == distil


@pytest.mark.parametrize("task", KINDS)
def test_a_student_that_is_its_teacher_has_nothing_to_learn_from_it(task):
    losses = losses_of(task, model(task).eval(), downstream.frozen(model(task)))
    for name, term in losses.terms.items():
        if name.startswith("kd_"):
            assert term.item() == pytest.approx(0.0, abs=1e-6), name


@pytest.mark.parametrize("task", KINDS)
@pytest.mark.parametrize("kind", ["hidden", "attention", "cross_attention"])
def test_the_image_stream_is_distilled_too(task, kind):
    """The image's last layer is changed in a part that only the term in question can see."""
    student, teacher = model(task).eval(), model(task)
    stream: Any = student.image_fusion
    layer = stream.layers[-1]
    part = {"hidden": layer.ffn_norm, "attention": layer.attention.q}
    changed = part.get(kind, layer.cross_attention.q).weight
    with torch.no_grad():
        changed.add_(torch.randn_like(changed))
    terms = losses_of(task, student, downstream.frozen(teacher)).terms
    assert terms[f"kd_fusion_{kind}"].item() > 1e-5
    assert terms["kd_text_hidden"].item() == pytest.approx(0.0, abs=1e-7)
    assert terms["kd_image_hidden"].item() == pytest.approx(0.0, abs=1e-7)


def test_one_stream_does_not_teach_two():
    one = presets.config("blocksworld-micro-teacher", form="vqa")
    with pytest.raises(ValueError, match="two models of one kind of fusion"):
        VqaTask({}, KdConfig(), model("vqa").config, one)


@pytest.mark.parametrize("task", TRIMMED)
def test_training_with_trimmers_reaches_both_streams(task):
    student = decisive(with_trimming(model(task))).train()
    with torch.no_grad():
        for name, value in student.named_parameters():
            if name.endswith("alpha"):
                value.fill_(1.0)
    base = KINDS[task]({}, KdConfig(), student.config, None)
    losses = TrimTask(base, TrimConfig(), 100).losses(
        student, None, batch(task, student.config), StepContext(50, 0, 1, torch.Generator())
    )
    losses.total().backward()
    assert {"cost"} < losses.terms.keys() and any(n.startswith("self_") for n in losses.terms)
    assert {"keep/image.2", "keep/fusion.3"} <= losses.metrics.keys()
    for name, value in student.named_parameters():
        if "trimmers" in name:
            assert value.grad is not None and bool(value.grad.any()), name


@pytest.mark.parametrize("form", [*TRIMMED, "pretrain"])
def test_bench_runs_and_counts_every_form(form):
    made, work = model(form).eval(), Workload(text_tokens=6, answers=5, top_k=3)
    macs = bench._macs(made, work, torch.device("cpu"))
    assert sum(value for part, value in macs.items() if part != "total") == macs["total"]
    if form == "vqa":
        assert macs == count_macs(made.config, text_tokens=6, top_k=3)
    elif form != "pretrain":
        assert macs["total"] == summarise(made, text_tokens=6).macs["total"]


def test_answers_are_ranked_at_the_counted_cost():
    made = model("vqa").eval()
    answers = Workload(answers=9).answer_list(downstream.VOCABULARY)
    asked = synthetic_batch(1, made.config.vision.image_size, 7, answers)
    ids = asked.question_ids % downstream.VOCABULARY
    asked = dataclasses.replace(asked, question_ids=ids)
    with torch.inference_mode(), FlopCounterMode(display=False) as counter:
        rank_answers(made, asked, answers, 4)
    wanted = count_macs(made.config, text_tokens=7, top_k=4)["total"]
    assert counter.get_total_flops() == 2 * wanted
    assert isinstance(answers, AnswerList)


def test_graphs_of_an_answer_decoder_are_refused():
    with pytest.raises(ValueError, match="pooled tokens"):
        graphs_of(model("vqa"))
    assert [graph.name for graph in graphs_of(model("nlvr2"))][-1] == "fusion"
