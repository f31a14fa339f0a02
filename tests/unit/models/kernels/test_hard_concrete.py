"""hard_concrete: published Philox vectors, the closed distribution, kernels against float64."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from models.kernels import hard_concrete as family
from models.kernels import reference_gates as reference
from tests.emulation import emulation

SIZES = [1, 4, 255, 256, 257, 1000]


def gates(count: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    torch.manual_seed(seed)
    return torch.randn(count, dtype=dtype) * 2, torch.rand(count, dtype=torch.float64) * 1000


def truth(log_alpha: Tensor, costs: Tensor, u: Tensor) -> tuple[Tensor, Tensor]:
    """z and size by the formulas, in float64."""
    s = torch.sigmoid((torch.log(u) - torch.log1p(-u) + log_alpha) * 1.5)
    size = torch.sigmoid(log_alpha - 2 / 3 * math.log(0.1 / 1.1)).clamp(1e-6, 1 - 1e-6)
    return (s * 1.2 - 0.1).clamp(0, 1), (size * costs).sum()


def test_philox_of_its_authors() -> None:
    """kat_vectors of Random123: the one whose upper counter words are 0, as ours are."""
    words = [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]
    assert reference.philox_words(0, 0, 1)[0].tolist() == words


def slow_philox(seed: int, counter: int) -> list[int]:
    """With Python's integers, straight from the paper."""
    k0, k1, word = seed % 2**32, seed >> 32, 2**32
    a, b, c, d = counter % word, counter >> 32, 0, 0
    for _ in range(10):
        left, right = 0xD2511F53 * a, 0xCD9E8D57 * c
        a, b, c, d = (right >> 32) ^ b ^ k0, right % word, (left >> 32) ^ d ^ k1, left % word
        k0, k1 = (k0 + 0x9E3779B9) % word, (k1 + 0xBB67AE85) % word
    return [a, b, c, d]


@pytest.mark.parametrize("seed", [0, 7, 2**63 - 1])
def test_philox_with_large_keys_and_counters(seed: int) -> None:
    for counter in (0, 5, 2**32 - 1, 2**45 + 3):
        found = reference.philox_words(seed, counter, 2).tolist()
        assert found == [slow_philox(seed, counter), slow_philox(seed, counter + 1)]


@pytest.mark.parametrize("seed, offset", [(0, 0), (123, 7), (2**62 + 12345, 2**33 + 5)])
def test_kernel_and_reference_draw_the_same_uniforms(seed: int, offset: int) -> None:
    log_alpha, costs = gates(1003)
    u = reference.philox_uniforms(seed, offset, 1003)
    with emulation():
        drawn = family.launch(log_alpha, costs, None, None, seed, offset)
        given = family.launch(log_alpha, costs, u, None, 0, 0)
        by_state = family.launch(log_alpha, costs, None, torch.tensor([seed, offset]), 9, 9)
    for a, b, c in zip(drawn, given, by_state, strict=True):
        assert torch.equal(a, b) and torch.equal(a, c)
    z, size = reference.hard_concrete(log_alpha, costs, None, None, seed, offset)
    torch.testing.assert_close(drawn[0], z, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(drawn[1], size, rtol=1e-6, atol=0)


@pytest.mark.parametrize("count", SIZES)
def test_kernels_against_float64(count: int) -> None:
    log_alpha, costs = gates(count)
    u = reference.philox_uniforms(1, 0, count)
    leaf = log_alpha.double().requires_grad_()
    expected_z, expected_size = truth(leaf, costs, u)
    dz, dsize = torch.randn(count), torch.tensor(0.37, dtype=torch.float64)
    (expected,) = torch.autograd.grad(
        (dz.double() * expected_z).sum() + dsize * expected_size, leaf, retain_graph=True
    )
    with emulation():
        z, size = family.launch(log_alpha, costs, u, None, 0, 0)
        found = family.launch_backward(dz, dsize, z, log_alpha, costs)
        only_z = family.launch_backward(dz, None, z, log_alpha, costs)
        only_size = family.launch_backward(None, dsize, z, log_alpha, costs)
    torch.testing.assert_close(z.double(), expected_z, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(size, expected_size, rtol=1e-6, atol=0)
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(only_z + only_size, found, rtol=1e-5, atol=1e-6)


def test_no_gates() -> None:
    log_alpha, costs = gates(0)
    with emulation():
        z, size = family.launch(log_alpha, costs, None, None, 0, 0)
        gradient = family.launch_backward(z, size, z, log_alpha, costs)
    assert z.shape == gradient.shape == (0,) and size.item() == 0.0


def test_extremes_and_nan() -> None:
    log_alpha = torch.tensor([-200.0, -20.0, 20.0, 200.0, torch.nan, 0.0])
    costs, u = torch.ones(6, dtype=torch.float64), torch.full((6,), 0.5, dtype=torch.float64)
    u[0], u[3] = 1e-6, 1 - 1e-6
    with emulation():
        z, size = family.launch(log_alpha, costs, u, None, 0, 0)
        gradient = family.launch_backward(torch.ones(6), size * 0 + 1, z, log_alpha, costs)
    assert z[:4].tolist() == [0.0, 0.0, 1.0, 1.0] and z[4].isnan() and size.isnan()
    assert gradient[4].isnan()
    with emulation():
        _, size = family.launch(log_alpha[:4], costs[:4], u[:4], None, 0, 0)
        gradient = family.launch_backward(None, size * 0 + 1, z[:4], log_alpha[:4], costs[:4])
    assert size.item() == pytest.approx(2.0, abs=1e-5)
    assert gradient[[0, 3]].tolist() == [0.0, 0.0]  # clipped


def test_distribution_of_the_noise() -> None:
    """Kolmogorov-Smirnov against the uniform; shares of exact 0 and 1 against their formulas."""
    count = 20000
    u = reference.philox_uniforms(5, 0, count).sort().values
    grid = torch.arange(1, count + 1, dtype=torch.float64) / count
    assert float((u - grid).abs().max()) < 1.63 / math.sqrt(count)  # 1 % level
    for log_alpha in (-1.0, 0.0, 1.5):
        z = reference.sampled(torch.full((count,), log_alpha), u)
        closed = torch.sigmoid(torch.tensor(reference.OPEN_SHIFT - log_alpha)).item()
        full = torch.sigmoid(torch.tensor(log_alpha + reference.OPEN_SHIFT)).item()
        assert float((z == 0).double().mean()) == pytest.approx(closed, abs=0.01)
        assert float((z == 1).double().mean()) == pytest.approx(full, abs=0.01)


def test_draws_do_not_overlap() -> None:
    state = torch.tensor([3, 0])
    draws = []
    for _ in range(3):
        draws.append(reference.philox_uniforms(*state.tolist(), 10))
        family.advance(state, 10)
    assert state.tolist() == [3, 9]
    assert torch.cat(draws).unique().numel() == 30
    assert not torch.equal(reference.philox_uniforms(4, 0, 10), draws[0])


def test_same_bits_whatever_order_threads_run_in() -> None:
    log_alpha, costs = gates(1000)
    results = []
    for seed in range(4):
        with emulation(seed):
            results.append(family.launch(log_alpha, costs, None, None, 1, 0))
    for z, size in results[1:]:
        assert torch.equal(z, results[0][0]) and torch.equal(size, results[0][1])


def test_reference_gradients() -> None:
    log_alpha, costs = gates(9, dtype=torch.float64)
    log_alpha.requires_grad_()
    u = reference.philox_uniforms(2, 0, 9)
    run = reference.hard_concrete
    assert torch.autograd.gradcheck(lambda a: run(a, costs, u, None, 0, 0), (log_alpha,))
    z, size = run(log_alpha, costs, u, None, 0, 0)
    dz, dsize = torch.randn(9, dtype=torch.float64), torch.tensor(0.3, dtype=torch.float64)
    (expected,) = torch.autograd.grad((z, size), log_alpha, (dz, dsize))
    found = reference.hard_concrete_backward(dz, dsize, z, log_alpha, costs)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


def test_op() -> None:
    log_alpha, costs = gates(9)
    u = reference.philox_uniforms(2, 0, 9)
    op = torch.ops.espalier.hard_concrete
    torch.library.opcheck(op, (log_alpha.requires_grad_(), costs, u, None, 0, 0))
    torch.library.opcheck(op, (log_alpha, costs, None, None, 3, 4))
    z, size = op(log_alpha, costs, u, None, 0, 0)
    arguments = (torch.ones(9), size.detach(), z.detach(), log_alpha.detach(), costs)
    torch.library.opcheck(torch.ops.espalier.hard_concrete_backward, arguments)
    plain = reference.hard_concrete(log_alpha, costs, u, None, 0, 0)
    for mine, other in (((z,), plain[:1]), ((size,), plain[1:]), ((z, size), plain)):
        weights = [torch.full_like(x, 0.7) for x in mine]
        (a,) = torch.autograd.grad(mine, log_alpha, weights, retain_graph=True)
        (b,) = torch.autograd.grad(other, log_alpha, weights, retain_graph=True)
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def test_bad_input() -> None:
    log_alpha, costs = gates(8)
    with pytest.raises(ValueError, match="costs"):
        torch.ops.espalier.hard_concrete(log_alpha, costs.float(), None, None, 0, 0)
    with pytest.raises(ValueError, match="state"):
        state = torch.zeros(2)
        torch.ops.espalier.hard_concrete(log_alpha, costs, None, state, 0, 0)
