"""Distillation losses: layer maps, hidden states, logits, similarities, and the choice of an
attention distance (they are in `attention.py` and `attention_algebra.py`).

Pure functions, float32 inside. The teacher gets no gradient.
Shape legend: B rows, N tokens, D width.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from models.outputs import AttentionTrace, Capture
from train.losses.attention import (
    attention_kl,
    attention_kl_reference,
    attention_mse,
    attention_mse_reference,
    attention_probabilities,
    kernel_backend,
    on_gpu,
    probabilities_mse,
    widen,
)
from train.losses.attention_algebra import kl_by_attention, scores_mse
from train.losses.vl import Similarities

__all__ = [
    "AttentionKind",
    "LayerPairs",
    "attention_distance",
    "attention_kl",
    "attention_kl_reference",
    "attention_mse",
    "attention_mse_reference",
    "attention_probabilities",
    "attention_sum",
    "capture_for_student",
    "capture_for_teacher",
    "contrastive_kl",
    "hidden_mse",
    "hidden_mse_terms",
    "layer_pairs",
    "logits_kl",
    "probabilities_mse",
]


AttentionKind = Literal["probabilities", "kl", "scores"]


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

    def doubled(self) -> LayerPairs:
        """The pairs when each layer stands for two that take turns (NLVR2): same turn with same."""
        return LayerPairs(
            2 * self.student_layers,
            2 * self.teacher_layers,
            tuple((2 * i, 2 * j) for i, j in self.hidden[:1])
            + tuple((2 * i - back, 2 * j - back) for i, j in self.hidden[1:] for back in (1, 0)),
            tuple((2 * i + turn, 2 * j + turn) for i, j in self.attention for turn in (0, 1)),
        )


def layer_pairs(
    student_layers: int,
    teacher_layers: int,
    layer_map: Sequence[int] | None = None,
    name: str = "layer",
) -> LayerPairs:
    """Pairs of a student layer with the teacher layer that teaches it.

    Attention maps of paired layers are compared, and the states they put out; the states that enter
    both stacks are compared too. Without a map, layer i of m learns from the teacher layer that
    ends the same share of the depth, round((i + 1) M / m) - 1 of M. For half the depth that is the
    published map: layer i <- 2i + 1, state i <- 2i.

    Args:
        layer_map: the teacher layer of each student layer, counted from 0.
        name: of the stack, for messages.

    Raises:
        ValueError: the map does not fit, or there is none and the student is deeper.
    """
    if layer_map is None:
        if student_layers > teacher_layers or (student_layers == 0) != (teacher_layers == 0):
            raise ValueError(
                f"no even map from {teacher_layers} teacher to {student_layers} student layers; "
                f"give kd.{name}_map, the teacher layer of each student layer"
            )
        # half up, in integers
        layer_map = [
            (2 * (i + 1) * teacher_layers + student_layers) // (2 * student_layers) - 1
            for i in range(student_layers)
        ]
    if len(layer_map) != student_layers or not all(0 <= j < teacher_layers for j in layer_map):
        raise ValueError(
            f"kd.{name}_map {tuple(layer_map)} needs {student_layers} entries from 0 to "
            f"{teacher_layers - 1}"
        )
    return LayerPairs(
        student_layers,
        teacher_layers,
        ((0, 0), *((i + 1, j + 1) for i, j in enumerate(layer_map))),
        tuple(enumerate(layer_map)),
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


Projection = Callable[[Tensor], Tensor]


def hidden_mse_terms(
    student: Mapping[int, Tensor],
    teacher: Mapping[int, Tensor],
    pairs: LayerPairs,
    drop_last: bool = False,
    project: Projection | None = None,
) -> list[Tensor]:
    """Mean squared error of each pair of hidden states (B, N, D), in the order of `pairs.hidden`.

    Args:
        drop_last: leaves out the student's last state (published for images, whose last state is
            compared nowhere).
        project: takes the student's states to the teacher's width, where the two differ.

    Raises:
        ValueError: shapes differ.
    """
    terms = []
    for i, j in pairs.hidden:
        if drop_last and i == pairs.student_layers:
            continue
        ours, theirs = student[i] if project is None else project(student[i]), teacher[j]
        if ours.shape != theirs.shape:
            raise ValueError(
                f"hidden state {i} of the student is {tuple(ours.shape)}, "
                f"state {j} of the teacher {tuple(theirs.shape)}: distilling hidden states needs "
                "equal token counts, and equal widths or a projection"
            )
        terms.append(F.mse_loss(widen(ours), widen(theirs.detach())))
    return terms


def hidden_mse(
    student: Mapping[int, Tensor],
    teacher: Mapping[int, Tensor],
    pairs: LayerPairs,
    drop_last: bool = False,
    project: Projection | None = None,
) -> Tensor:
    """Sum over layer pairs of the mean squared error (see `hidden_mse_terms`)."""
    return torch.stack(hidden_mse_terms(student, teacher, pairs, drop_last, project)).sum()


def attention_distance(
    student: AttentionTrace, teacher: AttentionTrace, kind: AttentionKind = "probabilities"
) -> Tensor:
    """One attention's distance to another.

    "probabilities": number of keys * mean squared difference of the maps, streamed (published).
    "kl": mean KL of their rows, streamed; on CUDA without the kernel attention_kd by those of
        attention.
    "scores": mean squared difference before the softmax, by Gram matrices; not for causal attention.

    Raises:
        ValueError: the maps have different shapes, or "scores" of causal attention.
    """
    if kind == "scores":
        return scores_mse(student, teacher)
    if kind == "kl":
        by_attention = on_gpu(student.q) and kernel_backend(student, teacher) == "reference"
        return (kl_by_attention if by_attention else attention_kl)(student, teacher)
    return attention_mse(student, teacher)


def attention_sum(
    student: Mapping[int, AttentionTrace],
    teacher: Mapping[int, AttentionTrace],
    pairs: Iterable[tuple[int, int]],
    kind: AttentionKind = "probabilities",
) -> Tensor:
    """Sum over layer pairs of `attention_distance`."""
    return torch.stack([attention_distance(student[i], teacher[j], kind) for i, j in pairs]).sum()


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


def contrastive_kl(
    student: Similarities, teacher: Similarities, temperature: float = 1.0
) -> Tensor:
    """Mean of `logits_kl` over similarities (B, G) of images to texts and of texts to images.

    Each model's similarities carry its own learned temperature; `temperature` divides them again.
    As with ITC, each rank computes its own rows' share, and the mean over ranks is the global loss.
    """
    ways = zip(student, teacher, strict=True)
    return torch.stack([logits_kl(ours, theirs, temperature) for ours, theirs in ways]).mean()
