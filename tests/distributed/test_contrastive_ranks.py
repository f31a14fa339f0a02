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
    all_gather_no_grad,
    all_gather_with_grad,
    own_rows,
    rank_and_world,
    take_rows,
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
    # Stands for the matching loss: own texts with images of other ranks, through the gather.
    fused = torch.cat([take_rows(image, negatives.image_for_text), text], dim=1)
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


@pytest.mark.parametrize("world", [2, 3])
def test_averaged_gradients_are_those_of_the_global_batch(world: int) -> None:
    alone = _step(published=False)
    results = run_ranks(both_scalings, world)
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


def test_one_process_without_a_group_gathers_nothing() -> None:
    x = torch.ones(2, 3, requires_grad=True)
    assert all_gather_with_grad(x) is x
    assert rank_and_world() == (0, 1) and own_rows(2).tolist() == [0, 1]
