"""Trimmed passes in half precision: the fp32 result, to what the type can hold, in every mode."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor

from models import streams, trimmers
from models.packing import Packing, masked_mean, weighted_attention
from models.trimmers import HeadTrimmer, TokenTrimmer, decide
from tests.unit.models.test_trimming import FORMS, SHAPES, Batch, by_mode, run, trimmed

# Of the outputs' norm. A rounding is 2^-9 in bf16 and 2^-12 in fp16; the models have eight layers.
BOUND = {torch.bfloat16: 0.04, torch.float16: 0.006}
KINDS = ["autocast", torch.bfloat16, torch.float16]
MODES = ["off", "mask", "gather", "bucket", "packed"]


class Replay:
    """Decisions of one pass, made again in another: near 0 the sign of a logit is rounding."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.made: list[Tensor] = []
        self.logits: list[Tensor] = []
        self.replays = False
        for module in (streams, trimmers):
            monkeypatch.setattr(module, "decide", self)

    def __call__(self, logits: Tensor, *arguments: Any, **options: Any) -> Tensor:
        kept = decide(logits, *arguments, **options)
        if not self.replays:
            self.made.append(kept.detach())
            return kept
        self.logits.append(logits.detach())
        wanted = self.made[len(self.logits) - 1]
        return kept + (wanted - kept).detach()


def counts(form: str) -> dict[str, Any]:
    texts = {} if form in ("pretrain", "captioning") else {"text_keep": (5, 3, 3)}
    return {"vision_keep": (7, 5, 4), "fusion_keep": (4, 2), **texts}


def check(
    monkeypatch: pytest.MonkeyPatch, form: str, mode: str, kind: Any, changes: Any = None
) -> None:
    model = trimmed(form, 3, changes=changes, **counts(form))
    batch, replay = Batch(model, 3), Replay(monkeypatch)
    wanted = by_mode(model, mode, batch)
    replay.replays = True
    dtype = torch.bfloat16 if kind == "autocast" else kind
    if kind != "autocast":
        model, batch.images = model.to(kind), batch.images.to(kind)
    with torch.autocast("cpu", dtype) if kind == "autocast" else nullcontext():
        found = by_mode(model, mode, batch)
    assert len(replay.logits) == len(replay.made) > 0 or mode == "off"
    assert all(logits.dtype == torch.float32 for logits in replay.logits)
    for one, other in zip(found, wanted, strict=True):
        assert bool(one.isfinite().all())
        assert float((one.float() - other).norm() / other.norm()) < BOUND[dtype]


@pytest.mark.parametrize("kind", KINDS, ids=str)
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("form", FORMS)
def test_half_precision_agrees_with_fp32(monkeypatch, form, mode, kind):
    check(monkeypatch, form, mode, kind)


@pytest.mark.parametrize("kind", KINDS, ids=str)
@pytest.mark.parametrize("mode", ["mask", "packed"])
@pytest.mark.parametrize("shape", ["registers and mean", "no class token"])
def test_other_backbones_in_half_precision(monkeypatch, shape, mode, kind):
    check(monkeypatch, "vqa", mode, kind, SHAPES[shape])


def test_gradients_under_autocast(monkeypatch):
    """Of every trimmer: the direction of fp32, by the same noise and decisions."""

    def gradients(dtype: torch.dtype | None) -> dict[str, Tensor]:
        model.zero_grad()
        torch.manual_seed(5)
        with torch.autocast("cpu", dtype) if dtype else nullcontext():
            losses = [value.float().square().mean() for value in run(model, batch)]
        torch.stack(losses).sum().backward()
        return {n: p.grad for n, p in model.named_parameters() if "trimmers" in n}  # type: ignore[misc]

    model = trimmed("vqa", 3).train()
    batch, replay = Batch(model, 3), Replay(monkeypatch)
    wanted = gradients(None)
    replay.replays = True
    found = gradients(torch.bfloat16)
    one, other = (torch.cat([g.flatten() for g in x.values()]) for x in (found, wanted))
    assert float(torch.cosine_similarity(one, other, dim=0)) > 0.98
    assert float(one.norm() / other.norm()) == pytest.approx(1, abs=0.1)


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_fresh_trimmers_rank_tokens_in_half_precision(kind):
    """Their logits are all near 5, where a bfloat16 has 32 values to the unit."""
    torch.manual_seed(0)
    trimmer, heads = TokenTrimmer(64, 16, 8), HeadTrimmer(64, 12, 16)
    x = torch.randn(1, 500, 64)
    wanted = trimmer(x)[0]
    if kind != "autocast":
        trimmer, heads, x = trimmer.to(kind), heads.to(kind), x.to(kind)
    with torch.autocast("cpu", torch.bfloat16) if kind == "autocast" else nullcontext():
        found = trimmer(x)[0]
        assert heads(x[:, 0]).dtype == torch.float32
    assert len(found.unique()) > 480
    best = set(wanted.topk(250).indices.tolist())
    assert len(best & set(found.topk(250).indices.tolist())) >= 240


def test_a_mean_of_large_channels_stays_finite():
    x = torch.full((2, 577, 4), 300.0, dtype=torch.float16)
    mask = torch.ones(2, 577)
    mask[1, 100:] = 0
    assert torch.equal(masked_mean(x, mask), torch.full((2, 4), 300.0, dtype=torch.float16))
    x = torch.randn(2, 577, 4, dtype=torch.float64)
    torch.testing.assert_close(masked_mean(x, mask)[1], x[1, :100].mean(0))


@pytest.mark.parametrize("dtype", BOUND, ids=str)
def test_weights_of_keys_in_half_precision(dtype):
    """Also where what is left holds a thousandth of the attention."""
    torch.manual_seed(1)
    q, k, v = (torch.randn(2, 2, 50, 16) for _ in "qkv")
    weight = (torch.rand(2, 50) > 0.5).float()
    k[:, :, 7] += 1.5 * q.mean(2)
    weight[:, 7] = 0.0
    mask = (weight > 0)[:, None, None, :]
    wanted = torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask)
    found = weighted_attention(q.to(dtype), k.to(dtype), v.to(dtype), weight, 0.25)
    assert found.dtype == dtype
    assert float((found.float() - wanted).norm() / wanted.norm()) < BOUND[dtype]


@pytest.mark.parametrize("dtype", BOUND, ids=str)
def test_packings_carry_any_type(dtype):
    packing = Packing.of(torch.tensor([2, 0, 3]))
    values = torch.randn(5, 3).to(dtype)
    assert torch.equal(packing.flat(packing.grid(values)), values)
