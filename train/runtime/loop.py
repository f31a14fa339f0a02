"""The training loop: general steps, region steps before some of them, and everything that happens
in between.

One iteration is one general optimizer step. A step that was not applied (overflow, non-finite loss)
does not count: the next batch tries again, so learning rate, sparsity ramp and checkpoints count
applied general steps.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist

from data_pipeline.batches import Batch
from data_pipeline.faults import FAULT_KINDS
from data_pipeline.remote import COUNTERS
from train.checkpoint import state as run_state
from train.config import RunConfig, UserError
from train.runtime.engine import gathered
from train.runtime.guard import NonFiniteGuard, close_logs, open_logs
from train.runtime.schedules import lr_at, set_lr
from train.runtime.signals import EXIT_STOPPED, StopFlag, stop_on_signals
from train.runtime.step import StepResult, keyed_generator, train_step
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
    guard: NonFiniteGuard = field(default_factory=NonFiniteGuard)


@dataclass
class _Window:
    """What has gathered since the last record."""

    started: float = field(default_factory=time.perf_counter)
    samples: int = 0
    data_wait: float = 0.0
    grad_norm: float | None = None
    sums: dict[str, torch.Tensor] = field(default_factory=dict)
    counts: dict[str, torch.Tensor] = field(default_factory=dict)

    def add(self, result: StepResult, prefix: str) -> None:
        self.samples += result.samples
        self.data_wait += result.data_wait
        if result.grad_norm is not None:
            self.grad_norm = result.grad_norm
        for name in result.sums:
            key = f"{prefix}{name}"
            self.sums[key] = self.sums.get(key, 0.0) + result.sums[name]
            self.counts[key] = self.counts.get(key, 0.0) + result.counts[name]


def train(run: Run, resume: str = "auto", rebase: bool = False) -> int:
    """Trains to `config.optim.steps` and writes `model/`. Returns 0, or 75 when a signal stopped it
    after a save.

    Args:
        resume: "auto" (last valid checkpoint, if any), a checkpoint path, or "none".
        rebase: accept changed data; a new order begins at the checkpoint's position.
    Collective. Raises NonFiniteError when training diverges, UserError when a checkpoint does not
    fit this run.
    """
    handlers = open_logs(run.directory, run.dist.rank)
    try:
        with stop_on_signals() as stop:
            return _train(run, resume, rebase, stop)
    except BaseException:
        _LOG.exception("the run failed")
        raise
    finally:
        close_logs(handlers)


def _train(run: Run, resume: str, rebase: bool, stop: StopFlag) -> int:
    config, progress = run.config, restore(run, resume, rebase)
    run.monitor = run.open_monitor(progress.step)
    general = iter(run.loader)
    region = iter(run.region_loader) if run.region_loader is not None else None
    guard, window, retry = progress.guard, _Window(), False
    run.student.train()
    while progress.step < config.optim.steps:
        set_lr(run.engine.optimizer.param_groups, lr_at(config.optim, progress.step))
        # A region step uses the coming general step's lr and does not advance the schedule.
        if region is not None and not retry and _is_region_step(config, progress.step):
            _one_step(run, region, progress, "region", window, guard)
        retry = not _one_step(run, general, progress, "general", window, guard)
        stopping = _any_rank(bool(stop), run)
        if not retry:
            progress.step += 1
            window = _between_steps(run, progress, window, guard)
        if stopping:
            _LOG.warning(
                "stopping at step %d (%s)", progress.step, stop.name or "signal on another rank"
            )
            save(run, progress, wait=True)
            return EXIT_STOPPED
    _finish(run, progress)
    return 0


def restore(run: Run, resume: str, rebase: bool = False) -> Progress:
    """Puts a checkpoint's state into the run, and says where it stands."""
    current = run_state.plain_config(run.config)

    def check(manifest: dict[str, Any]) -> None:
        run_state.check_config(manifest.get("config", {}), current)

    run_state.seed_rng(run.config.seed, run.dist.rank)
    state, progress = run.checkpoints.load(run.engine, resume, check=check), Progress()
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
    window: _Window,
    guard: NonFiniteGuard,
) -> bool:
    """One optimizer step on `batches`; True when it was applied."""
    context_of = _contexts(run, progress.step, kind)
    result = train_step(run.engine, batches, context_of, run.gates)
    if kind == "general":
        progress.samples += result.samples * run.dist.world_size
    window.add(result, "" if kind == "general" else "region_")
    if not result.finite:
        _LOG.warning("%s step %d: total loss is not finite, step skipped", kind, progress.step)
    guard.see(result.finite, progress.step)
    return result.applied


def _contexts(run: Run, step: int, kind: str) -> Callable[[int], StepContext]:
    def context_of(micro: int) -> StepContext:
        generator = keyed_generator(run.config.seed, step, kind, micro)
        return StepContext(
            step=step, rank=run.dist.rank, world_size=run.dist.world_size, generator=generator
        )

    return context_of


def _any_rank(flag: bool, run: Run) -> bool:
    """True on all ranks when it is on any: a rank that stops alone leaves the others waiting."""
    if run.dist.world_size == 1:
        return flag
    value = torch.tensor(float(flag), device=run.engine.device)
    dist.all_reduce(value, op=dist.ReduceOp.MAX)
    return value.item() > 0


def _between_steps(run: Run, progress: Progress, window: _Window, guard: NonFiniteGuard) -> _Window:
    """Record, validation, pictures, checkpoint: whatever is due after general step `progress.step`."""
    config, step, record, better = run.config, progress.step, {}, False
    paused = time.perf_counter()
    last = step == config.optim.steps
    if _due(config.log.every, step) or last:
        record, window = make_record(run, progress, window, guard), _Window()
    if _due(config.eval.every, step) or last:
        validated = validate(run, step)
        better = run.checkpoints.best.see(step, validated.get("validation", {}))
        record |= validated
    if record:
        run.monitor.step(step, progress.samples, record)
    if run.gates is not None and _due(config.log.histograms_every, step):
        run.monitor.histograms(step, run.gates.histograms())
    if run.pictures is not None and (_due(config.log.pictures_every, step) or last):
        run.pictures(step)
        run.student.train()
    if (_due(config.checkpoint.every, step) or better) and not last:
        save(run, progress)
    window.started += (
        time.perf_counter() - paused
    )  # samples/s is of training, not of validation and saving
    return window


def _due(every: int, step: int) -> bool:
    return every > 0 and step % every == 0


def validate(run: Run, step: int) -> dict[str, Any]:
    """`{"validation": {...}}`, or nothing when the run validates nothing. Collective."""
    if run.validate is None:
        return {}
    values = run.validate(step)
    run.student.train()
    return {"validation": values}


def make_record(
    run: Run, progress: Progress, window: _Window, guard: NonFiniteGuard
) -> dict[str, Any]:
    """The metrics.jsonl record of a window, loss terms averaged over its micro-batches and all
    ranks. Collective.
    """
    seconds = max(time.perf_counter() - window.started, 1e-9)
    names = sorted(window.sums)
    table = torch.stack(
        [torch.stack([window.sums[name], window.counts[name]]) for name in names]
        + [torch.tensor([window.data_wait / seconds, 1.0], device=run.engine.device)]
    )
    if run.dist.world_size > 1:
        dist.all_reduce(table)
    means = (table[:, 0] / table[:, 1].clamp_min(1.0)).tolist()
    per_epoch = getattr(run.loader, "samples_per_epoch", 0)
    record: dict[str, Any] = {
        "epoch": progress.samples / per_epoch if per_epoch else 0.0,
        "time": time.time(),
        "loss": {},
    }
    for name, value in zip(names, means, strict=False):
        section, _, term = name.partition(".")
        record.setdefault(section, {})[term] = value
    record |= {
        "lr": lr_at(run.config.optim, progress.step - 1),
        "samples_per_s": window.samples * run.dist.world_size / seconds,
        "data_wait": means[-1],
        "grad_norm": window.grad_norm,
        **_data_counters(run),
    }
    record["faults"]["nonfinite"] = guard.total
    if run.gates is not None:
        record["sparsity"] = run.gates.metrics()
    return record


def _data_counters(run: Run) -> dict[str, dict[str, int]]:
    """Skipped samples by kind, and what was fetched over networks, of all ranks since this process
    began. Collective.
    """
    faults, transfers = dict.fromkeys(FAULT_KINDS, 0), dict.fromkeys(COUNTERS, 0)
    for loader in (run.loader, run.region_loader):
        for table, counted in ((faults, "faults"), (transfers, "transfers")):
            for name, count in getattr(loader, counted, {}).items():
                table[name] += count
    values = torch.tensor(
        [*faults.values(), *transfers.values()], dtype=torch.float64, device=run.engine.device
    )
    if run.dist.world_size > 1:
        dist.all_reduce(values)
    totals = [int(value) for value in values.tolist()]
    record = {"faults": dict(zip(faults, totals, strict=False))}
    if any(totals[len(faults) :]):
        record["transfers"] = dict(zip(transfers, totals[len(faults) :], strict=True))
    return record


def _finish(run: Run, progress: Progress) -> None:
    """Last checkpoint and the model folder. A run with gates is cut and saved by its stage, not
    here.
    """
    save(run, progress, wait=True)
    if run.gates is None:
        save_model(run)
    _LOG.info("done: %d steps, %d samples", progress.step, progress.samples)


def save_model(run: Run) -> None:
    """Writes `model/` from consolidated weights, on rank 0. Collective (ZeRO-3 gathers)."""
    with gathered(run.student):
        if run.dist.rank == 0:
            run.student.save_pretrained(run.directory / "model", tokenizer=run.tokenizer)
    if dist.is_initialized():
        dist.barrier()
