"""pack_tokens and unpack_tokens: reference and emulated kernels against a loop over tokens."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from models.kernels import pack_tokens as family
from models.kernels import reference_attention as reference
from tests.emulation import emulation

Packed = tuple[Tensor, Tensor, Tensor]


def emulated_pack(x: Tensor, keep: Tensor, count: int | None = None) -> Packed:
    with emulation():
        return family.launch(x, keep, count)


def emulated_unpack(packed: Tensor, keep: Tensor) -> Tensor:
    with emulation():
        return family.launch_unpack(packed, keep)


PACKS: list[Callable[..., Packed]] = [reference.pack_tokens, emulated_pack]
UNPACKS: list[Callable[[Tensor, Tensor], Tensor]] = [reference.unpack_tokens, emulated_unpack]
pack_forms = pytest.mark.parametrize("pack", PACKS, ids=["reference", "kernel"])
unpack_forms = pytest.mark.parametrize("unpack", UNPACKS, ids=["reference", "kernel"])


def expected_pack(x: Tensor, keep: Tensor) -> Packed:
    """Token by token."""
    rows, tokens, _ = x.shape
    kept, sums = [], [0]
    for row in range(rows):
        kept += [row * tokens + token for token in range(tokens) if keep[row, token]]
        sums.append(len(kept))
    packed, indices = x.new_zeros(rows * tokens, x.shape[2]), torch.full((rows * tokens,), -1)
    for place, token in enumerate(kept):
        packed[place], indices[place] = x[token // tokens, token % tokens], token
    return packed, torch.tensor(sums, dtype=torch.int32), indices


def check(pack: Callable[..., Packed], x: Tensor, keep: Tensor, count: int | None = None) -> None:
    packed, cumulative, indices = expected_pack(x, keep)
    wanted = packed[:count], cumulative, indices[:count]
    for found, expected in zip(pack(x, keep, count), wanted, strict=True):
        assert found.dtype == expected.dtype and torch.equal(found, expected)


def check_unpack(unpack: Callable[[Tensor, Tensor], Tensor], packed: Tensor, keep: Tensor) -> None:
    found, place = unpack(packed, keep), 0
    assert found.dtype == packed.dtype
    for row in range(keep.shape[0]):
        for token in range(keep.shape[1]):
            there = bool(keep[row, token]) and place < packed.shape[0]
            expected = packed[place] if there else torch.zeros_like(found[row, token])
            assert torch.equal(found[row, token], expected)
            place += bool(keep[row, token])


def make(rows: int, tokens: int, width: int, share: float = 0.6) -> tuple[Tensor, Tensor]:
    torch.manual_seed(0)
    return torch.randn(rows, tokens, width), torch.rand(rows, tokens) < share


@pack_forms
@settings(max_examples=15, deadline=None)
@given(st.integers(1, 5), st.integers(1, 70), st.integers(1, 9), st.randoms())
def test_pack_any_mask(pack, rows, tokens, width, random) -> None:
    x = torch.arange(rows * tokens * width, dtype=torch.float32).view(rows, tokens, width)
    keep = torch.tensor([[random.random() < 0.5 for _ in range(tokens)] for _ in range(rows)])
    check(pack, x, keep)


@pack_forms
@pytest.mark.parametrize("width", [5, 16])
def test_as_many_rows_as_are_needed(pack, width: int) -> None:
    x, keep = make(3, 130, width)
    kept = int(keep.sum())
    for count in (kept, kept - 7, kept + 7, keep.numel() - 1, 1, 0):
        check(pack, x, keep, count)


@unpack_forms
@settings(max_examples=15, deadline=None)
@given(st.integers(1, 5), st.integers(1, 70), st.floats(0, 1), st.randoms())
def test_unpack_any_mask(unpack, rows, tokens, share, random) -> None:
    keep = torch.tensor([[random.random() < 0.5 for _ in range(tokens)] for _ in range(rows)])
    packed = torch.arange(rows * tokens * 3, dtype=torch.float32).view(-1, 3) + 1
    check_unpack(unpack, packed[: int(share * rows * tokens)], keep)


@pack_forms
@pytest.mark.parametrize("share", [0.0, 1.0, 0.5])
@pytest.mark.parametrize("shape", [(3, 197, 16), (1, 64, 8), (2, 65, 5), (4, 1, 3)])
def test_pack_shapes(pack, shape: tuple[int, int, int], share: float) -> None:
    check(pack, *make(*shape, share))


@pytest.mark.parametrize(
    "dtype",
    [
        torch.float64,
        torch.float16,
        torch.bfloat16,
        torch.int64,
        torch.int32,
        torch.uint8,
        torch.bool,
    ],
    ids=str,
)
def test_every_type_is_moved_as_it_is(dtype: torch.dtype) -> None:
    for width in (3, 16):
        x, keep = make(2, 70, width)
        x = (x * 50).to(dtype)
        check(emulated_pack, x, keep)
        check_unpack(emulated_unpack, x.flatten(0, 1), keep)


@pack_forms
@pytest.mark.parametrize("shape", [(0, 5, 4), (3, 0, 4), (3, 5, 0), (0, 0, 0)])
def test_empty(pack, shape: tuple[int, int, int]) -> None:
    x, keep = make(*shape)
    check(pack, x, keep)
    for unpack in UNPACKS:
        packed = x.flatten(0, 1)
        assert unpack(packed, keep).shape == shape
        assert not unpack(packed[:0], keep).any()


@pytest.mark.parametrize("width", [5, 16])
def test_layouts(width: int) -> None:
    x, keep = make(3, 37, width)
    apart = x.new_full((3, 41, width + 3), torch.nan)[:, 2:39, :width].copy_(x)
    shifted = x.new_full((x.numel() + 1,), torch.nan)[1:].view(x.shape).copy_(x)
    turned = x.transpose(0, 2).contiguous().transpose(0, 2)
    across = x.transpose(0, 1).contiguous().transpose(0, 1)
    for other in (apart, shifted, turned, across, x[:1].expand(3, -1, -1)):
        check(emulated_pack, other, keep)
        check(emulated_pack, other, keep.t().contiguous().t())
    misaligned = torch.zeros(keep.numel() + 3, dtype=torch.bool)[3:].view(keep.shape).copy_(keep)
    check(emulated_pack, x, misaligned)
    rows = x.new_full((111, width + 3), torch.nan)[:, :width].copy_(x.flatten(0, 1))
    check_unpack(emulated_unpack, rows, keep)
    check_unpack(emulated_unpack, rows, misaligned)


@pack_forms
def test_what_is_dropped_leaves_no_trace(pack) -> None:
    x, keep = make(2, 70, 4)
    x[~keep] = torch.nan
    packed, cumulative, _ = pack(x, keep)
    assert not packed.isnan().any() and not packed[int(cumulative[-1]) :].any()
    packed[int(cumulative[-1]) :] = torch.nan
    for unpack in UNPACKS:
        back = unpack(packed, keep)
        assert torch.equal(back[keep], x[keep]) and not back[~keep].any()


def test_each_is_the_gradient_of_the_other() -> None:
    x, keep = make(2, 5, 3)
    x = x.double().requires_grad_()
    packed = torch.randn(8, 3, dtype=torch.float64, requires_grad=True)
    ops = torch.ops.espalier
    for pack in (reference.pack_tokens, ops.pack_tokens):
        assert torch.autograd.gradcheck(lambda x, f=pack: f(x, keep)[0], x)
        assert torch.autograd.gradgradcheck(lambda x, f=pack: f(x, keep)[0], x)
        assert torch.autograd.gradcheck(lambda x, f=pack: f(x, keep, 4)[0], x)
    for unpack in (reference.unpack_tokens, ops.unpack_tokens):
        assert torch.autograd.gradcheck(lambda p, f=unpack: f(p, keep), packed)
        assert torch.autograd.gradgradcheck(lambda p, f=unpack: f(p, keep), packed)


def test_opcheck() -> None:
    x, keep = make(2, 5, 3)
    for count in (None, 4):
        arguments = (x.requires_grad_(), keep, count)
        torch.library.opcheck(torch.ops.espalier.pack_tokens.default, arguments)
    packed = torch.randn(8, 3, requires_grad=True)
    torch.library.opcheck(torch.ops.espalier.unpack_tokens.default, (packed, keep))


def test_every_order_of_threads_gives_the_same_bits() -> None:
    x, keep = make(3, 130, 5)
    first = emulated_pack(x, keep)
    for seed in range(1, 4):
        with emulation(seed):
            for a, b in zip(family.launch(x, keep), first, strict=True):
                assert torch.equal(a, b)


def test_unfit_arguments_are_refused() -> None:
    x, keep = make(2, 5, 3)
    for bad in (keep[:1], keep.int(), keep[0]):
        with pytest.raises(ValueError, match=r"keep|pack_tokens"):
            family.pack_tokens(x, bad)
    for count in (-1, 11):
        with pytest.raises(ValueError, match="0 to 10"):
            family.pack_tokens(x, keep, count)
    with pytest.raises(ValueError, match="at most 10"):
        family.unpack_tokens(torch.zeros(11, 3), keep)
    assert torch.equal(family.pack_tokens(x, keep)[0], expected_pack(x, keep)[0])  # auto on a CPU
    assert family.unpack_tokens(torch.zeros(3, 3), keep).shape == (2, 5, 3)
    assert "16 bytes" in (family._unsupported(torch.zeros(1, dtype=torch.complex128)) or "")
