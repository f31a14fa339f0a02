"""What a loss tells the trimmers: how much each token matters, and nothing to the states they read."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from models.attention import Attention
from models.packing import fused_attention, salient, weighted_attention
from models.trimmers import HeadTrimmer, TokenTrimmer
from tests.unit.models.test_trimming import Batch, run, trimmed


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 2**16), rows=st.integers(1, 4), tokens=st.integers(1, 9))
def test_salience_is_the_size_of_the_gradient_of_what_is_kept(seed, rows, tokens):
    generator = torch.Generator().manual_seed(seed)
    kept = (torch.rand(rows, tokens, generator=generator) > 0.4).float().requires_grad_()
    probe = torch.randn(rows, tokens, generator=generator)
    found = salient(kept)
    assert torch.equal(found, kept)
    (grad,) = torch.autograd.grad(found, kept, probe)
    for row in range(rows):
        for token in range(tokens):
            wanted = -abs(float(probe[row, token])) if kept[row, token] > 0 else 0.0
            assert float(grad[row, token]) == wanted


def _attention() -> tuple[Attention, torch.Tensor, torch.Tensor]:
    torch.manual_seed(5)
    layer = Attention(32, heads=2, head_dim=16).double()
    x = torch.randn(3, 6, 32, dtype=torch.float64)
    weight = torch.tensor([[1.0, 1, 0, 1, 0, 1], [1, 1, 1, 1, 1, 1], [1, 0, 0, 0, 0, 0]]).double()
    return layer, x, weight.requires_grad_()


def test_attention_hands_its_keep_weights_their_salience():
    """Summed over heads and queries first, then the size, attention by attention."""
    layer, x, weight = _attention()
    probe = torch.randn(3, 6, 32, dtype=torch.float64)
    found, _ = layer(x, key_mask=weight)
    (grad,) = torch.autograd.grad(found, weight, probe)

    def heads(linear: torch.nn.Module) -> torch.Tensor:
        return linear(x).unflatten(-1, (2, 16)).transpose(1, 2)

    q, k, v = heads(layer.q), heads(layer.k), heads(layer.v)
    mixed = weighted_attention(q, k, v, weight, 0.25).transpose(1, 2).flatten(2)
    (signed,) = torch.autograd.grad(layer.out(mixed), weight, probe)
    torch.testing.assert_close(grad, torch.where(weight > 0, -signed.abs(), 0.0))
    assert (signed[weight > 0] > 0).any() and (signed[weight == 0] != 0).any()


_MEAN = {
    "class_token": False,
    "pooling": "mean",
    "heads": (2,) * 4,
    "head_dim": 16,
    "image_size": 24,
}


@pytest.mark.parametrize("vision", [None, _MEAN], ids=["class token", "mean"])
@pytest.mark.parametrize("form", ["vqa", "retrieval"])
def test_a_task_can_only_ask_for_tokens(form, vision):
    """The bias of a last layer gets -sigma' times what tokens matter: never a push to drop them."""
    changes = None if vision is None else {"vision": vision}
    model = trimmed(form, changes=changes, heads=("vision", "text", "fusion")).train()
    batch = Batch(model)
    torch.manual_seed(1)
    torch.stack([value.float().square().mean() for value in run(model, batch)]).sum().backward()
    for part in model.modules():
        if isinstance(part, TokenTrimmer | HeadTrimmer):
            grad = part.fc2.bias.grad
            assert grad is not None and bool((grad <= 0).all()) and bool((grad < 0).any())


def test_states_that_trimmers_read_get_no_gradient_from_decisions():
    x, guide = (torch.randn(*shape, requires_grad=True) for shape in ((2, 5, 16), (2, 8)))
    trimmer = TokenTrimmer(16, 8, 4, guide_width=8)
    with torch.no_grad():
        trimmer.alpha.fill_(1.0)
    trimmer(x, guide).sum().backward()
    heads = HeadTrimmer(24, 3, 8)
    heads(x[:, 0], guide).sum().backward()
    assert x.grad is None and guide.grad is None
    for module in (trimmer, heads):
        for name, parameter in module.named_parameters():
            assert parameter.grad is not None and bool(parameter.grad.any()), name


def test_half_precision_on_a_cpu_is_attention_in_float32():
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, 2, 7, 16) for _ in "qkv")
    halves = [t.bfloat16() for t in (q, k, v)]
    mask = torch.rand(2, 1, 1, 7) > 0.3
    mask[..., 0] = True
    found = fused_attention(*halves, attn_mask=mask)
    wide = [t.float() for t in halves]
    wanted = F.scaled_dot_product_attention(*wide, attn_mask=mask).bfloat16()
    assert found.dtype == torch.bfloat16 and torch.equal(found, wanted)
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(fused_attention(*halves, attn_mask=mask), wanted, rtol=0, atol=0)
    bias = torch.randn(2, 1, 7, 7).bfloat16()
    found = fused_attention(*halves, attn_mask=bias)
    wanted = F.scaled_dot_product_attention(*wide, attn_mask=bias.float()).bfloat16()
    assert torch.equal(found, wanted)
