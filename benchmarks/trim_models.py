"""What the benchmarks of trimming share: a pass as it is served, its counted cost, its time."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from models.trimming import baselines
from train.evaluation.latency import interleave, ratios, summarise, waiter
from train.evaluation.vqa import rank_states

if TYPE_CHECKING:
    from models.xvlm import XVLM
    from train.evaluation.vqa import AnswerList

_RATES = tuple(rate / 100 for rate in range(100, 4, -1))


@dataclass(frozen=True)
class Asked:
    """Pictures (B, 3, S, S) uint8, one for each text (B, L), and the texts' mask."""

    images: Tensor
    ids: Tensor
    mask: Tensor

    def to(self, device: torch.device) -> Asked:
        return Asked(self.images.to(device), self.ids.to(device), self.mask.to(device))


def respond(
    model: XVLM,
    asked: Asked,
    answers: AnswerList | None = None,
    top_k: int = 128,
    order: Tensor | None = None,
) -> Tensor:
    """One pass as it is served: text layers once, the picture (with the text in mind where trimmers
    want it), fusion, then the answer, or whether picture and text belong together.

    Args:
        order: (B,) int64: trimmers of row i are told the text of row order[i]. None: its own.

    Returns:
        (B,) index into `answers`, or logits (B, 2) of a model without a decoder.
    """
    text = model.encode_text(asked.ids, asked.mask)
    guide = text.last[:, 0] if model.guided else None
    if guide is not None and order is not None:
        guide = guide[order]
    image = model.encode_image(asked.images, guide=guide)
    left = asked.mask if text.mask is None else text.mask
    fused = model.fuse(text.last, left, image.last, image.mask)
    left = left if fused.mask is None else fused.mask
    if model.decoder is None:
        return model.match_logits(fused.last)
    assert answers is not None
    return rank_states(model, fused.last, left, answers, top_k)


def load_asked(
    folder: Path, task: str, tokenizer: Any, image_size: int, count: int, max_tokens: int
) -> list[Asked]:
    """`count` test texts with their pictures, one row each, without padding.

    Of every picture the texts come one after another; here every picture gives one.
    """
    from data_pipeline.loader import build_loader

    loader = build_loader(
        task, folder, tokenizer=tokenizer, batch=1, train=False, limit=count,
        image_size=image_size, max_tokens=max_tokens,
    )  # fmt: skip
    found, seen = [], set[str]()
    for batch in cast(Iterable[Any], loader):
        vqa = task == "vqa"
        ids, mask = (
            (batch.question_ids, batch.question_mask) if vqa else (batch.text_ids, batch.text_mask)
        )
        key = batch.keys[0] if vqa else batch.image_ids[0]
        if key in seen:
            continue
        seen.add(key)
        row = len(seen) % int(batch.valid.sum()) if vqa else 0  # questions of all types
        length = int(mask[row].sum())
        found.append(
            Asked(batch.images[:1], ids[row : row + 1, :length], mask[row : row + 1, :length])
        )
    return found


def together(rows: Sequence[Asked]) -> Asked:
    """One padded batch."""
    longest = max(row.ids.shape[1] for row in rows)

    def padded(x: Tensor) -> Tensor:
        return torch.nn.functional.pad(x, (0, longest - x.shape[1]))

    return Asked(
        torch.cat([row.images for row in rows]),
        torch.cat([padded(row.ids) for row in rows]),
        torch.cat([padded(row.mask) for row in rows]),
    )


def counted_macs(
    model: XVLM, rows: Sequence[Asked], answers: AnswerList | None, top_k: int
) -> float:
    """Mean multiply-accumulates of a row by itself, as torch counts them while it runs."""
    total = 0
    with torch.inference_mode():
        for row in rows:
            with FlopCounterMode(display=False) as counter:
                respond(model, row, answers, top_k)
            total += counter.get_total_flops() // 2
    return total / len(rows)


# --- counts of equal cost -------------------------------------------------------------------------


def schedules(
    name: str, patches: int, layers: int, profile: Sequence[int]
) -> list[tuple[int, ...]]:
    """Counts that a baseline may keep, from all patches to few.

    "random" and "uniform" follow `profile`, what a trained model keeps at its sites, scaled; "evit"
    and "tome" keep the same share of what each block sees ("tome" at least half); "resolution" has
    the squares.
    """
    if name == "resolution":
        side = math.isqrt(patches)
        return [(grid * grid,) for grid in range(side, 0, -1)]
    if name in ("random", "uniform"):
        most = max(profile)
        found = [
            tuple(max(1, math.ceil(count * patches * rate / most)) for count in profile)
            for rate in _RATES
        ]
    else:
        found = [baselines.geometric(patches, rate, layers) for rate in _RATES]
    if name == "tome":
        found = [_halved(counts, patches) for counts in found]
    return list(dict.fromkeys(found))


def _halved(counts: Sequence[int], patches: int) -> tuple[int, ...]:
    kept = []
    for count in counts:
        patches = max(count, patches // 2, 1)
        kept.append(patches)
    return tuple(kept)


def cheapest(
    options: Sequence[tuple[int, ...]], cost: Callable[[tuple[int, ...]], float], target: float
) -> tuple[int, ...]:
    """The last of `options`, whose costs fall, that costs at least `target`; else the last of all.

    A baseline is never given less than what it is compared with, so that a lead over it is real.
    """
    low, high = 0, len(options) - 1
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if cost(options[middle]) >= target else (low, middle - 1)
    return options[low]


# --- time -----------------------------------------------------------------------------------------


def timed(
    calls: Mapping[str, Callable[[], object]],
    repeats: int,
    first: str,
    device: torch.device | None = None,
    warm_up: int = 2,
) -> dict[str, dict[str, Any]]:
    """Name -> median and quartiles in ms, seconds of each round, and how many times as fast as
    `first`, round by round. All take turns in one process.

    On a CPU "cpu" is the same by the processor's time of this process: on a machine that others use,
    time in which they ran is not in it. Of several threads it is the sum.
    """
    place = device or torch.device("cpu")
    spent: dict[str, list[float]] = {name: [] for name in calls}

    def clocked(name: str, call: Callable[[], object]) -> Callable[[], object]:
        def run() -> None:
            begin = time.process_time()
            call()
            spent[name].append(time.process_time() - begin)

        return run

    turns = [(name, clocked(name, call)) for name, call in calls.items()]
    with torch.inference_mode():
        found = interleave(turns, repeats, warm_up, waiter(place), progress=True)
    result = {name: _told(seconds, found[first]) for name, seconds in found.items()}
    if place.type == "cpu":
        spent = {name: seconds[warm_up:] for name, seconds in spent.items()}
        for name, seconds in spent.items():
            result[name]["cpu"] = _told(seconds, spent[first])
    return result


def _told(seconds: Sequence[float], first: Sequence[float]) -> dict[str, Any]:
    return summarise(seconds) | {"seconds": list(seconds), "speedup": ratios(first, seconds)}


def one_by_one(
    model: XVLM, rows: Sequence[Asked], answers: AnswerList | None, top_k: int
) -> Callable[[], object]:
    """A call that answers each row by itself."""

    def call() -> list[Any]:
        return [respond(model, row, answers, top_k).tolist() for row in rows]

    return call


def batches(rows: Sequence[Asked], size: int) -> Iterator[Asked]:
    """Whole batches of `size`."""
    for begin in range(0, len(rows) - size + 1, size):
        yield together(rows[begin : begin + size])
