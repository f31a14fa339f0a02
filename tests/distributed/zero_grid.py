"""One cell of the grid {ZeRO stage} x {accumulation} x {activation checkpointing} x {offload}: the
real pre-training task with a teacher, 20 steps on given rows, and the parameters that come out.

Every cell sees the same 16 rows a step: 8 on each of two ranks, in 1, 2 or 4 micro-batches. General
and region steps take turns, so the box head has work in some steps only; the numbers of masked
slots and of region rows differ between ranks and between micro-batches.

Left out: ITC and ITM and what depends on their negatives (kd.fusion, kd.logits). They are defined
on the micro-batch, so accumulation changes them.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from data_pipeline.batches import PretrainBatch
from models import presets
from models.xvlm import XVLM
from tests.distributed.pool import destroyed
from train.config import KdConfig, RunConfig
from train.runtime.distributed import start
from train.runtime.engine import build_engine, gathered, parameter_groups
from train.runtime.step import EngineModule, keyed_generator, train_step
from train.runtime.teacher import Teacher
from train.tasks.base import StepContext
from train.tasks.pretrain import PretrainTask

STEPS = 20
RANKS, ROWS, IMAGES, TOKENS, SLOTS = 2, 8, 8, 10, 3
REGION_IMAGES = 4
LOSS = {"itc": 0.0, "itm": 0.0}
KD = KdConfig(fusion=0.0, logits=0.0)


@dataclass(frozen=True)
class Case:
    """One cell."""

    stage: int
    accumulate: int = 1
    checkpointing: bool = False
    offload: str = "none"

    def __str__(self) -> str:
        parts = [f"zero{self.stage}", f"accumulate{self.accumulate}"]
        parts += ["checkpointing"] * self.checkpointing
        return "-".join(parts + ["offload"] * (self.offload != "none"))


def all_cases() -> list[Case]:
    """The full grid; nothing can be offloaded at stage 0."""
    cells = itertools.product(range(4), (1, 2, 4), (False, True), ("none", "optimizer"))
    return [Case(*cell) for cell in cells if cell[0] > 0 or cell[3] == "none"]


def pairwise(cases: list[Case]) -> list[Case]:
    """Few of the cases, so that any two settings that occur together do so in one of them."""

    def pairs(case: Case) -> set[tuple[Any, ...]]:
        settings = enumerate((case.stage, case.accumulate, case.checkpointing, case.offload))
        return set(itertools.combinations(settings, 2))

    open_pairs = set().union(*(pairs(case) for case in cases))
    chosen = []
    while open_pairs:
        best = max(cases, key=lambda case: len(pairs(case) & open_pairs))
        open_pairs -= pairs(best)
        chosen.append(best)
    return chosen


def run_config(case: Case) -> RunConfig:
    engine = {
        "config": f"zero{case.stage}",
        "accumulate": case.accumulate,
        "activation_checkpointing": case.checkpointing,
        "offload": case.offload,
    }
    return RunConfig(
        stage="distill",
        task="pretrain",
        out="unused",
        data={"train": "unused", "batch": ROWS // case.accumulate},
        model="unused",
        optim={"lr": 1e-3, "weight_decay": 0.1, "steps": STEPS, "new_lr_multiplier": 2.0},
        loss=LOSS,
        kd=KD,
        engine=engine,
    )


def models() -> tuple[XVLM, Teacher]:
    """Student and teacher with weights that every process draws alike."""
    torch.manual_seed(0)
    student = presets.create("blocksworld-micro-student").train()
    teacher = presets.create("blocksworld-micro-teacher")
    return student, Teacher(teacher, torch.float32, torch.device("cpu"), "torch")


def groups(student: XVLM, config: RunConfig) -> list[dict[str, Any]]:
    return parameter_groups(student, {"mlm_head", "bbox_head"}, config.optim)


def rows_of(step: int, rank: int) -> PretrainBatch:
    """The rows of a rank in a step; every third step is one of regions."""
    generator = torch.Generator().manual_seed(1000 * step + rank)

    def whole(high: int, *shape: int) -> Tensor:
        return torch.randint(0, high, shape, generator=generator)

    region = step % 3 == 1
    images = REGION_IMAGES if region else IMAGES
    lengths = whole(TOKENS - 4, ROWS) + 5
    labels = whole(256, ROWS, SLOTS)
    used = torch.arange(SLOTS)[None] < whole(SLOTS + 1, ROWS)[:, None]
    extra: dict[str, Tensor] = {}
    if region:
        visible = whole(2, ROWS, 37).bool()
        visible[:, 0] = True  # the class token
        extra = {
            "region_mask": visible,
            "boxes": torch.rand(ROWS, 4, generator=generator) * 0.4 + 0.3,
            "is_region": whole(4, ROWS) > 0,
        }
    return PretrainBatch(
        images=whole(256, images, 3, 48, 48).to(torch.uint8),
        image_index=torch.arange(ROWS) // (ROWS // images),
        valid=torch.ones(ROWS, dtype=torch.bool),
        keys=("",) * ROWS,
        text_ids=whole(256, ROWS, TOKENS),
        text_mask=torch.arange(TOKENS)[None] < lengths[:, None],
        mlm_ids=whole(256, ROWS, TOKENS),
        mlm_positions=torch.where(used, whole(4, ROWS, SLOTS), 0),
        mlm_labels=torch.where(used, labels, -100),
        **extra,
    )


def _cut(batch: PretrainBatch, start: int, stop: int) -> PretrainBatch:
    """Rows [start, stop) with the images they are of: as many rows an image in every part."""
    images = batch.image_index[start:stop]
    first, last = int(images[0]), int(images[-1]) + 1
    values = {
        name: value if value is None else value[start:stop] for name, value in vars(batch).items()
    }
    values |= {"images": batch.images[first:last], "image_index": images - first}
    return PretrainBatch(**values)


def _micro_batches(rank: int, accumulate: int) -> Iterator[PretrainBatch]:
    size = ROWS // accumulate
    for step in range(STEPS):
        rows = rows_of(step, rank)
        for start_row in range(0, ROWS, size):
            yield _cut(rows, start_row, start_row + size)


def train_case(case: Case) -> dict[str, Tensor]:
    """On a rank: the parameters after the steps, by name."""
    place, config = start(), run_config(case)
    student, teacher = models()
    task = PretrainTask(LOSS, KD, student.config, teacher.model.config)
    module = EngineModule(student, task, teacher)
    batches = _micro_batches(place.rank, case.accumulate)
    with destroyed(build_engine(config, module, groups(student, config))) as engine:
        assert engine.gradient_accumulation_steps() == case.accumulate
        assert student.vision.blocks[0].recompute is case.checkpointing
        adam = type(engine.optimizer.optimizer).__name__ if case.stage else ""
        assert (adam == "DeepSpeedCPUAdam") is (case.offload != "none"), adam
        for step in range(STEPS):

            def context_of(micro: int, step: int = step) -> StepContext:
                generator = keyed_generator(0, step, "general", micro)
                return StepContext(step, place.rank, place.world_size, generator)

            result = train_step(engine, batches, context_of)
            assert result.applied and result.finite
        with gathered(student):
            return {name: p.detach().clone() for name, p in student.named_parameters()}


def losses_of_two_runs() -> tuple[list[float], list[float]]:
    """On a rank: the total losses of six steps with every term and with dropout, trained twice."""
    return losses_of_all_terms(Case(1, 2), 0.1)[0], losses_of_all_terms(Case(1, 2), 0.1)[0]


def losses_of_all_terms(
    case: Case, dropout: float = 0.0, **engine: Any
) -> tuple[list[float], list[float]]:
    """On a rank: the total losses of six steps with every term, and the loss scale after each."""
    place, config = start(), run_config(case)
    config = replace(config, kd=KdConfig(), engine=replace(config.engine, **engine))
    _, teacher = models()
    torch.manual_seed(0)
    text = {"dropout": dropout, "attention_dropout": dropout}
    student = presets.create("blocksworld-micro-student", text=text).train()
    task = PretrainTask({}, config.kd, student.config, teacher.model.config)
    module = EngineModule(student, task, teacher)
    batches = _micro_batches(place.rank, case.accumulate)
    losses, scales = [], []
    with destroyed(build_engine(config, module, groups(student, config))) as built:
        for step in range(6):

            def context_of(micro: int, step: int = step) -> StepContext:
                generator = keyed_generator(0, step, "general", micro)
                return StepContext(step, place.rank, place.world_size, generator)

            result = train_step(built, batches, context_of)
            assert result.applied
            losses.append(result.loss)
            scales.append(float(getattr(built.optimizer, "loss_scale", 1.0)))
    return losses, scales


def train_plainly() -> dict[str, Tensor]:
    """The same in one process, with torch alone and all rows of a step in one batch."""
    config = run_config(Case(0))
    student, teacher = models()
    task = PretrainTask(LOSS, KD, student.config, teacher.model.config)
    optimizer = torch.optim.AdamW(
        groups(student, config), betas=config.optim.betas, eps=config.optim.eps
    )
    for step in range(STEPS):
        ranks = [rows_of(step, rank) for rank in range(RANKS)]
        batch = _joined(ranks)
        context = StepContext(step, 0, 1, keyed_generator(0, step, "general", 0))
        optimizer.zero_grad()
        task.losses(student, teacher, batch, context).total().backward()
        torch.nn.utils.clip_grad_norm_(student.parameters(), config.optim.clip)
        optimizer.step()
    return {name: p.detach().clone() for name, p in student.named_parameters()}


def _joined(batches: list[PretrainBatch]) -> PretrainBatch:
    """The rows of all ranks in one batch."""
    values: dict[str, Any] = {}
    offset, indices = 0, []
    for batch in batches:
        indices.append(batch.image_index + offset)
        offset += batch.images.shape[0]
    for name, value in vars(batches[0]).items():
        parts = [getattr(batch, name) for batch in batches]
        values[name] = torch.cat(parts) if isinstance(value, Tensor) else value
    values |= {"image_index": torch.cat(indices), "keys": ("",) * sum(b.rows for b in batches)}
    return PretrainBatch(**values)


def differences(found: dict[str, Tensor], expected: dict[str, Tensor]) -> dict[str, float]:
    """Relative error of each parameter, by name.

    Without key biases: their gradient is exactly zero, as the softmax ignores what all keys share,
    and Adam scales its rounding noise up to full steps. There is nothing to compare.
    """
    assert found.keys() == expected.keys()
    return {
        name: float((found[name] - value).norm() / value.norm().clamp_min(1e-12))
        for name, value in expected.items()
        if not name.endswith(".k.bias")
    }
