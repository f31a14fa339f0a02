"""Folded and compacted gates against the plain masked form, in float64: values and gradients."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from models import layers
from models.attention import Attention
from models.compaction import ActiveUnits
from models.gate_slot import GateSlot
from models.gated_linear import Entries, GatedLinear
from models.gates import GateBank
from models.layers import FeedForward, activation_function
from models.xvlm import XVLM
from tests.unit.models.test_memory import config, parts, run

FORMS = ("mask", "fold", "compact")
GATES = {
    "mixed": [0.0, 0.3, 1.0, 0.0, 0.7, 0.0, 0.0, 1.0],
    "open": [1.0] * 8,
    "closed": [0.0] * 8,
}
EXACT: dict[str, Any] = {"rtol": 1e-11, "atol": 1e-12}


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def hold(slot: GateSlot, z: Tensor, form: str, multiple: int = 2) -> Tensor:
    """Puts z into the slot as a bank does; returns the leaf."""
    leaf = z.clone().requires_grad_()
    active = None
    if form == "compact":
        padding = torch.zeros(1, slot.units, dtype=torch.bool)
        active = ActiveUnits(z[None], padding, torch.tensor([multiple])).rows()[0]
    slot.hold(leaf, form != "mask", active)
    return leaf


def gradients(module: torch.nn.Module, z: Tensor, inputs: list[Tensor], value: Tensor) -> dict:
    """Of a loss that weighs every output differently. A gate at 0 has none behind the clamp."""
    leaves = {f"input {index}": x for index, x in enumerate(inputs)} | dict(
        module.named_parameters()
    )
    weight = torch.linspace(-1, 2, value.numel(), dtype=value.dtype).view_as(value)
    loss = (value * weight).sum() + value.square().sum()
    found = torch.autograd.grad(loss, [*leaves.values(), z], allow_unused=True)
    assert all(gradient is not None for gradient in found[: len(leaves)]), "every parameter has one"
    result = dict(zip(leaves, found, strict=False))
    result["z"] = torch.zeros_like(z) if found[-1] is None else found[-1] * (z != 0)
    return result | {"value": value.detach()}


def same(found: dict, expected: dict, **tolerance: Any) -> None:
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, msg=lambda text, n=name: f"{n}: {text}",
                                   **(tolerance or EXACT))  # fmt: skip


# --- feed-forward ---------------------------------------------------------------------------------


def masked_ffn(ffn: FeedForward, x: Tensor, z: Tensor) -> Tensor:
    hidden = F.linear(x, ffn.fc1.weight, ffn.fc1.bias)
    f = activation_function(ffn.activation)
    hidden = f(hidden * z) if ffn.gate_first else f(hidden) * z
    return F.linear(hidden, ffn.get_parameter("fc2.weight"), ffn.get_parameter("fc2.bias"))


@pytest.mark.parametrize("tokens", [3, 70])
@pytest.mark.parametrize("values", GATES)
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(
    ("position", "activation"), [("pre", "quick_gelu"), ("post", "gelu"), ("pre", "gelu_tanh")]
)
def test_feed_forward_equals_the_masked_form(position, activation, form, values, tokens):
    """With fewer tokens than outputs (the gate goes onto activations) and with more."""
    ffn = FeedForward(6, 8, activation, position).double()
    x = torch.randn(2, tokens, 6, dtype=torch.float64, requires_grad=True)
    z = torch.tensor(GATES[values], dtype=torch.float64)
    leaf = z.clone().requires_grad_()
    expected = gradients(ffn, leaf, [x], masked_ffn(ffn, x, leaf))
    leaf = hold(ffn.gate, z, form)
    same(gradients(ffn, leaf, [x], ffn(x)), expected)


def test_closed_units_are_not_computed_and_get_exact_zeros():
    """NaN in a unit that is left out stays there; the units that fill up are computed."""
    ffn = FeedForward(6, 8, "gelu", "post").double()
    leaf = hold(ffn.gate, torch.tensor(GATES["mixed"], dtype=torch.float64), "compact", 3)
    active = ffn.gate.kept
    assert active is not None and active.tolist() == [1, 2, 4, 7, 0, 3]  # four are open
    with torch.no_grad():
        ffn.fc1.bias[[5, 6]] = torch.nan
    x = torch.randn(2, 40, 6, dtype=torch.float64)
    output = ffn(x)
    assert output.isfinite().all()
    output.sum().backward()
    for name, places in (("fc1.weight", ([5, 6],)), ("fc2.weight", (slice(None), [5, 6]))):
        gradient = ffn.get_parameter(name).grad
        assert gradient is not None and gradient.any() and not gradient[places].any()
    assert leaf.grad is not None and leaf.grad[[5, 6]].tolist() == [0.0, 0.0]
    hold(ffn.gate, leaf.detach(), "fold")
    assert output.shape == ffn(x).shape and ffn(x).isnan().all()


@pytest.mark.parametrize("name", ["gelu", "quick_gelu", "gelu_tanh"])
def test_activations_map_zero_to_zero(name):
    """What allows to leave out a unit whose gate acts before the activation."""
    assert activation_function(name)(torch.zeros(1)).item() == 0.0


def test_few_tokens_are_not_compacted(monkeypatch):
    """Gathering weights for a handful of tokens costs more than it saves."""
    ffn, seen = FeedForward(6, 8, "gelu", "post"), []
    hold(ffn.gate, torch.tensor(GATES["mixed"]), "compact")
    ffn.fc1.register_forward_hook(lambda _, __, output: seen.append(output.shape[-1]))
    for tokens in (layers._FEW_TOKENS - 1, layers._FEW_TOKENS):
        ffn(torch.randn(1, tokens, 6))
    assert seen == [8, 4]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("form", FORMS)
def test_half_precision_parameters_and_autocast(form, dtype):
    """Gates stay fp32: their gradient is as good as the weights allow."""
    exact = FeedForward(6, 8, "gelu", "post")
    z, x = torch.tensor(GATES["mixed"]), torch.randn(2, 40, 6)
    leaf = z.clone().requires_grad_()
    masked_ffn(exact, x, leaf).float().square().sum().backward()
    for cast in (True, False):
        ffn = FeedForward(6, 8, "gelu", "post")
        ffn.load_state_dict(exact.state_dict())
        ffn = ffn.to(dtype) if cast else ffn
        own = hold(ffn.gate, z, form)
        with torch.autocast("cpu", dtype, enabled=not cast):
            output = ffn(x.to(dtype) if cast else x)
        assert output.dtype == dtype
        output.float().square().sum().backward()
        assert own.grad is not None and own.grad.dtype == torch.float32 and leaf.grad is not None
        closed = z == 0
        torch.testing.assert_close(
            own.grad.masked_fill(closed, 0), leaf.grad.masked_fill(closed, 0), rtol=0.05, atol=0.05
        )


# --- attention ------------------------------------------------------------------------------------


def masked_attention(
    attention: Attention, x: Tensor, context: Tensor, z: Tensor, owner: Attention
) -> tuple[Tensor, Tensor, Tensor]:
    """Plain softmax attention with gates on the heads' mixtures; its q and k, all heads."""
    d = attention.head_dim

    def split(y: Tensor) -> Tensor:
        return y.unflatten(-1, (-1, d)).transpose(1, 2)

    q = split(F.linear(x, attention.q.weight, attention.q.bias))
    k, v = (split(F.linear(context, part.weight, part.bias)) for part in (owner.k, owner.v))
    if attention is owner:
        k, v = k[:, : attention.heads], v[:, : attention.heads]
    else:
        k, v = k[:, -attention.heads :], v[:, -attention.heads :]
    mixed = (q @ k.transpose(-1, -2) * d**-0.5).softmax(-1) @ v * z.view(1, -1, 1, 1)
    weight, bias = (attention.get_parameter(f"out.{name}") for name in ("weight", "bias"))
    return F.linear(mixed.transpose(1, 2).flatten(2), weight, bias), q, k


def with_trace(output: Tensor, q: Tensor, k: Tensor, trace: bool) -> Tensor:
    """One tensor of everything a loss may read."""
    return torch.cat([part.flatten() for part in ((output, q, k) if trace else (output,))])


@pytest.mark.parametrize("trace", [False, True])
@pytest.mark.parametrize("tokens", [3, 20])
@pytest.mark.parametrize("values", GATES)
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("cross", [False, True])
def test_attention_equals_the_masked_form(cross, form, values, tokens, trace):
    """A trace holds q and k of every head, closed ones too, and brings them gradients."""
    attention = Attention(12, 8, 4, key_width=7 if cross else None).double()
    z = torch.tensor(GATES[values], dtype=torch.float64)
    x = torch.randn(2, tokens, 12, dtype=torch.float64, requires_grad=True)
    inputs = [x]
    if cross:
        inputs.append(torch.randn(2, 5, 7, dtype=torch.float64, requires_grad=True))
    leaf = z.clone().requires_grad_()
    plain = masked_attention(attention, x, inputs[-1], leaf, attention)
    expected = gradients(attention, leaf, inputs, with_trace(*plain, trace))
    leaf = hold(attention.gate, z, form, multiple=1)
    output, record = attention(x, inputs[1] if cross else None, trace=trace)
    assert (record is not None) == trace
    q, k = (record.q, record.k) if record is not None else (output, output)
    same(gradients(attention, leaf, inputs, with_trace(output, q, k, trace)), expected)


def test_closed_heads_keep_queries_and_keys_only_where_a_trace_needs_them():
    attention = Attention(12, 8, 4)
    seen: dict[str, int] = {}

    def watch(name: str) -> None:
        def note(module: Any, inputs: Any, output: Tensor) -> None:
            seen[name] = output.shape[-1] // 4

        attention.get_submodule(name).register_forward_hook(note)

    for name in "qkv":
        watch(name)
    hold(attention.gate, torch.tensor(GATES["mixed"]), "compact", multiple=1)
    attention(torch.randn(1, 3, 12))
    assert seen == {"q": 4, "k": 4, "v": 4}
    attention(torch.randn(1, 3, 12), trace=True)
    assert seen == {"q": 8, "k": 8, "v": 4}


@pytest.mark.parametrize("trace", [False, True])
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("heads", [(3, 3), (2, 2), (3, 1)])
def test_pairs_that_share_keys_equal_the_masked_form(heads, form, trace):
    """NLVR2: the second layer reads the last heads of the first one's projection."""
    kwargs: dict[str, Any] = {"key_width": 6, "shared_heads": 3}
    owner = Attention(8, heads[0], 4, **kwargs).double()
    reader = Attention(8, heads[1], 4, owner=False, **kwargs).double()
    pair = torch.nn.ModuleList([owner, reader])
    x, first, second = (
        torch.randn(2, n, width, dtype=torch.float64, requires_grad=True)
        for n, width in ((5, 8), (7, 6), (4, 6))
    )
    z = torch.tensor([0.0, 0.6, 0.0, 0.4, 0.0, 1.0][: sum(heads)], dtype=torch.float64)

    def both(call: Callable[..., Any], leaf: Tensor) -> dict:
        parts = leaf.split(list(heads))
        one = call(owner, x, first, parts[0])
        two = call(reader, one[0], second, parts[1])
        value = torch.cat([with_trace(*one, trace=trace), with_trace(*two, trace=trace)])
        return gradients(pair, leaf, [x, first, second], value)

    def ours(attention: Attention, x: Tensor, context: Tensor, z: Tensor) -> Any:
        active = None
        if form == "compact":
            padding = torch.zeros(1, attention.heads, dtype=torch.bool)
            active = ActiveUnits(z[None], padding, torch.tensor([1])).rows()[0]
        attention.gate.hold(z, form != "mask", active)
        memory = None if attention is owner else owner.keys_values(context, reader, trace=trace)
        output, record = attention(x, context, trace=trace, memory=memory)
        return (output, record.q, record.k) if record else (output, output, output)

    leaf = z.clone().requires_grad_()
    expected = both(functools.partial(masked_attention, owner=owner), leaf)
    same(both(ours, z.clone().requires_grad_()), expected)


# --- layers that are pruned empty, and plain ones --------------------------------------------------


@pytest.mark.parametrize("form", FORMS)
def test_layers_without_units_take_any_form(form):
    attention, ffn = Attention(8, 0, 4), FeedForward(8, 0, "gelu", "post")
    for slot in (attention.gate, ffn.gate):
        slot.hold(torch.zeros(0), form != "mask", torch.zeros(0, dtype=torch.int64))
    x = torch.randn(2, 70, 8)
    assert torch.equal(attention(x)[0], attention.out(x)) and torch.equal(ffn(x), ffn.fc2(x))


def test_without_gates_it_is_a_linear_layer():
    """The same numbers to the bit, the same keys, the same fresh weights."""
    torch.manual_seed(3)
    ours = GatedLinear(5, 7)
    torch.manual_seed(3)
    plain, x = torch.nn.Linear(5, 7), torch.randn(2, 3, 5)
    assert ours.state_dict().keys() == plain.state_dict().keys()
    assert torch.equal(ours(x), plain(x))


def test_rows_and_columns_of_one_weight():
    layer, x = GatedLinear(5, 7).double(), torch.randn(4, 2, dtype=torch.float64)
    places, gates = torch.tensor([6, 0, 3]), torch.tensor([0.5, 1.0, 2.0]).double()
    rows = Entries(places, gates)
    columns = Entries(torch.tensor([1, 4]), torch.tensor([3.0, 0.25]).double())
    whole = torch.zeros(4, 5, dtype=torch.float64)
    whole[:, [1, 4]] = x * torch.tensor([3.0, 0.25]).double()
    expected = layer(whole)[:, places] * gates
    for fold in (True, False):
        found = layer(x, rows=rows._replace(fold=fold), columns=columns._replace(fold=fold))
        torch.testing.assert_close(found, expected, **EXACT)


# --- which units take part -------------------------------------------------------------------------


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.lists(st.sampled_from([0.0, 0.5, 1.0]), min_size=1, max_size=20), min_size=1,
             max_size=4),
    st.integers(1, 8),
)  # fmt: skip
def test_active_units_are_the_open_ones_and_few_more(rows, alignment):
    slots = {f"vision.{index}.ffn": GateSlot(len(row)) for index, row in enumerate(rows)}
    bank = GateBank(slots, dict.fromkeys(slots, 1), alignment=alignment)
    z = torch.tensor([value for row in rows for value in row])
    bank.write(z, active=bank.active_units(z))
    for row, slot in zip(rows, slots.values(), strict=True):
        kept = list(range(len(row))) if slot.kept is None else slot.kept.tolist()
        opened = [index for index, value in enumerate(row) if value > 0]
        if slot.kept is not None:
            assert kept[: len(opened)] == opened
        assert len(set(kept)) == len(kept) and set(opened) <= set(kept) <= set(range(len(row)))
        least = -(-max(1, len(opened)) // alignment) * alignment
        assert len(kept) == min(least, len(row))


def test_heads_are_aligned_by_their_rows():
    """64 rows are one head of 64, two of 32, and all three of 24 (8 would be needed)."""
    slots = {f"vision.{size}.heads": GateSlot(3, size) for size in (64, 32, 24, 128)}
    bank = GateBank(slots, dict.fromkeys(slots, 1))
    z = torch.tensor([0.0, 0.0, 1.0]).repeat(4)
    bank.write(z, active=bank.active_units(z))
    kept = {slot.size: None if slot.kept is None else slot.kept.tolist() for slot in slots.values()}
    assert kept == {64: [2], 32: [2, 0], 24: None, 128: [2]}
    entries = slots["vision.32.heads"].entries(True)
    assert entries.kept is not None and entries.gate is not None
    assert entries.kept.tolist() == [*range(64, 96), *range(32)]
    assert entries.gate.tolist() == [1.0] * 32 + [0.0] * 32


def test_a_gate_that_is_nan_takes_part():
    """Trouble must reach the loss, where steps are checked."""
    padding = torch.zeros(1, 3, dtype=torch.bool)
    rows = ActiveUnits(torch.tensor([[0.0, torch.nan, 0.0]]), padding, torch.tensor([1])).rows()
    assert rows[0].tolist() == [1]


def test_clearing_forgets_which_units_took_part():
    slots = {"vision.0.ffn": GateSlot(4)}
    bank = GateBank(slots, {"vision.0.ffn": 1}, alignment=1)
    z = torch.tensor([0.0, 1.0, 0.0, 1.0])
    bank.write(z, active=bank.active_units(z), requires_grad=False)
    held = bank.held()
    bank.clear()
    assert slots["vision.0.ffn"].kept is None and slots["vision.0.ffn"].z is None
    bank.restore(held)
    kept = slots["vision.0.ffn"].kept
    assert kept is not None and kept.tolist() == [1, 3]


# --- whole models ----------------------------------------------------------------------------------


def model_gradients(model: XVLM, z: Tensor, form: str) -> dict[str, Tensor]:
    """Values and gradients of every pass with captures, gates sampled to `z`."""
    bank = GateBank.of_model(model, alignment=4)
    active = bank.active_units(z) if form == "compact" else None
    bank.write(z, folded=form != "mask", active=active)
    model.zero_grad()
    values = run(model)
    loss = sum((value.square() * (1 + index)).mean() for index, value in enumerate(values))
    assert isinstance(loss, Tensor)
    loss.backward()
    result = {f"value {index}": value.detach() for index, value in enumerate(values)}
    result |= {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    result["z"] = bank.gradient() * (z != 0)
    bank.clear()
    return result


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("form", ["pretrain", "nlvr2", "vqa", "captioning"])
def test_every_pass_of_a_model_equals_the_masked_one(form, recompute, monkeypatch):
    monkeypatch.setattr(layers, "_FEW_TOKENS", 0)  # the texts here are short
    model = XVLM(config(form, 0.0)).double().train()
    bank = GateBank.of_model(model)
    bank.log_alpha.data.fill_(-0.5)
    z = bank.sample(torch.Generator().manual_seed(2)).detach().double()
    assert 0.2 < (z == 0).double().mean() < 0.8
    expected = model_gradients(model, z, "mask")
    model.set_activation_checkpointing(recompute)
    for other in ("fold", "compact"):
        found = model_gradients(model, z, other)
        # A bank gathers gradients in float32.
        torch.testing.assert_close(found.pop("z"), expected["z"], rtol=1e-5, atol=1e-6)
        same(found, {name: v for name, v in expected.items() if name != "z"}, rtol=1e-9, atol=1e-9)


def test_a_cached_decoder_reads_gates_like_an_uncached_one():
    model = XVLM(config("captioning", 0.0)).eval()
    bank = GateBank.of_model(model, alignment=1)
    bank.log_alpha.data.fill_(-0.5)
    z = bank.sample(torch.Generator().manual_seed(2)).detach()
    bank.write(z, requires_grad=False, active=bank.active_units(z))
    ids, states = torch.randint(1, 200, (2, 5)), torch.randn(2, 37, model.config.vision.width)
    with torch.no_grad():
        whole, cache = model.decode(ids, None, states, None), model.new_cache()
        steps = [model.decode(ids[:, t : t + 1], None, states, None, cache=cache) for t in range(5)]
    torch.testing.assert_close(torch.cat([step.logits for step in steps], 1), parts(whole)[0])


def test_compacted_passes_compile_to_one_graph(monkeypatch):
    """The counts change with every step and become symbols; nothing breaks the graph."""
    monkeypatch.setattr(layers, "_FEW_TOKENS", 0)
    torch._dynamo.reset()
    model = XVLM(config(dropout=0.0, name="blocksworld-micro-student")).train()
    bank = GateBank.of_model(model, alignment=4)
    bank.log_alpha.data.fill_(-0.5)
    images = torch.rand(2, 3, 48, 48)
    plain = model.vision
    compiled = torch.compile(plain, backend="aot_eager", fullgraph=True)
    for step in range(2):
        z = bank.sample(torch.Generator().manual_seed(step)).detach()
        found = []
        for call in (plain, compiled):
            bank.write(z, active=bank.active_units(z))
            model.zero_grad()
            call(images).last.square().mean().backward()
            norm = plain.get_parameter("norm.weight").grad
            assert norm is not None
            found.append(torch.cat([bank.gradient(), norm]))
        torch.testing.assert_close(found[1], found[0])
    torch._dynamo.reset()
