"""head_mask: the reference against autograd, the kernels under emulation against float64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from models.kernels import head_mask as family
from models.kernels import reference_attention as reference
from tests.emulation import emulation

TOLERANCE = {torch.float32: 1e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}
SUMS = 1e-5
SHAPES = [(2, 3, 37, 64), (1, 1, 1, 8), (3, 2, 300, 32), (1, 2, 80, 7), (1, 2, 3, 256)]


def make(
    shape: tuple[int, ...], dtype: torch.dtype, per_row: bool, flat: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """gradient, context, mask; flat: (B, N, H d) in place of (B, H, N, d)."""
    torch.manual_seed(0)
    rows, heads, tokens, depth = shape
    size = (rows, tokens, heads * depth) if flat else shape
    context, gradient = (torch.randn(size).to(dtype) for _ in range(2))
    mask = torch.rand(rows, heads) if per_row else torch.rand(heads)
    mask.view(-1)[::3] = 0.0
    return gradient, context, mask


def truth(gradient: Tensor, context: Tensor, mask: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """y, dc, dz in float64 by autograd."""
    c, z = context.double().requires_grad_(), mask.double().requires_grad_()
    rows, heads = context.shape[0], mask.shape[-1]
    wide = z.expand(rows, heads)
    if context.dim() == 4:
        y = torch.einsum("bhnd,bh->bhnd", c, wide)
    else:
        y = torch.einsum("bnhd,bh->bnhd", c.unflatten(2, (heads, -1)), wide).flatten(2)
    by_context, by_mask = torch.autograd.grad(y, (c, z), gradient.double())
    return y.detach(), by_context, by_mask


def run(
    gradient: Tensor, context: Tensor, mask: Tensor, seed: int = 0
) -> tuple[Tensor, Tensor, Tensor]:
    with emulation(seed):
        y = family.launch(context, mask)
        return y, *family.launch_backward(gradient, context, mask)


def error(found: Tensor, expected: Tensor) -> float:
    return float((found.double() - expected).norm() / expected.norm().clamp_min(1e-30))


def compare(gradient: Tensor, context: Tensor, mask: Tensor) -> None:
    found, expected = run(gradient, context, mask), truth(gradient, context, mask)
    bounds = (TOLERANCE[context.dtype],) * 2 + (max(SUMS, TOLERANCE[mask.dtype]),)
    for name, a, b, bound in zip(("y", "dc", "dz"), found, expected, bounds, strict=True):
        assert a.shape == b.shape
        assert error(a, b) <= bound, f"{name} is off by {error(a, b):.2g}"


@pytest.mark.parametrize("flat", [False, True])
@pytest.mark.parametrize("per_row", [False, True])
def test_reference_gradients(per_row: bool, flat: bool) -> None:
    gradient, context, mask = (x.double() for x in make((2, 3, 2, 4), torch.float32, per_row, flat))
    leaves = (context.requires_grad_(), mask.requires_grad_())
    assert torch.autograd.gradcheck(reference.head_mask, leaves)
    assert torch.autograd.gradgradcheck(reference.head_mask, leaves)
    assert torch.autograd.gradcheck(torch.ops.espalier.head_mask, leaves)
    found = reference.head_mask_backward(gradient, context, mask)
    torch.testing.assert_close(found, truth(gradient, context, mask)[1:])


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("flat", [False, True])
@pytest.mark.parametrize("per_row", [False, True])
def test_kernels_against_float64(per_row: bool, flat: bool, dtype: torch.dtype) -> None:
    for shape in SHAPES:
        compare(*make(shape, dtype, per_row, flat))


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("value", [0.0, 1.0])
def test_closed_and_open_masks(value: float, dtype: torch.dtype) -> None:
    gradient, context, mask = make((2, 3, 9, 16), torch.bfloat16, True, False)
    mask = torch.full_like(mask, value).to(dtype)
    compare(gradient, context, mask)
    y, down, _ = run(gradient, context, mask)
    if value:
        assert torch.equal(y, context) and torch.equal(down, gradient)
    else:
        assert not y.any() and not down.any()


@pytest.mark.parametrize("shape", [(0, 2, 3, 8), (2, 2, 0, 8), (2, 0, 3, 8), (2, 2, 3, 0)])
@pytest.mark.parametrize("per_row", [False, True])
def test_empty(shape: tuple[int, ...], per_row: bool) -> None:
    gradient, context, mask = make(shape, torch.bfloat16, per_row, False)
    y, down, dmask = run(gradient, context, mask)
    assert y.shape == down.shape == context.shape
    assert dmask.shape == mask.shape and not dmask.any()


def strided(x: Tensor, kind: str) -> Tensor:
    if kind == "projected":
        return x.transpose(1, 2).contiguous().transpose(1, 2)
    if kind == "expanded":
        return x[:1].expand_as(x)
    if kind == "misaligned":
        return x.new_full((x.numel() + 1,), torch.nan)[1:].view(x.shape).copy_(x)
    if kind == "odd rows":
        return x.new_full((*x.shape[:3], x.shape[3] + 3), torch.nan)[..., : x.shape[3]].copy_(x)
    return x.transpose(2, 3).contiguous().transpose(2, 3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", ["projected", "expanded", "misaligned", "odd rows", "depth"])
def test_layouts(kind: str, dtype: torch.dtype) -> None:
    gradient, context, mask = make((2, 3, 11, 16), dtype, True, False)
    if kind == "expanded":
        gradient, context = (x[:1].repeat(2, 1, 1, 1) for x in (gradient, context))
    compare(strided(gradient, kind), context, mask)
    compare(gradient, strided(context, kind), mask)
    compare(strided(gradient, kind), strided(context, kind), mask.t().contiguous().t())
    if kind == "projected":
        y, down, _ = run(gradient, strided(context, kind), mask)
        assert y.transpose(1, 2).is_contiguous() and down.transpose(1, 2).is_contiguous()


def test_nan_stays_nan_under_a_closed_mask() -> None:
    gradient, context, mask = make((1, 2, 4, 8), torch.float32, False, False)
    context[0, 0, 1, 3] = torch.nan
    y, _, dmask = run(gradient, context, torch.zeros_like(mask))
    assert y.isnan().sum() == 1 and dmask.isnan().tolist() == [True, False]


def test_every_run_and_every_order_of_threads_gives_the_same_bits() -> None:
    case = make((3, 2, 600, 32), torch.bfloat16, False, False)
    first = run(*case)
    for seed in range(1, 4):
        for a, b in zip(run(*case, seed=seed), first, strict=True):
            assert torch.equal(a, b)


@pytest.mark.parametrize("flat", [False, True])
@pytest.mark.parametrize("per_row", [False, True])
def test_opcheck(per_row: bool, flat: bool) -> None:
    gradient, context, mask = make((2, 3, 2, 4), torch.float32, per_row, flat)
    leaves = (context.requires_grad_(), mask.requires_grad_())
    torch.library.opcheck(torch.ops.espalier.head_mask.default, leaves)
    plain = (gradient, context.detach(), mask.detach())
    torch.library.opcheck(torch.ops.espalier.head_mask_backward.default, plain)


def test_unfit_arguments_are_refused() -> None:
    context = torch.zeros(2, 3, 5, 8)
    for mask in (torch.ones(2), torch.ones(3, 3), torch.ones(1, 2, 3), torch.ones(())):
        with pytest.raises(ValueError, match="head_mask"):
            family.head_mask(context, mask)
    with pytest.raises(ValueError, match="head_mask"):
        family.head_mask(torch.zeros(2, 5, 8), torch.ones(3))
    assert torch.equal(family.head_mask(context, torch.ones(3)), context)  # auto on a CPU
