"""What every task does when it distils: which layers pair up in which pass, and the terms of one
pass.

What may differ between student and teacher: depths (by a layer map), head sizes, feed-forward
widths, and widths (by learned projections of the student's hidden states). What may not: image
tokens, and the head counts of layers whose attention maps are compared. A map belongs to a head;
an average over heads is what no head computes, it cannot tell a sharp map from a mixture of
others, and the published loss has nothing like it. A narrow student takes the teacher's head count
with smaller heads instead, as TinyBERT does (312 = 12 x 26), or kd.attention=none.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from models.config import ModelConfig
from models.outputs import AttentionTrace, Capture, EncoderOutput
from models.part_configs import TextConfig
from train.config import KdConfig
from train.losses.distillation import (
    LayerPairs,
    attention_sum,
    capture_for_student,
    capture_for_teacher,
    hidden_mse,
    layer_pairs,
)
from train.tasks.base import Task

__all__ = [
    "Distils",
    "StackPairs",
    "capture",
    "hidden_projections",
    "pass_terms",
    "rows",
    "stack_pairs",
    "upper_part",
]


@dataclass(frozen=True)
class StackPairs:
    """Layer pairs of each stack; `decoder` where both models have one."""

    vision: LayerPairs
    text: LayerPairs
    fusion: LayerPairs
    decoder: LayerPairs | None


def stack_pairs(kd: KdConfig, student: ModelConfig, teacher: ModelConfig) -> StackPairs:
    """Pairs of every stack, by kd.vision_map, text_map, fusion_map and decoder_map or evenly.

    Fusion layers in pairs (NLVR2) are mapped pair by pair, the same image with the same.

    Raises:
        ValueError: naming the key, on maps that do not fit, image tokens that differ, head counts
            that differ where attention maps are compared, and kd.attention=scores with a decoder.
    """
    _check_tokens(student, teacher)
    if (student.image_fusion is None) != (teacher.image_fusion is None):
        raise ValueError(
            "distillation needs two models of one kind of fusion: one has two streams (image_fusion)"
        )
    ours, theirs = student.text, teacher.text
    if (ours.pair_heads is None) != (theirs.pair_heads is None):
        raise ValueError("distillation needs two models that read the same number of images")
    copies = 1 if ours.pair_heads is None else 2
    fusion = layer_pairs(
        ours.fusion_layers // copies, theirs.fusion_layers // copies, kd.fusion_map, "fusion"
    )
    both = student.decoder is not None and teacher.decoder is not None
    pairs = StackPairs(
        vision=layer_pairs(student.vision.layers, teacher.vision.layers, kd.vision_map, "vision"),
        text=layer_pairs(ours.text_layers, theirs.text_layers, kd.text_map, "text"),
        fusion=fusion if copies == 1 else fusion.doubled(),
        decoder=layer_pairs(
            student.decoder.layers, teacher.decoder.layers, kd.decoder_map, "decoder"
        )
        if student.decoder is not None and teacher.decoder is not None
        else None,
    )
    if kd.decoder_map is not None and not both:
        raise ValueError("kd.decoder_map: student and teacher do not both have a decoder")
    if kd.attention != "none":
        _check_heads(kd, student, teacher, pairs)
    if kd.attention == "scores" and (both or student.form == "captioning"):
        raise ValueError(
            "kd.attention=scores compares whole keys by Gram matrices, which the causal attention "
            "of a decoder does not have: use kd.attention=probabilities or kl"
        )
    return pairs


def _check_tokens(student: ModelConfig, teacher: ModelConfig) -> None:
    ours, theirs = student.vision, teacher.vision
    if (ours.prefix_tokens, ours.patches) != (theirs.prefix_tokens, theirs.patches):
        raise ValueError(
            f"image tokens differ: the student has {ours.prefix_tokens} + {ours.patches} patches, "
            f"the teacher {theirs.prefix_tokens} + {theirs.patches}; give the student the "
            "teacher's vision.image_size, patch_size, class_token and register_tokens"
        )


def _check_heads(
    kd: KdConfig, student: ModelConfig, teacher: ModelConfig, pairs: StackPairs
) -> None:
    def split(text: TextConfig) -> tuple[Sequence[int], Sequence[int]]:
        return text.heads[: text.text_layers], text.heads[text.text_layers :]

    (text, fusion), (their_text, their_fusion) = split(student.text), split(teacher.text)
    found = [
        ("vision.heads", student.vision.heads, teacher.vision.heads, pairs.vision),
        ("text.heads", text, their_text, pairs.text),
        ("text.heads (fusion)", fusion, their_fusion, pairs.fusion),
    ]
    cross = (student.text.cross_heads, teacher.text.cross_heads)
    if kd.cross_attention:
        found.append(("text.cross_heads", *cross, pairs.fusion))
    if student.image_fusion is not None and teacher.image_fusion is not None:
        mine, other = student.image_fusion, teacher.image_fusion
        found.append(("image_fusion.heads", mine.heads, other.heads, pairs.fusion))
        if kd.cross_attention:
            widths = mine.cross_heads, other.cross_heads
            found.append(("image_fusion.cross_heads", *widths, pairs.fusion))
    if pairs.decoder is not None:
        assert student.decoder is not None and teacher.decoder is not None
        mine, other = student.decoder, teacher.decoder
        found.append(("decoder.heads", mine.heads, other.heads, pairs.decoder))
        if kd.cross_attention:
            found.append(
                ("decoder.cross_heads", mine.cross_heads, other.cross_heads, pairs.decoder)
            )
    for key, ours, theirs, stack in found:
        for i, j in stack.attention:
            if ours[i] != theirs[j]:
                raise ValueError(
                    f"{key}: layer {i} of the student has {ours[i]} heads, layer {j} of its teacher "
                    f"{theirs[j]}, and attention maps are compared head by head: give the student "
                    "as many heads (they may be smaller: head_dim), or set kd.attention to none"
                )


def hidden_projections(student: ModelConfig, teacher: ModelConfig) -> nn.ModuleDict:
    """Learned linear maps of student states to the teacher's width, where widths differ.

    One for each residual stream, shared by all its layers (TinyBERT, 1909.10351): "vision", "text"
    (text and fusion layers) and "decoder". They are trained with the student and belong into the
    engine's module, but are no part of the student: its folder does not hold them. They start as
    isometries, so that states keep their lengths, the same on every rank and in every run.
    """
    widths = {"vision": (student.vision.width, teacher.vision.width)}
    widths["text"] = (student.text.width, teacher.text.width)
    if student.decoder is not None and teacher.decoder is not None:
        widths["decoder"] = widths["text"]
    result = nn.ModuleDict()
    for name, (ours, theirs) in widths.items():
        if ours != theirs:
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(0)
                linear = nn.Linear(ours, theirs)
                nn.init.orthogonal_(linear.weight)
            nn.init.zeros_(linear.bias)
            result[name] = linear
    return result


class Distils(Task):
    """What tasks with a teacher share: the projections between the two models' widths."""

    projections: nn.ModuleDict | None = None

    def trainable_modules(self) -> dict[str, nn.Module]:
        return {"projections": self.projections} if self.projections else {}

    def project(self, stream: str) -> nn.Module | None:
        """The projection of a residual stream ("vision", "text", "decoder"), where widths differ."""
        known = self.projections
        return known[stream] if known is not None and stream in known else None


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
        streams=output.streams
        and (rows(output.streams[0], start, stop), rows(output.streams[1], start, stop)),
    )


def pass_terms(
    kd: KdConfig,
    student: EncoderOutput,
    teacher: EncoderOutput,
    pairs: LayerPairs,
    drop_last: bool = False,
    cross: bool = False,
    project: nn.Module | None = None,
) -> dict[str, Tensor]:
    """Raw terms of one pass: "hidden", "attention" (self-attention), "cross_attention" with `cross`.

    The two of attention only where kd.attention and kd.cross_attention ask for them. All are means
    over the pass's rows. Of two streams the fusion's terms are those of the text stream's layers
    plus those of the image's; layers that only the text has (below the fusion) count once.

    Args:
        drop_last: image states, whose last one lies before the final norm (published).
        project: the stream's entry of `hidden_projections`, if it has one.
    """
    if cross and student.streams is not None and teacher.streams is not None:
        (ours, picture), (theirs, target) = student.streams, teacher.streams
        words = pass_terms(kd, ours, theirs, pairs, cross=True, project=project)
        beside = _image_pairs(picture, pairs)
        image = pass_terms(kd, picture, target, beside, cross=True, project=project)
        return {kind: value + image[kind] for kind, value in words.items()}
    terms = {"hidden": hidden_mse(student.hidden, teacher.hidden, pairs, drop_last, project)}
    if kd.attention == "none":
        return terms
    kind = kd.attention
    terms["attention"] = attention_sum(student.attention, teacher.attention, pairs.attention, kind)
    if cross and kd.cross_attention:
        # Layers below the first with cross-attention (the text layers of a multimodal pass) have none.
        upper = [pair for pair in pairs.attention if pair[0] in student.cross_attention]
        terms["cross_attention"] = attention_sum(
            student.cross_attention, teacher.cross_attention, upper, kind
        )
    return terms


def _image_pairs(student: EncoderOutput, pairs: LayerPairs) -> LayerPairs:
    """Those of `pairs` that the image stream has states and traces of."""
    return replace(
        pairs,
        hidden=tuple(pair for pair in pairs.hidden if pair[0] in student.hidden),
        attention=tuple(pair for pair in pairs.attention if pair[0] in student.attention),
    )
