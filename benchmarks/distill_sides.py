"""The two sides of `distill_step.py`: our step and the eager one, compared and measured."""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

__all__ = ["compare", "measure", "model_sizes", "settings"]

ROOT = Path(__file__).resolve().parent.parent
CHECKED_ROWS = 4  # of the batch on which losses are compared


def settings(args: argparse.Namespace) -> Any:
    """The recipe's run, at the size and in the precision asked for, in one process: with nothing to
    partition ZeRO would only keep second copies.
    """
    from train.recipes_io import load_run_config

    overrides = [
        f"data.batch={args.batch}",
        f"engine.precision={args.dtype}",
        f"teacher.dtype={args.dtype}",
        "engine.config=zero0",
        *args.set,
    ]
    return load_run_config(ROOT / "train/recipes/efficientvlm-4m.yaml", overrides)[0]


def model_sizes(args: argparse.Namespace) -> tuple[Any, Any]:
    """Configurations of student and teacher."""
    from models import presets

    size: dict[str, Any] = {"vision.image_size": args.image_size}
    return presets.config(args.student, **size), presets.config(args.teacher, **size)


def models(args: argparse.Namespace, device: Any) -> tuple[Any, Any]:
    """Student and teacher with fresh weights, the same in every process: the teacher's drawn, the
    student's cut from it as in the recipe.
    """
    import torch

    from models.initialise import student_from_teacher
    from models.xvlm import XVLM

    torch.manual_seed(0)
    student_config, teacher_config = model_sizes(args)
    teacher = XVLM(teacher_config)
    student, _ = student_from_teacher(teacher, student_config)
    return student.to(device), teacher.to(device)


def batch_of(config: Any, model: Any, device: Any) -> Any:
    """A general batch of the run's sizes: noise, texts of 8 tokens up to the longest."""
    import torch

    from data_pipeline.batches import PretrainBatch
    from train.stages.memory import step_batch

    generator = torch.Generator().manual_seed(0)
    empty = step_batch(config, model, region=False)
    assert isinstance(empty, PretrainBatch)
    rows, tokens = empty.text_ids.shape

    def ids() -> torch.Tensor:
        return torch.randint(1, model.text.vocab_size, (rows, tokens), generator=generator)

    slots = empty.mlm_labels.shape[1]
    lengths = torch.randint(min(8, tokens), tokens + 1, (rows, 1), generator=generator)
    text = ids()
    images = torch.randint(
        0, 256, tuple(empty.images.shape), dtype=torch.uint8, generator=generator
    )
    return replace(
        empty,
        images=images,
        text_ids=text,
        text_mask=torch.arange(tokens)[None] < lengths,
        mlm_ids=ids(),
        mlm_positions=torch.randint(0, min(8, tokens), (rows, slots), generator=generator),
        mlm_labels=torch.randint(1, model.text.vocab_size, (rows, slots), generator=generator),
    ).to(device)


def compare(args: argparse.Namespace) -> dict[str, Any]:
    """Raw terms of both steps on one small batch in fp32, and their largest relative difference."""
    import torch

    from benchmarks.eager_step import EagerStep, total
    from train.build import build_task
    from train.runtime.step import keyed_generator
    from train.runtime.teacher import Teacher
    from train.tasks.base import StepContext

    args.dtype, args.set = "fp32", []
    args.batch = min(args.batch, CHECKED_ROWS)
    config, device = settings(args), torch.device(args.device)
    student, teacher = models(args, device)
    student.eval()  # no dropout
    batch = batch_of(config, student.config, device)
    task = build_task(config, student, teacher, None)
    context = StepContext(0, 0, 1, keyed_generator(0, 0))
    with torch.no_grad():
        ours = task.losses(
            student, Teacher(teacher, torch.float32, device, "torch"), batch, context
        )
        optimizer = torch.optim.SGD(student.parameters(), lr=0.0)
        eager = EagerStep(student, teacher, optimizer, None).forward(batch, keyed_generator(0, 0))
    terms = {name: float(value) for name, value in ours.terms.items()}
    theirs = {name: float(value) for name, value in eager.items()}
    terms["total"], theirs["total"] = float(ours.total()), float(total(eager))
    assert terms.keys() == theirs.keys(), (terms.keys(), theirs.keys())
    differences = {name: abs(terms[name] / theirs[name] - 1) for name in terms}
    return {
        "rows": args.batch,
        "ours": terms,
        "eager": theirs,
        "largest_relative_difference": max(differences.values()),
    }


def ours_step(args: argparse.Namespace, device: Any) -> Callable[[int], Any]:
    """Our optimizer step: engine, task and teacher as a run builds them."""
    from train.build import build_task
    from train.runtime.engine import build_engine, parameter_groups
    from train.runtime.step import EngineModule, keyed_generator, train_step
    from train.runtime.teacher import Teacher, choose_dtype
    from train.tasks.base import StepContext

    config = settings(args)
    student, teacher = models(args, device)
    frozen = Teacher(
        teacher,
        choose_dtype(config.teacher.dtype, device),
        device,
        config.teacher.backend,
        compile=config.teacher.compile,
        overlap=config.teacher.overlap,
    )
    task = build_task(config, student, frozen.model, None)
    engine = build_engine(
        config,
        EngineModule(student, task, frozen),
        parameter_groups(student, set(), config.optim),
    )
    batch = batch_of(config, student.config, device)

    def step(number: int) -> float:
        def context(micro: int) -> StepContext:
            return StepContext(number, 0, 1, keyed_generator(0, number, micro))

        return train_step(engine, iter([batch] * config.engine.accumulate), context).loss

    return step


def eager_side(args: argparse.Namespace, device: Any) -> Callable[[int], Any]:
    """The eager optimizer step, with torch's own AdamW."""
    import torch

    from benchmarks.eager_step import EagerStep
    from train.runtime.engine import parameter_groups
    from train.runtime.step import keyed_generator

    config = settings(args)
    student, teacher = models(args, device)
    groups = parameter_groups(student, set(), config.optim)
    optimizer = torch.optim.AdamW(groups, betas=config.optim.betas, eps=config.optim.eps)
    half = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}
    run = EagerStep(student, teacher, optimizer, half[args.eager_dtype], config.optim.clip)
    batch = batch_of(config, student.config, device)
    return lambda number: float(run(batch, keyed_generator(0, number, 0))["total"])


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """Seconds of each step and peak memory of one side in this process."""
    import torch

    from train.runtime.distributed import finish, start

    device = start().device if args.device == "cuda" else torch.device("cpu")
    if args.device == "cpu":
        start()
    torch.nn.Linear(64, 64)(torch.randn(8, 64)).sum().backward()  # libraries are loaded
    before = 0 if device.type == "cuda" else resident("VmRSS")
    step = {"ours": ours_step, "eager": eager_side}[args.worker](args, device)
    reset_peak(device)
    for number in range(args.warmup):
        step(number)
    seconds, busy, value = [], [], 0.0
    for number in range(args.warmup, args.warmup + args.steps):
        synchronise(device)
        began, worked = time.perf_counter(), time.process_time()
        value = step(number)
        synchronise(device)
        seconds.append(time.perf_counter() - began)
        busy.append(time.process_time() - worked)
    peak = torch.cuda.max_memory_allocated() if device.type == "cuda" else resident("VmHWM")
    finish()
    return {
        "seconds": seconds,
        "cpu_seconds": busy,
        "peak_bytes": peak - before,
        "last_total": value,
    }


def synchronise(device: Any) -> None:
    import torch

    if device.type == "cuda":
        torch.cuda.synchronize()


def reset_peak(device: Any) -> None:
    """From here on counts the peak, the states that a first step makes included."""
    import torch

    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    else:
        Path("/proc/self/clear_refs").write_text("5")


def resident(key: str) -> int:
    """A figure of /proc/self/status in bytes."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(key):
            return int(line.split()[1]) * 1024
    raise ValueError(f"/proc/self/status has no {key}")
