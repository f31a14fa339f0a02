"""Distillation losses: layer maps, hidden states, logits; attention is in `attention.py`.

Pure functions, float32 inside. The teacher gets no gradient.
Shape legend: B rows, N tokens, D width.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from models.outputs import Capture
from train.losses.attention import (
    attention_kl,
    attention_kl_reference,
    attention_mse,
    attention_mse_reference,
    attention_probabilities,
    attention_sum,
    probabilities_mse,
    widen,
)

__all__ = [
    "LayerPairs",
    "attention_kl",
    "attention_kl_reference",
    "attention_mse",
    "attention_mse_reference",
    "attention_probabilities",
    "attention_sum",
    "capture_for_student",
    "capture_for_teacher",
    "hidden_mse",
    "hidden_mse_terms",
    "layer_pairs",
    "logits_kl",
    "probabilities_mse",
]


@dataclass(frozen=True)
class LayerPairs:
    """Which teacher layer teaches which student layer, in one stack or pass.

    Attributes:
        student_layers, teacher_layers: depths.
        hidden: (student state, teacher state); state 0 is the input of the first layer.
        attention: (student layer, teacher layer).
    """

    student_layers: int
    teacher_layers: int
    hidden: tuple[tuple[int, int], ...]
    attention: tuple[tuple[int, int], ...]

    def then(self, after: LayerPairs) -> LayerPairs:
        """Pairs of a pass through this stack and then `after`, each with its own depth ratio."""
        s, t = self.student_layers, self.teacher_layers
        # The last state of this stack IS the first of the next one: it is counted once.
        hidden = self.hidden + tuple((s + i, t + j) for i, j in after.hidden if i > 0)
        attention = self.attention + tuple((s + i, t + j) for i, j in after.attention)
        return LayerPairs(s + after.student_layers, t + after.teacher_layers, hidden, attention)


def layer_pairs(student_layers: int, teacher_layers: int) -> LayerPairs:
    """Uniform map with k = teacher_layers / student_layers: hidden i <- k i, attention i <- k i + k
    - 1.

    For k = 2 that is the published map: state i <- 2i (the input included), layer i <- 2i + 1.

    Raises:
        ValueError: the teacher's depth is not a multiple of the student's.
    """
    if student_layers == teacher_layers == 0:
        return LayerPairs(0, 0, ((0, 0),), ())
    if student_layers < 1 or teacher_layers % student_layers:
        raise ValueError(
            f"no uniform map from {teacher_layers} teacher to {student_layers} student layers: "
            "the teacher's depth must be a multiple of the student's"
        )
    k = teacher_layers // student_layers
    return LayerPairs(
        student_layers,
        teacher_layers,
        tuple((i, k * i) for i in range(student_layers + 1)),
        tuple((i, k * i + k - 1) for i in range(student_layers)),
    )


def _capture(
    pairs: LayerPairs, side: int, hidden: bool, attention: bool, cross_from: int | None
) -> Capture:
    layers = [pair[side] for pair in pairs.attention]
    cross = [
        pair[side] for pair in pairs.attention if cross_from is not None and pair[0] >= cross_from
    ]
    states = [pair[side] for pair in pairs.hidden]
    return Capture.of(states if hidden else (), layers if attention else (), cross)


def capture_for_student(
    pairs: LayerPairs, hidden: bool = True, attention: bool = True, cross_from: int | None = None
) -> Capture:
    """What the student's pass must return for `pairs`.

    `cross_from`: first STUDENT layer of the pass that has cross-attention, when that is distilled
    too (0 in a fusion pass, the number of text layers in a multimodal pass); None: it is not.
    """
    return _capture(pairs, 0, hidden, attention, cross_from)


def capture_for_teacher(
    pairs: LayerPairs, hidden: bool = True, attention: bool = True, cross_from: int | None = None
) -> Capture:
    """What the teacher's pass must return for `pairs`; `cross_from` counts STUDENT layers."""
    return _capture(pairs, 1, hidden, attention, cross_from)


def hidden_mse_terms(
    student: Mapping[int, Tensor],
    teacher: Mapping[int, Tensor],
    pairs: LayerPairs,
    drop_last: bool = False,
) -> list[Tensor]:
    """Mean squared error of each pair of hidden states (B, N, D), in the order of `pairs.hidden`.

    drop_last leaves out the student's last state (published for images, whose last state is
    compared nowhere).

    Raises:
        ValueError: shapes differ (there is no projection between different widths).
    """
    terms = []
    for i, j in pairs.hidden:
        if drop_last and i == pairs.student_layers:
            continue
        ours, theirs = student[i], teacher[j]
        if ours.shape != theirs.shape:
            raise ValueError(
                f"hidden state {i} of the student is {tuple(ours.shape)}, "
                f"state {j} of the teacher {tuple(theirs.shape)}: distilling hidden states needs "
                "equal widths and token counts (or set the hidden weights in kd to 0)"
            )
        terms.append(F.mse_loss(widen(ours), widen(theirs.detach())))
    return terms


def hidden_mse(
    student: Mapping[int, Tensor],
    teacher: Mapping[int, Tensor],
    pairs: LayerPairs,
    drop_last: bool = False,
) -> Tensor:
    """Sum over layer pairs of the mean squared error (see `hidden_mse_terms`)."""
    return torch.stack(hidden_mse_terms(student, teacher, pairs, drop_last)).sum()


def logits_kl(
    student: Tensor, teacher: Tensor, temperature: float = 1.0, mask: Tensor | None = None
) -> Tensor:
    """KL(teacher || student) of logits (..., C), summed over classes, averaged over all rows.

    As published: both are divided by the temperature, and there is no factor of its square.

    Args:
        mask: (...) bool, rows that count; None counts all. 0 when no row counts.

    Raises:
        ValueError: shapes differ.
    """
    if student.shape != teacher.shape:
        raise ValueError(
            f"logits of the student are {tuple(student.shape)}, "
            f"of the teacher {tuple(teacher.shape)}: distilling logits "
            "needs the same rows and the same classes (vocabulary)"
        )
    log_p = (widen(student) / temperature).log_softmax(dim=-1)
    log_t = (widen(teacher.detach()) / temperature).log_softmax(dim=-1)
    rows = F.kl_div(log_p, log_t, reduction="none", log_target=True).sum(dim=-1)
    if mask is None:
        return rows.mean()
    return torch.where(mask, rows, rows.new_zeros(())).sum() / mask.sum().clamp(min=1)
