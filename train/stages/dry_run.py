"""What a run would be: parameter counts, shapes and memory, without data, devices or weights."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn

from models import presets
from models.config import ModelConfig
from models.xvlm import XVLM
from train.config import RunConfig, per_rank
from train.runtime.engine import engine_settings, zero_stage
from train.student import is_model_folder, model_config

__all__ = ["describe", "memory_estimate"]

_BYTES = {"fp32": 4, "bf16": 2, "fp16": 2}


def _count(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def _on_meta(config: ModelConfig) -> XVLM:
    with torch.device("meta"):
        return XVLM(config)


def _teacher_config(config: RunConfig, form: str) -> ModelConfig | None:
    teacher = config.teacher
    if teacher.path is not None and (Path(teacher.path) / "config.json").is_file():
        return ModelConfig.load(Path(teacher.path) / "config.json")
    if teacher.model is not None:
        return presets.config(teacher.model, form=form)
    return None


def _activation_bytes(model: ModelConfig, rows: int, text_tokens: int, element: int) -> int:
    """Activations kept for backward, without recomputation, attention fused (no N x N maps).

    Per token and layer an attention block keeps its input, norm, q, k, v, context and output (7
    widths) and an MLP its norm, two FFN widths and output: an estimate by counting tensors, good to
    about a third.
    """
    vision, text = model.vision, model.text
    total = 0
    for heads, ffn in zip(vision.heads, vision.ffn, strict=True):
        width = 4 * vision.width + 4 * heads * vision.head_dim + 2 * vision.width + 2 * ffn
        total += rows * vision.tokens * width
    # Text once; fusion for B positive, 2B negative and B MLM rows in pre-training, B in a
    # downstream task.
    passes = (2, 5) if model.form == "pretrain" else (1, 1)
    for layer, (heads, ffn) in enumerate(zip(text.heads, text.ffn, strict=True)):
        width = 4 * text.width + 4 * heads * text.head_dim + 2 * text.width + 2 * ffn
        repeats = passes[0]
        if layer >= text.text_layers:
            cross = text.cross_heads[layer - text.text_layers] * text.head_dim
            repeats = passes[1]
            total += rows * repeats * 2 * cross * vision.output_tokens
            width += 4 * text.width + 2 * cross
        total += rows * repeats * text_tokens * width
    return total * element


def memory_estimate(
    config: RunConfig, student: ModelConfig, parameters: int, teacher_parameters: int, ranks: int
) -> dict[str, int]:
    """Bytes on each device: parameters, gradients, optimizer, activations of the student, teacher
    weights.

    fp32 parameters with Adam: 4 + 4 + 8 bytes, sharded as the ZeRO stage says; fp16 mode adds a
    half copy.
    """
    stage = zero_stage(engine_settings(config))
    half = config.engine.precision == "fp16"
    rows = config.data.batch * config.data.rows_per_image
    element = _BYTES[config.engine.precision]
    share = {name: ranks if stage >= at else 1 for name, at in (("p", 3), ("g", 2), ("o", 1))}
    return {
        "parameters": parameters * (2 if half else 4) // share["p"],
        "gradients": parameters * (2 if half else 4) // share["g"],
        "optimizer": parameters * (12 if half else 8) // share["o"],
        "activations": _activation_bytes(student, rows, config.data.max_tokens, element),
        "teacher": teacher_parameters * (2 if config.teacher.dtype != "fp32" else 4),
    }


def _module_lines(model: XVLM) -> list[str]:
    lines = []
    for name, child in model.named_children():
        if count := _count(child):
            lines.append(f"  {name:<14}{count / 1e6:>10.2f}M")
    return lines


def describe(config: RunConfig, ranks: int = 8) -> str:
    """The text that `--dry-run` prints. Memory is per device for `ranks` data-parallel ranks.

    Raises:
        ValueError, FileNotFoundError: the configuration cannot become a model.
    """
    config = per_rank(config, ranks)
    student = model_config(config, None)
    model = _on_meta(student)
    parameters = _count(model)
    prunable = sum(
        cost * slot.units
        for cost, slot in zip(
            model.parameters_per_unit().values(), model.gate_slots().values(), strict=True
        )
    )
    teacher = _teacher_config(config, student.form)
    teacher_parameters = 0 if teacher is None else _count(_on_meta(teacher))
    vision, text, data = student.vision, student.text, config.data
    lines = [
        f"stage {config.stage}, task {config.task}, out {config.out}",
        f"student {student.name} ({'folder' if is_model_folder(config.model) else 'new'}): "
        f"{parameters / 1e6:.2f}M parameters, {prunable / 1e6:.2f}M prunable",
        *_module_lines(model),
        f"layers: {vision.layers} vision, {text.text_layers} text, {text.fusion_layers} fusion, "
        f"{student.decoder.layers if student.decoder else 0} decoder",
        f"images ({data.batch}, 3, {vision.image_size}, {vision.image_size}) uint8 -> "
        f"({data.batch}, {vision.output_tokens}, {vision.width})",
        f"text ({data.batch * data.rows_per_image}, {data.max_tokens}) int64",
    ]
    if teacher is not None:
        lines.append(f"teacher {teacher.name}: {teacher_parameters / 1e6:.2f}M parameters, frozen")
    elif config.teacher.path is not None:
        lines.append(f"teacher {config.teacher.path}: not there yet")
    if config.prune is not None:
        lines.append(f"prune {config.prune.sparsity:.0%} of the prunable parameters")
    memory = memory_estimate(config, student, parameters, teacher_parameters, ranks)
    lines.append(
        f"memory per device, {ranks} ranks, {config.engine.config}, {config.engine.precision}:"
    )
    lines += [f"  {name:<14}{value / 2**30:>10.2f} GiB" for name, value in memory.items()]
    lines.append(f"  {'sum':<14}{sum(memory.values()) / 2**30:>10.2f} GiB")
    steps, global_batch = config.optim.steps, data.batch * ranks * config.engine.accumulate
    lines.append(f"{steps:,} steps of {global_batch:,} images over {ranks} ranks")
    return "\n".join(lines)
