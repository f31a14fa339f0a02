"""What the backward keeps: activation checkpointing, and no attention map anywhere."""

from __future__ import annotations

from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import CheckpointError

from models import presets
from models.config import ModelConfig
from models.generation import GenerationSettings, generate
from models.layers import BertLayer, ViTBlock
from models.outputs import AttentionTrace, Capture, EncoderOutput
from models.xvlm import XVLM, DecoderOutput

MICRO = "blocksworld-micro-teacher"


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def config(form: str = "pretrain", dropout: float = 0.2, name: str = MICRO) -> ModelConfig:
    """Two heads a layer, and everything random that training has."""
    plain = presets.config(name)
    text = {"heads": (2,) * plain.text.layers, "cross_heads": (2,) * plain.text.fusion_layers}
    text |= {"head_dim": 16, "dropout": dropout, "attention_dropout": dropout}
    vision = {"heads": (2,) * plain.vision.layers, "head_dim": 16, "drop_path": dropout}
    return presets.config(name, vision=vision, text=text).as_form(form)


def traced(values: dict[int, AttentionTrace]) -> list[Tensor]:
    return [tensor for trace in values.values() for tensor in (trace.q, trace.k)]


def parts(output: EncoderOutput) -> list[Tensor]:
    """Everything in an output that a loss may use."""
    return [
        output.logits if isinstance(output, DecoderOutput) else output.last,
        *output.hidden.values(),
        *traced(output.attention),
        *traced(output.cross_attention),
    ]


def run(model: XVLM) -> list[Tensor]:
    """Every pass with masks, regions and captures; what comes out, in a fixed order."""
    form, size = model.config.form, model.config.vision.image_size
    generator = torch.Generator().manual_seed(1)
    images = torch.randint(0, 256, (4, 3, size, size), dtype=torch.uint8, generator=generator)
    ids = torch.randint(1, 200, (2, 9), generator=generator)
    mask = torch.ones(2, 9, dtype=torch.bool)
    mask[0, 5:] = False
    everything = Capture.of(range(5), range(4), range(4))
    if form == "pretrain":
        region = torch.rand(3, 37, generator=generator) > 0.4
        region[:, 0] = True
        seen = model.encode_image(
            images, everything, region_mask=region, image_index=torch.tensor([0, 0, 3])
        )
        states = model.encode_text(ids, mask, everything)
        fused = model.fuse(states.last, mask, seen.rows.last[:2], region[:2], everything)
        return [*parts(seen.rows), seen.full, *parts(states), *parts(fused)]
    first, second = model.encode_image(images).last.chunk(2)
    if form == "nlvr2":
        return parts(model.multimodal(ids, mask, (first, second), None, everything))
    if form == "captioning":
        return parts(model.decode(ids, mask, first, None, everything))
    states = model.multimodal(ids, mask, first).last
    return parts(model.decode(ids, mask, states, mask, everything))


def loss_of(model: XVLM) -> Tensor:
    """Weighs every entry of every part differently, so that no gradient cancels."""
    values = run(model)
    generator = torch.Generator().manual_seed(2)
    weights = (torch.randn(value.shape, generator=generator) for value in values)
    return torch.stack([(v * w).mean() for v, w in zip(values, weights, strict=True)]).sum()


def gradients(model: XVLM, gates: dict[str, Tensor]) -> dict[str, Tensor]:
    model.zero_grad()
    for name, slot in model.gate_slots().items():
        slot.z = gates[name].clone().requires_grad_() if gates else None
    torch.manual_seed(3)
    loss = loss_of(model)
    after = torch.rand(1)  # the generator goes on from where it would be anyway
    loss.backward()
    leaves: dict[str, Tensor | None] = dict(model.named_parameters())
    leaves |= {name: slot.z for name, slot in model.gate_slots().items()}
    found = {name: z.grad for name, z in leaves.items() if z is not None and z.grad is not None}
    assert not gates or gates.keys() <= found.keys()
    return {"loss": loss.detach(), "after": after, **found}


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("form", ["pretrain", "vqa", "nlvr2", "captioning"])
def test_recomputed_activations_give_the_same_loss_and_gradients(form, gated):
    model = XVLM(config(form)).train()
    gates = {name: torch.rand(slot.units) for name, slot in model.gate_slots().items()}
    plain = gradients(model, gates if gated else {})
    calls = count_calls(model)
    model.set_activation_checkpointing(True)
    again = gradients(model, gates if gated else {})
    assert set(calls.values()) == {2}, calls  # once forward, once in the backward
    assert plain.keys() == again.keys()
    for name, value in plain.items():
        assert torch.equal(again[name], value), name
    model.set_activation_checkpointing(False)
    calls.clear()
    gradients(model, {})
    assert set(calls.values()) == {1}, calls


def count_calls(model: XVLM) -> dict[str, int]:
    """How often each block starts, by name."""
    calls: dict[str, int] = {}

    def hook(name: str) -> Any:
        def count(*_: Any) -> None:
            calls[name] = calls.get(name, 0) + 1

        return count

    for name, block in model.named_modules():
        if isinstance(block, ViTBlock | BertLayer):
            block.register_forward_pre_hook(hook(name))
    return calls


def test_gates_that_changed_before_the_backward_are_noticed():
    """Slots that are emptied in between leave other tensors to save; torch says so."""
    model = XVLM(config()).train()
    model.set_activation_checkpointing(True)
    for slot in model.gate_slots().values():
        slot.z = torch.rand(slot.units)
    loss = loss_of(model)
    for slot in model.gate_slots().values():
        slot.z = None
    with pytest.raises(CheckpointError):
        loss.backward()


def test_nothing_is_recomputed_without_gradients_and_with_a_cache():
    model = XVLM(config("captioning")).eval()
    model.set_activation_checkpointing(True)
    states = torch.randn(2, 37, 32)
    ids = torch.randint(1, 200, (2, 6))
    whole = model.decode(ids, None, states, None).logits
    cache = model.new_cache()
    steps = [
        model.decode(ids[:, t : t + 1], None, states, None, cache=cache).logits for t in range(6)
    ]
    torch.testing.assert_close(torch.cat(steps, 1), whole)
    torch.cat(steps, 1).square().mean().backward()
    assert cache.length == 6 and cache[0].own.length == 6
    with torch.no_grad():
        calls = count_calls(model)
        model.decode(ids, None, states, None)
    assert set(calls.values()) == {1}


@contextmanager
def kept(model: XVLM):
    """Sizes in bytes of the tensors kept for the backward, parameters left out; by storage."""
    sizes: dict[int, tuple[int, Tensor]] = {}
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            sizes[storage.data_ptr()] = storage.nbytes(), tensor  # held: the address stays its own
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        yield sizes


@pytest.mark.parametrize("form", ["pretrain", "vqa", "nlvr2", "captioning"])
def test_checkpointing_keeps_one_input_a_block(form):
    model = XVLM(config(form)).train()
    totals = {}
    for enabled in (False, True):
        model.set_activation_checkpointing(enabled)
        with kept(model) as sizes:
            outputs = forward_only(model)
        totals[enabled] = sum(size for size, _ in sizes.values())
        del outputs
    assert totals[True] < totals[False] / 4, totals


def forward_only(model: XVLM) -> Tensor:
    """The states alone: traces that a caller asks for are his to keep."""
    size = model.config.vision.image_size
    images = torch.randint(0, 256, (4, 3, size, size), dtype=torch.uint8)
    ids, mask = torch.randint(1, 200, (2, 9)), torch.ones(2, 9, dtype=torch.bool)
    states = model.encode_image(images).last
    if model.config.form == "nlvr2":
        return model.multimodal(ids, mask, states.chunk(2)).last
    if model.config.form == "captioning":
        return model.decode(ids, mask, states[:2], None).last
    fused = model.multimodal(ids, mask, states[:2]).last
    return model.decode(ids, mask, fused, mask).last if model.config.form == "vqa" else fused


class Maps(TorchDispatchMode):
    """Counts attention kernels, and collects what looks like an attention map.

    The functional attention is one kernel where it need not write the map; where it must, torch
    takes it apart into products and a softmax, which are seen here.
    """

    def __init__(self) -> None:
        super().__init__()
        self.kernels = 0
        self.found: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        name = str(func)
        if "flash_attention" in name or "efficient_attention" in name:
            self.kernels += "backward" not in name
            return result
        for value in tree_leaves(result):
            if isinstance(value, Tensor) and value.is_floating_point() and value.ndim > 2:
                # (..., heads, queries, keys); a causal mask with padding has one entry for all heads
                heads, queries, keys = value.shape[-3:]
                if heads > 1 and queries > 1 and keys in (TEXT, PATCHES):
                    self.found.append(f"{name} {tuple(value.shape)}")
        return result


TEXT, PATCHES = 9, 37  # tokens; no width is equal to one of them


@pytest.mark.parametrize("backward", [False, True])
@pytest.mark.parametrize("form", ["pretrain", "vqa", "nlvr2", "captioning"])
def test_no_path_writes_an_attention_map(form, backward):
    """Vision with and without regions, text, cross-attention, pairs, both decoders; traces too."""
    model = XVLM(config(form, dropout=0.0)).train(backward)
    attentions = {"pretrain": 4 + 2 + 2 * 2, "vqa": 4 + 2 + 2 * 2 * 2, "nlvr2": 4 + 2 + 4 * 2}
    with torch.set_grad_enabled(backward), Maps() as maps:
        loss = loss_of(model)
        if backward:
            loss.backward()
    assert maps.found == []
    assert maps.kernels == attentions.get(form, 4 + 2 + 2 * 2)


def test_a_written_map_would_be_seen():
    q, k = torch.randn(2, 2, TEXT, 16), torch.randn(2, 2, PATCHES, 16)
    with Maps() as maps:
        (q @ k.mT).softmax(-1)
    assert len(maps.found) >= 2 and maps.kernels == 0


def test_generation_writes_no_attention_map():
    model = XVLM(config("captioning")).eval()
    settings = GenerationSettings(end_id=2, beams=3, max_length=TEXT)
    with torch.no_grad(), Maps() as maps:
        generate(
            model,
            torch.tensor([[1, 5, 6], [1, 7, 8]]),
            torch.randn(2, PATCHES, 32),
            settings=settings,
        )
    assert maps.found == [] and maps.kernels >= 6
