"""Counts for mode "bucket" that lie on the steps of this device's latency.

Latency against token count is no line but a staircase: within a step more tokens cost nothing
(2407.05941 says so of pruned vision encoders). So a count goes up to the end of its step.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from train.evaluation.bench import DTYPES
from train.evaluation.latency import device_name, interleave, summarise, threads_of, waiter

if TYPE_CHECKING:
    from collections.abc import Callable

    from models.trim_config import TrimmingConfig
    from models.xvlm import XVLM

__all__ = ["counts_to_time", "latency_by_count", "on_steps", "round_counts", "step_of"]

_TOLERANCE = 0.02  # of a median; a difference below it is noise


def counts_to_time(patches: int, multiple: int = 8) -> list[int]:
    """Numbers of kept patches worth timing: multiples, and all of them."""
    return sorted({*range(multiple, patches, multiple), patches})


@torch.inference_mode()
def latency_by_count(
    model: XVLM,
    batch: int,
    counts: Sequence[int],
    *,
    repeats: int = 20,
    warm_up: int = 3,
    device: torch.device | str = "cpu",
) -> dict[int, float]:
    """Kept patches -> median milliseconds of the vision blocks behind the first site.

    The numbers take turns, in the model's dtype.

    Raises:
        ValueError: the vision encoder has no sites.
    """
    trimming, config = model.config.trimming, model.config.vision
    if trimming is None or not trimming.vision:
        raise ValueError("the vision encoder has no trimmers whose counts could be rounded")
    device = torch.device(device)
    blocks = list(model.to(device).eval().vision.blocks)[trimming.vision[0] :]
    like = next(model.parameters())
    random = torch.Generator().manual_seed(0)

    def call_of(count: int) -> Callable[[], object]:
        shape = (batch, config.prefix_tokens + count, config.width)
        x = torch.randn(shape, generator=random).to(device, like.dtype)

        def call() -> object:
            states = x
            for block in blocks:
                states, _ = block(states)
            return states[0, 0, 0].item()  # an answer on the host

        return call

    calls = [(str(count), call_of(count)) for count in counts]
    seconds = interleave(calls, repeats, warm_up, waiter(device), progress=True)
    return {count: summarise(seconds[str(count)])["median"] for count in counts}


def step_of(count: int, table: Mapping[int, float], tolerance: float = _TOLERANCE) -> int:
    """The largest count whose latency is that of `count`, or below: more tokens for the same time.

    Args:
        table: from `latency_by_count`. A count between two of it costs what the next one costs.

    Raises:
        ValueError: the table is empty.
    """
    if not table:
        raise ValueError("a table of latencies needs at least one count")
    above = [known for known in sorted(table) if known >= count]
    if not above:
        return count  # nothing larger was timed
    limit = table[above[0]] * (1 + tolerance)
    return max(known for known in above if table[known] <= limit)


def on_steps(trimming: TrimmingConfig, table: Mapping[int, float]) -> TrimmingConfig:
    """The configuration with `vision_keep` on the steps of the table, never increasing.

    Raises:
        ValueError: there are no counts.
    """
    if trimming.vision_keep is None:
        raise ValueError(
            "trimming.vision_keep is not set: espalier trim counts on held-out inputs, or set it"
        )
    rounded: list[int] = []
    for count in trimming.vision_keep:
        found = step_of(count, table)
        rounded.append(min(found, rounded[-1]) if rounded else found)
    return replace(trimming, vision_keep=tuple(rounded))


def round_counts(
    folder: Path,
    batch: int,
    *,
    repeats: int = 20,
    device: str = "cpu",
    dtype: str = "fp32",
    threads: int | None = None,
) -> dict[str, Any]:
    """Times the vision encoder of a model folder and moves its counts, in config.json.

    Returns:
        {"batch", "device", "before", "after": vision_keep, "latency": {count: ms}}.

    Raises:
        ValueError, FileNotFoundError: no such model, no trimmers, or no counts.
    """
    from models import from_pretrained

    model = from_pretrained(folder, dtype=DTYPES[dtype], device=device)
    trimming = model.config.trimming
    if trimming is None:
        raise ValueError(f"{folder}: this model has no trimmers, so it has no counts")
    on_steps(trimming, {model.config.vision.patches: 0.0})  # refused before anything is timed
    counts = counts_to_time(model.config.vision.patches)
    with threads_of(threads):
        table = latency_by_count(model, batch, counts, repeats=repeats, device=device)
    moved = on_steps(trimming, table)
    replace(model.config, trimming=moved).save(folder / "config.json")
    return {
        "batch": batch,
        "device": device_name(torch.device(device)),
        "before": list(trimming.vision_keep or ()),
        "after": list(moved.vision_keep or ()),
        "latency": table,
    }
