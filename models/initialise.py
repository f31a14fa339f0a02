"""First weights of a model from another: student from teacher, task form from pre-training.

Source: EfficientVLM (2210.07795): the student takes every second layer of the teacher, in each
stack; the answer decoder starts from the fusion layers and the masked-token head.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from models.config import ModelConfig
from models.vision import resize_positions
from models.xvlm import XVLM

__all__ = [
    "InitialiseReport",
    "add_task_vector",
    "default_map",
    "student_from_teacher",
    "task_form_from_pretrained",
]

_LAYER = re.compile(r"(vision\.blocks|text\.layers|decoder\.layers)\.(\d+)\.(.+)")
_POSITION = "vision.embeddings.position"
_LISTED = 5


@dataclass(frozen=True)
class InitialiseReport:
    """Where the weights of a new model came from.

    Attributes:
        mapped: new key -> source key.   unmapped: new keys that keep their fresh weights.
        unused: source keys that nothing was taken from.   resized: new keys that were resampled.
    """

    mapped: dict[str, str]
    unmapped: list[str]
    unused: list[str] = field(default_factory=list)
    resized: list[str] = field(default_factory=list)


def default_map(layers: int, source_layers: int, stack: str) -> tuple[int, ...]:
    """The last layer of each equal group: 1, 3, 5, ... for half depth, identity for equal depth.

    Raises:
        ValueError: when the depths do not divide; an explicit map is needed then.
    """
    if layers == 0:
        return ()
    if source_layers % layers:
        raise ValueError(
            f"{stack}: {layers} layers from {source_layers} have no default map; "
            f"give {stack}_map, one source layer for each"
        )
    group = source_layers // layers
    return tuple(group * (index + 1) - 1 for index in range(layers))


def _checked_map(
    given: Sequence[int] | None, layers: int, source_layers: int, stack: str
) -> tuple[int, ...]:
    if given is None:
        return default_map(layers, source_layers, stack)
    if len(given) != layers or not all(0 <= index < source_layers for index in given):
        raise ValueError(
            f"{stack}_map {tuple(given)}: needs {layers} entries from 0 to {source_layers - 1}"
        )
    return tuple(given)


def _copy(
    source: Mapping[str, Tensor], model: XVLM, pairs: Mapping[str, str], what: str
) -> InitialiseReport:
    """Copies source tensors by new key -> source key, resampling positions.

    Raises:
        ValueError: naming the keys whose shapes differ.
    """
    state = model.state_dict()
    mapped, resized, wrong = {}, [], []
    for key, origin in pairs.items():
        if key not in state or origin not in source:
            continue
        value, vision = source[origin], model.config.vision
        if key == _POSITION and value.shape[0] != vision.tokens:
            value = resize_positions(value, vision.image_size // vision.patch_size)
            resized.append(key)
        if value.shape != state[key].shape:
            wrong.append(f"{key} {tuple(state[key].shape)} from {origin} {tuple(value.shape)}")
            continue
        with torch.no_grad():
            state[key].copy_(value)
        mapped[key] = origin
    if wrong:
        more = f" and {len(wrong) - _LISTED} more" if len(wrong) > _LISTED else ""
        raise ValueError(f"{what}: shapes differ: {'; '.join(wrong[:_LISTED])}{more}")
    used = set(mapped.values())
    return InitialiseReport(
        mapped=mapped,
        unmapped=sorted(state.keys() - mapped.keys()),
        unused=sorted(source.keys() - used),
        resized=resized,
    )


def student_from_teacher(
    teacher: XVLM,
    config: ModelConfig,
    vision_map: Sequence[int] | None = None,
    text_map: Sequence[int] | None = None,
    fusion_map: Sequence[int] | None = None,
    decoder_map: Sequence[int] | None = None,
) -> tuple[XVLM, InitialiseReport]:
    """A model of `config` whose layers are copies of teacher layers, everything else copied as is.

    Args:
        vision_map, ...: teacher layer of each student layer, counted within its stack; None takes
            the last layer of each equal group (1, 3, 5, ... for half the depth).

    Returns:
        The student, on the teacher's device in float32, and the report of mapped and unmapped keys.

    Raises:
        ValueError: on maps that do not fit, or widths that differ (naming the key).
    """
    old, new = teacher.config, config
    fusion = _checked_map(fusion_map, new.text.fusion_layers, old.text.fusion_layers, "fusion")
    maps = {
        "vision.blocks": _checked_map(vision_map, new.vision.layers, old.vision.layers, "vision"),
        "text.layers": (
            *_checked_map(text_map, new.text.text_layers, old.text.text_layers, "text"),
            *(old.text.text_layers + index for index in fusion),
        ),
    }
    if new.decoder is not None and old.decoder is not None:
        maps["decoder.layers"] = _checked_map(
            decoder_map, new.decoder.layers, old.decoder.layers, "decoder"
        )
    student = XVLM(config).to(next(teacher.parameters()).device)
    pairs = {}
    for key in student.state_dict():
        match = _LAYER.fullmatch(key)
        if match is None:
            pairs[key] = key
        elif match[1] in maps:
            pairs[key] = f"{match[1]}.{maps[match[1]][int(match[2])]}.{match[3]}"
    report = _copy(teacher.state_dict(), student, pairs, "student from teacher")
    return student, report


def task_form_from_pretrained(
    pretrained: XVLM,
    form: str = "vqa",
    *,
    config: ModelConfig | None = None,
    decoder_map: Sequence[int] | None = None,
) -> XVLM:
    """The task form of a pre-trained model, as fine-tuning starts from it.

    Form "vqa": encoders copied (positions resampled when the image size differs); each decoder
    layer from a fusion layer, cross-attention included; the decoder's head from the masked-token
    head; its embeddings from the text embeddings.

    Args:
        config: the configuration wanted; None is `pretrained.config.as_form(form)`.
        decoder_map: fusion layer of each decoder layer; None takes the last of each equal group.

    Raises:
        ValueError: on forms, maps or widths that do not fit (naming the key).
    """
    if pretrained.config.form != "pretrain":
        raise ValueError(
            f"a task form starts from a model of form 'pretrain', not {pretrained.config.form!r}"
        )
    config = config or pretrained.config.as_form(form)
    if config.form != form:
        raise ValueError(f"form {form!r} was asked for, the configuration says {config.form!r}")
    old = pretrained.config.text
    model = XVLM(config).to(next(pretrained.parameters()).device)
    pairs = {key: key for key in model.state_dict() if not key.startswith("decoder.")}
    if config.decoder is not None:
        layers = _checked_map(decoder_map, config.decoder.layers, old.fusion_layers, "decoder")
        for key in model.state_dict():
            match = _LAYER.fullmatch(key)
            if key.startswith("decoder.embeddings."):
                pairs[key] = key.replace("decoder.", "text.", 1)
            elif key.startswith("decoder.head."):
                pairs[key] = key.replace("decoder.head.", "mlm_head.", 1)
            elif match is not None and match[1] == "decoder.layers":
                origin = old.text_layers + layers[int(match[2])]
                pairs[key] = f"text.layers.{origin}.{match[3]}"
    report = _copy(pretrained.state_dict(), model, pairs, f"form {form!r} from pre-trained")
    if report.unmapped:
        raise ValueError(f"nothing to start {', '.join(report.unmapped[:_LISTED])} from")
    return model


def add_task_vector(
    student: XVLM,
    pretrained: XVLM,
    finetuned: XVLM,
    *,
    vision_map: Sequence[int] | None = None,
    text_map: Sequence[int] | None = None,
    fusion_map: Sequence[int] | None = None,
    decoder_map: Sequence[int] | None = None,
) -> XVLM:
    """The distilled student's task form, moved by what fine-tuning changed in its teacher.

    For every weight that all three have: student + cut(finetuned) - cut(pretrained), where cut takes
    the teacher layers that the student was made from; weights that only the task form has (decoder)
    are cut from the fine-tuned teacher. Task vectors: Ilharco et al., 2212.04089; across depths this
    use of them is ours.

    Args:
        student: distilled from `pretrained`, form "pretrain".
        finetuned: `pretrained` after fine-tuning, in the form that is wanted.
        vision_map, text_map, fusion_map, decoder_map: as in `student_from_teacher`.

    Raises:
        ValueError: on forms, widths or maps that do not fit.
    """
    if student.config.form != "pretrain" or pretrained.config.form != "pretrain":
        raise ValueError(
            "a task vector needs student and teacher before fine-tuning: form pretrain"
        )
    form, size = finetuned.config.form, finetuned.config.vision.image_size
    result = task_form_from_pretrained(
        student, form, config=student.config.as_form(form, image_size=size)
    )
    maps = {"vision_map": vision_map, "text_map": text_map, "fusion_map": fusion_map}
    after, _ = student_from_teacher(finetuned, result.config, decoder_map=decoder_map, **maps)
    before, _ = student_from_teacher(
        pretrained, student.config.as_form("pretrain", image_size=size), **maps
    )
    new, old = after.state_dict(), before.state_dict()
    with torch.no_grad():
        for key, value in result.state_dict().items():
            if key in old:
                value.add_(new[key] - old[key])
            else:
                value.copy_(new[key])
    return result
