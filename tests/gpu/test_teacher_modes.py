"""On a GPU: whichever way the teacher runs, it computes the same, and says what it cost."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from train.config import TeacherConfig, UserError
from train.runtime.teacher import Sample, Teacher, parity

pytestmark = pytest.mark.gpu
PATH = Path(__file__).parents[2] / "models" / "pretrained" / "blocksworld-teacher"


def load(**options: Any) -> Teacher:
    return Teacher.load(TeacherConfig(path=str(PATH), **options), torch.device("cuda", 0))


def outputs(teacher: Teacher, beside: bool = False) -> dict[str, torch.Tensor]:
    """Three runs one after the other, each beside work of the main stream; the last one's states."""
    sample = Sample.for_model(teacher.model, teacher.device, rows=32)
    busy = torch.randn(2048, 2048, device=teacher.device)
    for _ in range(3):
        torch.compiler.cudagraph_mark_step_begin()
        if beside:
            teacher.inputs_ready()
        busy = torch.tanh(busy @ busy)
        with teacher.running() as model:
            found = sample.outputs(model)
        found = {name: value.clone() for name, value in found.items()}
    return found


@pytest.mark.parametrize(
    "options",
    [
        {"overlap": True},
        {"compile": "default"},
        {"compile": "reduce-overhead", "overlap": True},
        {"backend": "torch"},
        {"dtype": "bf16"},
    ],
    ids=str,
)
def test_every_mode_computes_what_fp32_does(options: dict[str, Any]) -> None:
    expected = outputs(load(dtype="fp32", backend="torch"))
    found = outputs(load(**options), beside=True)
    assert max(parity(found, expected).values()) < 0.03


def test_the_deepspeed_engine_is_what_auto_takes_and_costs_are_told() -> None:
    teacher = load()
    assert (teacher.backend, teacher.dtype) == ("deepspeed", torch.float16)
    outputs(teacher)
    told = teacher.metrics()
    assert told["seconds"] > 0 and 0 < told["share"] <= 1
    assert told["weights_bytes"] == 2 * sum(p.numel() for p in teacher.model.parameters())
    assert told["activations_bytes"] > 0


def test_injected_kernels_compute_the_same_or_are_refused_with_numbers() -> None:
    expected = outputs(load(dtype="fp16"))
    try:
        teacher = load(dtype="fp16", inject=True)
    except UserError as error:
        if "cannot be built" in str(error):
            pytest.skip(str(error))
        assert "inject_bound" in str(error)
        return
    assert max(parity(outputs(teacher), expected).values()) < 0.02
