"""What must hold between sections of a run file: errors before anything is built."""

from __future__ import annotations

import difflib

from train.config import RunConfig
from train.pruning.check import check_budget

__all__ = ["check_stage"]

_TERMS = {
    "pretrain": ("itc", "itm", "mlm", "box_l1", "box_giou"),
    "vqa": ("answer",),
    "nlvr2_pretrain": ("assignment",),
    "nlvr2": ("truth",),
    "retrieval": ("itc", "itm"),
    "captioning": ("caption",),
    "grounding": ("box_l1", "box_giou"),
}


def check_stage(config: RunConfig) -> None:
    """Raises ValueError on contradictions. What has no effect is told by `train.effects`."""
    needs_task = {"pretrain": "pretrain", "distill": "pretrain"}.get(config.stage)
    if needs_task is not None and config.task != needs_task:
        raise ValueError(
            f"task: stage {config.stage} trains task {needs_task!r}, not {config.task!r}"
        )
    if config.stage in ("finetune", "prune", "trim") and config.task == "pretrain":
        raise ValueError(f"task: stage {config.stage} needs a downstream task such as vqa")
    if config.stage in ("prune", "trim") and config.task == "nlvr2_pretrain":
        raise ValueError(
            f"task: nlvr2_pretrain comes before fine-tuning; {config.stage} task nlvr2"
        )
    for name in config.loss:
        if name not in _TERMS[config.task]:
            near = difflib.get_close_matches(name, _TERMS[config.task], n=1)
            hint = f"; did you mean {near[0]}?" if near else ""
            known = ", ".join(_TERMS[config.task])
            raise ValueError(f"loss.{name}: task {config.task} has the losses {known}{hint}")
    if config.stage == "prune" and config.prune is None:
        raise ValueError(
            "prune: stage prune needs a `prune` section (prune.sparsity=0.35 for example)"
        )
    if config.stage != "prune" and config.prune is not None:
        raise ValueError(f"prune: stage {config.stage} does not prune; remove the section")
    if (config.stage == "trim") != (config.trim is not None):
        raise ValueError(
            "trim: stage trim needs a `trim` section (trim.budget=0.5 for example), and only it"
        )
    if config.stage == "trim" and config.teacher.path is not None:
        raise ValueError(
            "teacher.path: stage trim learns from its own full pass (trim.distil_weight); leave "
            "teacher.path out"
        )
    if config.stage == "pretrain" and config.teacher.path is not None:
        raise ValueError(
            "teacher.path: stage pretrain learns without a teacher; leave teacher.path out, or set "
            "stage=distill"
        )
    if config.trim is not None and config.trim.guided and config.task == "retrieval":
        raise ValueError(
            "trim.guided: in retrieval a picture is encoded once for many texts, none of which could "
            "guide it; leave trim.guided out"
        )
    if config.stage == "distill" and config.teacher.path is None:
        raise ValueError("teacher.path: stage distill needs a teacher model folder")
    if config.prune is not None:
        check_budget(config)
        freeze = config.prune.freeze_step
        if freeze is not None and freeze > config.optim.steps:
            raise ValueError(
                f"prune.freeze_step: {freeze} lies after the last step "
                f"(optim.steps={config.optim.steps})"
            )
    if config.initialise.task_vector is not None and config.teacher.path is None:
        raise ValueError("initialise.task_vector: needs teacher.path, the fine-tuned teacher")
    if config.eval.annotators is not None and config.eval.annotators < 1:
        raise ValueError(f"eval.annotators: {config.eval.annotators} is not a number of people")
    if not 0 <= config.label_smoothing < 1:
        raise ValueError(f"label_smoothing: {config.label_smoothing} is not in [0, 1)")
