"""Every loss of pre-training and VQA with a teacher: ranks, and micro-batches where that is defined,
give the losses and gradients of one process with the whole batch.

Dropout is off, weights are float64 (features and temperature stay float32 inside), and gradients are
averaged as the engine averages them. The ranks' shares of a batch hold different numbers of masked
slots, region rows, questions and answers, so a mean of means would not pass.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from data_pipeline.batches import Batch, PretrainBatch, VqaBatch
from models import presets
from models.xvlm import XVLM
from tests.distributed.spawn import run_ranks
from train.config import KdConfig
from train.losses import gather
from train.runtime.teacher import Teacher
from train.tasks.base import Losses, StepContext, Task
from train.tasks.pretrain import PretrainTask
from train.tasks.vqa import VqaTask

VOCABULARY, TOKENS, ROWS, IMAGES, SLOTS = 40, 7, 8, 4, 3
KD = {
    "published": KdConfig(),
    "everything": KdConfig(contrastive=0.7, cross_attention=True, attention="kl", temperature=2.0),
    "scores": KdConfig(attention="scores", cross_attention=True),
}
# Under accumulation the candidates of ITC and ITM are a micro-batch's rows.
OF_A_MICRO_BATCH = {"itc", "itm", "kd_itm", "kd_itc", "total"} | {
    f"kd_fusion_{kind}" for kind in ("hidden", "attention", "cross_attention")
}


def _model(size: str, form: str, seed: int) -> XVLM:
    torch.manual_seed(seed)
    model = presets.create(f"blocksworld-micro-{size}", form=form, text={"vocab_size": VOCABULARY})
    return model.double().eval()


def _draw(generator: torch.Generator, low: int, high: int, *shape: int) -> Tensor:
    return torch.randint(low, high, shape, generator=generator)


def _pixels(generator: torch.Generator, count: int, size: int) -> Tensor:
    return torch.randn(count, 3, size, size, generator=generator, dtype=torch.float64)


def pretrain_batch(model: XVLM, region: bool, part: slice) -> PretrainBatch:
    """Rows [start, stop) of 8; region batches have two rows an image."""
    generator = torch.Generator().manual_seed(7)
    vision = model.config.vision
    images = _pixels(generator, IMAGES if region else ROWS, vision.image_size)
    ids = _draw(generator, 5, VOCABULARY, ROWS, TOKENS)
    lengths = torch.tensor([7, 6, 3, 7, 4, 5, 7, 2])
    labels = torch.full((ROWS, SLOTS), -100)
    for row, used in enumerate([3, 3, 2, 1, 0, 1, 1, 3]):
        labels[row, :used] = ids[row, 1 : 1 + used]
    extra = {}
    if region:
        visible = torch.rand(ROWS, vision.tokens, generator=generator) < 0.5
        visible[:, 0] = True
        boxes = torch.rand(ROWS, 4, generator=generator) * 0.5 + 0.1
        boxes[2, 2] = -0.1  # a broken box: no GIoU, and its row counts
        is_region = torch.tensor([True, True, True, False, True, False, False, False])
        extra = {"region_mask": visible, "boxes": boxes.double(), "is_region": is_region}
    whole = {
        "valid": torch.ones(ROWS, dtype=torch.bool),
        "text_ids": ids,
        "text_mask": torch.arange(TOKENS) < lengths[:, None],
        "mlm_ids": ids.masked_fill(_draw(generator, 0, 4, ROWS, TOKENS) == 0, 4),
        "mlm_positions": torch.tensor([[1, 2, 3]]).repeat(ROWS, 1) * (labels != -100),
        "mlm_labels": labels,
        **extra,
    }
    count = part.stop - part.start
    share = slice(part.start // 2, part.stop // 2) if region else part
    own = torch.arange(count)
    return PretrainBatch(
        images=images[share],
        image_index=own // 2 if region else own,
        keys=("",) * count,
        **{name: value[part] for name, value in whole.items()},
    )


def vqa_batch(model: XVLM, part: slice) -> VqaBatch:
    """The images [start, stop) / 2 of 4, with 3, 1, 2, 2 questions and a row's number of answers."""
    generator = torch.Generator().manual_seed(8)
    images = _pixels(generator, IMAGES, model.config.vision.image_size)
    image = torch.tensor([0, 0, 0, 1, 2, 2, 3, 3])
    answers = torch.tensor([0, 0, 0, 1, 2, 3, 4, 4, 5, 6, 7])
    ids = _draw(generator, 5, VOCABULARY, len(answers), 4)
    length = _draw(generator, 2, 5, len(answers))
    weight = torch.rand(len(answers), generator=generator)
    questions = _draw(generator, 5, VOCABULARY, ROWS, TOKENS)
    seen = torch.arange(TOKENS) < _draw(generator, 2, TOKENS + 1, ROWS)[:, None]
    first, last = part.start // 2, part.stop // 2
    rows = (image >= first) & (image < last)
    taken = rows[answers]
    count = int(rows.sum())
    return VqaBatch(
        images=images[first:last],
        image_index=image[rows] - first,
        valid=torch.ones(count, dtype=torch.bool),
        keys=("",) * count,
        question_ids=questions[rows],
        question_mask=seen[rows],
        answer_ids=ids[taken],
        answer_mask=torch.arange(4) < length[taken, None],
        answer_row=(answers - rows.nonzero()[0, 0])[taken],
        answer_weight=weight[taken],
        answers=({},) * count,
        questions=("",) * count,
        question_types=("",) * count,
    )


def _parts(rank: int, world: int, micro: int) -> Iterable[slice]:
    """The micro-batches of a rank."""
    step = ROWS // (world * micro)
    for number in range(rank * micro, (rank + 1) * micro):
        yield slice(number * step, (number + 1) * step)


def one_step(kind: str, kd: str, micro: int = 1) -> dict[str, Tensor]:
    """Losses and gradients of the whole batch, averaged over ranks and micro-batches."""
    rank, world = gather.rank_and_world()
    form = "vqa" if kind == "vqa" else "pretrain"
    student = _model("student", form, 1)
    teacher = Teacher(_model("teacher", form, 2), torch.float64, torch.device("cpu"), "torch")
    make: type[Task] = VqaTask if kind == "vqa" else PretrainTask
    task: Any = make({"mlm": 0.5}, KD[kd], student.config, teacher.model.config)
    batches: list[Batch] = [
        vqa_batch(student, part)
        if kind == "vqa"
        else pretrain_batch(student, kind == "region", part)
        for part in _parts(rank, world, micro)
    ]
    means = gather.mean_counts([task.counts(batch) for batch in batches], "cpu")
    values: dict[str, Tensor] = {}
    for number, batch in enumerate(batches):
        context = StepContext(
            step=0,
            rank=rank,
            world_size=world,
            generator=torch.Generator().manual_seed(number),
            mean_counts=means if micro > 1 else None,
        )
        losses: Losses = task.losses(student, teacher, batch, context)
        (losses.total() / micro).backward()
        for name, value in {**losses.logged(), "loss.total": losses.total()}.items():
            values[name] = values.get(name, 0.0) + value.detach().double() / micro
    for name, parameter in student.named_parameters():
        assert parameter.grad is not None, name
        values[f"grad.{name}"] = parameter.grad.double()
    if world > 1:
        for name in sorted(values):
            dist.all_reduce(values[name])
            values[name] /= world
    return values


def _close(name: str, found: Tensor, wanted: Tensor) -> None:
    torch.testing.assert_close(
        found, wanted, rtol=1e-6, atol=1e-6, msg=lambda text: f"{name}: {text}"
    )


def _compare(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> None:
    assert found.keys() == wanted.keys()
    for name, value in wanted.items():
        _close(name, found[name], value)


CASES = [
    ("general", "everything"),
    ("region", "published"),
    ("region", "scores"),
    ("vqa", "everything"),
]


def all_cases() -> list[dict[str, Tensor]]:
    """Runs on every rank."""
    return [one_step(kind, kd) for kind, kd in CASES]


@pytest.fixture(scope="module")
def alone() -> list[dict[str, Tensor]]:
    return all_cases()


@pytest.mark.parametrize("world", [2, 4])
def test_ranks_give_the_losses_and_gradients_of_one_process(
    world: int, alone: list[dict[str, Tensor]]
) -> None:
    for result in run_ranks(all_cases, world):
        for found, wanted in zip(result, alone, strict=True):
            _compare(found, wanted)


@pytest.mark.parametrize("case", [1, 3], ids=["region", "vqa"])
@pytest.mark.parametrize("micro", [2, 4])
def test_accumulation_gives_the_unaccumulated_losses_where_they_are_defined(
    case: int, micro: int, alone: list[dict[str, Tensor]]
) -> None:
    kind, kd = CASES[case]
    found = one_step(kind, kd, micro)
    for name, value in alone[case].items():
        section, _, term = name.partition(".")
        of_micro_batch = kind == "region" and term in OF_A_MICRO_BATCH
        if section in ("loss", "weighted") and not of_micro_batch:
            _close(name, found[name], value)
    if kind == "vqa":  # no term is of a micro-batch, so the gradients are equal, too
        _compare(found, alone[case])
