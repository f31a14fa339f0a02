"""ffn_act_mask: the reference against autograd, the kernels under emulation against float64."""

from __future__ import annotations

import itertools
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from torch import Tensor

from models.kernels import ffn_act_mask as family
from models.kernels import reference
from tests.emulation import emulation

# Relative L2 against float64 from the same inputs; sums are accumulated in fp32 in every type.
TOLERANCE = {torch.float32: 1e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}
SUMS = 1e-5
NAMES = ("y", "dx", "dmask", "dbias")
ACTIVATIONS = ("gelu", "gelu_tanh", "quick_gelu")
KINDS = list(itertools.product(ACTIVATIONS, (False, True)))
SHAPES = [(1, 8), (37, 264), (130, 3072), (5, 37), (9, 100), (3, 3071)]


@dataclass
class Case:
    x: Tensor
    bias: Tensor | None
    mask: Tensor | None
    gradient: Tensor
    activation: str
    mask_first: bool

    @property
    def arguments(self) -> tuple[Any, ...]:
        return self.x, self.bias, self.mask, self.activation, self.mask_first


def mixed_mask(columns: int) -> Tensor:
    """Values between 0 and 1, a third exactly 0 and some exactly 1."""
    mask = torch.rand(columns)
    mask[::3], mask[1::5] = 0.0, 1.0
    return mask


def make(
    shape: tuple[int, ...], dtype: torch.dtype, activation: str, mask_first: bool, seed: int = 0
) -> Case:
    torch.manual_seed(seed)
    x, gradient = ((torch.randn(shape) * 2).to(dtype) for _ in range(2))
    bias, mask = torch.randn(shape[-1]) * 0.3, mixed_mask(shape[-1])
    return Case(x, bias, mask, gradient, activation, mask_first)


def truth(case: Case) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """y, dx, dmask, dbias in float64, by autograd of the plain formula."""
    wide = [None if t is None else t.double() for t in (case.x, case.bias, case.mask)]
    leaves = [None if t is None else t.requires_grad_() for t in wide]
    x, bias, mask = leaves
    assert x is not None
    function = {
        "gelu": torch.nn.functional.gelu,
        "gelu_tanh": lambda v: torch.nn.functional.gelu(v, approximate="tanh"),
        "quick_gelu": lambda v: v * torch.sigmoid(1.702 * v),
    }[case.activation]
    h = x if bias is None else x + bias
    scale = 1.0 if mask is None else mask
    y = function(h * scale) if case.mask_first else function(h) * scale
    y.backward(case.gradient.double())
    return (
        y.detach(),
        *(None if leaf is None else leaf.grad for leaf in (x, mask, bias)),  # type: ignore
    )


def error(found: Tensor, expected: Tensor) -> float:
    """Relative L2; NaN when something was not written."""
    scale = expected.norm().clamp_min(1e-30)
    return float((found.double() - expected).norm() / scale)


def launch(case: Case, seed: int = 0) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """y, dx, dmask, dbias of the emulated kernels."""
    with emulation(seed):
        y = family.launch(*case.arguments)
        return y, *family.launch_backward(case.gradient, *case.arguments, True, True)


def compare(case: Case) -> None:
    found, expected = launch(case), truth(case)
    bounds = (TOLERANCE[case.x.dtype], TOLERANCE[case.x.dtype], SUMS, SUMS)
    for name, a, b, bound in zip(NAMES, found, expected, bounds, strict=True):
        if b is None:
            assert a.numel() == 0, f"{name} was not asked for"
        else:
            assert a.shape == b.shape
            assert error(a, b) <= bound, f"{name} is off by {error(a, b):.2g}"


@pytest.mark.parametrize("activation, mask_first", KINDS)
@pytest.mark.parametrize("shape", [(2, 5), (1, 3), (2, 2, 4)])
def test_reference_gradients(shape: tuple[int, ...], activation: str, mask_first: bool) -> None:
    torch.manual_seed(0)
    leaves = [torch.randn(s, dtype=torch.float64) for s in (shape, shape[-1:], shape[-1:])]
    leaves = [leaf.requires_grad_() for leaf in leaves]

    def run(x: Tensor, bias: Tensor, mask: Tensor) -> Tensor:
        return reference.ffn_act_mask(x, bias, mask, activation, mask_first)

    assert torch.autograd.gradcheck(run, leaves)
    assert torch.autograd.gradgradcheck(run, leaves)


@pytest.mark.parametrize("activation, mask_first", KINDS)
def test_closed_backward_is_the_gradient(activation: str, mask_first: bool) -> None:
    case = make((7, 33), torch.float64, activation, mask_first)
    _, *expected = truth(case)
    x, bias, mask = case.x, case.bias, case.mask
    assert bias is not None and mask is not None
    arguments = (x, bias.double(), mask.double(), activation, mask_first)
    found = reference.ffn_act_mask_backward(case.gradient, *arguments)
    for a, b in zip(found, expected, strict=True):
        assert b is not None
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("activation, mask_first", KINDS)
def test_kernels_against_float64(activation: str, mask_first: bool, dtype: torch.dtype) -> None:
    for shape in SHAPES:
        compare(make(shape, dtype, activation, mask_first))


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_without_bias_or_mask(dtype: torch.dtype) -> None:
    for bias, mask in ((False, True), (True, False), (False, False)):
        case = make((37, 264), dtype, "quick_gelu", True)
        compare(replace(case, bias=case.bias if bias else None, mask=case.mask if mask else None))


@pytest.mark.parametrize("value", [0.0, 1.0])
@pytest.mark.parametrize("mask_first", [False, True])
def test_closed_and_open_masks(value: float, mask_first: bool) -> None:
    case = make((37, 264), torch.bfloat16, "gelu", mask_first)
    case = replace(case, mask=torch.full((264,), value))
    compare(case)
    if value == 0.0:
        y, dx, _, dbias = launch(case)
        assert not y.any() and not dx.any() and not dbias.any()


def test_vectors_of_every_type() -> None:
    for dtype in TOLERANCE:
        case = make((37, 264), torch.bfloat16, "gelu_tanh", False)
        assert case.bias is not None and case.mask is not None
        case = replace(case, bias=case.bias.to(dtype), mask=case.mask.to(dtype))
        found, expected = launch(case), truth(case)
        for a, b in zip(found[2:], expected[2:], strict=True):
            assert a.dtype == dtype and b is not None
            assert error(a, b) <= max(SUMS, TOLERANCE[dtype])


@pytest.mark.parametrize("shape", [(0, 264), (4, 0), (0, 0), (2, 0, 8)])
def test_empty(shape: tuple[int, ...]) -> None:
    case = make(shape, torch.bfloat16, "gelu", False)
    y, dx, dmask, dbias = launch(case)
    assert y.shape == dx.shape == shape
    for total in (dmask, dbias):
        assert total.shape == shape[-1:] and not total.any()


def strided(x: Tensor, kind: str) -> Tensor:
    """The numbers of x in memory that is laid out differently."""
    rows, columns = x.shape
    if kind == "row stride":
        buffer = x.new_full((rows, columns + 24), torch.nan)
        return buffer[:, 8 : 8 + columns].copy_(x)
    if kind == "odd row stride":
        buffer = x.new_full((rows, columns + 5), torch.nan)
        return buffer[:, :columns].copy_(x)
    if kind == "misaligned base":
        buffer = x.new_full((rows * columns + 1,), torch.nan)
        return buffer[1:].view(rows, columns).copy_(x)
    if kind == "half aligned":
        buffer = x.new_full((rows * columns + 4,), torch.nan)
        return buffer[4:].view(rows, columns).copy_(x)
    return x.t().contiguous().t()  # transposed


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize(
    "kind", ["row stride", "odd row stride", "misaligned base", "half aligned", "transposed"]
)
def test_layouts(kind: str, dtype: torch.dtype) -> None:
    plain = make((37, 264), dtype, "gelu", True)
    expected = launch(plain)
    for both in (("x",), ("gradient",), ("x", "gradient")):
        changed = {name: strided(getattr(plain, name), kind) for name in both}
        for a, b in zip(launch(replace(plain, **changed)), expected, strict=True):
            # Narrower vectors group the rows of a sum differently.
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


def test_expanded_rows_and_leading_dimensions() -> None:
    case = make((1, 264), torch.float32, "gelu", False)
    row = case.x.expand(37, 264)
    gradient = torch.randn(37, 264)
    compare(replace(case, x=row, gradient=gradient))
    case = make((2, 3, 5, 40), torch.float32, "gelu", False)
    compare(case)
    compare(replace(case, x=case.x.transpose(0, 1).contiguous().transpose(0, 1)))


@pytest.mark.parametrize("mask_first", [False, True])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_nan_stays_nan_under_a_closed_mask(activation: str, mask_first: bool) -> None:
    case = make((4, 16), torch.float32, activation, mask_first)
    case.x[1, 3] = torch.nan
    case = replace(case, mask=torch.zeros(16))
    y, dx, dmask, dbias = launch(case)
    plain = reference.ffn_act_mask(*case.arguments)
    assert torch.equal(y.isnan(), plain.isnan()) and y.isnan().sum() == 1
    assert dx.isnan().sum() == 1 and dmask.isnan()[3] and dbias.isnan()[3]


def test_same_bits_whatever_order_threads_run_in() -> None:
    for dtype in TOLERANCE:
        case = make((130, 264), dtype, "gelu", False)
        first = launch(case, seed=1)
        for seed in range(2, 6):
            for a, b in zip(launch(case, seed), first, strict=True):
                assert torch.equal(a, b)


def test_large_values_do_not_overflow() -> None:
    case = make((64, 64), torch.float16, "gelu", False)
    case = replace(case, x=torch.full_like(case.x, 200.0), gradient=case.gradient * 0 + 500.0)
    compare(case)  # the products reach 1e5, the sums 6e6: beyond fp16


@pytest.mark.parametrize("bias, mask", [(True, True), (False, True), (True, False)])
def test_opcheck(bias: bool, mask: bool) -> None:
    x = torch.randn(3, 5, 8).transpose(0, 1).requires_grad_()
    leaves = [torch.rand(8, requires_grad=True) if wanted else None for wanted in (bias, mask)]
    torch.library.opcheck(torch.ops.espalier.ffn_act_mask, (x, *leaves, "gelu", True))
    plain = [None if leaf is None else leaf.detach() for leaf in leaves]
    arguments = (torch.randn(5, 3, 8), x.detach(), *plain, "gelu", True, mask, bias)
    torch.library.opcheck(torch.ops.espalier.ffn_act_mask_backward, arguments)


@pytest.mark.parametrize("activation, mask_first", KINDS)
def test_op_gradients_on_the_cpu(activation: str, mask_first: bool) -> None:
    leaves = [torch.randn(s, dtype=torch.float64, requires_grad=True) for s in ((3, 5), 5, 5)]
    assert torch.autograd.gradcheck(
        lambda x, b, m: torch.ops.espalier.ffn_act_mask(x, b, m, activation, mask_first), leaves
    )


def test_gradients_that_are_not_wanted() -> None:
    x, mask = torch.randn(3, 8, requires_grad=True), torch.rand(8)
    torch.ops.espalier.ffn_act_mask(x, torch.zeros(8), mask, "gelu", False).sum().backward()
    assert x.grad is not None and mask.grad is None
    case = make((3, 8), torch.float32, "gelu", False)
    with emulation():
        _, dmask, dbias = family.launch_backward(case.gradient, *case.arguments, False, True)
    assert dmask.numel() == 0 and dbias.shape == (8,)


def test_second_derivatives_are_refused() -> None:
    x = torch.randn(3, 8, requires_grad=True)
    y = torch.ops.espalier.ffn_act_mask(x, None, None, "gelu", False)
    (dx,) = torch.autograd.grad(y.sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="no derivative"):
        dx.sum().backward()


def test_bad_input() -> None:
    x = torch.randn(3, 8)
    with emulation():
        with pytest.raises(ValueError, match="mask must be"):
            family.launch(x, None, torch.rand(7), "gelu", False)
        with pytest.raises(ValueError, match="activation"):
            family.launch(x, None, None, "relu", False)
        with pytest.raises(TypeError, match="float64"):
            family.launch(x.double(), None, None, "gelu", False)


def test_on_a_cpu_auto_is_the_plain_formula() -> None:
    case = make((5, 37), torch.bfloat16, "quick_gelu", True)
    assert case.bias is not None and case.mask is not None
    h = (case.x + case.bias.bfloat16()) * case.mask.bfloat16()
    assert torch.equal(family.ffn_act_mask(*case.arguments), h * torch.sigmoid(1.702 * h))
