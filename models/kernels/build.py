"""Builds csrc/ with nvcc into one shared library: on demand, or ahead of time for a wheel.

The library knows nothing of torch or Python (C ABI, static CUDA runtime), so one file serves every
version of both, and loads on machines without a driver. No torch is imported here: setup.py uses
this module too.

    python -m models.kernels.build [--arch 80 90] [--report] [--output FILE]

Environment: ESPALIER_NVCC names the compiler, ESPALIER_CACHE the cache folder (~/.cache/espalier).
"""

from __future__ import annotations

import argparse
import fcntl
import hashlib
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

__all__ = [
    "AOT",
    "BuildError",
    "Kernel",
    "build",
    "cached",
    "cache_folder",
    "find_nvcc",
    "parse_report",
    "source_hash",
    "sources",
]

CSRC = Path(__file__).parent / "csrc"
AOT = Path(__file__).parent / "libespalier.so"  # in a wheel that was built with kernels
ARCHITECTURES = ("80", "90")
FLAGS = ("-std=c++17", "-O3", "-Xcompiler=-fPIC,-fvisibility=default", "-Xptxas=-v")
_TOLD_EVERY = 30.0  # seconds between two lines while another process builds


class BuildError(RuntimeError):
    """The kernels cannot be built; the message says what to do."""


@dataclass(frozen=True)
class Kernel:
    """What ptxas says of one kernel: registers a thread, bytes spilled and of stack."""

    name: str
    architecture: str
    registers: int
    spill_stores: int
    spill_loads: int
    stack: int

    @property
    def spills(self) -> bool:
        return bool(self.spill_stores or self.spill_loads or self.stack)


def sources() -> list[Path]:
    """Every file that goes into the library, in a fixed order."""
    return sorted(path for path in CSRC.iterdir() if path.suffix in (".cu", ".cuh"))


def source_hash() -> str:
    """16 hex digits of all sources; the library carries them and others are refused."""
    digest = hashlib.sha256()
    for path in sources():
        digest.update(path.name.encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()[:16]


def find_nvcc() -> Path | None:
    """ESPALIER_NVCC, else CUDA_HOME, PATH, /usr/local/cuda; None where there is none."""
    named = os.environ.get("ESPALIER_NVCC")
    if named:
        if not Path(named).is_file():
            raise BuildError(f"ESPALIER_NVCC names {named}, which is no file")
        return Path(named)
    homes = [os.environ.get(name) for name in ("CUDA_HOME", "CUDA_PATH")] + ["/usr/local/cuda"]
    on_path = shutil.which("nvcc")
    places = [Path(home) / "bin" / "nvcc" for home in homes if home]
    if on_path:
        places.insert(len(places) - 1, Path(on_path))
    return next((place for place in places if place.is_file()), None)


def _need_nvcc() -> Path:
    nvcc = find_nvcc()
    if nvcc is None:
        raise BuildError(
            "no nvcc here, so the CUDA kernels cannot be built: install the CUDA toolkit (12.4 or "
            "newer; the compiler is enough), set CUDA_HOME or ESPALIER_NVCC, or go without them "
            "with ESPALIER_KERNELS=reference"
        )
    return nvcc


def cache_folder() -> Path:
    """Where built libraries are kept."""
    named = os.environ.get("ESPALIER_CACHE")
    return (Path(named) if named else Path.home() / ".cache" / "espalier") / "kernels"


def _version(nvcc: Path) -> str:
    return subprocess.run([nvcc, "--version"], capture_output=True, text=True, check=True).stdout


def _targets(architectures: Sequence[str]) -> list[str]:
    """Machine code for each architecture, and PTX of the newest for what comes after it."""
    for name in architectures:
        if not re.fullmatch(r"\d{2,3}[af]?", name):
            raise ValueError(f"architecture {name!r} is not of the form 80 or 90a")
    codes = [f"-gencode=arch=compute_{name},code=sm_{name}" for name in architectures]
    plain = [name for name in architectures if name.isdigit()]
    if plain:  # architecture-specific PTX (90a) would run nowhere else
        newest = max(plain, key=int)
        codes.append(f"-gencode=arch=compute_{newest},code=compute_{newest}")
    return codes


def _run(command: Sequence[str | Path]) -> str:
    """Standard error of a compiler call (where ptxas reports). Raises BuildError with its text."""
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True)
    if done.returncode:
        line = " ".join(str(part) for part in command)
        raise BuildError(f"{line}\nfailed with code {done.returncode}:\n{done.stdout}{done.stderr}")
    return done.stderr


def build(output: Path, architectures: Sequence[str] = ARCHITECTURES) -> list[Kernel]:
    """Compiles every csrc/*.cu and links `output`, which appears whole or not at all.

    Returns what ptxas reports of each kernel. Raises BuildError without nvcc or when it fails.
    """
    nvcc, targets = _need_nvcc(), _targets(architectures)
    stamp = f'-DESPALIER_SOURCE_HASH="{source_hash()}"'
    output.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=output.parent, prefix=".build-") as folder:
        units = [path for path in sources() if path.suffix == ".cu"]
        objects = [Path(folder) / f"{path.stem}.o" for path in units]

        def compile_one(unit: Path, to: Path) -> str:
            return _run([nvcc, *FLAGS, *targets, stamp, "-c", unit, "-o", to])

        with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
            reports = list(pool.map(compile_one, units, objects))
        library = Path(folder) / "library.so"
        _run([nvcc, *targets, "-shared", "-Xcompiler=-fPIC", "-o", library, *objects])
        os.replace(library, output)
    return parse_report("\n".join(reports))


def parse_report(text: str) -> list[Kernel]:
    """Kernels in the output of `ptxas -v`.

    Raises ValueError when a kernel's figures are missing: a changed format must not pass for "no
    spills".
    """
    head = r"Compiling entry function '(\S+)' for 'sm_(\w+)'"
    figures = (
        r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads"
        r".*?Used (\d+) registers"
    )
    parts = re.split(head, text)
    kernels = []
    for name, architecture, body in zip(parts[1::3], parts[2::3], parts[3::3], strict=True):
        found = re.search(figures, body, re.S)
        if found is None:
            raise ValueError(f"no figures of kernel {name} in the report of ptxas:\n{body[:500]}")
        stack, stores, loads, registers = map(int, found.groups())
        kernels.append(Kernel(name, architecture, registers, stores, loads, stack))
    return kernels


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """One builder at a time on this machine; the others wait and then find the result."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w") as file:
        begun = told = time.monotonic()
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                now = time.monotonic()
                if now - told >= _TOLD_EVERY:
                    told = now
                    waited = f"waiting {now - begun:.0f} s for another process that builds kernels"
                    print(f"{waited} (lock: {path})", file=sys.stderr, flush=True)
                time.sleep(0.1)
        yield


def cached(architectures: Sequence[str] = ARCHITECTURES) -> Path:
    """The library of these sources, compiler and architectures, built now if it is not there.

    Safe to call from several processes at once. Raises BuildError.
    """
    nvcc = _need_nvcc()
    key = "\0".join([source_hash(), _version(nvcc), *FLAGS, *_targets(architectures)])
    folder = cache_folder() / hashlib.sha256(key.encode()).hexdigest()[:16]
    library = folder / "libespalier.so"
    if not library.is_file():
        with _locked(folder.with_suffix(".lock")):
            if not library.is_file():
                build(library, architectures)
    return library


def _readable(names: list[str]) -> list[str]:
    """C++ names in the open, where c++filt is at hand."""
    tool = shutil.which("c++filt") or shutil.which("cu++filt")
    if tool is None or not names:
        return names
    done = subprocess.run([tool], input="\n".join(names), capture_output=True, text=True)
    return done.stdout.splitlines() if done.returncode == 0 else names


def _table(kernels: list[Kernel]) -> str:
    lines = [f"{'sm':>4} {'registers':>9} {'spilled':>7} {'stack':>5}  kernel"]
    for kernel, name in zip(kernels, _readable([k.name for k in kernels]), strict=True):
        spilled = kernel.spill_stores + kernel.spill_loads
        lines.append(
            f"{kernel.architecture:>4} {kernel.registers:>9} {spilled:>7} {kernel.stack:>5}  {name}"
        )
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit code 0, 1 when a kernel spills under --report, 2 when the build fails."""
    parser = argparse.ArgumentParser(prog="python -m models.kernels.build", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--arch", nargs="+", default=list(ARCHITECTURES), help="80 90 90a ...")
    parser.add_argument("--report", action="store_true", help="registers and spills of each kernel")
    parser.add_argument("--output", type=Path, help="write this file instead of the cache")
    options = parser.parse_args(arguments)
    try:
        if not options.report and options.output is None:
            print(cached(options.arch))
            return 0
        with tempfile.TemporaryDirectory() as folder:
            output = options.output or Path(folder) / "libespalier.so"
            kernels = build(output, options.arch)
    except (BuildError, ValueError) as error:
        print(error, file=sys.stderr)
        return 2
    if options.report:
        print(_table(kernels))
    return int(options.report and any(kernel.spills for kernel in kernels))


if __name__ == "__main__":
    sys.exit(main())
