"""One machine, through the DeepSpeed launcher."""

from __future__ import annotations

import argparse
import glob
import os
import shutil
import socket
import sys
from pathlib import Path

from launchers.supervise import Plan

__all__ = ["base_environment", "deepspeed_command", "has_gpu", "plan"]

PROJECT = Path(__file__).resolve().parents[1]
MODULE = "train.main"
DEFAULT_HOSTFILE = "/job/hostfile"  # DeepSpeed reads it unasked


def has_gpu() -> bool:
    """Whether the NVIDIA driver shows a device here (torch is not imported in the launcher)."""
    return bool(glob.glob("/dev/nvidia[0-9]*")) or os.path.exists("/dev/dxg")


def base_environment() -> dict[str, str]:
    """What every rank needs, whoever starts it."""
    path = os.environ.get("PYTHONPATH", "")
    if str(PROJECT) not in path.split(os.pathsep):
        path = os.pathsep.join(filter(None, [str(PROJECT), path]))
    environment = {"PYTHONPATH": path}
    if not has_gpu() or os.environ.get("CUDA_VISIBLE_DEVICES") == "":
        # torch with CUDA on a machine without a GPU: DeepSpeed's launcher would find no device and
        # refuse.
        environment["DS_ACCELERATOR"] = os.environ.get("DS_ACCELERATOR", "cpu")
    return environment


def deepspeed_command() -> list[str]:
    """The launcher that belongs to this interpreter.

    Raises:
        FileNotFoundError: DeepSpeed is not installed for it.
    """
    beside = Path(sys.executable).with_name("deepspeed")
    if beside.is_file():
        return [str(beside)]
    found = shutil.which("deepspeed")
    if found is None:
        raise FileNotFoundError(
            f"no `deepspeed` beside {sys.executable} nor on PATH: install espalier into this "
            "environment (pip install -e .)"
        )
    return [found]


def plan(options: argparse.Namespace, job: list[str]) -> Plan:
    """The DeepSpeed command for one machine.

    Raises:
        ValueError: more processes than GPUs that CUDA_VISIBLE_DEVICES shows.
        FileNotFoundError: DeepSpeed is not installed.
    """
    processes = options.processes or 1
    environment = base_environment()
    argv = deepspeed_command()
    visible = [part for part in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if part]
    if visible and "DS_ACCELERATOR" not in environment and all(part.isdigit() for part in visible):
        if processes > len(visible):
            raise ValueError(
                f"-n {processes}, but CUDA_VISIBLE_DEVICES shows {len(visible)} GPU: start fewer "
                "processes or show more"
            )
        # --num_accelerators would count from GPU 0 and ignore the choice.
        argv += ["--include", f"localhost:{','.join(visible[:processes])}"]
    else:
        argv += ["--num_accelerators", str(processes)]
    if (
        environment.get("DS_ACCELERATOR") == "cpu"
        and processes > 1
        and "OMP_NUM_THREADS" not in os.environ
    ):
        # Otherwise every rank starts as many threads as there are cores, and they fight.
        environment["OMP_NUM_THREADS"] = str(max(1, len(os.sched_getaffinity(0)) // processes))
    if os.path.isfile(DEFAULT_HOSTFILE):
        argv += ["--hostfile", os.devnull]
    port = options.port if options.port else free_port()
    argv += ["--master_port", str(port), "--module", MODULE, *job]
    return Plan(argv, environment)


def free_port() -> int:
    """A TCP port of this machine that nobody listens on at this moment."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
