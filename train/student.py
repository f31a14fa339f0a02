"""First weights of the model to train, and where each of them came from."""

from __future__ import annotations

import json
import logging
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from models import from_pretrained, presets
from models.checkpoints.build import fresh_keys
from models.config import ModelConfig
from models.initialise import (
    InitialiseReport,
    add_sincos_positions,
    add_task_vector,
    student_from_teacher,
    task_form,
)
from models.trim_config import TrimmingConfig
from models.trimming import default_trimming, with_trimming
from models.xvlm import XVLM
from train.config import RunConfig
from train.trim_config import TrimConfig

__all__ = [
    "ORIGIN",
    "FirstWeights",
    "build_student",
    "is_model_folder",
    "model_config",
    "rest_trimmers",
]

_LOG = logging.getLogger(__name__)
ORIGIN = "origin.json"
# Keys of `trim` that say which trimmers there are; the others say how they learn.
_OF_THE_MODEL = (
    "vision", "fusion", "text", "guided", "heads", "bottleneck", "projection", "init_logit",
)  # fmt: skip


@dataclass(frozen=True)
class FirstWeights:
    """A model before its first step.

    Attributes:
        fresh: parameters that came from nowhere while others were loaded: they get
            optim.new_lr_multiplier.   source: what the others came from.   maps: source layer of
            each layer, by stack.   unused: keys of the source that nothing was taken from.
        resized: keys that were resampled.
        trimmers: parameters of trimmers that came with the model, of a run that goes on with them:
            they get optim.new_lr_multiplier, too.
    """

    model: XVLM
    source: str
    fresh: frozenset[str] = frozenset()
    maps: dict[str, list[int]] = field(default_factory=dict)
    unused: tuple[str, ...] = ()
    resized: tuple[str, ...] = ()
    trimmers: frozenset[str] = frozenset()

    @classmethod
    def reported(cls, model: XVLM, source: str, report: InitialiseReport) -> FirstWeights:
        """With what an `InitialiseReport` says. Only parameters are fresh, buffers are not."""
        trainable = {name for name, _ in model.named_parameters()}
        return cls(
            model,
            source,
            frozenset(report.fresh & trainable),
            _layer_maps(report.mapped),
            tuple(report.unused),
            tuple(report.resized),
        )

    def save(self, path: Path) -> None:
        """Writes what is known of the weights' origin as JSON, for the model card."""
        content = {
            "source": self.source,
            "layer_maps": self.maps,
            "fresh": sorted(self.fresh),
            "unused": list(self.unused),
            "resized": list(self.resized),
        }
        path.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def _layer_maps(mapped: dict[str, str]) -> dict[str, list[int]]:
    """Stack -> source layer of each layer, read off the keys."""
    maps: dict[str, dict[int, int]] = {}
    for key, origin in mapped.items():
        ours, theirs = key.split("."), origin.split(".")
        if len(ours) > 3 and ours[1] in ("blocks", "layers") and ours[2].isdigit():
            maps.setdefault(".".join(ours[:2]), {})[int(ours[2])] = int(theirs[2])
    return {stack: [layers[n] for n in sorted(layers)] for stack, layers in maps.items()}


def is_model_folder(model: str | dict[str, Any]) -> bool:
    return isinstance(model, str) and (Path(model) / "config.json").is_file()


def model_config(config: RunConfig, vocab_size: int | None) -> ModelConfig:
    """The student's configuration: a preset, a folder's config.json, or inline values.

    Raises:
        ValueError: image_size beside inline values, or one that the patches do not divide; keys of
            `trim` that ask for other trimmers than the model has.
        FileNotFoundError: `model` is a path, and no model folder is there.
    """
    return _with_sites(config, _dense_config(config, vocab_size))


def _with_sites(config: RunConfig, known: ModelConfig) -> ModelConfig:
    """With the trimmers that the run asks for; a model that has trimmers keeps them.

    Raises:
        ValueError: it has others than the run asks for, or no heads to choose among.
    """
    trim = config.trim
    if trim is None:
        return known
    if known.trimming is None:
        known = replace(known, trimming=_asked_trimming(trim, known))
    else:
        _check_same(trim, known.trimming)
    if trim.head_budget < 1 and not _chooses_heads(known):
        raise ValueError(
            f"trim.head_budget: {known.name} has no head trimmers, so there is no share of heads to "
            "ask for (layers of one head have none); leave it out, or name encoders in trim.heads "
            "whose layers have several"
        )
    return known


def _asked_trimming(trim: TrimConfig, known: ModelConfig) -> TrimmingConfig:
    asked = {"vision": trim.vision, "fusion": trim.fusion, "text": trim.text}
    changes: dict[str, Any] = {name: sites for name, sites in asked.items() if sites is not None}
    if trim.guided is not None or trim.vision == ():
        changes["guided"] = bool(trim.guided)
    changes |= {"heads": trim.heads, "bottleneck": trim.bottleneck, "projection": trim.projection}
    changes["init_logit"] = trim.init_logit
    return default_trimming(known, **changes)


def _check_same(trim: TrimConfig, found: TrimmingConfig) -> None:
    """Raises ValueError where a key that was set (is not its default) is not as the model has it."""
    default = TrimConfig()
    for key in _OF_THE_MODEL:
        asked, has = getattr(trim, key), getattr(found, key)
        same = set(asked) == set(has) if key == "heads" else asked == has
        if asked != getattr(default, key) and not same:
            raise ValueError(
                f"trim.{key}: {asked} was asked for, and the model has trimmers already, with {has}; "
                f"leave trim.{key} out to go on with those, or start from the model without trimmers"
            )


def _chooses_heads(config: ModelConfig) -> bool:
    """Whether a layer has a head trimmer: see `models.trim_pass`."""
    text, first = config.text, config.text.text_layers
    heads = {
        "vision": config.vision.heads,
        "text": text.heads[:first],
        "fusion": (*text.heads[first:], *text.cross_heads),
    }
    encoders = () if config.trimming is None else config.trimming.heads
    return any(count > 1 for encoder in encoders for count in heads[encoder])


def _dense_config(config: RunConfig, vocab_size: int | None) -> ModelConfig:
    form, size = config.task, config.image_size
    if is_model_folder(config.model):
        known = ModelConfig.load(Path(str(config.model)) / "config.json")
        return known.as_form(form, image_size=size)
    if isinstance(config.model, dict):
        if size is not None:
            raise ValueError("image_size: an inline model has its own, model.vision.image_size")
        return ModelConfig.from_dict(config.model, where="model")
    overrides: dict[str, Any] = {} if size is None else {"vision": {"image_size": size}}
    if vocab_size is not None and config.model.startswith("blocksworld"):
        overrides["text"] = {"vocab_size": vocab_size}
    if "/" in config.model:
        raise FileNotFoundError(
            f"model: {config.model}/config.json: not there; make that model first (an earlier stage, "
            "or espalier convert), or give a preset (model=efficientvlm) to plan without it"
        )
    return presets.config(config.model, form=form, **overrides)


def build_student(config: RunConfig, vocab_size: int, teacher: XVLM | None) -> FirstWeights:
    """The model to train, with its first weights. Trimmers that it has rest where the run does not
    train any (`rest_trimmers`).

    Raises:
        ValueError: `initialise.source` is "teacher" and there is none, shapes do not fit, or the model
            has other trimmers than `trim` asks for.
        FileNotFoundError: `model` or `initialise.source` is a path, and no model folder is there.
    """
    trimming = model_config(config, vocab_size).trimming
    first = _dense_student(config, vocab_size, teacher)
    if config.initialise.add_positions == "sincos":
        add_sincos_positions(first.model)
        first = replace(first, source=f"{first.source} + sine-cosine positions")
    if first.model.config.trimming is not None:
        _with_sites(config, first.model.config)  # initialise.source may decide what the model is
        return _going_on(first) if config.trim is not None else _resting(first)
    if config.trim is None:
        return first
    torch.manual_seed(config.seed)  # the same trimmers on every rank and in every run
    model = with_trimming(first.model, trimming)
    return replace(first, model=model, fresh=first.fresh | _trimmer_names(model))


def _trimmer_names(model: XVLM) -> set[str]:
    return {name for name, _ in model.named_parameters() if ".trimmers." in name}


def _going_on(first: FirstWeights) -> FirstWeights:
    return replace(first, trimmers=frozenset(_trimmer_names(first.model)))


def rest_trimmers(model: XVLM) -> set[str]:
    """Turns a model's trimmers off and freezes them: it trains and is validated as the full model.

    Its configuration stays, so a saved copy has the mode and the counts that it came with.

    Returns:
        The names of their parameters; none where a model has no trimmers.
    """
    if model.config.trimming is None:
        return set()
    model.set_trimming("off")
    names = _trimmer_names(model)
    for name in names:
        model.get_parameter(name).requires_grad_(False)
    return names


def _resting(first: FirstWeights) -> FirstWeights:
    names = rest_trimmers(first.model)
    _LOG.warning("trimmers of the model are off and frozen in this run; model/ has them again")
    return replace(first, fresh=first.fresh - names)


def _dense_student(config: RunConfig, vocab_size: int, teacher: XVLM | None) -> FirstWeights:
    """Before trimmers are added, where the run adds any."""
    wanted = _dense_config(config, vocab_size)
    init = config.initialise
    if is_model_folder(config.model):
        if init.task_vector is not None:
            return _with_task_vector(config, teacher)
        return _from_folder(str(config.model), wanted)
    if init.source == "random":
        torch.manual_seed(config.seed)
        return FirstWeights(XVLM(wanted), f"random, seed {config.seed}")
    if init.source == "teacher":
        if teacher is None:
            raise ValueError("initialise.source=teacher needs teacher.path")
        # From the file: the teacher that runs may be in half precision.
        student, report = student_from_teacher(
            from_pretrained(Path(str(config.teacher.path))),
            wanted,
            vision_map=init.vision_map,
            text_map=init.text_map,
            fusion_map=init.fusion_map,
            decoder_map=init.decoder_map,
        )
        return _told(FirstWeights.reported(student, str(config.teacher.path), report))
    if not is_model_folder(init.source):
        raise FileNotFoundError(
            f"initialise.source: {init.source}/config.json: not there; make that model first (an "
            "earlier stage, or espalier convert, docs/models.md), or name random or teacher"
        )
    first = _from_folder(init.source, wanted)
    if first.model.config != wanted:
        _LOG.warning("initialise.source %s decides the model's shape, not `model`", init.source)
    return first


def _told(first: FirstWeights) -> FirstWeights:
    _LOG.info("first weights from %s, layers %s", first.source, first.maps)
    for what, keys in (("fresh", sorted(first.fresh)), ("unused", first.unused)):
        if keys:
            _LOG.info("%d %s: %s", len(keys), what, ", ".join(keys))
    return first


def _from_folder(folder: str, wanted: ModelConfig) -> FirstWeights:
    """A saved model, turned into the wanted form or image size where it has another."""
    source = from_pretrained(Path(folder))
    fresh = fresh_keys(Path(folder))
    size = wanted.vision.image_size
    same_form = source.config.form == wanted.form
    if same_form and source.config.vision.image_size == size:
        trainable = {name for name, _ in source.named_parameters()}
        return _told(FirstWeights(source, folder, frozenset(fresh & trainable)))
    shape = source.config.as_form(wanted.form, image_size=size)
    model, report = task_form(source, wanted.form, config=shape)
    first = FirstWeights.reported(model, folder, report)
    inherited = {key for key, origin in report.mapped.items() if origin in fresh}
    return _told(
        FirstWeights(
            model, folder, first.fresh | inherited, first.maps, first.unused, first.resized
        )
    )


def _with_task_vector(config: RunConfig, teacher: XVLM | None) -> FirstWeights:
    init = config.initialise
    if teacher is None or init.task_vector is None:
        raise ValueError("initialise.task_vector needs teacher.path, the fine-tuned teacher")
    # From the files, as above.
    model = add_task_vector(
        from_pretrained(Path(str(config.model))),
        from_pretrained(Path(init.task_vector)),
        from_pretrained(Path(str(config.teacher.path))),
        vision_map=init.vision_map,
        text_map=init.text_map,
        fusion_map=init.fusion_map,
        decoder_map=init.decoder_map,
    )
    return FirstWeights(model, f"{config.model} + task vector of {config.teacher.path}")
