"""prune.gates: masked, folded and compacted gates make the same run, sampled ahead or not."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor

from models import layers
from models.gates import GateBank
from models.outputs import Capture
from models.xvlm import XVLM
from tests.unit.models.test_memory import config
from tests.unit.train.test_gate_optimizer import keyed, make, run, states_equal
from train.config import PruneConfig
from train.losses.attention import attention_mse
from train.runtime.gate_optimizer import GateOptimizer

STEPS, FREEZE = 6, 4
SKIPPED = 2  # a step that the engine does not apply, and that is made up for


@pytest.fixture(autouse=True)
def small_texts(monkeypatch):
    torch.manual_seed(0)
    monkeypatch.setattr(layers, "_FEW_TOKENS", 0)


def micro() -> XVLM:
    """Two heads a layer, so that some close; no dropout, whose draws depend on sizes."""
    return XVLM(config(dropout=0.0, name="blocksworld-micro-student")).double().train()


def losses(model: XVLM, teacher: XVLM, step: int, micro_step: int, trace: bool) -> Tensor:
    """A task loss, and attention distilled where `trace` says so."""
    generator = torch.Generator().manual_seed(10 * step + micro_step)
    images = torch.rand(2, 3, 48, 48, generator=generator, dtype=torch.float64)
    ids = torch.randint(1, 200, (2, 9), generator=generator)
    capture = Capture.of([], [0, 1], [0]) if trace else Capture()

    def passes(of: XVLM) -> list[Any]:
        image, text = of.encode_image(images, capture), of.encode_text(ids, None, capture)
        return [image, text, of.fuse(text.last, None, image.last, None, capture)]

    ours = passes(model)
    loss = (ours[-1].last - 0.3).square().mean()
    if trace:
        with torch.no_grad():
            theirs = passes(teacher)
        for mine, target in zip(ours, theirs, strict=True):
            for kind in ("attention", "cross_attention"):
                for layer, record in getattr(mine, kind).items():
                    loss = loss + 0.1 * attention_mse(record, getattr(target, kind)[layer])
    return loss


def pruned(start: XVLM, teacher: XVLM, form: Any, trace: bool, ahead: bool = True) -> dict:
    """Parameters and gates after a few steps of two micro-batches, frozen for the last ones."""
    model = copy.deepcopy(start)
    bank = GateBank.of_model(model, alignment=4, head_init=0.5)
    prune = PruneConfig(sparsity=0.6, ramp_steps=3, lr=0.3, gates=form, freeze_step=FREEZE)
    gates = GateOptimizer(bank, prune, "cpu", 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    step, tried = 0, 0
    widths: list[int] = []
    model.vision.blocks[0].get_submodule("ffn.fc1").register_forward_hook(
        lambda _, __, output: widths.append(output.shape[-1])
    )
    while step < STEPS:
        gates.begin_step(step, keyed(step))
        for micro_step in range(2):
            (losses(model, teacher, step, micro_step, trace) / 2).backward()
        applied = tried != SKIPPED
        if applied:
            optimizer.step()
        optimizer.zero_grad()
        gates.finish_step(step, applied)
        step, tried = step + applied, tried + 1
        if ahead:
            gates.prepare(step, keyed(step))
    with gates.evaluation(), torch.no_grad():
        held_out = losses(model, teacher, 99, 0, trace)
    return {
        "parameters": dict(model.state_dict()) | {"held out": held_out},
        "gates": gates.state_dict(),
        "widths": widths,
    }


@pytest.mark.parametrize("trace", [False, True])
def test_three_forms_train_the_same_model(trace):
    start, teacher = micro(), micro()
    expected = pruned(start, teacher, "mask", trace)
    assert expected["gates"]["skipped"] == 1 and set(expected["widths"]) == {128}
    moved = expected["parameters"]["vision.blocks.0.ffn.fc1.weight"]
    assert not torch.allclose(moved, start.state_dict()["vision.blocks.0.ffn.fc1.weight"])
    for form in ("fold", "compact"):
        found = pruned(start, teacher, form, trace)
        for part, tolerance in (("parameters", 1e-8), ("gates", 1e-5)):
            compare(found[part], expected[part], tolerance)
        assert (min(found["widths"]) < 100) == (form == "compact")


def compare(found: Any, expected: Any, tolerance: float) -> None:
    if isinstance(expected, dict):
        assert found.keys() == expected.keys()
        for key in expected:
            compare(found[key], expected[key], tolerance)
    elif isinstance(expected, Tensor) and expected.is_floating_point():
        torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance)
    else:
        assert found == expected or isinstance(found, Tensor)


@pytest.mark.parametrize("form", ["mask", "fold", "compact"])
def test_sampling_ahead_changes_nothing_to_the_bit(form):
    start, teacher = micro(), micro()
    ahead, late = (pruned(start, teacher, form, False, when) for when in (True, False))
    assert states_equal(ahead["parameters"], late["parameters"])
    assert states_equal(ahead["gates"], late["gates"])


def test_a_step_takes_the_sample_made_for_it():
    gates = make(gates="compact")
    gates.prepare(0, keyed(0))
    assert gates._ahead is not None
    prepared = gates._ahead.z
    gates.begin_step(0, keyed(0))
    assert gates._sampled is prepared and gates._ahead is None


@pytest.mark.parametrize("other", [(1, 1), (0, 7)])
def test_a_sample_for_another_step_or_noise_is_thrown_away(other):
    gates, expected = make(), make()
    gates.prepare(0, keyed(0))
    step, noise = other
    for one in (gates, expected):
        one.begin_step(step, keyed(noise))
    assert states_equal(gates.bank.values(), expected.bank.values())


def test_a_sample_of_the_gates_before_a_resume_is_thrown_away():
    trained = make()
    run(trained, 0, 5)
    resumed = make()
    resumed.prepare(5, keyed(5))
    resumed.load_state_dict(trained.state_dict())
    for gates in (trained, resumed):
        gates.begin_step(5, keyed(5))
    assert states_equal(trained.bank.values(), resumed.bank.values())


def test_preparing_does_not_freeze():
    gates = make(freeze_step=3)
    run(gates, 0, 3)
    before = gates.state_dict()
    gates.prepare(3, keyed(3))
    assert not gates.frozen and states_equal(gates.state_dict(), before)


def test_unknown_forms_are_refused():
    from pydantic import TypeAdapter, ValidationError

    with pytest.raises(ValidationError, match="compact"):
        TypeAdapter(PruneConfig).validate_python({"gates": "squeeze"})
