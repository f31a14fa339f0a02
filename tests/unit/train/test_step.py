"""One optimizer step: what it tells the task about the other micro-batches, and what it records."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from data_pipeline.batches import Batch
from train.runtime.step import EngineModule, keyed_generator, train_step
from train.tasks.base import Losses, StepContext, Task, scaled


class MeanTask(Task):
    """The mean of a parameter's distance to each row's number."""

    name = "pretrain"

    def counts(self, batch: Batch) -> dict[str, torch.Tensor]:
        return {"rows": batch.valid.sum()}

    def losses(self, student: Any, teacher: Any, batch: Batch, context: StepContext) -> Losses:
        numbers = batch.images[:, 0, 0, 0].float()
        mean = (student.weight - numbers).square().mean()
        terms = {"gap": scaled(mean, self.shares(batch, context)["rows"])}
        return Losses(terms, {"gap": 0.5}, {"rows": torch.tensor(float(batch.rows))})

    def evaluate(self, model: Any, batch: Batch) -> dict[str, Any]:
        return {}


class PlainEngine:
    """As much of an engine as a step needs: gradients are averaged over micro-batches."""

    device, optimizer = "cpu", None

    def __init__(self, module: nn.Module, micro_steps: int) -> None:
        self.module, self.micro_steps = module, micro_steps

    def gradient_accumulation_steps(self) -> int:
        return self.micro_steps

    def __call__(self, *args: Any) -> Any:
        return self.module(*args)

    def backward(self, loss: torch.Tensor) -> None:
        (loss / self.micro_steps).backward()

    def step(self) -> None: ...

    def was_step_applied(self) -> bool:
        return True

    def fp16_enabled(self) -> bool:
        return False

    def get_global_grad_norm(self) -> None:
        return None


def _batch(numbers: list[int]) -> Batch:
    rows = len(numbers)
    return Batch(
        images=torch.tensor(numbers).view(-1, 1, 1, 1).expand(-1, 3, 2, 2),
        image_index=torch.arange(rows),
        valid=torch.ones(rows, dtype=torch.bool),
        keys=("",) * rows,
    )


def _context(micro: int) -> StepContext:
    return StepContext(step=0, rank=0, world_size=1, generator=keyed_generator(0, micro))


@pytest.mark.parametrize("window", [[[1, 2, 9]], [[1], [2, 9]], [[1, 2], [9]], [[1], [2], [9]]])
def test_micro_batches_of_any_size_make_the_step_of_the_whole_batch(
    window: list[list[int]],
) -> None:
    student: Any = nn.Linear(1, 1, bias=False)
    nn.init.zeros_(student.weight)
    module = EngineModule(student, MeanTask())
    batches = iter([_batch(numbers) for numbers in window])
    engine: Any = PlainEngine(module, len(window))
    result = train_step(engine, batches, _context)
    assert student.weight.grad.item() == pytest.approx(0.5 * 2 * -(1 + 2 + 9) / 3)
    means = {name: (result.sums[name] / result.counts[name]).item() for name in result.sums}
    assert means == pytest.approx(
        {
            "loss.gap": 86 / 3,
            "weighted.gap": 43 / 3,
            "loss.total": 43 / 3,
            "metrics.rows": 3 / len(window),
        }
    )
    assert result.samples == 3 and result.finite and result.applied
