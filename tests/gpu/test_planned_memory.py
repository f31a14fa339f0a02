"""On a GPU: the memory that --dry-run plans against what a real step allocates."""

from __future__ import annotations

import pytest
import torch

from tests.distributed.spawn import run_ranks
from tests.unit.train.test_step_memory import sizes
from train.stages.memory import stage_memory, step_batch, step_memory

pytestmark = pytest.mark.gpu


def allocated(overrides: list[str], kd: bool) -> int:
    """Peak bytes that torch's allocator handed out, from before the model to after three steps."""
    from models.xvlm import XVLM
    from train.build import build_task
    from train.runtime.distributed import start
    from train.runtime.engine import build_engine, parameter_groups
    from train.runtime.step import EngineModule, keyed_generator, train_step
    from train.runtime.teacher import Teacher
    from train.tasks.base import StepContext

    config, student, teacher = sizes(overrides, kd)
    device = start().device
    before = torch.cuda.memory_allocated(device)
    frozen = None
    if teacher is not None:
        frozen = Teacher(XVLM(teacher), torch.float16, device, "torch")
    model = XVLM(student).to(device)
    model.set_activation_checkpointing(config.engine.activation_checkpointing)
    task = build_task(config, model, None if frozen is None else frozen.model, None)
    module = EngineModule(model, task, frozen)
    engine = build_engine(config, module, parameter_groups(model, set(), config.optim))
    torch.cuda.reset_peak_memory_stats(device)
    for step in range(3):
        context = StepContext(step, 0, 1, keyed_generator(0, step))
        batches = iter([step_batch(config, student, False)])
        train_step(engine, batches, lambda _micro, context=context: context)
    return torch.cuda.max_memory_allocated(device) - before


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize(("stage", "kd", "recompute"), [(0, True, False), (1, False, True)])
def test_the_plan_is_within_15_percent(
    precision: str, stage: int, kd: bool, recompute: bool
) -> None:
    overrides = [
        "data.batch=64",
        "teacher.dtype=fp16",
        f"engine.precision={precision}",
        f"engine.config=zero{stage}",
        f"engine.activation_checkpointing={str(recompute).lower()}",
    ]
    real = run_ranks(allocated, 1, overrides, kd)[0]
    config, student, teacher = sizes(overrides, kd)
    step = step_memory(config, student, teacher)
    parameters = step.gradients // 4
    found = stage_memory(config, step, parameters, stage, 1)["peak"]
    assert found == pytest.approx(real, rel=0.15), f"{found / 2**20:.0f} of {real / 2**20:.0f} MiB"
