"""The benchmark's eager step (every map materialised) and the project's step: the same losses and
the same student gradients.
"""

from __future__ import annotations

import pytest
import torch

from benchmarks import eager_step
from data_pipeline.batches import PretrainBatch
from models import presets
from models.xvlm import XVLM
from train.config import KdConfig
from train.runtime.step import keyed_generator
from train.runtime.teacher import Teacher
from train.tasks.base import Losses, StepContext
from train.tasks.pretrain import PretrainTask


def tiny(depth: int, seed: int) -> XVLM:
    """Weights large enough that maps are far from uniform."""
    torch.manual_seed(seed)
    name = "blocksworld-micro-teacher" if depth == 4 else "blocksworld-micro-student"
    model = XVLM(presets.config(name, text={"vocab_size": 64}))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.mul_(3.0)
    return model


def batch(rows: int = 5, tokens: int = 9, slots: int = 3) -> PretrainBatch:
    generator = torch.Generator().manual_seed(3)
    lengths = torch.tensor([9, 4, 7, 2, 9])[:rows]
    labels = torch.randint(0, 64, (rows, slots), generator=generator)
    labels[:, -1] = -100
    return PretrainBatch(
        images=torch.randint(0, 256, (rows, 3, 48, 48), dtype=torch.uint8, generator=generator),
        image_index=torch.arange(rows),
        valid=torch.ones(rows, dtype=torch.bool),
        keys=("",) * rows,
        text_ids=torch.randint(1, 64, (rows, tokens), generator=generator),
        text_mask=torch.arange(tokens)[None] < lengths[:, None],
        mlm_ids=torch.randint(1, 64, (rows, tokens), generator=generator),
        mlm_positions=torch.randint(0, 2, (rows, slots), generator=generator),
        mlm_labels=labels,
    )


def project_step(student: XVLM, teacher: XVLM, inputs: PretrainBatch) -> Losses:
    frozen = Teacher(teacher, torch.float32, torch.device("cpu"), "torch")
    task = PretrainTask({}, KdConfig(), student.config, teacher.config)
    context = StepContext(0, 0, 1, keyed_generator(0, 0))
    return task.losses(student, frozen, inputs, context)


@pytest.fixture(scope="module")
def both() -> tuple[dict[str, float], dict[str, float], dict[str, tuple]]:
    """Raw terms and the total of ours and of the eager step; pairs of gradients by parameter."""
    inputs = batch()
    ours, eager, teacher = tiny(2, 0), tiny(2, 0), tiny(4, 1)
    losses = project_step(ours, teacher, inputs)
    losses.total().backward()
    optimizer = torch.optim.SGD(eager.parameters(), lr=0.0)
    step = eager_step.EagerStep(eager, tiny(4, 1), optimizer, None, clip=1e9)
    theirs = step(inputs, keyed_generator(0, 0))
    raw = {name: float(value.detach()) for name, value in losses.terms.items()}
    gradients = {
        name: (parameter.grad, dict(eager.named_parameters())[name].grad)
        for name, parameter in ours.named_parameters()
    }
    found = raw | {"total": float(losses.total().detach())}
    return found, {name: float(value) for name, value in theirs.items()}, gradients


def test_every_term_and_the_total(both) -> None:
    ours, eager, _ = both
    assert ours.keys() == eager.keys()
    for name, value in ours.items():
        assert eager[name] == pytest.approx(value, rel=1e-4), name
        assert value > 0, name


def test_the_students_gradients(both) -> None:
    compared = 0
    for name, (ours, eager) in both[2].items():
        if eager is None:
            assert name.startswith("bbox_head"), name
            assert not ours.any()
            continue
        # Key biases have no gradient but for rounding, hence the absolute part.
        assert float((ours - eager).norm()) <= 1e-3 * float(eager.norm()) + 2e-5, name
        compared += 1
    assert compared > 60


def test_maps_of_every_layer_are_kept() -> None:
    teacher, inputs = tiny(4, 1), batch()
    done = eager_step.run(teacher, inputs, keyed_generator(0, 0))
    assert [len(stack.maps) for stack in (done.image, done.text, done.masked)] == [4, 2, 4]
    assert len(done.negative.cross) == 2
    rows, tokens = inputs.text_ids.shape
    assert done.negative.maps[0].shape == (2 * rows, 1, tokens, tokens)
    assert done.image.maps[0].shape == (rows, 1, 37, 37)
    for probabilities in done.masked.maps:
        assert torch.allclose(probabilities.sum(-1), torch.ones(()))
