"""Which runs read which key of a run file, in one table, and warnings for keys that do nothing."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from train.config import BudgetConfig, KdConfig, RunConfig
from train.recipes_io import section_class

__all__ = ["READERS", "Reader", "ineffective_keys"]

# What every run reads has no entry, nor what is refused where it is not read: `prune` and `trim` of
# other stages (`stages.check`), kd.decoder_map where not both models have a decoder.
_KD = tuple(f"kd.{field.name}" for field in fields(KdConfig) if field.name != "temperature")
_TIMED = tuple(
    f"prune.budget.{field.name}"
    for field in fields(BudgetConfig)
    if field.name not in ("macs", "speedup", "text_tokens", "top_k")
)
_MAPS = tuple(f"initialise.{stack}_map" for stack in ("vision", "text", "fusion", "decoder"))


@dataclass(frozen=True)
class Reader:
    """Keys, and which runs read them: those of all that is given.

    Attributes:
        keys: dotted; a section stands for all keys in it.
        why: what a run that does not read them is told; {task} and {stage} are filled in.
        tasks: None: all.   stages: None: all.   when: what else must hold of a run.
    """

    keys: tuple[str, ...]
    why: str
    tasks: tuple[str, ...] | None = None
    stages: tuple[str, ...] | None = None
    when: Callable[[RunConfig], bool] | None = None

    def covers(self, key: str) -> bool:
        """Whether `key` is one of `keys`, or in one of them."""
        return any(key == known or key.startswith(f"{known}.") for known in self.keys)

    def reads(self, config: RunConfig) -> bool:
        """Whether this run reads them."""
        return (
            (self.tasks is None or config.task in self.tasks)
            and (self.stages is None or config.stage in self.stages)
            and (self.when is None or self.when(config))
        )


def _has_teacher(config: RunConfig) -> bool:
    return config.teacher.path is not None


def _compares(config: RunConfig) -> bool:
    """Whether outputs are compared: with a teacher's, or trimmed ones with those of the full pass."""
    if config.trim is not None:
        return config.trim.distil_weight > 0
    return _has_teacher(config)


def _from_folder(config: RunConfig) -> bool:
    """Whether `model` is a folder; one that is not there yet is refused, unless it is a preset."""
    model = config.model
    return isinstance(model, str) and ("/" in model or (Path(model) / "config.json").is_file())


def _cuts_teacher(config: RunConfig) -> bool:
    init = config.initialise
    return init.task_vector is not None if _from_folder(config) else init.source == "teacher"


def _evaluates(config: RunConfig) -> bool:
    return config.data.val is not None or config.stage == "trim"


def _plans(config: RunConfig) -> bool:
    """Whether the work of answering counts: in evaluation, or in a budget."""
    return _evaluates(config) or (config.prune is not None and config.prune.budget is not None)


def _times(config: RunConfig) -> bool:
    budget = None if config.prune is None else config.prune.budget
    return budget is not None and budget.speedup is not None


# The first entry that does not read a key says why.
READERS = (
    Reader(
        ("teacher", *_KD),
        "stage {stage} learns without a teacher",
        stages=("distill", "finetune", "prune"),
    ),
    Reader(("teacher", *_KD), "there is no teacher (teacher.path)", when=_has_teacher),
    Reader(
        ("kd.temperature",),
        "task {task} compares no distributions",
        tasks=("pretrain", "vqa", "nlvr2_pretrain", "nlvr2", "retrieval", "captioning"),
    ),
    Reader(("kd.temperature",), "no outputs are compared without teacher.path", when=_compares),
    Reader(
        ("kd.text", "kd.fusion"),
        "all layers of the text stack are the decoder of task {task} (kd.decoder)",
        tasks=("pretrain", "vqa", "nlvr2_pretrain", "nlvr2", "retrieval", "grounding"),
    ),
    Reader(("kd.decoder",), "task {task} has no decoder", tasks=("vqa", "captioning")),
    Reader(
        ("kd.contrastive",), "task {task} has no contrastive loss", tasks=("pretrain", "retrieval")
    ),
    Reader(
        ("kd.cross_attention",),
        "kd.attention=none compares no maps",
        when=lambda config: config.kd.attention != "none",
    ),
    Reader(
        ("itc_scaling",), "task {task} has no contrastive loss", tasks=("pretrain", "retrieval")
    ),
    Reader(
        ("negatives",),
        "task {task} draws no negatives",
        tasks=("pretrain", "nlvr2_pretrain", "retrieval"),
    ),
    Reader(
        ("label_smoothing",), "only captions are smoothed, not task {task}", tasks=("captioning",)
    ),
    Reader(("data.prompt",), "task {task} begins no captions", tasks=("captioning",)),
    Reader(("data.max_answer_tokens",), "task {task} writes no answers", tasks=("vqa",)),
    Reader(
        ("data.rows_per_image",),
        "task {task} draws one caption per image",
        tasks=("vqa", "nlvr2_pretrain", "nlvr2", "retrieval", "captioning", "grounding"),
    ),
    Reader(
        ("data.mlm_probability", "data.mlm_max"), "task {task} masks no words", tasks=("pretrain",)
    ),
    Reader(
        ("data.region", "data.region_train"),
        "task {task} has no region batches",
        tasks=("pretrain",),
    ),
    Reader(
        ("data.region", "data.region_train"),
        "there are no region batches without data.region.probability",
        when=lambda config: config.data.region.probability > 0,
    ),
    Reader(("eval.top_k",), "task {task} ranks nothing", tasks=("vqa", "retrieval")),
    Reader(("eval.annotators",), "task {task} scores no answers", tasks=("vqa",)),
    Reader(
        ("eval.beams", "eval.max_length", "eval.min_length"),
        "task {task} writes no captions",
        tasks=("captioning",),
    ),
    Reader(
        ("eval.samples", "eval.batch", "eval.min_length", "eval.annotators"),
        "nothing is evaluated without data.val",
        when=_evaluates,
    ),
    Reader(
        ("eval.top_k", "eval.beams", "eval.max_length"),
        "nothing is evaluated without data.val",
        when=_plans,
    ),
    Reader(
        ("eval.every", "checkpoint.best"),
        "nothing is validated without data.val",
        when=lambda config: config.data.val is not None,
    ),
    Reader(
        ("prune.sparsity",),
        "prune.budget takes its place",
        when=lambda config: config.prune is None or config.prune.budget is None,
    ),
    Reader(("prune.budget.top_k",), "task {task} ranks no answers", tasks=("vqa",)),
    Reader(_TIMED, "only prune.budget.speedup is measured", when=_times),
    Reader(
        ("initialise.source",),
        "`model` is a folder, which has its weights",
        when=lambda config: not _from_folder(config),
    ),
    Reader(
        ("initialise.task_vector",),
        "it is added to the weights of a model folder, and `model` is none",
        when=_from_folder,
    ),
    Reader(("initialise.decoder_map",), "task {task} has no answer decoder", tasks=("vqa",)),
    Reader(
        _MAPS,
        "no layers of a teacher are taken (initialise.source=teacher, or a task vector)",
        when=_cuts_teacher,
    ),
    Reader(
        ("teacher.inject_bound",),
        "it is for teacher.inject",
        when=lambda config: config.teacher.inject,
    ),
    Reader(
        ("optim.spike_window",),
        "it is for optim.spike_factor",
        when=lambda config: config.optim.spike_factor > 0,
    ),
    Reader(
        ("data.max_fault_rate",),
        "it is for data.faults=skip",
        when=lambda config: config.data.faults == "skip",
    ),
)


def ineffective_keys(config: RunConfig, sources: dict[str, str]) -> list[str]:
    """Warnings for keys that somebody set to something else than their default, and that this run
    does not read.

    Args:
        sources: of `load_run_config`.
    """
    found = []
    for key, source in sources.items():
        if source == "default" or not _differs(config, key):
            continue
        idle = (reader for reader in READERS if reader.covers(key) and not reader.reads(config))
        reader = next(idle, None)
        if reader is not None:
            why = reader.why.format(task=config.task, stage=config.stage)
            found.append(f"{key} has no effect: {why}")
    return found


def _differs(config: RunConfig, key: str) -> bool:
    """Whether a key's value is not its default; True where it has none."""
    value: Any = config
    section: type | None = RunConfig
    known = None
    for part in key.split("."):
        value = value.get(part) if isinstance(value, dict) else getattr(value, part, None)
        if section is None:  # in a dictionary, such as `loss`
            return True
        known = next(field for field in fields(section) if field.name == part)
        section = section_class(section, part)
    assert known is not None
    if known.default_factory is not dataclasses.MISSING:
        return value != known.default_factory()
    return value != known.default
