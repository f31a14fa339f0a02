"""The record of a window of steps: what the ranks measured, put together for metrics.jsonl."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor

from data_pipeline.faults import FAULT_KINDS
from data_pipeline.remote import COUNTERS
from train.monitor.deepspeed import EngineEvents
from train.monitor.flops import device_peak
from train.monitor.heatmaps import gate_heatmaps
from train.runtime.gate_optimizer import GateOptimizer
from train.runtime.guard import StepGuard
from train.runtime.schedules import lr_at
from train.runtime.step import StepResult

if TYPE_CHECKING:
    from train.build import Run

__all__ = ["Window", "gate_pictures", "make_record"]


@dataclass
class Window:
    """What has gathered since the last record, on this rank."""

    started: float = field(default_factory=time.perf_counter)
    samples: int = 0
    data_wait: float = 0.0
    grad_norm: float | None = None
    steps: dict[str, int] = field(default_factory=lambda: {"general": 0, "region": 0})
    sums: dict[str, Tensor] = field(default_factory=dict)
    counts: dict[str, Tensor] = field(default_factory=dict)

    def add(self, result: StepResult, kind: str) -> None:
        """A step of a kind; terms of region steps get names of their own ("region_loss.mlm")."""
        self.samples += result.samples
        self.data_wait += result.data_wait
        self.steps[kind] += 1
        if result.grad_norm is not None:
            self.grad_norm = result.grad_norm
        prefix = "" if kind == "general" else f"{kind}_"
        for name in result.sums:
            key = f"{prefix}{name}"
            self.sums[key] = self.sums.get(key, 0.0) + result.sums[name]
            self.counts[key] = self.counts.get(key, 0.0) + result.counts[name]


def make_record(run: Run, step: int, window: Window, guard: StepGuard) -> dict[str, Any]:
    """The metrics.jsonl record of a window after general step `step`: loss terms averaged over its
    micro-batches and all ranks, rates, and the state of everything that moves. Collective.
    """
    seconds = max(time.perf_counter() - window.started, 1e-9)
    teacher = {} if run.teacher is None else run.teacher.metrics()
    own = {"data_wait": window.data_wait / seconds}
    own |= {f"teacher.{name}": value for name, value in teacher.items()}
    means = _means(window, own, run)
    record: dict[str, Any] = {"time": time.time(), "loss": {}}
    for name, value in means.items():
        section, _, term = name.partition(".")
        if term:
            record.setdefault(section, {})[term] = value
        else:
            record[section] = value
    record |= {
        "lr": lr_at(run.config.optim, step - 1),
        "lr_groups": _learning_rates(run.engine.optimizer.param_groups),
        "samples_per_s": window.samples * run.dist.world_size / seconds,
        "grad_norm": window.grad_norm,
        **_work(run, window, seconds),
        **_data_counters(run),
    }
    record["faults"] |= {"nonfinite": guard.nonfinite, "spikes": guard.spikes}
    if run.engine.fp16_enabled():
        record["loss_scale"] = float(run.engine.optimizer.loss_scale)
    if run.gates is not None:
        record["sparsity"] = run.gates.metrics()
    if isinstance(run.engine.monitor, EngineEvents):
        record["deepspeed"] = run.engine.monitor.take()
    return record


def _means(window: Window, own: Mapping[str, float], run: Run) -> dict[str, float]:
    """Sums over counts of all ranks, and the ranks' mean of what each measured itself."""
    names, device = sorted(window.sums), run.engine.device
    rows = [torch.stack([window.sums[name], window.counts[name]]).double() for name in names]
    rows += [
        torch.tensor([value, 1.0], dtype=torch.float64, device=device) for value in own.values()
    ]
    table = torch.stack(rows)
    if run.dist.world_size > 1:
        dist.all_reduce(table)
    values = (table[:, 0] / table[:, 1].clamp_min(1.0)).tolist()
    return dict(zip([*names, *own], values, strict=True))


def _learning_rates(groups: list[dict[str, Any]]) -> dict[str, float]:
    """By the groups' names (decay, no_decay, and those with _new for fresh modules)."""
    return {str(group.get("name", index)): float(group["lr"]) for index, group in enumerate(groups)}


def _work(run: Run, window: Window, seconds: float) -> dict[str, float]:
    """TFLOP/s that each device did for the models, and the share of its peak where that is known."""
    if run.cost is None:
        return {}
    micro = run.config.engine.accumulate
    done = run.cost.of(window.steps["general"] * micro, window.steps["region"] * micro) / seconds
    peak = device_peak(torch.device(run.engine.device), run.config.engine.precision)
    return {"tflops": done / 1e12} | ({} if peak is None else {"mfu": done / peak})


def _data_counters(run: Run) -> dict[str, dict[str, int]]:
    """Skipped samples by kind, and what was fetched over networks, of all ranks since this process
    began. Collective.
    """
    faults: dict[str, int] = dict.fromkeys(FAULT_KINDS, 0)
    transfers = dict.fromkeys(COUNTERS, 0)
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


def gate_pictures(gates: GateOptimizer) -> dict[str, Tensor]:
    """Heat maps of how open each gate is expected to be; of the structure once it is fixed."""
    bank = gates.bank
    flat = gates.hard_gates() if gates.frozen else bank.probabilities_open()
    return gate_heatmaps(bank.split(flat))
