"""Attention and feed-forward: masks, traces, gates, empty layers."""

from __future__ import annotations

import pytest
import torch

from models.attention import Attention
from models.layers import FeedForward, activation_function


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def reference(attention: Attention, x, context, visible):
    """Plain softmax attention, one head at a time."""
    d, heads = attention.head_dim, []
    for head in range(attention.heads):
        part = slice(head * d, (head + 1) * d)
        q, k, v = (
            torch.nn.functional.linear(source, linear.weight[part], linear.bias[part])
            for source, linear in (
                (x, attention.q),
                (context, attention.k),
                (context, attention.v),
            )
        )
        scores = (q @ k.transpose(1, 2) / d**0.5).masked_fill(~visible, float("-inf"))
        heads.append(scores.softmax(-1) @ v)
    return attention.out(torch.cat(heads, -1))


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("kind", ["self", "causal", "cross"])
def test_attention_is_softmax_attention(kind, masked):
    attention = Attention(12, 3, 5, key_width=7 if kind == "cross" else None)
    x = torch.randn(2, 4, 12)
    context = torch.randn(2, 6, 7) if kind == "cross" else x
    keys = context.shape[1]
    mask = torch.ones(2, keys, dtype=torch.bool)
    if masked:
        mask[0, -2:] = False
    visible = mask[:, None, :].expand(2, 4, keys)
    if kind == "causal":
        visible = visible & torch.ones(4, keys, dtype=torch.bool).tril()
    output, trace = attention(
        x,
        context if kind == "cross" else None,
        key_mask=mask if masked else None,
        causal=kind == "causal",
        trace=True,
    )
    torch.testing.assert_close(output, reference(attention, x, context, visible))
    assert trace.q.shape == (2, 3, 4, 5) and trace.k.shape == (2, 3, keys, 5)
    assert trace.scale == 5**-0.5 and trace.causal == (kind == "causal")
    assert (trace.key_mask is mask) if masked else trace.key_mask is None


def test_no_trace_unless_asked():
    assert Attention(8, 2, 4)(torch.randn(1, 3, 8))[1] is None


def test_a_closed_head_gate_equals_zero_output_columns():
    attention, x = Attention(8, 2, 4), torch.randn(2, 3, 8)
    attention.gate.z = torch.tensor([0.0, 1.0])
    gated = attention(x)[0]
    attention.gate.z = None
    with torch.no_grad():
        attention.out.weight[:, :4] = 0
    torch.testing.assert_close(gated, attention(x)[0])


@pytest.mark.parametrize("position", ["pre", "post"])
def test_soft_ffn_gates_sit_where_the_configuration_says(position):
    ffn, x = FeedForward(6, 5, "gelu", position), torch.randn(2, 3, 6)
    z = ffn.gate.z = torch.rand(5, requires_grad=True)
    gelu, hidden = activation_function("gelu"), ffn.fc1(x)
    expected = gelu(hidden * z) if position == "pre" else gelu(hidden) * z
    output = ffn(x)
    torch.testing.assert_close(output, ffn.fc2(expected))
    output.sum().backward()
    assert z.grad is not None and z.grad.abs().min() > 0


def test_layers_without_units_leave_their_bias():
    attention, ffn = Attention(8, 0, 4), FeedForward(8, 0, "gelu", "pre")
    for part in (attention.out, ffn.fc2):
        torch.nn.init.normal_(part.bias)
    x = torch.randn(2, 3, 8)
    output, trace = attention(x, torch.randn(2, 5, 8), trace=True)
    torch.testing.assert_close(output, attention.out.bias.expand(2, 3, 8))
    torch.testing.assert_close(ffn(x), ffn.fc2.bias.expand(2, 3, 8))
    assert trace.q.shape == (2, 0, 3, 4) and trace.k.shape == (2, 0, 5, 4)
    assert set(attention.state_dict()) == {"out.bias"} and set(ffn.state_dict()) == {"fc2.bias"}
    assert all(parameter.numel() for parameter in [*attention.parameters(), *ffn.parameters()])


def test_attention_dropout_only_in_training():
    attention, x = Attention(8, 2, 4, dropout=0.5), torch.randn(2, 30, 8)
    attention.eval()
    assert torch.equal(attention(x)[0], attention(x)[0])
    attention.train()
    assert not torch.equal(attention(x)[0], attention(x)[0])


def test_unknown_activation():
    with pytest.raises(ValueError, match="swish"):
        activation_function("swish")


def test_activations_are_the_published_ones():
    x = torch.linspace(-6, 6, 100)
    expected = {
        "gelu": x * (1 + torch.erf(x / 2**0.5)) / 2,
        "quick_gelu": x / (1 + torch.exp(-1.702 * x)),
        "gelu_tanh": x * (1 + torch.tanh((2 / torch.pi) ** 0.5 * (x + 0.044715 * x**3))) / 2,
    }
    for name, values in expected.items():
        torch.testing.assert_close(activation_function(name)(x), values)
