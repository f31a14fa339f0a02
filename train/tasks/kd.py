"""What every task does when it distils: which layers pair up in which pass, and the terms of one
pass.
"""

from __future__ import annotations

from dataclasses import replace

from torch import Tensor

from models.outputs import AttentionTrace, Capture, EncoderOutput
from train.config import KdConfig
from train.losses.distillation import (
    LayerPairs,
    attention_sum,
    capture_for_student,
    capture_for_teacher,
    hidden_mse,
)

__all__ = ["capture", "pass_terms", "rows", "upper_part"]


def upper_part(whole: LayerPairs, first: int) -> LayerPairs:
    """The pairs of a pass from student layer `first` up; the state that enters it belongs to the
    lower part.
    """
    return replace(
        whole,
        hidden=tuple(pair for pair in whole.hidden if pair[0] > first),
        attention=tuple(pair for pair in whole.attention if pair[0] >= first),
    )


def capture(
    pairs: LayerPairs | None, side: str, kd: KdConfig, cross_from: int | None = None
) -> Capture:
    """What a pass must return for `pairs`.

    Args:
        side: "student", "teacher", or "none" (evaluation: nothing is compared).
        cross_from: first STUDENT layer of the pass with cross-attention, where that is distilled.
    """
    if pairs is None or side == "none":
        return Capture()
    maps = kd.attention != "none"
    make = capture_for_student if side == "student" else capture_for_teacher
    return make(
        pairs, attention=maps, cross_from=cross_from if maps and kd.cross_attention else None
    )


def rows(output: EncoderOutput, start: int, stop: int) -> EncoderOutput:
    """The same output for rows [start, stop)."""

    def cut(trace: AttentionTrace) -> AttentionTrace:
        mask = None if trace.key_mask is None else trace.key_mask[start:stop]
        return replace(trace, q=trace.q[start:stop], k=trace.k[start:stop], key_mask=mask)

    return EncoderOutput(
        last=output.last[start:stop],
        hidden={i: state[start:stop] for i, state in output.hidden.items()},
        attention={i: cut(trace) for i, trace in output.attention.items()},
        cross_attention={i: cut(trace) for i, trace in output.cross_attention.items()},
    )


def pass_terms(
    kd: KdConfig,
    student: EncoderOutput,
    teacher: EncoderOutput,
    pairs: LayerPairs,
    drop_last: bool = False,
    cross: bool = False,
) -> dict[str, Tensor]:
    """Raw terms of one pass: "hidden", and "attention" (self-attention, plus cross-attention with
    `cross`).

    drop_last: image states, whose last one lies before the final norm (published).
    """
    terms = {"hidden": hidden_mse(student.hidden, teacher.hidden, pairs, drop_last)}
    if kd.attention == "none":
        return terms
    total = attention_sum(student.attention, teacher.attention, pairs.attention, kd.attention)
    if cross and kd.cross_attention:
        total = total + attention_sum(
            student.cross_attention, teacher.cross_attention, pairs.attention, kd.attention
        )
    terms["attention"] = total
    return terms
