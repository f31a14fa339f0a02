"""The library of models/kernels/csrc compiled by g++ for the CPU, kernels and launchers alike.

    with emulation():
        ...  # the CUDA implementations now take CPU tensors

emulation.h says what is emulated, and what is not.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import re
import shutil
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
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


def _with_headers(path: Path, found: dict[Path, bytes]) -> dict[Path, bytes]:
    """A source file and what it includes of ours, with contents."""
    if path in found:
        return found
    found[path] = path.read_bytes()
    for name in re.findall(rb'#include "([^"]+)"', found[path]):
        for folder in (path.parent, HERE):
            if (folder / name.decode()).is_file():
                _with_headers(folder / name.decode(), found)
    return found


def _object(unit: Path) -> Path:
    """One compiled source file, from the cache if it and its headers are as they were."""
    digest = hashlib.sha256(repr((FLAGS, unit.name)).encode())
    for content in _with_headers(unit, {}).values():
        digest.update(content)
    target = CACHE / f"{unit.stem}-{digest.hexdigest()[:16]}.o"
    if not target.is_file():
        CACHE.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=CACHE) as folder:
            part = Path(folder) / "part.o"
            include = [f"-I{HERE}", f"-I{unit.parent}"]
            _run([_compiler(), *FLAGS, *include, "-x", "c++", "-c", str(unit), "-o", str(part)])
            os.replace(part, target)
    return target


def compile_library(csrc: Path, output: Path) -> None:
    """Compiles the .cu files of a folder with g++. Raises RuntimeError with the compiler's text."""
    units = [*sorted(csrc.glob("*.cu")), HERE / "emulation.cpp"]
    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        objects = [str(path) for path in pool.map(_object, units)]
    with tempfile.TemporaryDirectory(dir=output.parent) as folder:
        library = Path(folder) / "library.so"
        _run([_compiler(), "-shared", "-o", str(library), *objects])
        os.replace(library, output)


def _compiler() -> str:
    return os.environ.get("CXX", "g++").split()[0]


def _run(command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)}\n{done.stderr}")


@cache
def emulated() -> Emulated:
    """The emulated library, compiled once for these sources; skips the test without a compiler.

    ESPALIER_EMULATION names a folder that is compiled in the place of csrc/ (tests/mutation).
    """
    if shutil.which(_compiler()) is None:
        pytest.skip("no C++ compiler for the emulation")
    csrc = Path(os.environ.get("ESPALIER_EMULATION", build.CSRC))
    digest = hashlib.sha256(repr(FLAGS).encode())
    for path in sorted([*csrc.glob("*.cu*"), *HERE.glob("emulation.*")]):
        digest.update(path.name.encode() + path.read_bytes())
    output = CACHE / f"{digest.hexdigest()[:16]}.so"
    if not output.is_file():
        compile_library(csrc, output)
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
