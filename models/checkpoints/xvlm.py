"""Published X-VLM / EfficientVLM (CLIP variant) checkpoints: key names both ways, and their shape.

Every form has its own names: pre-training (`text_encoder.bert.`), retrieval, grounding and NLVR2
(`text_encoder.`, in NLVR2 with both copies of the shared keys and values), visual question
answering (`text_encoder.` and `text_decoder.bert.`) and captioning (`text_decoder.bert.` alone).
Source: https://github.com/zengyan-97/X-VLM and https://github.com/swaggy-TN/EfficientVLM.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from models.checkpoints.conversion import (
    ConversionReport,
    check_tied,
    fit_positions,
    grid_of,
    load_converted,
)
from models.checkpoints.xvlm_names import names, rename, rules, text_prefix
from models.config import HEADS, PAIRED, Form, ModelConfig
from models.part_configs import DecoderConfig, TextConfig, VisionConfig
from models.xvlm import XVLM

__all__ = ["config_of", "form_of", "from_published", "load", "to_published"]

_IGNORED = re.compile(r"(^|\.)position_ids$|^(idx|image|text)_queue")
_TIED_COPY = re.compile(r"(text_(?:en|de)coder\.)cls\.predictions\.decoder\.(weight|bias)")
_GATES = "l0_module."
_SHARED = re.compile(
    r"text_encoder\.encoder\.layer\.(\d+)\.(crossattention\.self\.(?:key|value).*)"
)


def form_of(state: Mapping[str, Tensor], where: str = "checkpoint") -> Form:
    """Which published model a state dict belongs to, by the modules that it has.

    Raises:
        ValueError: when it is none of the CLIP variants of X-VLM.
    """

    def has(prefix: str) -> bool:
        return any(key.startswith(prefix) for key in state)

    if has("vision_encoder.layers."):
        raise ValueError(f"{where}: its vision encoder is a Swin transformer; only CLIP's ViT fits")
    if has("vision_encoder.blocks."):
        raise ValueError(f"{where}: its vision encoder is a DeiT; only X-VLM's CLIP variant fits")
    if has("text_encoder.roberta.") or has("text_decoder.roberta."):
        raise ValueError(f"{where}: its text encoder is a RoBERTa; only the BERT variant fits")
    forms: list[tuple[bool, Form]] = [
        (has("text_decoder.") and has("text_encoder."), "vqa"),
        (has("text_decoder."), "captioning"),
        (has("text_encoder.bert."), "pretrain"),
        (has("cls_head."), "nlvr2"),
        (has("ta_head."), "nlvr2_pretrain"),
        (has("itm_head."), "retrieval"),
        (has("bbox_head."), "grounding"),
    ]
    for found, form in forms:
        if found and has("vision_encoder."):
            return form
    raise ValueError(
        f"{where}: not a checkpoint of X-VLM or EfficientVLM (vision_encoder..., text_encoder...)"
    )


def from_published(
    state: Mapping[str, Tensor], where: str = "checkpoint"
) -> tuple[dict[str, Tensor], ConversionReport]:
    """Renames a published state dict to our keys.

    Index buffers, tied or shared copies, and pruning modules are left out (see
    `ConversionReport.ignored`); the 0-dim temperature becomes (1,).

    Raises:
        ValueError: on a state dict of another model, or copies that differ from their originals.
    """
    form = form_of(state, where)
    named = rules(names(form))
    report, converted = ConversionReport(), {}
    shared = _shared_copies(state, form, where)
    for key, value in state.items():
        ours, tied = rename(key, named), _TIED_COPY.fullmatch(key)
        if tied is not None:
            ours = _tied(state, tied, form, where)
        if key in shared or _IGNORED.search(key) or key.startswith(_GATES):
            report.ignored.append(key)
        elif ours is not None:
            converted[ours] = value.reshape(1) if value.ndim == 0 else value
            report.took(key, ours)
        elif tied is not None:
            report.ignored.append(key)
        else:
            report.unexpected.append(key)
    gates = [key for key in report.ignored if key.startswith(_GATES)]
    if gates:
        report.notes.append(
            f"{len(gates)} tensors of pruning gates ({_GATES}*) are left out: the weights are taken "
            "as they are, nothing is pruned"
        )
    return converted, report


def _tied(state: Mapping[str, Tensor], match: re.Match[str], form: Form, where: str) -> str | None:
    """Our key of a stored copy of the output layer where the original is missing, as in files that
    store a shared tensor once; None when the copy can be left out. Raises ValueError when it differs.
    """
    key, original = match[0], f"{match[1]}cls.predictions.bias"
    if match[2] == "weight":
        stack = f"{match[1]}bert."
        original = f"{stack}embeddings.word_embeddings.weight"
    check_tied(state, key, original, where)
    if original in state:
        return None
    return rename(original, rules(names(form)))


def _shared_copies(state: Mapping[str, Tensor], form: Form, where: str) -> set[str]:
    """Keys and values of the second layer of each pair: the first holds the same.

    Raises:
        ValueError: when the two of a pair differ.
    """
    if form not in PAIRED:
        return set()
    layers = {int(m[1]) for key in state if (m := _SHARED.fullmatch(key))}
    copies = set()
    for key in state:
        match = _SHARED.fullmatch(key)
        if match and (int(match[1]) - min(layers)) % 2:
            first = f"text_encoder.encoder.layer.{int(match[1]) - 1}.{match[2]}"
            check_tied(state, key, first, where)
            if first in state:
                copies.add(key)
    return copies


def _form_of_ours(state: Mapping[str, Tensor]) -> Form:
    modules = {key.split(".", 1)[0] for key in state} - {"vision", "text"}
    for form, heads in HEADS.items():
        if modules == set(heads):
            return form
    raise ValueError(
        f"a model with the modules {', '.join(sorted(modules)) or '(none)'} beside its encoders has "
        "no name in the published format"
    )


def to_published(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Our state dict under published names, with the copies and index buffers that they store.

    Raises:
        ValueError: on modules or keys that the published code has no name for.
    """
    form = _form_of_ours(state)
    named = rules((ours, published) for published, ours in names(form))
    result: dict[str, Tensor] = {}
    for key, value in state.items():
        published = rename(key, named)
        if published is None:
            raise ValueError(f"{key} has no name in the published format (a pruned or other model)")
        result[published] = value.reshape(()) if published == "temp" else value
        match = _SHARED.fullmatch(published)
        if form in PAIRED and match:
            result[f"text_encoder.encoder.layer.{int(match[1]) + 1}.{match[2]}"] = value
    for key in ("vision.embeddings.class_token", "vision.embeddings.norm.weight"):
        if key not in state:
            raise ValueError(f"the published format needs CLIP's ViT; the model has no {key}")
    result["vision_encoder.position_ids"] = _index(state["vision.embeddings.position"])
    text = text_prefix(form)
    result[f"{text}embeddings.position_ids"] = _index(state["text.embeddings.position.weight"])
    if form == "vqa":
        positions = state["decoder.embeddings.position.weight"]
        result["text_decoder.bert.embeddings.position_ids"] = _index(positions)
        _tie(result, "text_decoder.", state["decoder.embeddings.word.weight"])
    elif form in ("pretrain", "captioning"):
        _tie(result, text.removesuffix("bert."), state["text.embeddings.word.weight"])
    return result


def _index(positions: Tensor) -> Tensor:
    return torch.arange(positions.shape[0], device=positions.device).unsqueeze(0)


def _tie(result: dict[str, Tensor], prefix: str, word: Tensor) -> None:
    result[f"{prefix}cls.predictions.decoder.weight"] = word
    result[f"{prefix}cls.predictions.decoder.bias"] = result[f"{prefix}cls.predictions.bias"]


def config_of(
    state: Mapping[str, Tensor],
    *,
    head_dim: int = 64,
    vision_head_dim: int | None = None,
    region_layers: int | None = None,
    where: str = "checkpoint",
) -> ModelConfig:
    """The configuration that a published state dict belongs to, read off its shapes.

    Args:
        head_dim: not visible in the weights (64 in every published model).
        vision_head_dim: of the vision encoder; None is `head_dim`.
        region_layers: not visible either; None takes a third of the layers, as published.

    Raises:
        ValueError: naming a key that is missing or sizes that do not go together.
    """
    ours, _ = from_published(state, where)
    for key in (
        "vision.embeddings.patch.proj.weight",
        "vision.embeddings.position",
        "text.embeddings.word.weight",
        "text.embeddings.position.weight",
        "text.embeddings.token_type.weight",
    ):
        if key not in ours:
            raise ValueError(f"{where}: nothing in it gives {key}, which the sizes are read from")
    word, form = ours["text.embeddings.word.weight"], form_of(state, where)
    vision = _vision_of(ours, vision_head_dim or head_dim, region_layers, where)
    text_ffn = _widths(ours, "text.layers.{}.ffn.fc1.bias")
    cross = _heads(ours, "text.layers.{}.cross_attention.q.bias", head_dim, where)
    decoder = None
    if form == "vqa":
        decoder = DecoderConfig(
            heads=_heads(ours, "decoder.layers.{}.attention.q.bias", head_dim, where),
            cross_heads=_heads(ours, "decoder.layers.{}.cross_attention.q.bias", head_dim, where),
            ffn=tuple(_widths(ours, "decoder.layers.{}.ffn.fc1.bias")),
        )
    projection = ours.get("image_projection.linear.bias")
    return ModelConfig(
        form=form,
        embed_dim=256 if projection is None else projection.shape[0],
        decoder=decoder,
        vision=vision,
        text=TextConfig(
            vocab_size=word.shape[0],
            max_positions=ours["text.embeddings.position.weight"].shape[0],
            type_vocab_size=ours["text.embeddings.token_type.weight"].shape[0],
            width=word.shape[1],
            head_dim=head_dim,
            text_layers=len(text_ffn) - len(cross),
            heads=_heads(ours, "text.layers.{}.attention.q.bias", head_dim, where),
            cross_heads=cross,
            pair_heads=cross[::2] if form in PAIRED else None,
            ffn=tuple(text_ffn),
        ),
    )


def _vision_of(
    ours: Mapping[str, Tensor], head_dim: int, region_layers: int | None, where: str
) -> VisionConfig:
    ffn = _widths(ours, "vision.blocks.{}.ffn.fc1.bias")
    patch = ours["vision.embeddings.patch.proj.weight"]
    grid = grid_of(ours["vision.embeddings.position"], where)
    return VisionConfig(
        image_size=grid * patch.shape[-1],
        patch_size=patch.shape[-1],
        width=patch.shape[0],
        head_dim=head_dim,
        heads=_heads(ours, "vision.blocks.{}.attention.q.bias", head_dim, where),
        ffn=tuple(ffn),
        region_layers=len(ffn) // 3 if region_layers is None else region_layers,
    )


def _widths(state: Mapping[str, Tensor], template: str) -> list[int]:
    """Lengths of the biases whose key fits the template, in the order of their layers."""
    pattern = re.compile(re.escape(template).replace(r"\{\}", r"(\d+)"))
    found = {int(m[1]): state[key].shape[0] for key in state if (m := pattern.fullmatch(key))}
    return [found[index] for index in sorted(found)]


def _heads(
    state: Mapping[str, Tensor], template: str, head_dim: int, where: str
) -> tuple[int, ...]:
    widths = _widths(state, template)
    if any(width % head_dim for width in widths):
        raise ValueError(
            f"{where}: attention widths {sorted(set(widths))} are not multiples of head size "
            f"{head_dim}; give vision.head_dim and text.head_dim"
        )
    return tuple(width // head_dim for width in widths)


def load(
    model: XVLM,
    state: Mapping[str, Tensor],
    *,
    allow_missing: Iterable[str] = (),
    allow_unexpected: bool | Iterable[str] = False,
    where: str = "checkpoint",
) -> ConversionReport:
    """Loads published weights into a model of their form; positions are resampled to the model's
    image size.

    Args:
        allow_missing, allow_unexpected: keys, modules or globs, as in `load_converted`.

    Raises:
        ValueError: naming keys that are missing (unless allowed), misshapen or unexpected, or when
            the file is of another form.
    """
    form = form_of(state, where)
    if form != model.config.form:
        raise ValueError(f"{where}: holds form {form!r}, the model is {model.config.form!r}")
    converted, report = from_published(state, where)
    fit_positions(converted, report, "vision.embeddings.position", model.config.vision, where)
    return load_converted(
        model,
        converted,
        report,
        allow_missing=allow_missing,
        allow_unexpected=allow_unexpected,
        where=where,
    )
