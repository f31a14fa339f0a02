"""attention_kd: the reference against autograd, the kernels under emulation against float64."""

from __future__ import annotations

import itertools
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from torch import Tensor

from models.kernels import attention_kd as family
from models.kernels import reference_attention as reference
from tests.emulation import emulation

KINDS = ("probabilities", "kl", "scores")
# Relative L2 of dq and dk against float64 from the same inputs; the loss is fp32 in every type.
TOLERANCE = {torch.float32: 2e-6, torch.float16: 1e-3, torch.bfloat16: 5e-3}
LOSS = 1e-6


@dataclass
class Case:
    """Fields in the order of the op's arguments."""

    q: Tensor
    k: Tensor
    teacher_q: Tensor
    teacher_k: Tensor
    mask: Tensor | None
    teacher_mask: Tensor | None
    weight: Tensor | None
    scale: float
    teacher_scale: float
    causal: bool
    teacher_causal: bool
    kind: str

    @property
    def arguments(self) -> tuple[Any, ...]:
        return tuple(getattr(self, name) for name in self.__dataclass_fields__)

    def double(self) -> Case:
        names = ("q", "k", "teacher_q", "teacher_k", "weight")
        tensors = {name: getattr(self, name) for name in names}
        wide = {name: None if t is None else t.double() for name, t in tensors.items()}
        return replace(self, **wide)


def make(
    kind: str,
    dtype: torch.dtype = torch.float32,
    shape: tuple[int, int, int, int] = (1, 2, 70, 97),
    depths: tuple[int, int] = (64, 64),
    teacher_dtype: torch.dtype | None = None,
    seed: int = 0,
) -> Case:
    torch.manual_seed(seed)
    rows, heads, queries, keys = shape
    tensors = []
    for depth, element in zip(depths, (dtype, teacher_dtype or dtype), strict=True):
        tensors.append(torch.randn(rows, heads, queries, depth).to(element))
        tensors.append(torch.randn(rows, heads, keys, depth).to(element))
    scales = [depth**-0.5 for depth in depths]
    return Case(*tensors, None, None, None, *scales, False, False, kind)  # type: ignore[arg-type]


def truth(case: Case, upstream: float = 3.0) -> tuple[Tensor, Tensor, Tensor]:
    """loss, dq, dk in float64, written with torch's softmax on whole maps and plain autograd."""
    wide = case.double()
    q, k = wide.q.requires_grad_(), wide.k.requires_grad_()
    maps, seen = [], []
    sides = ((q, k, case.mask, case.scale, case.causal),)
    sides += (
        (
            wide.teacher_q,
            wide.teacher_k,
            case.teacher_mask,
            case.teacher_scale,
            case.teacher_causal,
        ),
    )
    for queries, keys, mask, scale, causal in sides:
        visible = torch.ones(q.shape[0], 1, q.shape[2], k.shape[2], dtype=torch.bool)
        if mask is not None:
            visible &= mask[:, None, None, :]
        if causal:
            visible &= torch.ones(q.shape[2], k.shape[2], dtype=torch.bool).tril()
        seen.append(visible)
        scores = torch.einsum("bhid,bhjd->bhij", queries, keys) * scale
        maps.append(scores)
    if case.kind == "scores":
        row = ((maps[0] - maps[1]) * (seen[0] & seen[1])).square().sum(-1)
    else:
        weights = [s.exp() * v for s, v in zip(maps, seen, strict=True)]
        p, t = (w / w.sum(-1, keepdim=True).clamp_min(1e-300) for w in weights)
        if case.kind == "probabilities":
            row = (p - t).square().sum(-1)
        else:
            row = torch.where(t > 0, t * ((t + (t == 0)).log() - (p + (t == 0)).log()), 0.0).sum(-1)
    if wide.weight is not None:
        row = row * wide.weight[..., None]
    loss = row.sum() / max(1, row.numel())
    dq, dk = torch.autograd.grad(loss * upstream, (q, k))
    return loss.detach(), dq, dk


def run(case: Case, upstream: float = 3.0, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """loss, dq, dk of the emulated kernels, whose outputs are full of NaN before."""
    with emulation(seed):
        loss, statistics = family.launch(*case.arguments)
        gradients = family.launch_backward(torch.tensor(upstream), statistics, *case.arguments)
    return loss, *gradients


def error(found: Tensor, expected: Tensor) -> float:
    """Relative L2; NaN when something was not written."""
    scale = expected.norm().clamp_min(1e-30)
    return float((found.double() - expected).norm() / scale)


def compare(case: Case, tolerance: float | None = None) -> None:
    found, expected = run(case), truth(case)
    bound = tolerance or TOLERANCE[case.q.dtype]
    for name, a, b, limit in zip(
        ("loss", "dq", "dk"), found, expected, (LOSS, bound, bound), strict=True
    ):
        assert a.shape == b.shape
        assert error(a, b) <= limit, f"{name} is off by {error(a, b):.2g}"


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("causal", [False, True])
def test_reference_is_the_definition_and_differentiable(kind: str, causal: bool) -> None:
    case = make(kind, torch.float64, (2, 2, 3, 5), (4, 3))
    mask = torch.tensor([[True, False, True, True, False], [True] * 5])
    case = replace(case, mask=mask, teacher_mask=mask, causal=causal, teacher_causal=causal)
    case = replace(case, weight=torch.rand(2, 2, dtype=torch.float64))
    loss, dq, dk = truth(case)
    torch.testing.assert_close(reference.attention_kd(*case.arguments), loss)
    found = reference.attention_kd_backward(torch.tensor(3.0).double(), *case.arguments)
    torch.testing.assert_close(found, (dq, dk))
    rest = case.arguments[2:]
    leaves = (case.q.requires_grad_(), case.k.requires_grad_())
    assert torch.autograd.gradcheck(lambda q, k: reference.attention_kd(q, k, *rest), leaves)
    assert torch.autograd.gradgradcheck(lambda q, k: reference.attention_kd(q, k, *rest), leaves)
    # The registered op, in double, by its own backward.
    assert torch.autograd.gradcheck(lambda q, k: family.kernel(q, k, *rest), leaves)


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_kernels_against_float64(kind: str, dtype: torch.dtype) -> None:
    compare(make(kind, dtype))


@pytest.mark.parametrize("shape", [(1, 1, 1, 1), (2, 1, 5, 64), (1, 3, 65, 33), (1, 1, 64, 129)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_odd_sizes(shape: tuple[int, int, int, int], dtype: torch.dtype) -> None:
    case = make("probabilities", dtype, shape)
    if shape[-1] > 1:
        compare(case)
    else:  # a single key has probability 1 in both
        assert [float(x.abs().sum()) for x in run(case)] == [0.0, 0.0, 0.0]


@pytest.mark.parametrize("depths", [(32, 64), (64, 32), (16, 16), (40, 24), (7, 1), (33, 64)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_head_sizes_of_both_models(depths: tuple[int, int], dtype: torch.dtype) -> None:
    compare(make("kl", dtype, (1, 1, 20, 37), depths))


@pytest.mark.parametrize(
    "dtype, teacher", [p for p in itertools.product(TOLERANCE, TOLERANCE) if p[0] != p[1]], ids=str
)
def test_models_of_different_types(dtype: torch.dtype, teacher: torch.dtype) -> None:
    compare(make("probabilities", dtype, (1, 1, 20, 37), teacher_dtype=teacher))


def masks(kind: str, keys: int) -> Tensor:
    """(2, keys): of two rows the same kind of mask, not the same mask."""
    if kind == "all":
        return torch.ones(2, keys, dtype=torch.bool)
    if kind == "none":
        return torch.zeros(2, keys, dtype=torch.bool)
    if kind == "padding":
        return torch.arange(keys) < torch.tensor([[keys - 3], [keys // 2]])
    mask = torch.rand(2, keys) > 0.7  # a region
    mask[1] = False  # and a row that sees nothing at all
    return mask


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("which", ["all", "none", "padding", "region"])
def test_masks(which: str, kind: str, dtype: torch.dtype) -> None:
    torch.manual_seed(1)
    mask = masks(which, 37)
    case = replace(make(kind, dtype, (2, 1, 20, 37), (32, 32)), mask=mask, teacher_mask=mask)
    compare(case)
    _, dq, dk = run(case)
    blind = ~mask.any(dim=1)
    assert not dq[blind].any() and not dk.transpose(1, 2)[~mask].any()


@pytest.mark.parametrize("kind", ["probabilities", "scores"])
def test_masks_of_one_model_alone(kind: str) -> None:
    torch.manual_seed(1)
    plain = make(kind, torch.bfloat16, (2, 1, 20, 37), (32, 32))
    one, other = masks("padding", 37), torch.rand(2, 37) > 0.5
    for pair in ((one, None), (None, one), (one, other)):
        compare(replace(plain, mask=pair[0], teacher_mask=pair[1]))


def test_a_teacher_that_sees_nothing_has_no_say_in_kl() -> None:
    plain = make("kl", torch.bfloat16, (2, 1, 20, 37), (32, 32))
    seen = masks("padding", 37)
    seen[1] = False
    case = replace(plain, teacher_mask=seen)
    compare(case)
    _, dq, dk = run(case)
    assert not dq[1].any() and not dk[1].any()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", [(1, 1, 70, 70), (1, 1, 9, 33), (1, 1, 33, 9)])
def test_causal(shape: tuple[int, int, int, int], kind: str) -> None:
    both = replace(make(kind, torch.bfloat16, shape), causal=True, teacher_causal=True)
    compare(both)
    if kind != "kl":
        compare(replace(both, causal=False))
        compare(replace(both, teacher_causal=False))


def test_a_key_that_the_teacher_alone_sees_is_infinitely_far() -> None:
    mask = torch.ones(1, 9, dtype=torch.bool)
    case = make("kl", torch.float32, (1, 1, 5, 9), (8, 8))
    hidden = mask.clone()
    hidden[0, 3] = False
    case = replace(case, mask=hidden, teacher_mask=mask)
    loss, dq, dk = run(case)
    assert loss.isinf() and reference.attention_kd(*case.arguments).isinf()
    expected = reference.attention_kd_backward(torch.tensor(3.0), *case.arguments)
    torch.testing.assert_close((dq, dk), expected)


@pytest.mark.parametrize("shape", [(2,), (2, 2)])
def test_weights_of_heads(shape: tuple[int, ...]) -> None:
    case = make("probabilities", torch.float32, (2, 2, 9, 11), (16, 16))
    weight = torch.rand(shape)
    weight.view(-1)[0] = 0.0
    compare(replace(case, weight=weight))
    compare(replace(case, weight=weight.bfloat16()))
    _, dq, _ = run(replace(case, weight=weight))
    assert not dq[0, 0].any()


def layouts(x: Tensor, kind: str) -> Tensor:
    """The numbers of x (B, H, N, d) in memory that is laid out differently."""
    rows, heads, tokens, depth = x.shape
    if kind == "projected":  # as linear layers leave it
        return x.transpose(1, 2).contiguous().transpose(1, 2)
    if kind == "packed":  # as one projection to q, k, v leaves it
        buffer = x.new_full((rows, tokens, 3, heads, depth), torch.nan)
        return buffer[:, :, 1].transpose(1, 2).copy_(x)
    if kind == "misaligned":
        buffer = x.new_full((x.numel() + 1,), torch.nan)
        return buffer[1:].view(x.shape).copy_(x)
    if kind == "odd rows":
        buffer = x.new_full((rows, heads, tokens, depth + 3), torch.nan)
        return buffer[..., :depth].copy_(x)
    if kind == "expanded":
        return x[:1].expand(rows, -1, -1, -1)
    return x.transpose(2, 3).contiguous().transpose(2, 3)  # depth is not contiguous


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    "kind", ["projected", "packed", "misaligned", "odd rows", "expanded", "depth"]
)
def test_layouts(kind: str, dtype: torch.dtype) -> None:
    names = ("q", "k", "teacher_q", "teacher_k")
    case = make("probabilities", dtype, (2, 2, 9, 11), (16, 16))
    if kind == "expanded":
        case = replace(case, **{name: getattr(case, name)[:1].repeat(2, 1, 1, 1) for name in names})
    expected = run(case)
    for changed in (names[:1], names[3:], names):
        found = run(replace(case, **{n: layouts(getattr(case, n), kind) for n in changed}))
        for a, b in zip(found, expected, strict=True):
            assert torch.equal(a, b)
    if kind == "projected":
        assert found[1].transpose(1, 2).is_contiguous()


@pytest.mark.parametrize("shape", [(0, 2, 3, 5), (2, 0, 3, 5), (2, 2, 0, 5), (2, 2, 3, 0)])
@pytest.mark.parametrize("kind", KINDS)
def test_empty(shape: tuple[int, int, int, int], kind: str) -> None:
    case = make(kind, torch.bfloat16, shape, (8, 8))
    loss, dq, dk = run(case)
    assert loss == 0 and not dq.any() and not dk.any()
    assert reference.attention_kd(*case.arguments) == 0


def test_near_the_teacher_the_difference_keeps_its_precision() -> None:
    """A loss in terms of normalisers would be off by 4e-2 here."""
    case = make("probabilities", torch.float32)
    near = case.q + 1e-3 * torch.randn_like(case.q)
    case = replace(case, teacher_q=near, teacher_k=case.k)
    errors = [error(a, b) for a, b in zip(run(case), truth(case), strict=True)]
    assert errors[0] < 5e-4 and max(errors) < 2e-3


def test_small_gradients_survive_fp16() -> None:
    """Long rows, near the teacher: gradients of scores are far below the range of fp16."""
    case = make("probabilities", torch.float16, (1, 1, 16, 577), (64, 64))
    case = replace(case, teacher_q=case.q + (0.02 * torch.randn(case.q.shape)).half())
    case = replace(case, teacher_k=case.k)
    found, expected = run(case, upstream=2.0**16), truth(case, upstream=2.0**16)
    assert error(found[1], expected[1]) < 5e-3
    assert error(found[2], expected[2]) < 5e-3


def test_large_scores_do_not_overflow() -> None:
    case = make("probabilities", torch.float16, (1, 1, 20, 37), (64, 64))
    compare(replace(case, q=case.q * 30, teacher_q=case.teacher_q * 30))


def test_nan_shows() -> None:
    for kind, name in itertools.product(KINDS, ("q", "k", "teacher_q", "teacher_k")):
        case = make(kind, torch.bfloat16, (1, 1, 5, 9), (16, 16))
        getattr(case, name)[0, 0, 3, 2] = torch.nan
        loss, dq, _ = run(case)
        assert loss.isnan() and dq[0, 0, 3].isnan().all()


def test_every_run_and_every_order_of_threads_gives_the_same_bits() -> None:
    case = make("probabilities", torch.bfloat16, (1, 2, 70, 97), (32, 32))
    first = run(case)
    for seed in range(1, 4):
        for a, b in zip(run(case, seed=seed), first, strict=True):
            assert torch.equal(a, b)


def test_gradients_that_are_not_wanted_are_not_returned() -> None:
    case = make("kl", torch.float32, (1, 1, 5, 9), (8, 8))
    case.k.requires_grad_()
    family.attention_kd(*case.arguments).backward()
    assert case.q.grad is None and case.k.grad is not None
    expected = truth(case, 1.0)[2]
    assert error(case.k.grad, expected) < 1e-6


@pytest.mark.parametrize("kind", KINDS)
def test_opcheck(kind: str) -> None:
    op = torch.ops.espalier.attention_kd.default
    case = make(kind, torch.float32, (2, 2, 3, 5), (8, 4))
    mask = torch.rand(2, 5) > 0.3
    projected = layouts(case.q, "projected").requires_grad_()
    case = replace(case, q=projected, mask=mask, teacher_mask=mask, weight=torch.rand(2))
    case.k.requires_grad_()
    torch.library.opcheck(op, case.arguments)
    with torch.no_grad():
        _, statistics = op(*case.arguments)
    plain = tuple(x.detach() if isinstance(x, Tensor) else x for x in case.arguments)
    backward = torch.ops.espalier.attention_kd_backward.default
    torch.library.opcheck(backward, (torch.tensor(1.0), statistics, *plain))


def test_statistics_are_what_the_reference_says() -> None:
    for kind in KINDS:
        mask = torch.rand(1, 97) > 0.3
        case = replace(make(kind), mask=mask, teacher_mask=mask)
        with emulation():
            _, found = family.launch(*case.arguments)
        rest = (*case.arguments[:6], *case.arguments[7:])
        torch.testing.assert_close(found, reference.attention_statistics(*rest))


def test_second_derivatives_are_refused() -> None:
    case = make("kl", torch.float32, (1, 1, 5, 9), (8, 8))
    case.q.requires_grad_()
    (dq,) = torch.autograd.grad(family.kernel(*case.arguments), case.q, create_graph=True)
    with pytest.raises(RuntimeError, match="no derivative"):
        dq.sum().backward()


def test_unfit_arguments_are_refused() -> None:
    case = make("kl", torch.float32, (2, 2, 5, 9), (8, 8))
    wrong = {
        "kind": "mse",
        "teacher_k": case.teacher_k[:, :1],
        "k": case.k.bfloat16(),
        "mask": torch.ones(2, 8, dtype=torch.bool),
        "teacher_mask": torch.ones(2, 9),
        "weight": torch.ones(3),
    }
    for name, value in wrong.items():
        with pytest.raises(ValueError, match="attention_kd"):
            family.attention_kd(*replace(case, **{name: value}).arguments)
    wide = torch.zeros(1, 1, 2, 65)
    assert "65" in (family.unsupported(wide, wide) or "")
    assert "float64" in (family.unsupported(case.q, case.q.double()) or "")
    with emulation(), pytest.raises(RuntimeError, match="sizes"):
        family.launch(*make("kl", torch.float32, (1, 1, 2, 2), (65, 64)).arguments)
    with emulation(), pytest.raises(TypeError, match="float64"):
        family.launch(*case.double().arguments)


def test_on_a_cpu_auto_is_the_reference() -> None:
    case = make("probabilities", torch.bfloat16, (1, 1, 5, 9), (8, 8))
    expected = reference.attention_kd(*case.arguments)
    assert torch.equal(family.attention_kd(*case.arguments), expected)


def test_compiled_code_takes_the_op_in() -> None:
    case = make("probabilities", torch.float32, (1, 1, 5, 9), (8, 8))
    rest = case.arguments[1:]

    def loss(q: Tensor) -> Tensor:
        return family.kernel(2 * q, *rest)

    q = (0.5 * case.q).requires_grad_()
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")(q)
    (found,) = torch.autograd.grad(compiled, q)
    (expected,) = torch.autograd.grad(loss(q), q)
    torch.testing.assert_close(found, expected)
