"""What a loader worker sets before its first sample: one thread, and an allocator that keeps memory.

A decoded picture is megabytes that live for a millisecond. glibc by default gives such memory back
to the system at once, and every page of the next picture is then faulted in and cleared anew; up to
three times the decoding time on large pictures.
"""

from __future__ import annotations

import ctypes
import gc
import os
import sys

import torch

__all__ = ["keep_memory", "start_worker"]

# mallopt's parameters (malloc.h).
_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3
_KEEP_BYTES = 1 << 30
# Older versions of glibc take at most 32 MiB for the second one.
_HEAP_BYTES = (256 << 20, 32 << 20)


def keep_memory() -> bool:
    """Lets this process keep up to 1 GiB of freed memory, and take blocks below 256 MiB from it.

    False where the C library is not glibc or refuses; nothing is changed then. Only the first
    setting alone would be worse than none: it ends glibc's own adaptation.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError):
        return False
    if not any(mallopt(_MMAP_THRESHOLD, size) for size in _HEAP_BYTES):
        return False
    return bool(mallopt(_TRIM_THRESHOLD, _KEEP_BYTES))


def start_worker(number: int) -> None:
    """`worker_init_fn` of the loader: workers share the cores with training and with one another.

    Args:
        number: of the worker; all are set up alike, since what is random hangs on the sample.
    """
    keep_memory()
    torch.set_num_threads(1)
    # Only where something else brought it: the pipeline does not use it.
    if (opencv := sys.modules.get("cv2")) is not None:
        opencv.setNumThreads(0)
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    # What came from the parent stays for good: passing over it again and again would only copy
    # its pages.
    gc.freeze()
