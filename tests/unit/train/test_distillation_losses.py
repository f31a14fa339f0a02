"""Distillation: layer maps; streamed attention against its definition, with gradients."""

from __future__ import annotations

import math
from dataclasses import replace
from itertools import product
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.autograd import gradcheck

from models import presets
from models.config import ModelConfig
from models.outputs import AttentionTrace, EncoderOutput
from train.config import KdConfig
from train.losses.attention_algebra import kl_by_attention, scores_mse
from train.losses.distillation import (
    attention_kl,
    attention_kl_reference,
    attention_mse,
    attention_mse_reference,
    attention_probabilities,
    attention_sum,
    capture_for_student,
    capture_for_teacher,
    contrastive_kl,
    hidden_mse,
    layer_pairs,
    logits_kl,
)
from train.losses.vl import Similarities
from train.tasks.kd import hidden_projections, pass_terms, stack_pairs

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


def test_depths_that_do_not_divide() -> None:
    assert layer_pairs(4, 6).attention == ((0, 1), (1, 2), (2, 4), (3, 5))
    assert layer_pairs(4, 6).hidden == ((0, 0), (1, 2), (2, 3), (3, 5), (4, 6))
    assert layer_pairs(2, 3).attention == ((0, 1), (1, 2))


@given(st.integers(1, 30), st.integers(0, 30))
@settings(max_examples=60, deadline=None)
def test_even_maps(student: int, extra: int) -> None:
    teacher = student + extra
    pairs = layer_pairs(student, teacher)
    taught = [j for _, j in pairs.attention]
    assert [i for i, _ in pairs.attention] == list(range(student))
    assert taught == sorted(set(taught)) and taught[-1] == teacher - 1
    for i, j in pairs.attention:  # never further from the same share of the depth than half a layer
        assert abs(2 * (j + 1) * student - 2 * (i + 1) * teacher) <= student
    assert pairs.hidden == ((0, 0), *((i + 1, j + 1) for i, j in pairs.attention))


def test_maps_by_hand() -> None:
    pairs = layer_pairs(3, 4, (3, 0, 0))
    assert pairs.attention == ((0, 3), (1, 0), (2, 0))
    assert pairs.hidden == ((0, 0), (1, 4), (2, 1), (3, 1))
    assert layer_pairs(3, 2, (0, 1, 1)).teacher_layers == 2
    assert layer_pairs(0, 2, ()).hidden == ((0, 0),)


@pytest.mark.parametrize(
    ("student", "teacher", "layer_map", "message"),
    [
        (4, 2, None, "no even map from 2 teacher to 4 student layers; give kd.text_map"),
        (0, 2, None, "give kd.text_map"),
        (2, 4, (1,), r"kd.text_map \(1,\) needs 2 entries from 0 to 3"),
        (2, 4, (1, 4), "needs 2 entries from 0 to 3"),
        (2, 4, (-1, 1), "needs 2 entries from 0 to 3"),
    ],
)
def test_maps_that_do_not_fit(
    student: int, teacher: int, layer_map: tuple[int, ...] | None, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        layer_pairs(student, teacher, layer_map, "text")


def test_layers_in_pairs_learn_from_the_same_turn() -> None:
    """Pair 0 learns from pair 1: layers 0, 1 from 2, 3, and each state from what its teacher puts
    out.
    """
    pairs = layer_pairs(1, 2).doubled()
    assert (pairs.student_layers, pairs.teacher_layers) == (2, 4)
    assert pairs.attention == ((0, 2), (1, 3))
    assert pairs.hidden == ((0, 0), (1, 3), (2, 4))
    assert all(i % 2 == j % 2 for i, j in layer_pairs(3, 6).doubled().attention)


def _config(**changes: Any) -> ModelConfig:
    return presets.config("blocksworld-micro-student", **changes)


def _teacher(**changes: Any) -> ModelConfig:
    return presets.config("blocksworld-micro-teacher", **changes)


def test_stacks_follow_their_maps() -> None:
    kd = KdConfig(vision_map=(0, 2), fusion_map=(0,))
    pairs = stack_pairs(kd, _config(), _teacher())
    assert pairs.vision.attention == ((0, 0), (1, 2)) and pairs.decoder is None
    assert pairs.text.attention == ((0, 1),) and pairs.fusion.attention == ((0, 0),)
    decoder = stack_pairs(KdConfig(), _config(form="vqa"), _teacher(form="vqa")).decoder
    assert decoder == layer_pairs(1, 2)
    with pytest.raises(ValueError, match="kd.vision_map .* needs 2 entries"):
        stack_pairs(KdConfig(vision_map=(0,)), _config(), _teacher())
    with pytest.raises(ValueError, match="kd.decoder_map: student and teacher do not both"):
        stack_pairs(KdConfig(decoder_map=(0,)), _config(), _teacher())


def test_two_images_are_paired_by_turn() -> None:
    forms = (_config().as_form("nlvr2"), _teacher().as_form("nlvr2"))
    pairs = stack_pairs(KdConfig(), *forms)
    assert pairs.fusion == layer_pairs(1, 2).doubled()
    with pytest.raises(ValueError, match="same number of images"):
        stack_pairs(KdConfig(), _config(), forms[1])


@pytest.mark.parametrize(
    ("changes", "kd", "message"),
    [
        ({"vision": {"heads": (2, 1), "head_dim": 16}}, {}, "vision.heads: layer 0 .* has 2 heads"),
        ({"text": {"heads": (1, 2), "head_dim": 16}}, {}, r"text.heads \(fusion\): layer 0"),
        ({"text": {"cross_heads": (2,)}}, {"cross_attention": True}, "text.cross_heads: layer 0"),
        ({"vision": {"register_tokens": 2}}, {}, r"image tokens differ: the student has 3 \+ 36"),
        ({"vision": {"patch_size": 16}}, {"attention": "none"}, r"student has 1 \+ 9 patches"),
    ],
)
def test_what_may_not_differ(changes: dict[str, Any], kd: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        stack_pairs(KdConfig(**kd), _config(**changes), _teacher())


@pytest.mark.parametrize("form", ["vqa", "captioning"])
def test_scores_of_a_decoder_are_refused_before_the_first_step(form: str) -> None:
    pair = (_config(form=form), _teacher(form=form))
    with pytest.raises(
        ValueError, match=r"kd\.attention=scores .* use kd\.attention=probabilities or kl"
    ):
        stack_pairs(KdConfig(attention="scores"), *pair)
    stack_pairs(KdConfig(attention="kl"), *pair)
    stack_pairs(KdConfig(attention="scores"), _config(), _teacher())


def test_heads_may_differ_where_no_map_is_compared() -> None:
    other = _config(vision={"heads": (2, 2)}, text={"cross_heads": (2,)})
    stack_pairs(KdConfig(attention="none"), other, _teacher())
    smaller = _config(vision={"head_dim": 16}, text={"cross_heads": (3,)})
    stack_pairs(KdConfig(), smaller, _teacher())


def test_projections_exist_where_widths_differ() -> None:
    assert not hidden_projections(_config(), _teacher())
    wide = _teacher(form="vqa", **{"vision.width": 64, "text.width": 48})
    found = hidden_projections(_config(form="vqa"), wide)
    shapes = {name: tuple(part.state_dict()["weight"].shape) for name, part in found.items()}
    assert shapes == {"vision": (64, 32), "text": (48, 32), "decoder": (48, 32)}
    assert set(hidden_projections(_config(), _teacher(**{"text.width": 48}))) == {"text"}
    states = torch.randn(5, 32)  # an isometry at first
    torch.testing.assert_close(found["vision"](states).norm(dim=1), states.norm(dim=1))


def test_projected_states_are_compared_and_the_projection_learns() -> None:
    torch.manual_seed(0)
    pairs = layer_pairs(1, 2)
    project = torch.nn.Linear(4, 6)
    student = {i: torch.randn(2, 3, 4, requires_grad=True) for i in range(2)}
    teacher = {i: torch.randn(2, 3, 6) for i in (0, 2)}
    ours, theirs = (
        EncoderOutput(last=states[max(states)], hidden=states) for states in (student, teacher)
    )
    kd = KdConfig(attention="none")
    loss = pass_terms(kd, ours, theirs, pairs, project=project)["hidden"]
    expected = sum(F.mse_loss(project(student[i]), teacher[2 * i]) for i in range(2))
    torch.testing.assert_close(loss, expected)
    loss.backward()
    assert project.weight.grad is not None and student[1].grad is not None
    optimizer = torch.optim.SGD(project.parameters(), lr=0.1)
    optimizer.step()
    assert pass_terms(kd, ours, theirs, pairs, project=project)["hidden"] < loss
    with pytest.raises(ValueError, match="equal widths or a projection"):
        pass_terms(kd, ours, theirs, pairs)


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


@pytest.mark.parametrize(
    ("kind", "one"),
    [("probabilities", attention_mse), ("kl", attention_kl), ("scores", scores_mse)],
)
def test_sum_over_pairs(kind: Any, one: Any) -> None:
    student, teacher = _traces(masked=True, causal=False)
    total = attention_sum(
        {0: student, 1: teacher}, {1: teacher, 3: student}, ((0, 1), (1, 3)), kind
    )
    torch.testing.assert_close(total, one(student, teacher) + one(teacher, student))


@pytest.mark.parametrize("eps", [1.0, 0.02])
def test_kl_by_attention_of_half_inputs_is_as_good_as_streamed(eps: float) -> None:
    """Near agreement, attention in bfloat16 would lose a third of the gradient."""
    generator = torch.Generator().manual_seed(0)
    base = torch.randn(2, 1, 2, 9, 8, generator=generator)
    moved = base + eps * torch.randn(2, 1, 2, 9, 8, generator=generator)
    pairs = []
    for dtype in (torch.bfloat16, torch.float64):
        (tq, tk), (q, k) = (x.bfloat16().to(dtype).unbind(0) for x in (base, moved))
        pairs.append((_leaves(AttentionTrace(q, k, 0.35)), AttentionTrace(tq, tk, 0.35)))
    (half, theirs), (exact, wide) = pairs
    loss, wanted = kl_by_attention(half, theirs), attention_kl_reference(exact, wide)
    torch.testing.assert_close(loss.double(), wanted, rtol=1e-3, atol=0)
    loss.backward()
    wanted.backward()
    for ours, true in ((half.q.grad, exact.q.grad), (half.k.grad, exact.k.grad)):
        assert ours is not None and ours.dtype == torch.bfloat16 and true is not None
        assert (ours.double() - true).norm() < 0.01 * true.norm()


@given(st.integers(1, 3), st.integers(1, 3), st.integers(1, 4), st.integers(0, 999))
@settings(max_examples=20, deadline=None)
def test_hidden_states_by_loops(rows: int, tokens: int, width: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    ours, theirs = torch.randn(2, rows, tokens, width, generator=generator, dtype=torch.float64)
    total = 0.0
    for b, n, d in product(range(rows), range(tokens), range(width)):
        total += float(ours[b, n, d] - theirs[b, n, d]) ** 2
    loss = hidden_mse({0: ours}, {0: theirs}, layer_pairs(0, 0))
    assert loss.item() == pytest.approx(total / (rows * tokens * width), rel=1e-9)


@given(st.integers(1, 4), st.integers(0, 999), st.sampled_from([1.0, 3.0]))
@settings(max_examples=20, deadline=None)
def test_similarities_by_loops(rows: int, seed: int, temperature: float) -> None:
    generator = torch.Generator().manual_seed(seed)
    tables = torch.randn(4, rows, rows + 1, generator=generator, dtype=torch.float64)
    total = 0.0
    for ours, theirs in ((tables[0], tables[2]), (tables[1], tables[3])):
        for b in range(rows):
            p, t = (x[b].div(temperature).exp() for x in (ours, theirs))
            p, t = (p / p.sum()).tolist(), (t / t.sum()).tolist()
            total += sum(y * math.log(y / x) for x, y in zip(p, t, strict=True))
    student, teacher = Similarities(tables[0], tables[1]), Similarities(tables[2], tables[3])
    loss = contrastive_kl(student, teacher, temperature)
    assert loss.item() == pytest.approx(total / (2 * rows), rel=1e-9, abs=1e-12)


def test_logits_kl() -> None:
    torch.manual_seed(0)
    student = torch.randn(2, 3, 5, requires_grad=True)
    teacher = torch.randn(2, 3, 5, requires_grad=True)
    rows = []
    for i, j in product(range(2), range(3)):
        t, s = teacher[i, j].div(2).softmax(0), student[i, j].div(2).softmax(0)
        rows.append(torch.stack([t[c] * (t[c].log() - s[c].log()) for c in range(5)]).sum())
    torch.testing.assert_close(logits_kl(student, teacher, 2.0), torch.stack(rows).mean())
    mask = torch.tensor([[True, False, False], [False, True, False]])
    torch.testing.assert_close(logits_kl(student, teacher, 2.0, mask), (rows[0] + rows[4]) / 2)
    assert logits_kl(student, teacher, 2.0, torch.zeros(2, 3, dtype=torch.bool)) == 0
    logits_kl(student, teacher).backward()
    assert teacher.grad is None and student.grad is not None
    with pytest.raises(ValueError, match="vocabulary"):
        logits_kl(torch.zeros(2, 3), torch.zeros(2, 4))
