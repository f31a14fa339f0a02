"""One optimizer step: micro-batches through the engine, one summed backward each, and what came of
it.
"""

from __future__ import annotations

import hashlib
import math
import time
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Protocol, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn

from data_pipeline.batches import Batch
from train.losses.gather import mean_counts
from train.tasks.base import Losses, StepContext, Task

if TYPE_CHECKING:
    from deepspeed import DeepSpeedEngine

    from models.xvlm import XVLM

__all__ = ["EngineModule", "GateStep", "StepResult", "keyed_generator", "train_step"]


class GateStep(Protocol):
    """The part of `GateOptimizer` that a step needs."""

    def begin_step(self, step: int, generator: torch.Generator) -> None: ...

    def finish_step(self, step: int, applied: bool, grad_scale: float) -> None: ...


class EngineModule(nn.Module):
    """What DeepSpeed wraps: the student, and around it the task and the teacher, which it must not
    see.

    Only the student and what a task trains beside it (`Task.trainable_modules`) are submodules, so
    only their parameters are cast, partitioned, optimized and saved.
    """

    def __init__(self, student: XVLM, task: Task, teacher: Any | None = None) -> None:
        super().__init__()
        self.student = student
        self.extra = nn.ModuleDict(task.trainable_modules())
        self._unregistered = (task, teacher)
        # Compiled passes may replay CUDA graphs, whose outputs live until the next step begins.
        self.replays_graphs = bool(getattr(teacher, "compiled", False))

    def counts(self, batch: Batch) -> dict[str, Tensor]:
        """The task's counts of a batch (`Task.counts`)."""
        return self._unregistered[0].counts(batch)

    def forward(self, batch: Batch, context: StepContext) -> tuple[Tensor, Losses]:
        """The total and its terms.

        The total is returned as a tensor of its own: DeepSpeed 0.19 hangs the work before a
        backward (the accumulation boundary among it) on tensors it finds in the output, and it does
        not look into dataclasses.
        """
        if self.replays_graphs:
            torch.compiler.cudagraph_mark_step_begin()
        task, teacher = self._unregistered
        losses = task.losses(self.student, teacher, batch, context)
        return losses.total(), losses


@dataclass
class StepResult:
    """One optimizer step.

    Attributes:
        applied: parameters were updated (on all ranks or on none).
        finite: the total loss was finite on every rank in every micro-batch.
        spike: a finite micro-batch was above the limit, and the step was skipped.
        loss: mean total loss over ranks and micro-batches; NaN when not finite.
        samples: text rows of all micro-batches on this rank.
        data_wait: seconds spent waiting for batches.
        sums, counts: detached sums over micro-batches that count, by "loss.NAME", "weighted.NAME" and
            "metrics.NAME"; on the device.
    """

    applied: bool = False
    finite: bool = True
    spike: bool = False
    loss: float = math.nan
    samples: int = 0
    data_wait: float = 0.0
    grad_norm: float | None = None
    sums: dict[str, Tensor] = field(default_factory=dict)
    counts: dict[str, Tensor] = field(default_factory=dict)


def keyed_generator(seed: int, *key: int | str) -> torch.Generator:
    """A CPU generator that depends on (seed, key) only, so all ranks and a resumed run draw the
    same numbers.
    """
    text = ":".join(str(part) for part in (seed, *key))
    digest = hashlib.blake2b(text.encode(), digest_size=8).digest()
    generator = torch.Generator()
    generator.manual_seed(int.from_bytes(digest, "big") >> 1)
    return generator


def train_step(
    engine: DeepSpeedEngine,
    batches: Iterator[Batch],
    context_of: Callable[[int], StepContext],
    gates: GateStep | None = None,
    loss_limit: float = math.inf,
) -> StepResult:
    """One optimizer step of `engine.gradient_accumulation_steps()` micro-batches.

    `context_of(micro)` gives the context of each. All batches are read before the first forward,
    because means are over the counts of the whole step (`Task.counts`): a step holds its
    micro-batches' inputs. A micro-batch whose total loss, averaged over ranks, is above
    `loss_limit` or not finite makes all ranks skip the step (in fp16 the loss scale sees an
    overflow). Collective: all ranks call it with the same contexts and limit.
    """
    result = StepResult()
    micro_steps = engine.gradient_accumulation_steps()
    device = torch.device(engine.device or "cpu")
    verdicts = torch.zeros(3, device=device)
    step = context_of(0).step
    if gates is not None:
        gates.begin_step(step, context_of(micro_steps).generator)
    scale = _loss_scale(engine)
    started = time.perf_counter()
    window = deque([next(batches) for _ in range(micro_steps)])
    result.data_wait = time.perf_counter() - started
    module = cast(EngineModule, engine.module)
    means = mean_counts([module.counts(batch) for batch in window], device)
    for micro in range(micro_steps):
        batch = window.popleft()
        result.samples += batch.rows
        context = replace(context_of(micro), mean_counts=means)
        total, losses = engine(batch.to(device, non_blocking=True), context)
        verdict = _verdict(total, loss_limit)
        bad_here = verdict[:2].sum()
        _accumulate(result, total, losses, bad_here)
        verdicts += verdict
        # One NaN anywhere makes every gradient NaN everywhere, and DeepSpeed skips such a step on
        # all ranks alike: no rank decides alone, and the flag need not be read before the backward.
        engine.backward(total * torch.where(bad_here > 0, torch.nan, 1.0))
        engine.step()
    broken, spikes, loss = verdicts.tolist()
    result.finite, result.spike = broken == 0.0, broken == 0.0 and spikes > 0.0
    if result.finite:
        result.loss = loss / micro_steps
    result.applied = bool(engine.was_step_applied())
    result.grad_norm = _grad_norm(engine)
    if gates is not None:
        gates.finish_step(step, result.applied, scale)
    return result


def _verdict(total: Tensor, limit: float) -> Tensor:
    """(3,) float32 on the device, the same on all ranks: 1 when `total` is not finite on any rank, 1
    when its mean is finite and above `limit`, and the mean of the finite ones.
    """
    value = total.detach().float()
    finite = torch.isfinite(value)
    table = torch.stack([(~finite).float(), torch.where(finite, value, torch.zeros_like(value))])
    world = 1
    if dist.is_initialized() and dist.get_world_size() > 1:
        world = dist.get_world_size()
        dist.all_reduce(table)
    broken, mean = (table[0] > 0).float(), table[1] / world
    return torch.stack([broken, (mean > limit).float() * (1 - broken), mean])


def _accumulate(result: StepResult, total: Tensor, losses: Losses, bad: Tensor) -> None:
    for name, value in (losses.logged() | {"loss.total": total}).items():
        value = value.detach().float().reshape(())
        good = torch.isfinite(value) & (bad == 0)
        kept = torch.where(good, value, torch.zeros_like(value))
        result.sums[name] = result.sums.get(name, 0.0) + kept
        result.counts[name] = result.counts.get(name, 0.0) + good.float()


def _loss_scale(engine: DeepSpeedEngine) -> float:
    """Factor on all gradients of the coming backwards (fp16 mode only; 1 otherwise)."""
    return (
        float(getattr(engine.optimizer, "loss_scale", None) or 1.0)
        if engine.fp16_enabled()
        else 1.0
    )


def _grad_norm(engine: DeepSpeedEngine) -> float | None:
    """Global gradient norm before clipping, None when the engine did not compute one."""
    norm = engine.get_global_grad_norm()
    return None if norm is None else float(norm)
