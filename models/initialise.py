"""First weights of a model from another: student from teacher, task form from pre-training.

Source: EfficientVLM (2210.07795): the student takes every second layer of the teacher, in each
stack; the answer decoder starts from the fusion layers and the masked-token head, the captioning
head from the masked-token head, each pair of NLVR2 fusion layers from one fusion layer.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from timm.layers.pos_embed_sincos import build_sincos2d_pos_embed
from torch import Tensor

from models.config import ModelConfig
from models.part_configs import TextConfig
from models.vision import resize_positions
from models.xvlm import XVLM

__all__ = [
    "InitialiseReport",
    "add_sincos_positions",
    "add_task_vector",
    "default_map",
    "student_from_teacher",
    "task_form",
    "task_form_from_pretrained",
]

_LAYER = re.compile(
    r"(vision\.blocks|text\.layers|image_fusion\.layers|decoder\.layers)\.(\d+)\.(.+)"
)
_POSITION = "vision.embeddings.position"
_LISTED = 5
# Forms that a model of a form can become, beside itself at another image size.
_STARTS = {
    "pretrain": ("retrieval", "vqa", "nlvr2_pretrain", "nlvr2", "captioning", "grounding"),
    "nlvr2_pretrain": ("nlvr2",),
}
# Modules without a counterpart in pre-training.
_FRESH = {"nlvr2_pretrain": ("ta_head.",), "nlvr2": ("cls_head.",)}


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

    @property
    def fresh(self) -> frozenset[str]:
        """Names of the parameters with fresh weights, for a higher learning rate of theirs."""
        return frozenset(self.unmapped)


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


def _fusion_sources(
    new: TextConfig, old: TextConfig, given: Sequence[int] | None
) -> tuple[int, ...]:
    """Source layer, counted in its whole stack, of each fusion layer.

    Where fusion layers come in pairs, `given` counts pairs and a layer comes from the layer of the
    source pair that reads the same image. (The published distillation of NLVR2 pairs layers that
    read image 0 with layers that read image 1.)

    Raises:
        ValueError: on a map that does not fit, or when only the source has pairs.
    """
    if new.pair_heads is None and old.pair_heads is not None:
        raise ValueError("single fusion layers cannot start from pairs of them")
    copies, source_copies = (1 if text.pair_heads is None else 2 for text in (new, old))
    groups = _checked_map(
        given, new.fusion_layers // copies, old.fusion_layers // source_copies, "fusion"
    )
    return tuple(
        old.text_layers + (group if source_copies == 1 else 2 * group + slot)
        for group in groups
        for slot in range(copies)
    )


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
        if key == _POSITION and value.shape[0] != vision.position_rows:
            grid = vision.image_size // vision.patch_size
            value = resize_positions(value, grid, vision.position_prefix)
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
            the last layer of each equal group (1, 3, 5, ... for half the depth). `fusion_map` counts
            pairs in the forms of NLVR2.

    Returns:
        The student, on the teacher's device in float32, and the report of mapped and unmapped keys.

    Raises:
        ValueError: on maps that do not fit, or widths that differ (naming the key).
    """
    old, new = teacher.config, config
    if (old.image_fusion is None) != (new.image_fusion is None):
        raise ValueError(
            "one of student and teacher has two streams (image_fusion) and the other one; give both "
            "the same kind of fusion"
        )
    fusion = _fusion_sources(new.text, old.text, fusion_map)
    maps = {
        "vision.blocks": _checked_map(vision_map, new.vision.layers, old.vision.layers, "vision"),
        "text.layers": (
            *_checked_map(text_map, new.text.text_layers, old.text.text_layers, "text"),
            *fusion,
        ),
        "image_fusion.layers": tuple(layer - old.text.text_layers for layer in fusion),
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


def task_form(
    pretrained: XVLM,
    form: str,
    *,
    config: ModelConfig | None = None,
    decoder_map: Sequence[int] | None = None,
) -> tuple[XVLM, InitialiseReport]:
    """The task form of a pre-trained model, as fine-tuning starts from it.

    Encoders are copied (positions resampled when the image size differs), and every head that both
    have. Form "vqa": each decoder layer from a fusion layer, cross-attention included; the
    decoder's head from the masked-token head; its embeddings from the text embeddings. Form
    "captioning": the head from the masked-token head. Forms of NLVR2: both layers of pair j from
    fusion layer j; their own heads are fresh.

    Args:
        pretrained: of form "pretrain", or of the wanted form itself (another image size, after a
            domain stage), or of "nlvr2_pretrain" for "nlvr2".
        config: the configuration wanted; None is `pretrained.config.as_form(form)`.
        decoder_map: fusion layer of each decoder layer; None takes the last of each equal group.

    Returns:
        The model on the source's device in float32, and the report; `report.fresh` names the
        parameters that nothing was there for.

    Raises:
        ValueError: on forms, maps or widths that do not fit (naming the key).
    """
    before = pretrained.config
    config = config or before.as_form(form)
    _same_depth(config, before)
    if config.form != form:
        raise ValueError(f"form {form!r} was asked for, the configuration says {config.form!r}")
    if form != before.form and form not in _STARTS.get(before.form, ()):
        known = [source for source, forms in _STARTS.items() if form in forms]
        raise ValueError(
            f"form {form!r} starts from a model of form {' or '.join(map(repr, known))}, "
            f"not {before.form!r}"
        )
    model = XVLM(config).to(next(pretrained.parameters()).device)
    pairs = _task_pairs(model, before, decoder_map)
    what = f"form {form!r} from {before.form!r}"
    report = _copy(pretrained.state_dict(), model, pairs, what)
    fresh = _FRESH.get(config.form, ()) if config.form != before.form else ()
    lost = [key for key in report.unmapped if not key.startswith(fresh)]
    if lost:
        raise ValueError(f"{what}: nothing to start {', '.join(lost[:_LISTED])} from")
    return model, report


def _same_depth(config: ModelConfig, before: ModelConfig) -> None:
    """Raises ValueError when a task form would lose or lack layers of the encoders."""
    depths = [
        (c.vision.layers, c.text.text_layers, c.text.fusion_layers)
        for c in (config.as_form(before.form), before)
    ]
    if depths[0] != depths[1]:
        raise ValueError(
            f"a task form has the depth of its pre-trained model, (vision, text, fusion) layers "
            f"{depths[1]}, not {depths[0]}; student_from_teacher makes shallower models"
        )


def _task_pairs(
    model: XVLM, before: ModelConfig, decoder_map: Sequence[int] | None
) -> dict[str, str]:
    """Key of the task form -> key of the model it starts from; see `task_form`."""
    config, same = model.config, model.config.form == before.form
    fusion = _fusion_sources(config.text, before.text, None)
    first = config.text.text_layers
    layers: tuple[int, ...] = ()
    if config.decoder is not None and not same:
        depth = before.text.fusion_layers
        layers = _checked_map(decoder_map, config.decoder.layers, depth, "decoder")
    pairs = {}
    for key in model.state_dict():
        match, origin = _LAYER.fullmatch(key), key
        if match is not None and match[1] == "text.layers" and int(match[2]) >= first:
            origin = f"text.layers.{fusion[int(match[2]) - first]}.{match[3]}"
        elif key.startswith("lm_head.") and not same:
            origin = key.replace("lm_head.", "mlm_head.", 1)
        elif key.startswith("decoder.embeddings.") and not same:
            origin = key.replace("decoder.", "text.", 1)
        elif key.startswith("decoder.head.") and not same:
            origin = key.replace("decoder.head.", "mlm_head.", 1)
        elif match is not None and match[1] == "decoder.layers" and not same:
            source = before.text.text_layers + layers[int(match[2])]
            origin = f"text.layers.{source}.{match[3]}"
        pairs[key] = origin
    return pairs


def task_form_from_pretrained(
    pretrained: XVLM,
    form: str = "vqa",
    *,
    config: ModelConfig | None = None,
    decoder_map: Sequence[int] | None = None,
) -> XVLM:
    """`task_form` without its report."""
    return task_form(pretrained, form, config=config, decoder_map=decoder_map)[0]


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
    the teacher layers that the student was made from; weights that only the task form has (decoder,
    fresh heads) are cut from the fine-tuned teacher. Task vectors: Ilharco et al., 2212.04089;
    across depths this use of them is ours.

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
    config = student.config.as_form(form, image_size=size)
    result, report = task_form(student, form, config=config)
    maps = {"vision_map": vision_map, "text_map": text_map, "fusion_map": fusion_map}
    after, _ = student_from_teacher(finetuned, config, decoder_map=decoder_map, **maps)
    cut, _ = student_from_teacher(pretrained, student.config, **maps)
    new = after.state_dict()
    old = task_form_from_pretrained(cut, form, config=config).state_dict()
    with torch.no_grad():
        for key, value in result.state_dict().items():
            if key in report.fresh or key.startswith("decoder."):
                value.copy_(new[key])
            else:
                value.add_(new[key] - old[key])
    return result


def add_sincos_positions(model: XVLM) -> None:
    """Adds 2D sine-cosine vectors to the learned positions of the patches, in place.

    Learned positions of a small model may stay so weak that no later layer can tell where a patch
    is, and then a box is not learned either. These are the fixed positions of MoCo v3 (2104.02057),
    one quarter of the width each for the sines and cosines of row and column; here they are only a
    start, and go on being learned. Class and register tokens keep theirs.

    Raises:
        ValueError: when the vision width is not a multiple of 4.
    """
    vision = model.config.vision
    if vision.width % 4:
        raise ValueError(
            f"initialise.add_positions: sincos needs a vision width that is a multiple of 4, "
            f"{model.config.name} has {vision.width}"
        )
    grid = vision.image_size // vision.patch_size
    position = model.vision.embeddings.position
    with torch.no_grad():
        position[vision.position_prefix :] += build_sincos2d_pos_embed(
            [grid, grid], dim=vision.width, device=position.device, dtype=position.dtype
        )
