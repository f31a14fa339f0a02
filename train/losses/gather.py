"""Rows of all ranks: gathers that losses over the global batch are built on.

Every rank must call these functions in the same order and with the same shapes (rows are padded or
sampled to a fixed number beforehand), otherwise the collective does not match and the job hangs.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

__all__ = [
    "all_gather_no_grad",
    "all_gather_with_grad",
    "own_rows",
    "rank_and_world",
    "scale_gradient",
    "take_rows",
]


def rank_and_world() -> tuple[int, int]:
    """(rank, world size) of the default process group; (0, 1) when there is none."""
    if not (dist.is_available() and dist.is_initialized()):
        return 0, 1
    return dist.get_rank(), dist.get_world_size()


def own_rows(rows: int, device: torch.device | str = "cpu") -> Tensor:
    """(rows,) int64: where this rank's rows stand in the gathered batch (rank-major order)."""
    rank, _ = rank_and_world()
    return torch.arange(rank * rows, (rank + 1) * rows, device=device)


def _gather(x: Tensor, world: int) -> Tensor:
    gathered = x.new_empty((world * x.shape[0], *x.shape[1:]))
    dist.all_gather_into_tensor(gathered, x.contiguous())
    return gathered


class _AllGather(torch.autograd.Function):
    """Forward: concatenation over ranks. Backward: sum of all ranks' gradients, own slice.

    Each rank's loss depends on every rank's rows, so the gradient of sum(losses) with respect to
    the own rows is the SUM over ranks of their gradients. Returning only the own rank's gradient
    would lose the other terms.
    """

    @staticmethod
    def forward(ctx, x: Tensor, rank: int, world: int) -> Tensor:
        ctx.rank, ctx.rows = rank, x.shape[0]
        return _gather(x, world)

    @staticmethod
    @once_differentiable
    def backward(ctx, *grads: Tensor):
        # Summed in fp32: half gradients of a large world lose bits or overflow when added up.
        grad = grads[0]
        total = grad.to(
            torch.float32 if grad.dtype in (torch.float16, torch.bfloat16) else grad.dtype
        )
        total = total.clone() if total is grad else total
        total = total.contiguous()
        dist.all_reduce(total)
        own = total[ctx.rank * ctx.rows : (ctx.rank + 1) * ctx.rows]
        return own.to(grad.dtype), None, None


def all_gather_with_grad(x: Tensor) -> Tensor:
    """(B, ...) of every rank -> (world * B, ...), rank-major; gradients flow to the rank that owns
    a row.

    Identity when there is one process or no process group.
    """
    rank, world = rank_and_world()
    if world == 1:
        return x
    gathered = _AllGather.apply(x, rank, world)
    assert isinstance(gathered, Tensor)
    return gathered


@torch.no_grad()
def all_gather_no_grad(x: Tensor) -> Tensor:
    """(B, ...) of every rank -> (world * B, ...) without gradients; any dtype, bool included."""
    _, world = rank_and_world()
    if world == 1:
        return x.detach()
    if x.dtype == torch.bool:
        return _gather(x.detach().to(torch.uint8), world).bool()
    return _gather(x.detach(), world)


def take_rows(x: Tensor, index: Tensor) -> Tensor:
    """Rows `index` (K,) of the global batch of `x` (B, ...) -> (K, ...), with exact gradients to
    the owners.

    Holds the gathered (world * B, ...) tensor while it selects.
    """
    if x.dtype.is_floating_point:
        return all_gather_with_grad(x).index_select(0, index)
    return all_gather_no_grad(x).index_select(0, index)


class _ScaleGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, factor: float) -> Tensor:
        ctx.factor = factor
        return x.view_as(x)

    @staticmethod
    def backward(ctx, *grads: Tensor):
        return grads[0] * ctx.factor, None


def scale_gradient(x: Tensor, factor: float) -> Tensor:
    """`x` unchanged; its gradient times `factor`."""
    scaled = _ScaleGradient.apply(x, factor)
    assert isinstance(scaled, Tensor)
    return scaled
