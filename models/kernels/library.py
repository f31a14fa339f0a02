"""The compiled kernels as Python sees them: one shared library, called through ctypes.

    library.current().launch("espalier_ffn_act_mask", x, bias, mask, y, rows, columns, ...)

Tensors become addresses, None a null pointer, integers int64_t, floats double, ctypes arrays their
address in host memory; the stream of the tensors' device is appended. The C side follows the same
rule (csrc/common.cuh).
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from models.kernels import build

__all__ = ["Library", "TYPES", "current", "type_code", "unavailable", "using"]

Argument = Tensor | int | float | ctypes.Array[Any] | None

# enum Type in csrc/common.cuh
TYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}


def type_code(dtype: torch.dtype) -> int:
    """The code of an element type. Raises TypeError for one that no kernel takes."""
    if dtype not in TYPES:
        raise TypeError(f"kernels take float32, float16 and bfloat16, not {dtype}")
    return TYPES[dtype]


class Library:
    """A loaded library. Raises OSError when the file cannot be loaded."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._library = ctypes.CDLL(str(path))
        self._library.espalier_error.restype = ctypes.c_char_p
        self._library.espalier_source_hash.restype = ctypes.c_char_p

    @property
    def source_hash(self) -> str:
        """Hash of the sources it was built from."""
        return self._library.espalier_source_hash().decode()

    def query(self, function: str, *arguments: int) -> int:
        """A function of sizes alone, such as how many bytes of workspace a launch needs."""
        call = getattr(self._library, function)
        call.restype = ctypes.c_int64
        return call(*(ctypes.c_int64(value) for value in arguments))

    def launch(self, function: str, *arguments: Argument, reached: Sequence[Tensor] = ()) -> None:
        """Enqueues a launcher's kernels on the current stream of the tensors' device.

        reached: tensors whose addresses stand in a table (a ctypes array) among the arguments.

        Raises RuntimeError when the launch is refused, ValueError when the tensors lie on several
        devices.
        """
        tensors = [value for value in arguments if isinstance(value, Tensor)]
        devices = {tensor.device for tensor in (*tensors, *reached)}
        if len(devices) != 1:
            places = sorted(str(device) for device in devices)
            raise ValueError(f"{function}: tensors must lie on one device, not on {places}")
        (device,) = devices
        values = [_convert(value) for value in arguments]
        call = getattr(self._library, function)
        if device.type != "cuda":
            code = call(*values, ctypes.c_void_p(None))
        else:
            with torch.cuda.device(device):
                stream = torch.cuda.current_stream(device).cuda_stream
                code = call(*values, ctypes.c_void_p(stream))
        if code:
            text = self._library.espalier_error(ctypes.c_int(code)).decode()
            raise RuntimeError(f"{function}: {text} (code {code})")


def _convert(value: Argument) -> Any:
    if value is None:
        return ctypes.c_void_p(None)
    if isinstance(value, Tensor):
        return ctypes.c_void_p(value.data_ptr())
    if isinstance(value, float):
        return ctypes.c_double(value)
    if isinstance(value, ctypes.Array):
        return value  # passed by address
    return ctypes.c_int64(value)


_replacement: Library | None = None


@contextmanager
def using(library: Library) -> Iterator[None]:
    """Calls go to another library meanwhile; tests put the emulation there."""
    global _replacement
    before, _replacement = _replacement, library
    try:
        yield
    finally:
        _replacement = before


def current() -> Library:
    """The library, loaded or built at the first call. Raises RuntimeError saying why there is none."""
    return _replacement or _load()


@cache
def _load() -> Library:
    """The one of the wheel if it was built from these sources, else the cache's."""
    if build.AOT.is_file():
        library = Library(build.AOT)
        if library.source_hash == build.source_hash():
            return library
    capability = "".join(map(str, torch.cuda.get_device_capability()))
    return Library(build.cached([capability]))


@cache
def unavailable() -> str | None:
    """Why the kernels cannot run here, or None. May build them, so it can take half a minute."""
    if not torch.cuda.is_available():
        return "torch sees no CUDA device"
    if torch.version.hip is not None:
        return "this torch is built for ROCm"
    major, minor = torch.cuda.get_device_capability()
    if major < 8:
        return f"the device has compute capability {major}.{minor}, the kernels need 8.0"
    try:
        current()
    except (OSError, RuntimeError) as error:
        return str(error)
    return None
