"""Rows and counts of all ranks: what losses over the global batch are built on.

Every rank must call these functions in the same order and with the same shapes (rows are padded or
sampled to a fixed number beforehand), otherwise the collective does not match and the job hangs.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

__all__ = [
    "RowExchange",
    "all_gather_no_grad",
    "all_gather_with_grad",
    "by_itself",
    "mean_counts",
    "own_rows",
    "rank_and_world",
    "scale_gradient",
]


class _Alone:
    """Whether `by_itself` stands."""

    stands = False


@contextmanager
def by_itself() -> Iterator[None]:
    """While it lasts this rank is the only one for everything here, and nothing is collective: for
    held-out batches, which may have other numbers of rows on each rank.
    """
    before, _Alone.stands = _Alone.stands, True
    try:
        yield
    finally:
        _Alone.stands = before


def rank_and_world() -> tuple[int, int]:
    """(rank, world size) of the default process group; (0, 1) when there is none, or `by_itself`."""
    if _Alone.stands or not (dist.is_available() and dist.is_initialized()):
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
        grad = grads[0]
        total = _summable(grad)
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


def _summable(x: Tensor) -> Tensor:
    """Half gradients as fp32: many of them added up lose bits or overflow."""
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x


class RowExchange:
    """Chosen rows of the global batch, sent point to point by the ranks that hold them.

    A rank receives the K rows it asked for and nothing else, where a gather would hold world * B of
    them. All ranks learn who asks for what by gathering the indices (a few bytes); how many rows
    each pair of ranks exchanges must be known on the host, and is copied there while the device goes
    on. So make the exchange as soon as the indices are known, queue work that does not need its
    rows, and only then `take`: the host waits for the indices, not for that work.

    Collective: `__init__` and each `take` (and its backward), in the same order on every rank, with
    the same K and B. All sizes come from indices that every rank has seen, so no pair can disagree.
    Uses `all_to_all_single` with uneven and empty parts, which NCCL has, and gloo too (seen with
    torch 2.15 for float64, float32, float16, bfloat16, int64 and uint8).

    Args:
        index: (K,) int64, rows of the global batch (rank-major) that this rank wants; repeats are
            allowed.
        rows: B, the rows each rank holds.
        local: every rank asks for rows of its own only, and nothing is sent.
    """

    def __init__(self, index: Tensor, rows: int, local: bool = False) -> None:
        self.rows = rows
        self._rank, world = rank_and_world()
        self._own: Tensor | None = None
        if local or world == 1:
            self._own = index - self._rank * rows
            return
        self._wanted = all_gather_no_grad(index)  # (world * K,), by asking rank
        owner = self._wanted // rows
        own_owner = index // rows
        ranks = torch.arange(world, device=index.device)
        sends = (owner.view(world, -1) == self._rank).sum(dim=1)
        receives = (own_owner[None, :] == ranks[:, None]).sum(dim=1)
        # Requests to this rank first, in the order in which the askers expect them.
        self._to_me = torch.argsort((owner != self._rank).to(torch.int8), stable=True)
        self._order = torch.argsort(own_owner, stable=True)  # which request each arrival answers
        sizes = torch.stack([sends, receives])
        self._sizes = sizes.to("cpu", non_blocking=True)  # page-locked, where the device is another
        self._ready = (
            torch.accelerator.current_stream(sizes.device).record_event()
            if sizes.device.type != "cpu"
            else None
        )
        self._route: _Route | None = None

    def settle(self) -> None:
        """Waits for the sizes of the exchange and queues what `take` reads beside its argument.

        From here on another stream may `take` as soon as it waits for the current one.
        """
        if self._own is None:
            self._known_route()

    def _known_route(self) -> _Route:
        if self._route is None:
            if self._ready is not None:
                self._ready.synchronize()
            sends, receives = self._sizes.tolist()
            send_rows = self._wanted[self._to_me[: sum(sends)]] - self._rank * self.rows
            self._route = _Route(send_rows, self._order, sends, receives)
        return self._route

    def take(self, x: Tensor) -> Tensor:
        """x (B, ...) of every rank -> the rows asked for, (K, ...); any dtype, bool included.

        The gradient of a row is the sum over all ranks that asked for it, exactly, at its owner.

        Raises:
            ValueError: `x` does not have B rows.
        """
        if x.shape[0] != self.rows:
            raise ValueError(f"the exchange is of {self.rows} rows per rank, not {x.shape[0]}")
        if self._own is not None:
            return x.index_select(0, self._own)
        route = self._known_route()
        if x.dtype == torch.bool:
            return route.forward(x.view(torch.uint8)).view(torch.bool)
        if not x.dtype.is_floating_point:
            return route.forward(x)
        taken = _Exchange.apply(x, route)
        assert isinstance(taken, Tensor)
        return taken


class _Route:
    """Who sends which of its rows to whom.

    Attributes:
        send_rows: (S,) own rows in the order in which they leave: by asking rank.
        order: (K,) the request that each arriving row answers.
        sends, receives: rows for and from each rank.
    """

    def __init__(
        self, send_rows: Tensor, order: Tensor, sends: list[int], receives: list[int]
    ) -> None:
        self.send_rows, self.order, self.sends, self.receives = send_rows, order, sends, receives

    def forward(self, x: Tensor) -> Tensor:
        """(B, ...) -> (K, ...)."""
        arrived = _all_to_all(x.index_select(0, self.send_rows), self.sends, self.receives)
        return torch.empty_like(arrived).index_copy_(0, self.order, arrived)

    def backward(self, grad: Tensor, rows: int) -> Tensor:
        """(K, ...) of the asking ranks -> (B, ...), summed at the owners."""
        arrived = _all_to_all(grad.index_select(0, self.order), self.receives, self.sends)
        arrived = _summable(arrived)
        total = arrived.new_zeros((rows, *grad.shape[1:]))
        return total.index_add_(0, self.send_rows, arrived).to(grad.dtype)


def _all_to_all(x: Tensor, sends: list[int], receives: list[int]) -> Tensor:
    result = x.new_empty((sum(receives), *x.shape[1:]))
    dist.all_to_all_single(result, x, receives, sends)
    return result


class _Exchange(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, route: _Route) -> Tensor:
        ctx.route, ctx.rows = route, x.shape[0]
        return route.forward(x)

    @staticmethod
    @once_differentiable
    def backward(ctx, *grads: Tensor):
        return ctx.route.backward(grads[0], ctx.rows), None


def mean_counts(
    window: Sequence[Mapping[str, Tensor]], device: torch.device | str
) -> dict[str, Tensor]:
    """The mean of each count over all ranks and the micro-batches of a window.

    A mean over n_r of the N items of all ranks, times n_r / mean(n), is a rank's share of the mean
    over all N: averaged over ranks and micro-batches, as the engine averages gradients, the shares
    give sum / N exactly. Without it every rank's mean weighs the same, however few its items.

    Args:
        window: for each micro-batch of this rank, name -> 0-d count, the same names everywhere.

    Returns:
        name -> 0-d float64 on `device`. One all-reduce, no wait on the host. Collective.
    """
    names = list(window[0])
    if not names:
        return {}
    table = torch.stack(
        [torch.stack([counts[name].double() for name in names]) for counts in window]
    )
    total = table.to(device, non_blocking=True).sum(dim=0)
    _, world = rank_and_world()
    if world > 1:
        dist.all_reduce(total)
    return dict(zip(names, (total / (world * len(window))).unbind(), strict=True))


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
