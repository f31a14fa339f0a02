"""Losses over the global batch: averaged over ranks, gradients are those of one process."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from tests.distributed.spawn import run_ranks
from train.losses.gather import (
    RowExchange,
    all_gather_no_grad,
    all_gather_with_grad,
    mean_counts,
    own_rows,
    rank_and_world,
)
from train.losses.vl import contrastive_loss, hard_negatives

ROWS = 12


def _step(published: bool) -> dict[str, Tensor]:
    """One step of a tiny two-tower model on this rank's rows; gradients averaged over ranks."""
    rank, world = rank_and_world()
    generator = torch.Generator().manual_seed(0)
    images, texts = torch.randn(2, ROWS, 6, generator=generator, dtype=torch.float32)
    shapes = ((6, 4), (6, 4), (8, 4))
    weights = [torch.randn(shape, generator=generator).requires_grad_() for shape in shapes]
    temperature = torch.tensor([0.3], requires_grad=True)
    own = slice(rank * ROWS // world, (rank + 1) * ROWS // world)

    image = images[own] @ weights[0]
    text = texts[own] @ weights[1]
    loss, similarities = contrastive_loss(
        F.normalize(image, dim=-1), F.normalize(text, dim=-1), temperature, published
    )
    negatives = hard_negatives(similarities.detach(), torch.Generator().manual_seed(7))
    # Stands for the matching loss: own texts with images of other ranks, through the exchange.
    exchange = RowExchange(negatives.image_for_text, len(image))
    fused = torch.cat([exchange.take(image), text], dim=1)
    matching = (fused @ weights[2]).square().mean()
    itc_grads = torch.autograd.grad(loss, [*weights[:2], temperature], retain_graph=True)
    (loss + matching).backward()
    grads = [leaf.grad for leaf in (*weights, temperature)]
    values = {f"grad_{i}": grad for i, grad in enumerate(grads)}
    values |= {f"itc_grad_{i}": grad for i, grad in enumerate(itc_grads)}
    values |= {"loss": loss.detach(), "matching": matching.detach()}
    averaged = {}
    for name, value in values.items():
        assert value is not None
        averaged[name] = value.clone()
        if world > 1:
            dist.all_reduce(averaged[name])
            averaged[name] /= world
    averaged["image_for_text"] = all_gather_no_grad(negatives.image_for_text)
    averaged["text_for_image"] = all_gather_no_grad(negatives.text_for_image)
    return averaged


def both_scalings() -> dict[str, Any]:
    """Runs on every rank."""
    rank, world = rank_and_world()
    mask = torch.tensor([rank == 0, True])
    x = torch.full((2, 3), float(rank), requires_grad=True)
    gathered = all_gather_with_grad(x)
    (gathered * (rank + 1)).sum().backward()
    half = torch.ones(2, 3, dtype=torch.float16, requires_grad=True)
    all_gather_with_grad(half).sum().backward()
    return {
        "exact": _step(published=False),
        "published": _step(published=True),
        "gathered": gathered.detach(),
        "grad": x.grad,
        "half_grad": half.grad,
        "mask": all_gather_no_grad(mask),
        "own": own_rows(2),
        "expected": float(sum(r + 1 for r in range(world))),
    }


def on_every_rank() -> dict[str, Any]:
    return both_scalings() | exchanges()


@pytest.fixture(scope="module", params=[2, 3])
def results(request: pytest.FixtureRequest) -> list[dict[str, Any]]:
    return run_ranks(on_every_rank, request.param)


def test_averaged_gradients_are_those_of_the_global_batch(results: list[dict[str, Any]]) -> None:
    alone, world = _step(published=False), len(results)
    for rank, result in enumerate(results):
        for name, wanted in alone.items():
            torch.testing.assert_close(result["exact"][name], wanted, rtol=1e-4, atol=1e-6)
        # Published: encoders get 1/world of it, the temperature all of it.
        for i, share in ((0, world), (1, world), (2, 1)):
            name = f"itc_grad_{i}"
            torch.testing.assert_close(
                result["published"][name] * share, alone[name], rtol=1e-4, atol=1e-6
            )
        assert result["gathered"][:, 0].tolist() == [float(r) for r in range(world) for _ in "ab"]
        assert (result["grad"] == result["expected"]).all()
        assert result["half_grad"].dtype == torch.float16 and (result["half_grad"] == world).all()
        assert result["mask"].tolist() == [True, True] + [False, True] * (world - 1)
        assert result["own"].tolist() == [2 * rank, 2 * rank + 1]


EXCHANGES, OWN = 6, 4


def _exchange(
    x: Tensor, wanted: Tensor, factor: Tensor, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """The rows this rank asks for, and the gradient of sum(factor * rows) in its own rows."""
    rank, _ = rank_and_world()
    own = x[rank * OWN : (rank + 1) * OWN].to(dtype).requires_grad_()
    taken = RowExchange(wanted, OWN).take(own)
    (taken * factor.to(dtype)).sum().backward()
    assert own.grad is not None
    return taken.detach(), own.grad


def exchanges() -> dict[str, Any]:
    """Runs on every rank: exchanges of drawn rows, with repeats, ranks nobody asks, and one that
    everybody does.
    """
    rank, world = rank_and_world()
    drawn, half = [], []
    for seed in range(EXCHANGES):
        x, wanted, factor = _drawn_exchange(seed, world)
        drawn.append(_exchange(x, wanted[rank], factor[rank], torch.float64))
        half.append(_exchange(x, wanted[rank], factor[rank], torch.float16))
    plan = RowExchange(own_rows(OWN).flip(0), OWN)
    number = torch.arange(OWN) + 10 * rank
    counts = {"slots": torch.tensor(rank + 1), "regions": torch.tensor(0)}
    return {
        "drawn": drawn,
        "half": half,
        "integers": plan.take(number),
        "flags": plan.take(number % 3 == 0),
        "local": RowExchange(own_rows(OWN).flip(0), OWN, local=True).take(number),
        "counts": mean_counts([counts, counts], "cpu"),
    }


def _drawn_exchange(seed: int, world: int) -> tuple[Tensor, Tensor, Tensor]:
    """(G, 2, 3) rows of all ranks, (world, K) indices, (world, K, 2, 3) factors; K is not B."""
    generator = torch.Generator().manual_seed(seed)
    rows, asked = world * OWN, 3 + seed
    x = torch.randn(rows, 2, 3, generator=generator, dtype=torch.float64)
    # The first ones ask one rank only, or one row.
    top = (OWN, 1, rows)[min(seed, 2)]
    wanted = torch.randint(0, top, (world, asked), generator=generator)
    return x, wanted, torch.randn(world, asked, 2, 3, generator=generator, dtype=torch.float64)


def test_exchanged_rows_and_their_gradients_are_those_of_indexing_the_whole_batch(
    results: list[dict[str, Any]],
) -> None:
    world = len(results)
    for seed in range(EXCHANGES):
        x, wanted, factor = _drawn_exchange(seed, world)
        whole = x.clone().requires_grad_()
        (whole[wanted] * factor).sum().backward()
        assert whole.grad is not None
        for rank, result in enumerate(results):
            own = slice(rank * OWN, (rank + 1) * OWN)
            taken, grad = result["drawn"][seed]
            assert torch.equal(taken, x[wanted[rank]])
            torch.testing.assert_close(grad, whole.grad[own])
            taken, grad = result["half"][seed]
            assert taken.dtype == grad.dtype == torch.float16
            assert torch.equal(taken, x[wanted[rank]].half())
            torch.testing.assert_close(grad.double(), whole.grad[own], rtol=2e-3, atol=2e-3)
    for rank, result in enumerate(results):
        numbers = [10 * rank + n for n in (3, 2, 1, 0)]
        assert result["integers"].tolist() == result["local"].tolist() == numbers
        assert result["flags"].tolist() == [n % 3 == 0 for n in numbers]
        assert result["counts"] == {"slots": (world + 1) / 2, "regions": 0.0}


def test_an_exchange_in_one_process_is_an_index() -> None:
    x = torch.randn(3, 2)
    exchange = RowExchange(torch.tensor([2, 0]), 3)
    assert torch.equal(exchange.take(x), x[[2, 0]])
    with pytest.raises(ValueError, match="3 rows per rank, not 2"):
        exchange.take(x[:2])


def test_one_process_without_a_group_gathers_nothing() -> None:
    x = torch.ones(2, 3, requires_grad=True)
    assert all_gather_with_grad(x) is x
    assert rank_and_world() == (0, 1) and own_rows(2).tolist() == [0, 1]
