"""Distillation: layer maps; streamed attention against its definition, with gradients."""

from __future__ import annotations

from dataclasses import replace
from itertools import product

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import gradcheck

from models.outputs import AttentionTrace
from train.losses.distillation import (
    attention_kl,
    attention_kl_reference,
    attention_mse,
    attention_mse_reference,
    attention_probabilities,
    attention_sum,
    capture_for_student,
    capture_for_teacher,
    hidden_mse,
    layer_pairs,
    logits_kl,
)

STREAMED = {
    "mse": (attention_mse, attention_mse_reference),
    "kl": (attention_kl, attention_kl_reference),
}


def test_published_maps() -> None:
    pairs = layer_pairs(6, 12)
    assert pairs.hidden == tuple((i, 2 * i) for i in range(7))
    assert pairs.attention == tuple((i, 2 * i + 1) for i in range(6))
    assert layer_pairs(2, 2).attention == ((0, 0), (1, 1))
    assert layer_pairs(2, 6).hidden == ((0, 0), (1, 3), (2, 6))
    assert layer_pairs(2, 6).attention == ((0, 2), (1, 5))


def test_maps_of_a_pass_through_two_stacks() -> None:
    assert layer_pairs(3, 6).then(layer_pairs(3, 6)) == layer_pairs(6, 12)
    mixed = layer_pairs(1, 1).then(layer_pairs(2, 4))
    assert mixed.hidden == ((0, 0), (1, 1), (2, 3), (3, 5))
    assert mixed.attention == ((0, 0), (1, 2), (2, 4))
    assert layer_pairs(0, 0).then(layer_pairs(1, 2)) == layer_pairs(1, 2)


@pytest.mark.parametrize(("student", "teacher"), [(2, 3), (0, 2), (4, 2)])
def test_maps_that_do_not_divide(student: int, teacher: int) -> None:
    with pytest.raises(ValueError, match="multiple"):
        layer_pairs(student, teacher)


def test_captures() -> None:
    pairs = layer_pairs(2, 4)
    student, teacher = capture_for_student(pairs), capture_for_teacher(pairs)
    assert (student.hidden, student.attention) == ({0, 1, 2}, {0, 1})
    assert (teacher.hidden, teacher.attention) == ({0, 2, 4}, {1, 3})
    assert not student.cross_attention and not teacher.cross_attention
    cross = capture_for_teacher(pairs, hidden=False, attention=False, cross_from=1)
    assert (cross.hidden, cross.attention, cross.cross_attention) == (set(), set(), {3})


def test_hidden_states() -> None:
    torch.manual_seed(0)
    pairs = layer_pairs(2, 4)
    student = {i: torch.randn(2, 3, 4, requires_grad=True) for i in range(3)}
    teacher = {i: torch.randn(2, 3, 4, requires_grad=True) for i in (0, 2, 4)}
    each = [F.mse_loss(student[i], teacher[2 * i]) for i in range(3)]
    torch.testing.assert_close(hidden_mse(student, teacher, pairs), sum(each))
    torch.testing.assert_close(
        hidden_mse(student, teacher, pairs, drop_last=True), each[0] + each[1]
    )
    hidden_mse(student, teacher, pairs, drop_last=True).backward()
    assert student[2].grad is None and student[0].grad is not None and teacher[0].grad is None


def test_hidden_states_of_different_width() -> None:
    with pytest.raises(
        ValueError, match=r"state 0 of the student is \(1, 2, 4\)(.|\n)*\(1, 2, 6\)"
    ):
        hidden_mse({0: torch.zeros(1, 2, 4)}, {0: torch.zeros(1, 2, 6)}, layer_pairs(0, 0))


def test_half_states_are_compared_in_float32() -> None:
    big = {0: torch.full((1, 2, 4), 300.0, dtype=torch.half)}
    loss = hidden_mse(big, {0: -big[0]}, layer_pairs(0, 0))
    assert loss == 360_000


def _traces(
    masked: bool, causal: bool, queries: int = 5, keys: int = 5, dtype: torch.dtype = torch.float64
) -> tuple[AttentionTrace, AttentionTrace]:
    generator = torch.Generator().manual_seed(1)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

    mask = None
    if masked:
        mask = torch.rand(3, keys, generator=generator) > 0.4
        mask[:, 0] = True
        mask[1] = True
        mask[1, 2:] = False
    student = AttentionTrace(draw(3, 2, queries, 4), draw(3, 2, keys, 4), 0.5, mask, causal)
    # The teacher's head size is another one: only the maps have to agree.
    teacher = AttentionTrace(draw(3, 2, queries, 6), draw(3, 2, keys, 6), 0.4, mask, causal)
    return student, teacher


CASES = [
    pytest.param(
        masked, causal, queries, keys, id=f"mask{masked:d}-causal{causal:d}-{queries}x{keys}"
    )
    for masked, causal, (queries, keys) in product((False, True), (False, True), ((5, 5), (4, 7)))
]


def _leaves(trace: AttentionTrace) -> AttentionTrace:
    return replace(trace, q=trace.q.clone().requires_grad_(), k=trace.k.clone().requires_grad_())


@pytest.mark.parametrize("kind", STREAMED)
@pytest.mark.parametrize("chunk", [None, 1, 25, 80])
@pytest.mark.parametrize(("masked", "causal", "queries", "keys"), CASES)
def test_streamed_is_the_definition(
    kind: str, chunk: int | None, masked: bool, causal: bool, queries: int, keys: int
) -> None:
    streamed, reference = STREAMED[kind]
    student, teacher = _traces(masked, causal, queries, keys)
    ours, plain = _leaves(student), _leaves(student)
    loss, wanted = streamed(ours, _leaves(teacher), chunk=chunk), reference(plain, teacher)
    torch.testing.assert_close(loss, wanted, rtol=1e-12, atol=1e-12)
    (loss * 3).backward()
    (wanted * 3).backward()
    torch.testing.assert_close(ours.q.grad, plain.q.grad, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(ours.k.grad, plain.k.grad, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("kind", STREAMED)
@pytest.mark.parametrize(("masked", "causal", "queries", "keys"), CASES)
def test_gradients(kind: str, masked: bool, causal: bool, queries: int, keys: int) -> None:
    student, teacher = _traces(masked, causal, queries, keys)

    def loss(q: Tensor, k: Tensor) -> Tensor:
        return STREAMED[kind][0](replace(student, q=q, k=k), teacher, chunk=30)

    leaves = _leaves(student)
    assert gradcheck(loss, (leaves.q, leaves.k))


def test_definition_by_hand() -> None:
    """Keys * mean squared difference; hidden keys and padded queries count in the mean."""
    student, teacher = _traces(masked=True, causal=False)
    p, t = attention_probabilities(student), attention_probabilities(teacher)
    assert student.key_mask is not None
    hidden = ~student.key_mask[:, None, None, :].expand_as(p)
    assert (p[hidden] == 0).all()
    torch.testing.assert_close(p.sum(-1), torch.ones_like(p.sum(-1)))
    torch.testing.assert_close(attention_mse(student, teacher), 5 * ((p - t) ** 2).mean())
    kl = F.kl_div(p.clamp(min=1e-300).log(), t, reduction="sum") / p[..., 0].numel()
    torch.testing.assert_close(attention_kl(student, teacher), kl)


@pytest.mark.parametrize("kind", STREAMED)
def test_a_query_without_any_visible_key_adds_nothing(kind: str) -> None:
    student, teacher = _traces(masked=True, causal=False)
    assert student.key_mask is not None
    student.key_mask[0] = False
    streamed, reference = STREAMED[kind]
    leaves, plain = _leaves(student), _leaves(student)
    loss, wanted = streamed(leaves, teacher), reference(plain, teacher)
    torch.testing.assert_close(loss, wanted)
    loss.backward()
    wanted.backward()
    assert leaves.q.grad is not None and (leaves.q.grad[0] == 0).all()
    torch.testing.assert_close(leaves.k.grad, plain.k.grad)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("kind", STREAMED)
def test_half_inputs_are_computed_in_float32(kind: str, dtype: torch.dtype) -> None:
    streamed, reference = STREAMED[kind]
    student, teacher = _traces(masked=True, causal=False, dtype=dtype)
    ours, plain = _leaves(student), _leaves(student)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = streamed(ours, teacher)
    wanted = reference(plain, teacher)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, wanted, rtol=1e-5, atol=1e-6)
    loss.backward()
    wanted.backward()
    assert ours.q.grad is not None and ours.q.grad.dtype == dtype
    torch.testing.assert_close(ours.q.grad, plain.q.grad, rtol=2e-2, atol=1e-4)


def test_small_gradients_of_half_inputs_survive_until_the_loss_scale() -> None:
    """Unscaled, these gradients lie below the smallest fp16 number."""
    student, teacher = _traces(masked=False, causal=False, dtype=torch.float16)
    leaves = _leaves(student)
    loss = attention_mse(leaves, teacher) * 1e-9
    (loss * 2.0**20).backward()
    wide = _leaves(replace(student, q=student.q.float(), k=student.k.float()))
    (attention_mse(wide, teacher) * 1e-9 * 2.0**20).backward()
    assert wide.q.grad is not None and leaves.q.grad is not None
    torch.testing.assert_close(leaves.q.grad.float(), wide.q.grad, rtol=2e-2, atol=1e-7)


def test_no_map_is_kept_for_the_backward() -> None:
    student, teacher = _traces(masked=False, causal=False, queries=40, keys=40)
    sizes: list[int] = []

    def note(tensor: Tensor) -> Tensor:
        sizes.append(tensor.numel())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        attention_mse(_leaves(student), _leaves(teacher)).backward()
    assert sizes and max(sizes) <= student.q.numel()


def test_cut_heads_are_refused() -> None:
    student, teacher = _traces(masked=False, causal=False)
    cut = replace(student, q=student.q[:, :1], k=student.k[:, :1])
    with pytest.raises(ValueError, match="gated, not cut"):
        attention_mse(cut, teacher)


def test_sum_over_pairs() -> None:
    student, teacher = _traces(masked=False, causal=False)
    total = attention_sum(
        {0: student, 1: teacher}, {1: teacher, 3: student}, ((0, 1), (1, 3)), "kl"
    )
    torch.testing.assert_close(
        total, attention_kl(student, teacher) + attention_kl(teacher, student)
    )


def test_logits_kl() -> None:
    torch.manual_seed(0)
    student = torch.randn(2, 3, 5, requires_grad=True)
    teacher = torch.randn(2, 3, 5, requires_grad=True)
    rows = [
        sum(
            t * (t.log() - s.log())
            for t, s in zip(
                teacher[i, j].div(2).softmax(0), student[i, j].div(2).softmax(0), strict=True
            )
        )
        for i, j in product(range(2), range(3))
    ]
    torch.testing.assert_close(logits_kl(student, teacher, 2.0), torch.stack(rows).mean())
    mask = torch.tensor([[True, False, False], [False, True, False]])
    torch.testing.assert_close(logits_kl(student, teacher, 2.0, mask), (rows[0] + rows[4]) / 2)
    assert logits_kl(student, teacher, 2.0, torch.zeros(2, 3, dtype=torch.bool)) == 0
    logits_kl(student, teacher).backward()
    assert teacher.grad is None and student.grad is not None
    with pytest.raises(ValueError, match="vocabulary"):
        logits_kl(torch.zeros(2, 3), torch.zeros(2, 4))
