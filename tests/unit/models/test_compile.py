"""torch.compile: one graph for each encoder pass, with the values and gradients of eager mode."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

from models.outputs import Capture
from models.xvlm import XVLM
from tests.unit.models.test_memory import config, forward_only, gradients

STUDENT = "blocksworld-micro-student"


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch.manual_seed(0)
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def passes(model: XVLM) -> dict[str, Callable[[Capture], Any]]:
    """The three encoders as `XVLM` calls them, with all their masks."""
    images = torch.rand(4, 3, 48, 48)
    region, index = torch.rand(3, 37) > 0.3, torch.tensor([0, 0, 3])
    ids, mask = torch.randint(1, 200, (2, 9)), torch.rand(2, 9) > 0.2
    mask[:, 0] = region[:, 0] = True
    states, seen = torch.randn(2, 9, 32, requires_grad=True), torch.randn(2, 37, 32)
    return {
        "vision": lambda capture: model.vision(images, capture),
        "regions": lambda capture: model.vision(images, capture, region, index),
        "text": lambda capture: model.text.encode(ids, mask, capture),
        "fusion": lambda capture: model.text.fuse(states, mask, seen, region[:2], capture),
        "multimodal": lambda capture: model.text.multimodal(ids, mask, seen, None, capture),
    }


@pytest.mark.parametrize("checkpointed", [False, True])
@pytest.mark.parametrize("gated", [False, True])
def test_no_graph_breaks_in_the_three_encoders(gated, checkpointed):
    model = XVLM(config(dropout=0.0, name=STUDENT)).train()
    model.set_activation_checkpointing(checkpointed)
    for slot in model.gate_slots().values():
        slot.z = torch.rand(slot.units, requires_grad=True) if gated else None
    for name, call in passes(model).items():
        for capture in (Capture(), Capture.of(range(5), range(4), range(4))):
            torch._dynamo.reset()
            found = torch._dynamo.explain(call)(capture)
            reasons = [str(reason.reason) for reason in found.break_reasons]
            assert (found.graph_count, found.graph_break_count) == (1, 0), (name, reasons)


@pytest.mark.parametrize(
    ("form", "checkpointed"),
    [
        ("pretrain", False),
        ("pretrain", True),
        ("vqa", True),
        ("nlvr2", False),
        ("captioning", False),
    ],
)
def test_compiled_passes_give_the_values_and_gradients_of_eager_ones(form, checkpointed):
    """Without dropout: a compiled graph draws its random numbers in another order."""
    model = XVLM(config(form, 0.0, STUDENT)).train()
    gates = {name: torch.rand(slot.units) for name, slot in model.gate_slots().items()}
    plain = gradients(model, gates)
    model.compile_encoders(backend="aot_eager", fullgraph=True)
    model.set_activation_checkpointing(checkpointed)
    compiled = gradients(model, gates)
    assert compiled.keys() == plain.keys()
    for name, value in plain.items():
        torch.testing.assert_close(compiled[name], value, atol=1e-6, rtol=1e-4, msg=name)


def test_a_pass_is_compiled_once_for_each_kind_of_call():
    counter = CompileCounterWithBackend("eager")
    model = XVLM(config(name=STUDENT)).eval()
    model.compile_encoders(backend=counter, fullgraph=True)
    expected = XVLM(model.config).eval()
    expected.load_state_dict(model.state_dict())
    for rows, graphs in ((2, 1), (2, 1), (3, 2), (5, 2), (6, 2)):  # the second size: any size
        images = torch.rand(rows, 3, 48, 48)
        found = model.encode_image(images).last
        torch.testing.assert_close(found, expected.encode_image(images).last)
        assert counter.frame_count == graphs, rows
    capture = Capture.of([1], [1])
    for _ in range(2):
        assert model.encode_image(images, capture).attention.keys() == {1}
    assert counter.frame_count == 3


def test_other_models_keep_their_own_budget_of_compilations():
    counter = CompileCounterWithBackend("eager")
    for count in range(1, 11):  # torch's default limit is 8 for one piece of code
        model = XVLM(config(name=STUDENT)).eval()
        model.compile_encoders(backend=counter, fullgraph=True)
        model.encode_image(torch.rand(2, 3, 48, 48))
        assert counter.frame_count == count


def test_copies_and_files_are_not_compiled(tmp_path):
    def refuse(*_: Any) -> Any:
        raise AssertionError("compiled")

    model = XVLM(config(name=STUDENT)).eval()
    model.compile_encoders(backend=refuse)
    twin = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter.zero_()
        assert not forward_only(twin).any()
    model.save_pretrained(tmp_path)
    forward_only(XVLM.from_pretrained(tmp_path))
    with pytest.raises(Exception, match="compiled"):
        forward_only(model)


def test_a_cache_is_not_compiled():
    counter = CompileCounterWithBackend("eager")
    model = XVLM(config("captioning", name=STUDENT)).eval()
    model.compile_encoders(backend=counter)
    ids, states, cache = torch.randint(1, 200, (2, 6)), torch.randn(2, 37, 32), model.new_cache()
    steps = [model.decode(ids[:, t : t + 1], None, states, None, cache=cache) for t in range(6)]
    assert counter.frame_count == 0
    whole = model.decode(ids, None, states, None).logits
    assert counter.frame_count == 1
    torch.testing.assert_close(torch.cat([step.logits for step in steps], 1), whole)
