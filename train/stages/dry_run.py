"""What a run would be: sizes, memory on each device, work and hours, without data or weights."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

from models import presets
from models.config import ModelConfig
from models.summary import PARTS, summarise
from train.config import RunConfig, UserError, per_rank
from train.monitor.flops import peak_flops, step_cost
from train.pruning.check import budget_line
from train.runtime.engine import engine_settings, zero_stage
from train.stages.memory import StepMemory, stage_memory, step_memory
from train.stages.plan import Speed, Work, measured_speed, samples_of_data, work
from train.student import is_model_folder, model_config

__all__ = ["Asked", "default_ranks", "describe"]

_COLUMNS = ("weights", "gradients", "optimizer", "activations", "teacher", "KD", "peak")
_REFERENCE = "NVIDIA A100", "NVIDIA H100"


@dataclass(frozen=True)
class Asked:
    """What `--dry-run` was asked besides the recipe.

    Attributes:
        ranks: world sizes of the memory table; the first one is that of the text. Empty: those of
            `default_ranks`.
        samples_per_s: speed of all ranks.   like: directory of a run to take it from.
    """

    ranks: tuple[int, ...] = ()
    samples_per_s: float | None = None
    like: Path | None = None

    def __post_init__(self) -> None:
        if any(count < 1 for count in self.ranks):
            raise UserError(f"--ranks: {min(self.ranks)} is not a number of ranks")
        if self.samples_per_s is not None and not self.samples_per_s > 0:
            raise UserError(f"--samples-per-s: {self.samples_per_s} is not a speed")
        if self.samples_per_s is not None and self.like is not None:
            raise UserError("--samples-per-s and --like both give a speed: leave one out")

    def speed(self, ranks: int) -> Speed | None:
        """The speed at a number of ranks, if one was given."""
        if self.like is not None:
            return measured_speed(self.like, ranks)
        if self.samples_per_s is not None:
            return Speed(self.samples_per_s, "given")
        return None


def default_ranks() -> tuple[int, ...]:
    """Under a launcher its world size; else 8 (the text), 1 and 64."""
    world = int(os.environ.get("WORLD_SIZE", "1"))
    return (world,) if world > 1 else (8, 1, 64)


def _teacher_config(config: RunConfig, form: str) -> ModelConfig | None:
    teacher = config.teacher
    if teacher.path is not None and (Path(teacher.path) / "config.json").is_file():
        return ModelConfig.load(Path(teacher.path) / "config.json")
    if teacher.model is not None:
        return presets.config(teacher.model, form=form)
    return None


def describe(config: RunConfig, asked: Asked | None = None) -> str:
    """The text that `--dry-run` prints.

    Raises:
        ValueError, FileNotFoundError: the configuration cannot become a model, or a run to take the
            speed from is not there.
    """
    asked = asked or Asked()
    ranks = asked.ranks or default_ranks()
    first = per_rank(config, ranks[0])
    student = model_config(config, None)
    teacher = _teacher_config(config, student.form)
    total = work(first, step_cost(first, student, teacher), ranks[0], samples_of_data(config))
    lines = [
        f"stage {config.stage}, task {config.task}, out {config.out}",
        *_model_lines(first, student, teacher),
        *_work_lines(first, total, ranks[0], asked.speed(ranks[0])),
        *_memory_lines(config, student, teacher, ranks),
    ]
    return "\n".join(lines)


# --- models -----------------------------------------------------------------------------------------


def _model_lines(config: RunConfig, student: ModelConfig, teacher: ModelConfig | None) -> list[str]:
    vision, text, data = student.vision, student.text, config.data
    ours = summarise(student, text_tokens=data.max_tokens)
    theirs = None if teacher is None else summarise(teacher, text_tokens=data.max_tokens)
    origin = "folder" if is_model_folder(config.model) else "new"
    lines = [
        f"student {student.name} ({origin}): {ours.parameters['total'] / 1e6:.2f}M parameters, "
        f"{ours.prunable['total'] / 1e6:.2f}M prunable"
    ]
    if theirs is not None:
        lines.append(
            f"teacher {theirs.name}: {theirs.parameters['total'] / 1e6:.2f}M parameters, frozen"
        )
    elif config.teacher.path is not None:
        lines.append(f"teacher {config.teacher.path}: not there yet (teacher.model says its shape)")
    lines.append(f"  {'parameters':<12}" + "".join(f"{part:>10}" for part in PARTS))
    for name, summary in (("student", ours), ("teacher", theirs)):
        if summary is not None:
            counts = (summary.parameters.get(part) for part in PARTS)
            cells = ("-" if count is None else f"{count / 1e6:.2f}M" for count in counts)
            lines.append(f"  {name:<12}" + "".join(f"{cell:>10}" for cell in cells))
    if config.prune is not None:
        lines.append(budget_line(config))
    rows = data.batch * (data.rows_per_image if config.task == "vqa" else 1)
    return [
        *lines,
        f"layers: {vision.layers} vision, {text.text_layers} text, {text.fusion_layers} fusion, "
        f"{student.decoder.layers if student.decoder else 0} decoder",
        f"images ({data.batch}, 3, {vision.image_size}, {vision.image_size}) uint8 -> "
        f"({data.batch}, {vision.output_tokens}, {vision.width})",
        f"text ({rows}, {data.max_tokens}) int64",
    ]


# --- work -------------------------------------------------------------------------------------------


def _work_lines(config: RunConfig, total: Work, ranks: int, speed: Speed | None) -> list[str]:
    accumulate, regions = config.engine.accumulate, config.data.region
    lines = [
        f"{total.steps:,} steps of {total.global_batch:,} images: {config.data.batch} a micro-batch "
        f"x {accumulate} accumulated x {ranks} ranks"
    ]
    if config.task == "pretrain" and regions.probability:
        lines.append(
            f"  and before {regions.probability:.0%} of them a region step: {regions.images} images, "
            f"{regions.rows} rows a micro-batch"
        )
    epochs = "" if total.epochs is None else f", {total.epochs:.1f} epochs"
    if total.epochs is None:
        epochs = " (epochs: data.train is not here)"
    lines.append(f"{total.samples:,} samples{epochs}")
    a_step = total.flops / total.steps / ranks
    lines.append(f"{a_step / 1e12:,.2f} TFLOP a step and rank, {total.flops:.2e} FLOP in all")
    if speed is None:
        lines.append("hours: give a speed with --samples-per-s N, or --like RUN to take a run's")
        return lines
    needed = total.flops_per_s(speed, ranks)
    precision = config.engine.precision
    shares = ", ".join(
        f"{needed / peak:.1%} of {name}"
        for name in _REFERENCE
        if (peak := peak_flops(name, precision)) is not None
    )
    return [
        *lines,
        f"{total.hours(speed):,.1f} hours at {speed.samples_per_s:,.1f} samples/s ({speed.source})",
        f"  which takes {needed / 1e12:,.1f} TFLOP/s of each device in {precision}: MFU {shares}",
    ]


# --- memory -----------------------------------------------------------------------------------------


def _memory_lines(
    config: RunConfig, student: ModelConfig, teacher: ModelConfig | None, ranks: Sequence[int]
) -> list[str]:
    """A row for each number of ranks and ZeRO stage, for the larger of general and region step."""
    own = zero_stage(engine_settings(config))
    parameters = summarise(student).parameters["total"]

    @cache
    def of_step(batch: int, images: int, rows: int) -> StepMemory:
        region = replace(config.data.region, images=images, rows=rows)
        sized = replace(config, data=replace(config.data, batch=batch, region=region))
        kinds = (False, True) if config.task == "pretrain" and region.probability else (False,)
        found = [step_memory(sized, student, teacher, region=kind) for kind in kinds]
        return max(found, key=lambda step: step.activations + step.kd)

    rows: list[tuple[int, str, dict[str, int]]] = []
    refused: list[str] = []
    for count in sorted(ranks):
        try:
            sized = per_rank(config, count)
        except UserError as error:
            refused.append(f"  {count:>5}  {error}")
            continue
        step = of_step(sized.data.batch, sized.data.region.images, sized.data.region.rows)
        for stage in range(4):
            if stage == 0 and config.engine.precision == "fp16":
                continue  # refused by the engine's settings
            parts = stage_memory(config, step, parameters, stage, count)
            rows.append((count, f"{stage}{'*' if stage == own else ' '}", parts))
    return [*_table(config, rows), *refused]


def _table(config: RunConfig, rows: list[tuple[int, str, dict[str, int]]]) -> list[str]:
    large = any(parts["peak"] >= 2**30 for _, _, parts in rows)
    unit, name = (2**30, "GiB") if large else (2**20, "MiB")
    recompute = ", activation checkpointing" if config.engine.activation_checkpointing else ""
    return [
        f"memory per device in {name}, {config.engine.precision}{recompute} "
        "(* is this recipe's stage; peak: what lives at once):",
        f"  {'ranks':>5} {'ZeRO':>5}" + "".join(f"{column:>12}" for column in _COLUMNS),
        *(
            f"  {count:>5} {stage:>5}"
            + "".join(f"{parts[column] / unit:>12.2f}" for column in _COLUMNS)
            for count, stage, parts in rows
        ),
    ]
