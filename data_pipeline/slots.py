"""Shared memory that a loader worker uses again and again for the pictures of its batches.

torch moves a tensor between processes in a new shared memory file each time. For a batch of pictures
(12 MB for 64 of 256 x 256) that is three thousand pages to find, clear and give back, and a copy:
more than all else that a loader does beside decoding. Here a worker draws into memory that the main
process maps, and gets it back when the batch is no longer used there.

A slot is an anonymous file in memory (`memfd`), the last byte of which says whether it is in use: set
by the worker when it takes the slot, cleared by the main process when the last view of the batch is
gone, so neither waits for the other. Nothing outlives the two processes, and `/dev/shm`, which is
small in many containers, is not used.
"""

from __future__ import annotations

import mmap
import multiprocessing.reduction
import os
import weakref
from functools import cache
from typing import Any

import numpy as np
import torch
from torch.utils.data import get_worker_info

__all__ = ["SlotPool", "allocate", "receive", "share"]

# A consumer that keeps more batches than this gets ordinary memory.
_MOST_SLOTS = 32
_PAGE = mmap.PAGESIZE


class _Slot:
    """One file of `size` bytes and a page for the mark."""

    def __init__(self, size: int) -> None:
        self.size = size
        self.file = os.memfd_create("batch-images", os.MFD_CLOEXEC)
        os.ftruncate(self.file, size + _PAGE)
        self.memory = mmap.mmap(self.file, size + _PAGE)
        self.unsent = False
        self._takes = 0

    @property
    def free(self) -> bool:
        return self.memory[-1] == 0

    def take(self, shape: tuple[int, ...]) -> np.ndarray:
        """The slot's memory as an array; the slot is in use until the receiver releases it, or the
        array is gone without having been sent.
        """
        self.memory[-1] = 1
        self.unsent = True
        self._takes += 1
        array = np.frombuffer(self.memory, np.uint8, int(np.prod(shape))).reshape(shape)
        # numpy hangs views of a view on the first array: that is the one to watch.
        weakref.finalize(array.base, self._forgotten, self._takes)
        return array

    def _forgotten(self, take: int) -> None:
        # An array that was sent may stay here until its slot is in use for another one.
        if self.unsent and take == self._takes:
            self.unsent, self.memory[-1] = False, 0


class SlotPool:
    """The slots of one worker process."""

    def __init__(self) -> None:
        self._slots: list[_Slot] = []
        self._taken: dict[int, _Slot] = {}

    def take(self, shape: tuple[int, ...]) -> np.ndarray | None:
        """A uint8 array in a slot that is not in use; None when there are too many in use."""
        size = int(np.prod(shape))
        slot = next((slot for slot in self._slots if slot.size == size and slot.free), None)
        if slot is None:
            # Other sizes are of earlier batches (the last of an evaluation): let go of free ones.
            self._slots = [slot for slot in self._slots if slot.size == size or not slot.free]
            if len(self._slots) >= _MOST_SLOTS:
                return None
            slot = _Slot(size)
            self._slots.append(slot)
        array = slot.take(shape)
        self._taken[array.ctypes.data] = slot
        return array

    def sent(self, tensor: torch.Tensor) -> _Slot | None:
        """The slot that a tensor fills, once: from now on it belongs to the receiver."""
        slot = self._taken.get(tensor.data_ptr())
        if slot is None or not slot.unsent or tensor.numel() != slot.size:
            return None
        slot.unsent = False
        return slot


@cache
def _pool(process: int) -> SlotPool:
    """Of this process: a fork must not use its parent's slots."""
    return SlotPool()


def allocate(shape: tuple[int, ...]) -> np.ndarray:
    """A uint8 array: in a slot when this is a loader worker, else in ordinary memory."""
    if get_worker_info() is not None and hasattr(os, "memfd_create"):
        array = _pool(os.getpid()).take(shape)
        if array is not None:
            return array
    return np.empty(shape, np.uint8)


def share(tensor: torch.Tensor) -> tuple[Any, tuple[int, ...], tuple[int, ...]] | None:
    """What `receive` needs to map a tensor that fills a slot; None for any other tensor.

    For use while a message to another process is being made.
    """
    if tensor.device.type != "cpu" or tensor.dtype != torch.uint8:
        return None
    slot = _pool(os.getpid()).sent(tensor)
    if slot is None:
        return None
    file = multiprocessing.reduction.DupFd(slot.file)
    return file, tuple(tensor.shape), tuple(tensor.stride())


def _release(memory: mmap.mmap, process: int) -> None:
    # The copy that a fork has of the batch is not the one that counts.
    if os.getpid() == process:
        memory[-1] = 0


def receive(file: Any, shape: tuple[int, ...], stride: tuple[int, ...]) -> torch.Tensor:
    """The sender's tensor, in the same memory; the slot is released with its last view."""
    descriptor = file.detach()
    try:
        memory = mmap.mmap(descriptor, 0)
    finally:
        os.close(descriptor)
    array = np.frombuffer(memory, np.uint8, int(np.prod(shape)))
    weakref.finalize(array, _release, memory, os.getpid()).atexit = False
    return torch.from_numpy(array).as_strided(shape, stride)
