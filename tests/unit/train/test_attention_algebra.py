"""Attention distances by algebra against whole maps, values and gradients, in float64."""

from __future__ import annotations

import math
from itertools import product

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from models.outputs import AttentionTrace
from train.losses.attention import (
    attention_kl,
    attention_kl_reference,
    attention_mse,
    log_normalisers,
)
from train.losses.attention_algebra import kl_by_attention, scores_mse, scores_mse_reference


def traces(
    seed, *, sizes=(2, 3, 5, 7), dims=(4, 4), masked=False, causal=False, dtype=torch.float64
):
    rows, heads, queries, keys = sizes
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

    mask = None
    if masked:
        mask = torch.rand(rows, keys, generator=generator) < 0.6
        mask[:, 0] = True
    made = [
        AttentionTrace(
            draw(rows, heads, queries, d), draw(rows, heads, keys, d), d**-0.5, mask, causal
        )
        for d in dims
    ]
    made[0].q.requires_grad_(True)
    made[0].k.requires_grad_(True)
    return made


def with_gradients(loss, student):
    dq, dk = torch.autograd.grad(loss, (student.q, student.k))
    return loss.detach(), dq, dk


def same(one, two, **tolerance):
    for a, b in zip(one, two, strict=True):
        torch.testing.assert_close(a, b, **tolerance)


def _scores(trace, b, h, i):
    """The scores of one query with the keys it sees."""
    keys = [n for n in range(trace.k.shape[2]) if trace.key_mask is None or trace.key_mask[b, n]]
    return [
        trace.scale * sum(x * y for x, y in zip(trace.q[b, h, i].tolist(), k, strict=True))
        for k in (trace.k[b, h, n].tolist() for n in keys)
    ]


@settings(max_examples=20, deadline=None)
@given(
    seed=st.integers(0, 1000),
    sizes=st.tuples(*(st.integers(1, 3) for _ in range(3)), st.integers(1, 4)),
    masked=st.booleans(),
)
def test_every_distance_by_loops(seed, sizes, masked):
    student, teacher = traces(seed, sizes=sizes, dims=(2, 3), masked=masked)
    rows, heads, queries, _ = sizes
    squares = kl = raw = 0.0
    for b, h, i in product(range(rows), range(heads), range(queries)):
        ours, theirs = _scores(student, b, h, i), _scores(teacher, b, h, i)
        p, t = ([math.exp(x - max(row)) for x in row] for row in (ours, theirs))
        p, t = ([x / sum(row) for x in row] for row in (p, t))
        squares += sum((x - y) ** 2 for x, y in zip(p, t, strict=True))  # hidden keys differ by 0
        kl += sum(y * math.log(y / x) for x, y in zip(p, t, strict=True))
        raw += sum((x - y) ** 2 for x, y in zip(ours, theirs, strict=True)) / len(ours)
    count = rows * heads * queries
    found = [loss(student, teacher).item() for loss in (attention_mse, attention_kl, scores_mse)]
    assert found == pytest.approx([squares / count, kl / count, raw / count], rel=1e-9, abs=1e-12)


@settings(max_examples=30, deadline=None)
@given(
    seed=st.integers(0, 1000),
    sizes=st.tuples(*(st.integers(1, 6) for _ in range(4))),
    dims=st.tuples(st.integers(1, 5), st.integers(1, 5)),
    masked=st.booleans(),
)
def test_gram_matrices_give_the_squared_difference_of_scores(seed, sizes, dims, masked):
    student, teacher = traces(seed, sizes=sizes, dims=dims, masked=masked)
    same(
        with_gradients(scores_mse(student, teacher), student),
        with_gradients(scores_mse_reference(student, teacher), student),
    )


def test_gram_form_keeps_its_precision_near_the_teacher():
    student, teacher = traces(0, sizes=(2, 3, 50, 60), dims=(8, 8), dtype=torch.float32)
    near = AttentionTrace(
        (teacher.q + 1e-4 * student.q).detach().requires_grad_(True),
        (teacher.k + 1e-4 * student.k).detach().requires_grad_(True),
        student.scale,
    )
    exact = AttentionTrace(near.q.double(), near.k.double(), near.scale)
    truth = scores_mse_reference(
        exact, AttentionTrace(teacher.q.double(), teacher.k.double(), teacher.scale)
    )
    torch.testing.assert_close(scores_mse(near, teacher).double(), truth, rtol=1e-4, atol=0)


def test_gram_form_counts_visible_keys_only_and_refuses_causal_maps():
    student, teacher = traces(1, masked=True)
    assert student.key_mask is not None
    hidden = ~student.key_mask
    assert hidden.any()
    moved = AttentionTrace(
        student.q, student.k + 100 * hidden[:, None, :, None], student.scale, student.key_mask
    )
    torch.testing.assert_close(scores_mse(moved, teacher), scores_mse(student, teacher))
    with pytest.raises(ValueError, match=r"kd\.attention=probabilities"):
        scores_mse(*traces(1, sizes=(2, 3, 5, 5), causal=True))
    with pytest.raises(ValueError, match="head by head"):
        scores_mse(student, traces(1, sizes=(2, 4, 5, 7))[1])


@settings(max_examples=30, deadline=None)
@given(
    seed=st.integers(0, 1000),
    sizes=st.tuples(*(st.integers(1, 6) for _ in range(4))),
    dims=st.tuples(st.integers(1, 5), st.integers(1, 5)),
    masked=st.booleans(),
    causal=st.booleans(),
)
def test_kl_by_attention_is_the_kl_of_the_maps(seed, sizes, dims, masked, causal):
    if causal:
        sizes = (*sizes[:3], sizes[2])
    student, teacher = traces(seed, sizes=sizes, dims=dims, masked=masked, causal=causal)
    one = with_gradients(kl_by_attention(student, teacher), student)
    same(one, with_gradients(attention_kl_reference(student, teacher), student))
    same(one, with_gradients(attention_kl(student, teacher), student))


def test_a_query_without_a_key_adds_nothing():
    student, teacher = traces(3, masked=True)
    assert student.key_mask is not None
    student.key_mask[1] = False
    one = with_gradients(kl_by_attention(student, teacher), student)
    same(one, with_gradients(attention_kl(student, teacher), student))
    assert all(torch.isfinite(part).all() for part in one)


def test_normalisers_are_streamed_in_any_chunks():
    student, _ = traces(4, masked=True)
    assert student.key_mask is not None
    whole = log_normalisers(student)
    for chunk in (1, 7, 50):
        torch.testing.assert_close(log_normalisers(student, chunk), whole)
    scores = student.q * student.scale @ student.k.transpose(-1, -2)
    scores = scores.masked_fill(~student.key_mask[:, None, None, :], float("-inf"))
    torch.testing.assert_close(whole, scores.logsumexp(-1).detach())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_half_precision_stays_close(dtype):
    student, teacher = traces(5, sizes=(2, 4, 20, 20), dims=(16, 16), dtype=dtype)
    wide = [AttentionTrace(t.q.double(), t.k.double(), t.scale) for t in (student, teacher)]
    tolerance = 1e-5 if dtype == torch.float32 else 2e-2
    for fast, plain in (
        (kl_by_attention, attention_kl_reference),
        (scores_mse, scores_mse_reference),
    ):
        truth = plain(*wide)
        torch.testing.assert_close(
            fast(student, teacher).double(), truth, rtol=tolerance, atol=tolerance
        )
