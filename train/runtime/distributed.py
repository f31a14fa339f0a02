"""Ranks: who am I, who are the others, how do we start and end together.

`start()` works without a launcher (one process), under the DeepSpeed launcher and torchrun (their
variables are taken as they are), under Slurm's srun and under MPI. `finish()` waits for everybody
and takes the group down: ranks that leave without it abort at exit now and then.
"""

from __future__ import annotations

import ctypes
import os
import select
import signal
import socket
import sys
import threading
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING, Any

from train.runtime import report
from train.runtime.ranks import discover_ranks

if TYPE_CHECKING:
    import torch

__all__ = [
    "Distributed",
    "all_reduce_flag",
    "barrier",
    "broadcast_object",
    "choose_accelerator",
    "finish",
    "start",
]

DIE_WITH_PARENT = "ESPALIER_DIE_WITH_PARENT"
LAUNCHER = "ESPALIER_LAUNCHER"
_PR_SET_PDEATHSIG = 1  # <linux/prctl.h>


@dataclass(frozen=True)
class Distributed:
    """This process in the group: 0 <= rank < world_size; local_rank counts on this machine."""

    rank: int
    world_size: int
    local_rank: int
    device: torch.device
    backend: str

    @property
    def is_main(self) -> bool:
        """True on the rank that writes shared files and talks to the terminal."""
        return self.rank == 0


def choose_accelerator() -> None:
    """Tells DeepSpeed to use the CPU where torch sees no GPU. Must run before `import deepspeed`."""
    import torch

    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")


def _die_with_parent() -> None:
    """The kernel sends SIGTERM when the launcher is gone, so that a killed launcher leaves no
    orphans.
    """
    parent = os.environ.get(DIE_WITH_PARENT)
    if not parent or not sys.platform.startswith("linux"):
        return
    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM, 0, 0, 0)
    if os.getppid() == 1:  # it died before the call above
        raise SystemExit(1)


def _stop_with_launcher() -> None:
    """A thread that sends SIGTERM here when `espalier launch` is gone (`pid:start time`).

    DeepSpeed's launcher stands between us and has no such tie; killed, ours would leave everything
    running. SIGTERM, not an exit: the ranks save first.
    """
    pid, _, started = os.environ.get(LAUNCHER, "").partition(":")
    if not pid or not hasattr(os, "pidfd_open"):
        return
    try:
        descriptor = os.pidfd_open(int(pid))
        with open(f"/proc/{pid}/stat") as file:
            same = file.read().rpartition(")")[2].split()[19] == started
    except OSError:
        same = False
    if not same:
        raise SystemExit("espalier: `espalier launch` is gone: not starting without it")
    poller = select.poll()
    poller.register(descriptor, select.POLLIN)

    def watch() -> None:
        poller.poll()
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=watch, name="espalier-launcher", daemon=True).start()


def _record_collectives() -> None:
    """NCCL leaves its last collectives in a file when one times out, and ends the process instead
    of hanging; the user's own settings stand.
    """
    os.environ.setdefault("TORCH_NCCL_ASYNC_ERROR_HANDLING", "1")
    os.environ.setdefault("TORCH_NCCL_DUMP_ON_TIMEOUT", "1")
    os.environ.setdefault("TORCH_NCCL_TRACE_BUFFER_SIZE", "2000")


def _device(local_rank: int) -> torch.device:
    import torch

    if not torch.cuda.is_available():
        return torch.device("cpu")
    count = torch.cuda.device_count()
    if local_rank < count:
        index = local_rank
    elif count == 1 and "SLURM_PROCID" in os.environ:
        index = 0  # srun --gpus-per-task shows every task its own GPU only
    else:
        raise ValueError(
            f"local rank {local_rank} has no GPU: {count} visible on {socket.gethostname()}; start "
            "fewer processes per machine (-n), or hide the GPUs (CUDA_VISIBLE_DEVICES=) to run on "
            "the CPU"
        )
    torch.cuda.set_device(index)
    return torch.device("cuda", index)


def _share_cores() -> None:
    """Ranks of one machine share its cores; otherwise each starts a thread on every core, and they
    fight. A thread count that the user set stands.
    """
    import torch

    ranks_here = int(os.environ.get("LOCAL_WORLD_SIZE") or os.environ.get("LOCAL_SIZE") or 1)
    if ranks_here > 1 and "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // ranks_here))


def start(timeout_minutes: float | None = None) -> Distributed:
    """Joins the process group, through `deepspeed.init_distributed`. Calling it again returns the
    same ranks.

    Args:
        timeout_minutes: how long a collective may wait for the slowest rank; None is DeepSpeed's 10
            minutes (environment variable DEEPSPEED_TIMEOUT).

    Raises:
        ValueError: incomplete rank variables, more processes than GPUs on this machine, or no time
            to wait.
    """
    if timeout_minutes is not None and timeout_minutes <= 0:
        raise ValueError(f"engine.collective_timeout: {timeout_minutes} minutes is no time to wait")
    os.environ.update(discover_ranks(os.environ))
    _die_with_parent()
    _stop_with_launcher()
    report.at("joining the other ranks")
    choose_accelerator()
    local_rank = int(os.environ["LOCAL_RANK"])
    device = _device(local_rank)
    if device.type == "cpu":
        _share_cores()
    else:
        _record_collectives()

    import deepspeed
    import torch.distributed

    if not torch.distributed.is_initialized():
        timeout: dict[str, Any] = (
            {} if timeout_minutes is None else {"timeout": timedelta(minutes=timeout_minutes)}
        )
        deepspeed.init_distributed(auto_mpi_discovery=False, verbose=False, **timeout)
        _open_flag_group(**timeout)
    report.at("started")
    return Distributed(
        rank=torch.distributed.get_rank(),
        world_size=torch.distributed.get_world_size(),
        local_rank=local_rank,
        device=device,
        backend=str(torch.distributed.get_backend()),
    )


class _FlagGroup:
    """The gloo group of `all_reduce_flag`; None is the default group."""

    group: Any = None


def _open_flag_group(**timeout: Any) -> None:
    """A gloo group beside NCCL: a flag then costs no synchronisation with the GPU. Collective."""
    import torch.distributed

    _FlagGroup.group = None
    if torch.distributed.get_backend() != "gloo" and torch.distributed.get_world_size() > 1:
        _FlagGroup.group = torch.distributed.new_group(backend="gloo", **timeout)


def _initialised() -> bool:
    import torch.distributed

    return torch.distributed.is_available() and torch.distributed.is_initialized()


def barrier(what: str, timeout_minutes: float | None = None) -> None:
    """Waits for all ranks at a point with a name.

    Raises:
        RuntimeError: a rank did not come; the message names the point, and with gloo also the
            missing ranks.
    """
    if not _initialised():
        return
    import torch.distributed

    try:
        if torch.distributed.get_backend() == "gloo":
            timeout = None if timeout_minutes is None else timedelta(minutes=timeout_minutes)
            torch.distributed.monitored_barrier(timeout=timeout, wait_all_ranks=True)
        else:
            torch.distributed.barrier()
    except RuntimeError as error:
        rank = torch.distributed.get_rank()
        raise RuntimeError(
            f"rank {rank} waited in vain for all ranks at '{what}': {error}"
        ) from error


def finish(failed: bool = False, code: int | None = None) -> None:
    """Barrier, then destroys the process group. Does nothing when there is none.

    Args:
        failed: this rank leaves because of an error: it must not wait for ranks that know nothing
            of it. The error being handled is reported first.
        code: exit code to tell the launcher when all ranks are through.
    """
    error = sys.exc_info()[1]
    if failed and error is not None:
        report.failed(error)
    if not _initialised():
        if not failed and code is not None:
            report.ended(code)
        return
    import deepspeed.comm

    if not failed:
        barrier("the end of the run")
        if code is not None:
            report.ended(code)
            # mpirun and srun kill the others when the first rank leaves with 75.
            barrier("the report to the launcher")
    deepspeed.comm.destroy_process_group()
    # DeepSpeed keeps its own handle and would take a dead group for a live one at the next start().
    deepspeed.comm.comm.cdb = None
    _FlagGroup.group = None


def _collective_device() -> torch.device:
    import torch

    on_gpu = torch.distributed.get_backend() == "nccl"
    return torch.device("cuda", torch.cuda.current_device()) if on_gpu else torch.device("cpu")


def all_reduce_flag(flag: bool) -> bool:
    """True on every rank when it is true on any, over gloo. All ranks must call it the same number
    of times.
    """
    if not _initialised() or _world_size() == 1:
        return bool(flag)
    import torch

    value = torch.tensor([int(flag)], dtype=torch.int32)
    group = _FlagGroup.group
    if group is None:
        value = value.to(_collective_device())
    torch.distributed.all_reduce(value, op=torch.distributed.ReduceOp.MAX, group=group)
    return bool(value.item())


def _world_size() -> int:
    import torch.distributed

    return torch.distributed.get_world_size()


def broadcast_object(value: Any, source: int = 0) -> Any:
    """The `source` rank's picklable object, on every rank."""
    if not _initialised():
        return value
    import torch

    box = [value]
    torch.distributed.broadcast_object_list(box, src=source, device=_collective_device())
    return box[0]
