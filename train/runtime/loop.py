"""The training loop: general steps, region steps before some of them, and everything that happens
in between.

One iteration is one general optimizer step. A step that was not applied (overflow, non-finite loss)
does not count: the next batch tries again, so learning rate, sparsity ramp and checkpoints count
applied general steps.
"""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist

from data_pipeline.batches import Batch
from train.checkpoint import state as run_state
from train.checkpoint.same_config import check_config
from train.checkpoint.selection import SELECTED, select
from train.config import RunConfig, UserError
from train.monitor.deepspeed import attach
from train.monitor.watchdog import StallWatchdog
from train.runtime import report
from train.runtime.engine import gathered
from train.runtime.guard import StepGuard, close_logs, open_logs
from train.runtime.record import Window, gate_pictures, make_record
from train.runtime.schedules import lr_at, set_lr
from train.runtime.signals import EXIT_STOPPED, StopFlag, Stopped, stop_on_signals
from train.runtime.step import keyed_generator, train_step
from train.tasks.base import StepContext

if TYPE_CHECKING:
    from train.build import Run

__all__ = ["Progress", "save_model", "train"]

_LOG = logging.getLogger(__name__)


@dataclass
class Progress:
    """Where the run stands: applied general steps, and text rows of general batches on all ranks."""

    step: int = 0
    samples: int = 0
    saved: int = -1  # step of the newest checkpoint, which is not written twice
    unvalidated: bool = False  # a stop came before this step's validation: it is made up for
    retry: bool = False  # the general step was not applied: its region step is not taken again
    guard: StepGuard = field(default_factory=StepGuard)


def train(run: Run, resume: str = "auto", rebase: bool = False) -> int:
    """Trains to `config.optim.steps` and writes `model/`. Returns 0, or 75 when a signal stopped it
    after a save, or before its first step.

    Args:
        resume: "auto" (last valid checkpoint, if any), a checkpoint path, or "none".
        rebase: accept changed data; a new order begins at the checkpoint's position.
    Collective. Raises NonFiniteError when training diverges, UserError when a checkpoint does not
    fit this run.
    """
    handlers = open_logs(run.directory, run.dist.rank)
    try:
        log = run.directory / f"rank_{run.dist.rank:04d}.log"
        stall = StallWatchdog(log, 60 * run.config.log.stall_minutes)
        with stop_on_signals() as stop, stall as watchdog:
            return _train(run, resume, rebase, stop, watchdog)
    except BaseException:
        _LOG.exception("the run failed")
        raise
    finally:
        close_logs(handlers)


def _train(run: Run, resume: str, rebase: bool, stop: StopFlag, watchdog: StallWatchdog) -> int:
    if stop.everywhere():
        return _left_early(stop, "before a checkpoint was loaded")
    config, progress = run.config, restore(run, resume, rebase)
    if stop.everywhere():
        return _left_early(stop, f"before step {progress.step} began")
    run.monitor = run.open_monitor(progress.step)
    attach(run.engine, run.directory)
    general = iter(run.loader)
    region = iter(run.region_loader) if run.region_loader is not None else None
    guard, window = progress.guard, Window()
    run.student.train()
    if progress.unvalidated:
        _between_steps(run, progress, window, guard, stop)
    while progress.step < config.optim.steps:
        set_lr(run.engine.optimizer.param_groups, lr_at(config.optim, progress.step))
        # A region step uses the coming general step's lr and does not advance the schedule.
        if region is not None and not progress.retry and _is_region_step(config, progress.step):
            _one_step(run, region, progress, "region", window, guard)
        progress.retry = not _one_step(run, general, progress, "general", window, guard)
        watchdog.beat()
        stop.everywhere()  # all ranks hear of it in the same step
        if not progress.retry:
            progress.step += 1
            window = _between_steps(run, progress, window, guard, stop)
        if stop.agreed:
            _LOG.warning(
                "stopping at step %d (%s)", progress.step, stop.name or "signal on another rank"
            )
            save(run, progress, wait=True)
            return EXIT_STOPPED
    if stop.agreed:  # while the last step's validation was made up for
        return EXIT_STOPPED
    _finish(run, progress)
    return 0


def _left_early(stop: StopFlag, where: str) -> int:
    _LOG.warning(
        "told to stop (%s) %s: nothing to save", stop.name or "signal on another rank", where
    )
    return EXIT_STOPPED


def restore(run: Run, resume: str, rebase: bool = False) -> Progress:
    """Puts a checkpoint's state into the run, and says where it stands."""
    report.at("loading a checkpoint")
    current = run_state.plain_config(run.config)

    def check(manifest: dict[str, Any]) -> None:
        check_config(manifest.get("config", {}), current)

    run_state.seed_rng(run.config.seed, run.dist.rank)
    progress = Progress(guard=StepGuard.of(run.config.optim))
    state = run.checkpoints.load(run.engine, resume, check=check)
    if state is None:
        return progress
    run_state.restore(
        state,
        loader=run.loader,
        region_loader=run.region_loader,
        gates=run.gates,
        guard=progress.guard,
        best=run.checkpoints.best,
        rebase=rebase,
    )
    _tell_batch_change(state, run)
    progress.step, progress.samples, progress.saved = state["step"], state["samples"], state["step"]
    progress.unvalidated = state.get("unvalidated", False)
    progress.retry = state.get("retry", False)
    _LOG.info("resumed at step %d (%d samples)", progress.step, progress.samples)
    if progress.step > run.config.optim.steps:
        raise UserError(
            f"optim.steps is {run.config.optim.steps}, but the checkpoint is already at step "
            f"{progress.step}: raise optim.steps, or pass --resume none"
        )
    return progress


def _tell_batch_change(state: dict[str, Any], run: Run) -> None:
    """The data go on exactly whatever the batch size; the optimization does not, and says so."""
    before = state["loader"].get("step_samples", 0) * state["config"].get("engine.accumulate", 1)
    now = getattr(run.loader, "global_batch", 0) * run.config.engine.accumulate
    if before and now and before != now:
        _LOG.warning("an optimizer step has %d images, it had %d (data.batch x ranks x engine."
                     "accumulate)", now, before)  # fmt: skip


def save(run: Run, progress: Progress, wait: bool = False) -> None:
    """Checkpoint at an accumulation boundary, unless this step has one. Collective.

    Args:
        wait: return when it is on disk, whatever `checkpoint.asynchronous` says.
    """
    if progress.saved == progress.step:
        if wait:
            run.checkpoints.wait()
        return
    state = run_state.collect(
        run.config,
        step=progress.step,
        samples=progress.samples,
        loader=run.loader,
        region_loader=run.region_loader,
        gates=run.gates,
        guard=progress.guard,
        best=run.checkpoints.best,
    )
    state["unvalidated"], state["retry"] = progress.unvalidated, progress.retry
    run.monitor.flush()  # a run that goes on from here writes no records of earlier steps
    report.at(f"the checkpoint of step {progress.step}")
    run.checkpoints.save(run.engine, progress.step, state, wait=wait)
    progress.saved = progress.step


def _is_region_step(config: RunConfig, step: int) -> bool:
    """Drawn from a generator all ranks share: no rank takes a region step alone (ZeRO would hang)."""
    draw = torch.rand((), generator=keyed_generator(config.seed, step, "branch")).item()
    return draw < config.data.region.probability


def _one_step(
    run: Run,
    batches: Iterator[Batch],
    progress: Progress,
    kind: str,
    window: Window,
    guard: StepGuard,
) -> bool:
    """One optimizer step on `batches`; True when it was applied."""
    report.at(f"{kind} step {progress.step}")
    context_of = _contexts(run, progress.step, kind)
    result = train_step(run.engine, batches, context_of, run.gates, guard.loss_limit(kind))
    if kind == "general":
        progress.samples += result.samples * run.dist.world_size
    window.add(result, kind)
    if not result.finite:
        _LOG.warning("%s step %d: total loss is not finite, step skipped", kind, progress.step)
    elif result.spike:
        _LOG.warning("%s step %d: the loss leapt up, step skipped", kind, progress.step)
    guard.see(result.finite, progress.step, kind=kind, loss=result.loss, spike=result.spike)
    if run.gates is not None and kind == "general":
        _prepare_gates(run, progress.step + result.applied)
    return result.applied


def _prepare_gates(run: Run, step: int) -> None:
    """Gates of the coming step, drawn now as `train_step` will: see `GateOptimizer.prepare`."""
    assert run.gates is not None
    micro_steps = run.engine.gradient_accumulation_steps()
    run.gates.prepare(step, _contexts(run, step, "general")(micro_steps).generator)


def _contexts(run: Run, step: int, kind: str) -> Callable[[int], StepContext]:
    def context_of(micro: int) -> StepContext:
        generator = keyed_generator(run.config.seed, step, kind, micro)
        return StepContext(
            step=step, rank=run.dist.rank, world_size=run.dist.world_size, generator=generator
        )

    return context_of


def _between_steps(
    run: Run, progress: Progress, window: Window, guard: StepGuard, stop: StopFlag
) -> Window:
    """Record, validation, pictures, checkpoint: whatever is due after general step `progress.step`.

    A stop leaves out what takes long; a checkpoint remembers a validation left out.
    """
    report.at(f"the record of step {progress.step}")
    late, progress.unvalidated = progress.unvalidated, False
    config, step, record, better = run.config, progress.step, {}, False
    paused = time.perf_counter()
    last = step == config.optim.steps
    if last and run.gates is not None and not stop.agreed:
        _fix_structure(run)
        window.started += time.perf_counter() - paused  # which may take timing runs
    if (_due(config.log.every, step) or last) and not late:
        record, window = make_record(run, step, window, guard), Window()
    if late or _due(config.eval.every, step) or last:
        validated = validate(run, step, stop)
        progress.unvalidated = validated is None
        if validated is not None:
            better = run.checkpoints.best.see(step, validated.get("validation", {}))
            if late:  # the step has its checkpoint, which `save` would not write twice
                run.checkpoints.note_score(step)
                if last and run.gates is not None:  # its record was of gates that a stop left open
                    record["sparsity"] = run.gates.metrics()
            record |= validated
    if record:
        run.monitor.step(step, progress.samples, record)
    if run.gates is not None and _due(config.log.histograms_every, step):
        run.monitor.histograms(step, run.gates.histograms())
        for tag, picture in gate_pictures(run.gates).items():
            run.monitor.image(step, tag, picture)
    pictures = (_due(config.log.pictures_every, step) or last) and not stop.agreed
    if run.pictures is not None and pictures:
        report.at(f"the pictures of step {step}")
        run.pictures(step)
        run.student.train()
    if (_due(config.checkpoint.every, step) or better) and not last:
        save(run, progress)
    window.started += (
        time.perf_counter() - paused
    )  # samples/s is of training, not of validation and saving
    return window


def _fix_structure(run: Run) -> None:
    """Before the validation of the last step, which is then of the model that is cut and written.
    Nothing to do from `prune.freeze_step` on. All ranks: a speed-up is measured, and they agree on
    what it says.
    """
    assert run.gates is not None
    report.at("fixing the structure")
    run.gates.freeze()


def _due(every: int, step: int) -> bool:
    return every > 0 and step % every == 0


def validate(run: Run, step: int, stop: StopFlag | None = None) -> dict[str, Any] | None:
    """`{"validation": {...}}`, nothing when the run validates nothing, None when all ranks were told
    to stop before it was through. Collective.
    """
    if run.validate is None:
        return {}
    if stop is not None and stop.agreed:
        return None
    report.at(f"the validation of step {step}")
    try:
        values = run.validate(step)
    except Stopped:
        return None
    finally:
        run.student.train()
    return {"validation": values}


def _finish(run: Run, progress: Progress) -> None:
    """Last checkpoint and the model folder. A run with gates is cut and saved by its stage, not
    here. With `checkpoint.best` the engine holds the best checkpoint's weights from here on.
    """
    save(run, progress, wait=True)
    _select(run, progress.step)
    if run.gates is None:
        save_model(run)
    run.monitor.finished()
    _LOG.info("done: %d steps, %d samples", progress.step, progress.samples)


def _select(run: Run, last: int) -> None:
    """Loads the best weights, and says in the run directory which they are."""
    report.at("choosing the best checkpoint")
    selected = select(run.checkpoints, run.engine, last)
    if run.dist.rank == 0:
        path = run.directory / SELECTED
        path.unlink(missing_ok=True)  # of an earlier end of this run
        if selected is not None:
            path.write_text(json.dumps(asdict(selected), indent=2) + "\n", encoding="utf-8")


def save_model(run: Run) -> None:
    """Writes `model/` from consolidated weights, on rank 0. Collective (ZeRO-3 gathers)."""
    report.at("writing the model")
    with gathered(run.student):
        if run.dist.rank == 0:
            run.student.save_pretrained(run.directory / "model", tokenizer=run.tokenizer)
    if dist.is_initialized():
        dist.barrier()
