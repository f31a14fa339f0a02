"""The library of models/kernels/csrc compiled by g++ for the CPU, kernels and launchers alike.

    with emulation():
        ...  # the CUDA implementations now take CPU tensors

emulation.h says what is emulated, and what is not.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import cache
from pathlib import Path

import pytest
import torch
from torch import Tensor

from models.kernels import build, library
from models.kernels.library import Argument, Library

HERE = Path(__file__).parent
CACHE = HERE.parents[1] / ".cache" / "emulation"
FLAGS = ("-std=c++17", "-O1", "-fPIC", "-Wall", "-Wno-unknown-pragmas", "-ffp-contract=off")


class Emulated(Library):
    """Kernels may touch the tensors of the call alone; `seed` draws another order of threads."""

    def seed(self, seed: int) -> None:
        """Another order of threads and blocks from here on."""
        self._library.emulation_seed(ctypes.c_int64(seed))

    def launch(self, function: str, *arguments: Argument, reached: Sequence[Tensor] = ()) -> None:
        """As on a device, with bounds checked."""
        tensors = [value for value in arguments if isinstance(value, Tensor)]
        bounds = [edge for tensor in (*tensors, *reached) for edge in _span(tensor)]
        array = (ctypes.c_int64 * len(bounds))(*bounds)
        self._library.emulation_ranges(array, ctypes.c_int64(len(bounds) // 2))
        super().launch(function, *arguments, reached=reached)


def _span(tensor: Tensor) -> tuple[int, int]:
    """First and past-the-end address of a tensor with its strides."""
    begin = tensor.data_ptr()
    if tensor.numel() == 0:
        return begin, begin
    pairs = zip(tensor.shape, tensor.stride(), strict=True)
    last = sum((size - 1) * stride for size, stride in pairs)
    return begin, begin + (last + 1) * tensor.element_size()


def compile_library(sources: Iterable[Path], output: Path) -> None:
    """Compiles the .cu files among `sources` with g++. Raises RuntimeError with the compiler's text."""
    compiler = os.environ.get("CXX", "g++").split()[0]
    units = [path for path in sources if path.suffix == ".cu"] + [HERE / "emulation.cpp"]
    output.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=output.parent) as folder:

        def compile_one(unit: Path) -> Path:
            target = Path(folder) / f"{unit.stem}.o"
            include = [f"-I{HERE}", f"-I{unit.parent}"]
            _run([compiler, *FLAGS, *include, "-x", "c++", "-c", str(unit), "-o", str(target)])
            return target

        with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
            objects = [str(path) for path in pool.map(compile_one, units)]
        library = Path(folder) / "library.so"
        _run([compiler, "-shared", "-o", str(library), *objects])
        os.replace(library, output)


def _run(command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)}\n{done.stderr}")


@cache
def emulated() -> Emulated:
    """The emulated library, compiled once for these sources; skips the test without a compiler."""
    if shutil.which(os.environ.get("CXX", "g++").split()[0]) is None:
        pytest.skip("no C++ compiler for the emulation")
    digest = hashlib.sha256(repr(FLAGS).encode())
    for path in [*build.sources(), *sorted(HERE.glob("emulation.*"))]:
        digest.update(path.read_bytes())
    output = CACHE / f"{digest.hexdigest()[:16]}.so"
    if not output.is_file():
        compile_library(build.sources(), output)
    return Emulated(output)


@contextmanager
def emulation(seed: int = 0) -> Iterator[Emulated]:
    """CUDA implementations run on the CPU meanwhile; all that torch.empty gives them is NaN.

    seed: the order in which threads and blocks run.
    """
    emulator = emulated()
    emulator.seed(seed)
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)  # with torch.utils.deterministic: fills empty memory
    try:
        with library.using(emulator):
            yield emulator
    finally:
        torch.use_deterministic_algorithms(before)
