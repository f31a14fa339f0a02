"""The only place that wires: from a RunConfig to everything the loop needs."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from data_pipeline.loader import Loader, build_loader, evaluation_workers
from data_pipeline.remote import RemoteOptions
from data_pipeline.text import load_tokenizer
from models.config import ModelConfig
from models.gates import GateBank
from models.kernels import dispatch as kernels
from models.xvlm import XVLM
from train.answers import check_answers, check_held_out, load_answers
from train.checkpoint.manager import CheckpointManager
from train.checkpoint.state import plain_config
from train.config import RunConfig
from train.data_config import RemoteConfig, SourceConfig
from train.evaluation.captioning import CaptionWriter
from train.evaluation.pictures import pretrain_pictures, vqa_pictures
from train.evaluation.pretrain import evaluate_pretraining
from train.evaluation.runner import EvaluatesSplit, evaluate
from train.evaluation.task_pictures import task_pictures
from train.evaluation.trim_pictures import trim_pictures
from train.evaluation.vqa import AnswerList
from train.monitor import Monitor
from train.monitor.flops import StepCost, step_cost
from train.pruning.make import make_budget
from train.runtime.distributed import Distributed, all_reduce_flag
from train.runtime.engine import (
    build_engine,
    engine_settings,
    parameter_groups,
    zero_stage,
)
from train.runtime.gate_optimizer import GateOptimizer
from train.runtime.signals import leave_if_stopped
from train.runtime.step import EngineModule
from train.runtime.teacher import Teacher
from train.student import FirstWeights, build_student
from train.tasks.assignment import AssignmentTask
from train.tasks.base import Task
from train.tasks.captioning import CaptionTask
from train.tasks.grounding import GroundingTask
from train.tasks.nlvr2 import Nlvr2Task
from train.tasks.pretrain import PretrainTask
from train.tasks.retrieval import RetrievalTask
from train.tasks.trim import TrimTask
from train.tasks.vqa import VqaTask

__all__ = [
    "Run",
    "build",
    "build_task",
    "make_loader",
]

_LOG = logging.getLogger(__name__)


@dataclass
class Run:
    """Everything one training stage holds while it runs."""

    config: RunConfig
    directory: Path
    dist: Distributed
    task: Task
    student: XVLM
    first: FirstWeights
    teacher: Teacher | None
    engine: Any  # deepspeed.DeepSpeedEngine
    cost: StepCost | None  # of a micro-batch, for MFU
    loader: Loader
    region_loader: Loader | None
    gates: GateOptimizer | None
    open_monitor: Callable[[int], Monitor]
    monitor: Monitor
    checkpoints: CheckpointManager
    tokenizer: Any
    validate: Callable[[int], dict[str, float]] | None
    pictures: Callable[[int], None] | None


def tokenizer_folder(config: RunConfig) -> Path:
    """`data.tokenizer`, or the tokenizer beside the task folder of `data.train` (DIR/tokenizer).

    Raises:
        FileNotFoundError: neither exists.
    """
    if config.data.tokenizer is not None:
        folder = Path(config.data.tokenizer)
    else:
        folder = Path(config.data.folder).parent.parent / "tokenizer"
    if not folder.is_dir():
        raise FileNotFoundError(
            f"{folder}: no tokenizer there; name one with data.tokenizer=FOLDER (a Hugging Face "
            "tokenizer)"
        )
    return folder


def build_task(
    config: RunConfig,
    student: XVLM,
    teacher: XVLM | None,
    answers: AnswerList | None,
    tokenizer: Any = None,
) -> Task:
    """The task of a run; without answers (VQA) or tokenizer (captioning) it trains and does not
    evaluate.
    """
    task = _plain_task(config, student, teacher, answers, tokenizer)
    return task if config.trim is None else TrimTask(task, config.trim, config.optim.steps)


def _plain_task(
    config: RunConfig,
    student: XVLM,
    teacher: XVLM | None,
    answers: AnswerList | None,
    tokenizer: Any,
) -> Task:
    theirs = None if teacher is None else teacher.config
    common = (config.loss, config.kd, student.config, theirs)
    pairs = (config.negatives == "global", config.itc_scaling == "published")
    if config.task == "vqa":
        return VqaTask(*common, answers, config.eval.top_k, config.eval.annotators)
    if config.task == "nlvr2":
        return Nlvr2Task(*common)
    if config.task == "nlvr2_pretrain":
        return AssignmentTask(*common, config.negatives == "global")
    if config.task == "retrieval":
        return RetrievalTask(*common, *pairs, config.eval.top_k)
    if config.task == "captioning":
        limits = config.eval.beams, config.eval.max_length, config.eval.min_length
        writer = None if tokenizer is None else CaptionWriter(tokenizer, *limits)
        return CaptionTask(*common, config.label_smoothing, writer)
    if config.task == "grounding":
        return GroundingTask(*common)
    return PretrainTask(*common, *pairs)


def remote_options(remote: RemoteConfig) -> RemoteOptions:
    """The run file's `data.remote` for the data pipeline."""
    return RemoteOptions(
        cache_dir=None if remote.cache is None else Path(remote.cache),
        cache_gb=remote.cache_gb,
        retries=remote.retries,
        timeout_s=remote.timeout_s,
        deadline_s=remote.deadline_s,
        allow_pipe=remote.allow_pipe,
    )


def make_loader(
    config: RunConfig,
    task: str,
    source: str | Sequence[SourceConfig],
    model: ModelConfig,
    tokenizer: Any,
    dist: Distributed,
    train: bool,
) -> Loader:
    data = config.data
    return build_loader(
        task,
        source,
        tokenizer=tokenizer,
        batch=data.batch if train else config.eval.batch,
        rank=dist.rank,
        world_size=dist.world_size,
        seed=config.seed,
        train=train,
        image_size=model.vision.image_size,
        patch_size=model.vision.patch_size,
        max_tokens=data.max_tokens,
        max_words=data.max_words,
        max_answer_tokens=data.max_answer_tokens,
        mlm_probability=data.mlm_probability,
        mlm_max=data.mlm_max,
        rows_per_image=data.rows_per_image,
        augment=data.augment if train else "none",
        prompt=data.prompt,
        workers=data.workers if train else evaluation_workers(source, data.workers),
        block=data.block,
        window_blocks=data.window_blocks,
        groups=data.groups,
        mix_period=data.mix_period,
        faults=data.faults,
        max_fault_rate=data.max_fault_rate,
        region=data.region,
        limit=0 if train else config.eval.samples,
        device=dist.device,
        quarantine=Path(config.out) / f"quarantine_{dist.rank:04d}.jsonl" if train else None,
        remote=remote_options(data.remote),
    )


def _gates(
    config: RunConfig, student: XVLM, teacher: XVLM | None, dist: Distributed
) -> GateOptimizer | None:
    if config.prune is None:
        return None
    bank = GateBank.of_model(
        student,
        config.prune.modalities,
        head_init=config.prune.head_init,
        ffn_init_drop=config.prune.ffn_init_drop,
        seed=config.seed,
    )
    bank.to(dist.device)
    theirs = None if teacher is None else teacher.config
    budget = make_budget(config, bank, student.config, theirs, dist)
    return GateOptimizer(bank, config.prune, dist.device, dist.world_size, budget)


def _choose_kernels(config: RunConfig, dist: Distributed) -> None:
    """Sets engine.kernels. Collective: where a rank has no kernels, none takes them, because gates
    are drawn alike on all ranks only if all draw them the same way."""
    kernels.configure(config.engine.kernels)
    missing = kernels.missing(dist.device.type)
    if all_reduce_flag(missing is not None) and missing is None:
        kernels.refuse("another rank has no kernels")


def build(config: RunConfig, dist: Distributed) -> Run:
    """Wire a run. Collective: every rank calls it with the same configuration.

    Raises:
        ValueError, FileNotFoundError: bad input, with file, key and remedy.
        Stopped: a signal came.
    """
    directory = Path(config.out)
    _choose_kernels(config, dist)
    tokenizer = load_tokenizer(tokenizer_folder(config))
    teacher = _teacher(config, dist)
    teacher_model = None if teacher is None else teacher.model
    first = build_student(config, len(tokenizer), teacher_model)
    student = first.model.float().to(dist.device)
    check_tokenizer(student.config, len(tokenizer))
    answers = load_answers(config, tokenizer) if config.task == "vqa" else None
    answers = None if answers is None else answers.to(dist.device)
    task = build_task(config, student, teacher_model, answers, tokenizer)
    for part in task.frozen_parts():
        getattr(student, part).requires_grad_(False)
    _check_validation(config, task, answers, dist)
    gates = _gates(config, student, teacher_model, dist)
    leave_if_stopped("while the models were loaded")
    engine = build_engine(
        config,
        EngineModule(student, task, teacher),
        parameter_groups(
            student, set(first.fresh | first.trimmers), config.optim, task.trainable_modules()
        ),
    )
    leave_if_stopped("while the engine was built")
    loader = partial(make_loader, config, model=student.config, tokenizer=tokenizer, dist=dist)
    regions = config.data.region.probability > 0 and config.task == "pretrain"
    areas = config.data.region_train or config.data.train
    theirs = None if teacher_model is None else teacher_model.config
    checkpoints = directory / "checkpoints"
    run = Run(
        config=config,
        directory=directory,
        dist=dist,
        task=task,
        student=student,
        first=first,
        teacher=teacher,
        engine=engine,
        cost=step_cost(config, student.config, theirs),
        loader=loader(config.task, config.data.train, train=True),
        region_loader=loader("region", areas, train=True) if regions else None,
        gates=gates,
        open_monitor=lambda step: _open_monitor(run, step),
        # Until the loop knows where it resumes, a monitor that writes nothing stands in.
        monitor=Monitor(directory, config.optim.steps, 1, config.log),
        checkpoints=CheckpointManager.of(config, checkpoints, run_id(config)),
        tokenizer=tokenizer,
        validate=None,
        pictures=None,
    )
    if config.data.val is not None:
        held_out = loader(config.task, config.data.val, train=False)
        check_held_out(config, held_out)
        places = loader("region", config.data.val, train=False) if regions else None
        _hold_out(run, answers, held_out, places)
    return run


def _teacher(config: RunConfig, dist: Distributed) -> Teacher | None:
    if config.teacher.path:
        return Teacher.load(config.teacher, dist.device)
    if config.stage == "distill":
        raise ValueError("teacher.path: distill needs a teacher model folder")
    return None


def _hold_out(
    run: Run, answers: AnswerList | None, held_out: Loader, places: Loader | None
) -> None:
    """Validation and pictures of a run; `places`: held-out regions."""
    run.validate = lambda step: _validate(run, held_out, places)
    run.pictures = lambda step: _pictures(run, step, answers, held_out, places)


def _open_monitor(run: Run, resume_step: int) -> Monitor:
    return Monitor(
        run.directory,
        run.config.optim.steps,
        run.dist.rank,
        run.config.log,
        resume_step,
        # Of images: `samples` counts texts, of which an image may have several.
        epoch=lambda: run.loader.epoch,
        settings=plain_config(run.config),
    )


def _check_validation(
    config: RunConfig, task: Task, answers: AnswerList | None, dist: Distributed
) -> None:
    """Raises ValueError where validation would fail, before the run has trained up to it."""
    check_answers(config, answers)
    # Ranks pass through the model as often as their images need, when a whole split is scored.
    split = isinstance(task, EvaluatesSplit) and config.data.val is not None
    if split and dist.world_size > 1 and zero_stage(engine_settings(config)) == 3:
        raise ValueError(
            f"data.val: validation of task {config.task} runs the model unequally often on the "
            "ranks, which parameters partitioned by ZeRO-3 do not allow: use engine.config=zero2, or "
            "data.val=null and espalier eval"
        )


def _validate(run: Run, held_out: Loader, places: Loader | None) -> dict[str, float]:
    """Held-out metrics; a run that prunes is judged with the gates that evaluation will use."""
    if run.config.task == "pretrain":
        return evaluate_pretraining(run.student, held_out, places, run.dist)
    with run.gates.evaluation() if run.gates is not None else nullcontext():
        return evaluate(run.student, run.task, held_out, run.dist)


def _pictures(
    run: Run, step: int, answers: AnswerList | None, held_out: Loader, places: Loader | None
) -> None:
    """Held-out examples: what the model says beside the truth, and what its trimmers keep."""
    if isinstance(run.task, TrimTask):
        trim_pictures(run.monitor, step, run.student, run.task, held_out, run.dist, run.tokenizer)
    if run.config.task == "pretrain":
        pretrain_pictures(
            run.monitor,
            step,
            run.student,
            held_out,
            places,
            run.tokenizer,
            run.dist,
            run.teacher,
        )
        return
    with run.gates.evaluation() if run.gates is not None else nullcontext():
        if answers is None:
            writer = getattr(run.task, "writer", None)
            task_pictures(
                run.config.task, run.monitor, step, run.student, held_out, run.dist, writer
            )
            return
        vqa_pictures(
            run.monitor,
            step,
            run.student,
            answers,
            held_out,
            run.dist,
            top_k=run.config.eval.top_k,
        )


def check_tokenizer(config: ModelConfig, vocab_size: int) -> None:
    """Raises ValueError when the tokenizer knows ids that the embedding table has no row for."""
    if vocab_size > config.text.vocab_size:
        raise ValueError(
            f"the tokenizer has {vocab_size} entries but model {config.name!r} only "
            f"{config.text.vocab_size} (text.vocab_size): they do not belong together"
        )


def run_id(config: RunConfig) -> str:
    """What makes a checkpoint this run's: stage, task, seed and output folder."""
    return json.dumps([config.stage, config.task, config.seed, Path(config.out).name])
