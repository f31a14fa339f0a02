"""How long calls take, fairly: they take turns in one process, and are compared round by round."""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from tqdm import tqdm

__all__ = [
    "device_name",
    "interleave",
    "ratios",
    "summarise",
    "threads_of",
    "waiter",
]


def interleave(
    calls: Sequence[tuple[str, Callable[[], object]]],
    repeats: int,
    warm_up: int = 3,
    synchronise: Callable[[], object] = lambda: None,
    clock: Callable[[], float] = time.perf_counter,
    progress: bool = False,
) -> dict[str, list[float]]:
    """Seconds of each call, `repeats` of them, taken in turns.

    Each round runs every call once and starts with another one, so that a busy moment of the
    machine, its temperature or a neighbour's caches hit all of them alike.
    """
    for _, call in calls:
        for _ in range(warm_up):
            call()
    seconds: dict[str, list[float]] = {name: [] for name, _ in calls}
    for turn in tqdm(
        range(repeats), desc="bench", unit="round", disable=None if progress else True
    ):
        shift = turn % len(calls)
        for name, call in (*calls[shift:], *calls[:shift]):
            synchronise()
            begin = clock()
            call()
            synchronise()
            seconds[name].append(clock() - begin)
    return seconds


def summarise(seconds: Sequence[float]) -> dict[str, float]:
    """Median and quartiles in milliseconds. Raises ValueError on fewer than two values."""
    if len(seconds) < 2:
        raise ValueError("at least two repeats are needed for quartiles")
    low, middle, high = statistics.quantiles(seconds, n=4, method="inclusive")
    return {
        "median": middle * 1e3,
        "q1": low * 1e3,
        "q3": high * 1e3,
        "repeats": float(len(seconds)),
    }


@contextmanager
def threads_of(count: int | None) -> Iterator[None]:
    """CPU threads of torch inside; None changes nothing."""
    before = torch.get_num_threads()
    if count is not None:
        torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def waiter(device: torch.device) -> Callable[[], object]:
    """What waits until the device has done everything asked of it."""
    return torch.cuda.synchronize if device.type == "cuda" else (lambda: None)


def ratios(slow: Sequence[float], fast: Sequence[float]) -> dict[str, float]:
    """How many times as fast: median and quartiles over rounds of slow / fast, pair by pair.

    Both were taken one right after the other, so what slows the machine down for a while cancels.
    Raises ValueError on fewer than two rounds, or unequal ones.
    """
    if len(slow) != len(fast) or len(slow) < 2:
        raise ValueError(f"{len(slow)} and {len(fast)} rounds: as many of both, two at least")
    pairs = [a / b for a, b in zip(slow, fast, strict=True)]
    low, middle, high = statistics.quantiles(pairs, n=4, method="inclusive")
    return {"median": middle, "q1": low, "q3": high}


def device_name(device: torch.device) -> str:
    """The processor's or accelerator's name, as a person knows it."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    info = Path("/proc/cpuinfo")
    rows = info.read_text(errors="replace").splitlines() if info.is_file() else []
    names = [row.partition(":")[2].strip() for row in rows if row.startswith("model name")]
    return f"{names[0] if names else 'CPU'}, {os.cpu_count()} logical cores"
