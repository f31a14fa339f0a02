"""A model from a foreign state dict: sizes read off the tensors, weights loaded, the rest fresh.

state = read_weights("clip-vit-base-patch16/model.safetensors")
made = build("clip", state)
made.model.save_pretrained("runs/initial")
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from models.backbones import hf_fields
from models.checkpoints import bert, clip, hf_text, timm, xvlm
from models.checkpoints.conversion import ConversionReport, fit_positions
from models.config import ModelConfig
from models.initialise import task_form
from models.xvlm import XVLM

__all__ = [
    "KINDS",
    "RECORD",
    "Conversion",
    "Options",
    "build",
    "fresh_keys",
    "merged",
    "sizes_beside",
    "write_record",
]

KINDS = ("xvlm", "clip", "bert", "timm")
RECORD = "conversion.json"
_SECTION = {"clip": "vision", "timm": "vision", "bert": "text"}
_POSITION = "vision.embeddings.position"
# what no tensor shows, by the section of the configuration that a kind fills
_UNSEEN = ("head_dim", "activation", "norm_eps")
_OF_BERT = (
    *_UNSEEN,
    *("vocab_size", "max_positions", "position_offset", "type_vocab_size", "word_width"),
    *("dropout", "attention_dropout", "pad_id", "init_std"),
)


@dataclass(frozen=True)
class Options:
    """How to convert.

    Attributes:
        sizes: values of a `ModelConfig`, nested, that win over what the tensors show.
        layer_map: foreign layer of each of ours (clip, bert); None spreads them evenly.
        image_size: resample the positions to it; None keeps the size.
        form: the task form wanted; None keeps the file's.
        allow_missing, allow_unexpected: keys, modules or globs, as in `load_converted`; ours for
            missing ones, foreign ones for unexpected ones.
    """

    sizes: Mapping[str, Any] = field(default_factory=dict)
    layer_map: Sequence[int] | None = None
    image_size: int | None = None
    form: str | None = None
    allow_missing: Sequence[str] = ()
    allow_unexpected: Sequence[str] = ()


@dataclass(frozen=True)
class Conversion:
    """A converted model.

    Attributes:
        fresh: keys of the model that no checkpoint has filled, sorted.
    """

    model: XVLM
    report: ConversionReport
    fresh: list[str]


def build(
    kind: str,
    state: Mapping[str, Tensor],
    options: Options | None = None,
    *,
    base: XVLM | None = None,
    base_fresh: Iterable[str] = (),
    where: str = "checkpoint",
) -> Conversion:
    """A whole model with the weights of a foreign state dict; fresh weights come from torch's
    global generator.

    Args:
        kind: one of KINDS. "xvlm" fills the model, "clip" and "timm" the vision encoder, "bert" the
            text and fusion layers but for cross-attention.
        base: a model whose other parts stay; without it they are fresh, in the sizes of X-VLM.
        base_fresh: its keys that are fresh.

    Raises:
        ValueError: on another kind, sizes that do not go together, or keys that are missing (unless
            allowed), misshapen or unexpected.
    """
    options = options or Options()
    if kind not in KINDS:
        raise ValueError(f"kind {kind!r} is unknown; choose one of {KINDS}")
    if kind == "xvlm" and base is not None:
        raise ValueError("a whole X-VLM checkpoint does not go into another model")
    config = _config(kind, state, options, base, where)
    model = XVLM(config)
    fresh = set(model.state_dict())
    if base is not None:
        fresh = _copy_base(model, base, set(base_fresh))
    report = _load(kind, model, state, options, where)
    report.notes += _assumed(kind, config, options)
    fresh -= set(report.loaded)
    if options.form not in (None, model.config.form):
        model, fresh = _as_form(model, str(options.form), fresh)
    return Conversion(model.eval(), report, sorted(fresh))


def merged(values: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """Nested values with nested changes written over them."""
    result = dict(values)
    for key, change in changes.items():
        old = result.get(key)
        if isinstance(old, Mapping) and isinstance(change, Mapping):
            result[key] = merged(old, change)
        else:
            result[key] = change
    return result


def _config(
    kind: str, state: Mapping[str, Tensor], options: Options, base: XVLM | None, where: str
) -> ModelConfig:
    """Sizes of the base or of the tensors, changed by the options; a backbone's name stands for all
    sizes of its section.
    """
    named = [s for s in ("vision", "text") if options.sizes.get(s, {}).get("backbone")]
    if base is not None:
        found = base.config
    elif _SECTION.get(kind) in named:
        found = ModelConfig()
    else:
        found = _shown(kind, state, options.sizes, where)
    values = found.to_dict()
    for section in named:  # `ModelConfig.from_dict` writes the other fields out
        values[section] = {}
    if "vision" in named:
        del values["image_mean"], values["image_std"]
    values = merged(values, options.sizes)
    config = ModelConfig.from_dict(values, where=f"{where}: sizes")
    if options.image_size is None:
        return config
    return replace(config, vision=replace(config.vision, image_size=options.image_size))


def _shown(
    kind: str, state: Mapping[str, Tensor], sizes: Mapping[str, Any], where: str
) -> ModelConfig:
    """The configuration that the tensors show, with the head sizes given."""
    vision, text = sizes.get("vision", {}), sizes.get("text", {})
    region, head_dim = vision.get("region_layers"), vision.get("head_dim", 64)
    if kind == "xvlm":
        return xvlm.config_of(
            state,
            head_dim=text.get("head_dim", 64),
            vision_head_dim=head_dim,
            region_layers=region,
            where=where,
        )
    if kind == "bert":
        names = hf_text.bert_names(state)
        renamed = {names[key]: value for key, value in state.items()}
        head_dim = text.get("head_dim", 64)
        return ModelConfig(text=bert.config_of(renamed, head_dim=head_dim, where=where))
    if kind == "clip":
        found = clip.config_of(state, head_dim=head_dim, region_layers=region, where=where)
    else:
        found = timm.config_of(state, head_dim=head_dim, region_layers=region, where=where)
    return ModelConfig(vision=found)


def _copy_base(model: XVLM, base: XVLM, base_fresh: set[str]) -> set[str]:
    """Copies what fits and returns the keys that are fresh now.

    Raises:
        ValueError: when a weight that is not fresh would be lost.
    """
    ours, theirs, fresh = model.state_dict(), dict(base.state_dict()), set()
    fit_positions(theirs, ConversionReport(), _POSITION, model.config.vision, "the model folder")
    with torch.no_grad():
        for key, value in ours.items():
            if key in theirs and theirs[key].shape == value.shape:
                value.copy_(theirs[key])
                fresh |= {key} & base_fresh
            else:
                fresh.add(key)
    lost = sorted((theirs.keys() - base_fresh) & fresh | (theirs.keys() - ours.keys() - base_fresh))
    if lost:
        raise ValueError(f"{lost[0]} of the model folder does not fit the new sizes")
    return fresh


def _load(
    kind: str, model: XVLM, state: Mapping[str, Tensor], options: Options, where: str
) -> ConversionReport:
    allow: dict[str, Any] = {
        "allow_missing": options.allow_missing,
        "allow_unexpected": options.allow_unexpected,
        "where": where,
    }
    if kind == "bert":
        report = hf_text.load(model, state, options.layer_map, **allow)
        report.missing = [k for k in report.missing if k.startswith(("text.", "mlm_head."))]
        return report
    if kind == "clip":
        # keys of the encoder lie below `vision.` in the model
        allow["allow_missing"] = [key.removeprefix("vision.") for key in options.allow_missing]
        return clip.load(model.vision, state, options.layer_map, **allow).below("vision.")
    if options.layer_map is not None:
        raise ValueError(f"a layer map belongs to clip and bert, not to {kind}")
    if kind == "timm":
        allow["allow_missing"] = [key.removeprefix("vision.") for key in options.allow_missing]
        return timm.load(model.vision, state, **allow).below("vision.")
    return xvlm.load(model, state, **allow)


def _assumed(kind: str, config: ModelConfig, options: Options) -> list[str]:
    """One note on the values that neither the tensors nor the sizes gave."""
    filled = [_SECTION[kind]] if kind in _SECTION else ["vision", "text"]
    sections = [s for s in filled if not options.sizes.get(s, {}).get("backbone")]
    taken = [
        f"{section}.{name} {getattr(getattr(config, section), name)}"
        for section in sections
        for name in (*_UNSEEN, "region_layers" if section == "vision" else "position_offset")
        if name not in options.sizes.get(section, {})
    ]
    if kind == "timm" and sections and "image_mean" not in options.sizes:
        taken.append(f"image_mean {config.image_mean}, image_std {config.image_std}")
    return [f"not in the file, taken as published: {', '.join(taken)}"] if taken else []


def _as_form(model: XVLM, form: str, fresh: set[str]) -> tuple[XVLM, set[str]]:
    """The task form, and its fresh keys: those that come from fresh ones, or from none."""
    result, report = task_form(model, form)
    return result, set(report.fresh) | {new for new, old in report.mapped.items() if old in fresh}


def sizes_beside(kind: str, config: Mapping[str, Any], path: Path) -> dict[str, Any]:
    """Values of a `ModelConfig` from the config.json that lies beside a foreign weight file.

    Raises:
        ValueError: when it describes a model that the encoder here is not.
    """
    if kind == "clip":
        return {"vision": clip.sizes_of(config, str(path))}
    if kind == "bert":
        fields = hf_fields(path)
        return {"text": {name: fields[name] for name in _OF_BERT}}
    values: dict[str, Any] = {}
    if kind == "timm":
        shown = config.get("pretrained_cfg", config)
        if {"mean", "std"} <= shown.keys():
            values = {"image_mean": shown["mean"], "image_std": shown["std"]}
        if "architecture" in config:
            values["vision"] = {"backbone": f"timm/{config['architecture']}"}
    return values


def fresh_keys(folder: Path) -> set[str]:
    """Keys of a converted model folder that no checkpoint has filled; empty without a record.

    Raises:
        ValueError: on a record that cannot be read.
    """
    return set(_record(folder)["fresh"])


def _record(folder: Path) -> dict[str, Any]:
    path = folder / RECORD
    if not path.is_file():
        return {"conversions": [], "fresh": []}
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        return {"conversions": list(values["conversions"]), "fresh": list(values["fresh"])}
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path}: not a record of a conversion: {error!r}") from error


def write_record(
    folder: Path, made: Conversion, facts: Mapping[str, Any], before: Path | None = None
) -> None:
    """Writes every key of a conversion beside the model, after those of the folder it went into."""
    earlier = [] if before is None else _record(before)["conversions"]
    values = {
        "conversions": [*earlier, {**facts, **made.report.to_dict()}],
        "fresh": made.fresh,
    }
    partial = folder / f".{RECORD}.partial"
    partial.write_text(json.dumps(values, indent=1) + "\n", encoding="utf-8")
    os.replace(partial, folder / RECORD)
