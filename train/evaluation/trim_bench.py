"""`espalier bench --modes`: how fast each way of running a trimmed model is, on this device.

All modes compute with the same weights and take turns on the same inputs; "off", the full model, is
what they are compared with. Which mode is best depends on device and batch size, and trimming can be
slower than not trimming: small operations cost time whatever they save. So it is measured.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import cycle
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch.utils.flop_counter import FlopCounterMode

from train.evaluation.bench import DTYPES, fitting
from train.evaluation.latency import device_name, interleave, ratios, summarise, threads_of, waiter
from train.evaluation.workload import WHOLE, Inputs, Workload, calls_of

if TYPE_CHECKING:
    from collections.abc import Callable

    from models.config import ModelConfig
    from models.xvlm import XVLM

__all__ = ["bench_modes", "held_out", "mode_table", "modes_of", "verdict", "write_mode"]

MODES = ("off", "mask", "gather", "bucket", "packed")
SERVED = ("off", "gather", "bucket", "packed")  # "mask" computes every token: it is the reference
_BATCHES = 4  # of inputs that rounds go through in turn


def modes_of(model: XVLM) -> tuple[str, ...]:
    """The modes that a model can run in: buckets need counts.

    Raises:
        ValueError: the model has no trimmers.
    """
    trimming = model.config.trimming
    if trimming is None:
        raise ValueError(
            "this model has no trimmers, so it has no modes: train some with espalier trim"
        )
    counted = (trimming.vision_keep, trimming.fusion_keep, trimming.text_keep)
    sites = (trimming.vision, trimming.fusion, trimming.text)
    whole = all(keep is not None or not where for keep, where in zip(counted, sites, strict=True))
    return MODES if whole else tuple(mode for mode in MODES if mode != "bucket")


def held_out(
    folder: Path, config: ModelConfig, data: Path, split: str, batch: int, work: Workload,
    device: torch.device,
) -> list[Inputs]:  # fmt: skip
    """Up to `_BATCHES` different batches of real inputs, one text for each picture.

    Raises:
        FileNotFoundError: no such split.   ValueError: it has fewer pictures than a batch.
    """
    from data_pipeline.loader import build_loader
    from train.evaluation.accuracy import find_split, tokenizer_of

    where = find_split(data, config.form, split)
    loader = build_loader(
        config.form, where, tokenizer=tokenizer_of(folder, where), batch=batch, train=False,
        image_size=config.vision.image_size, patch_size=config.vision.patch_size,
        max_tokens=config.text.max_positions,
    )  # fmt: skip
    found: list[Inputs] = []
    for one in loader:
        first: dict[int, int] = {}
        for row in one.valid.nonzero()[:, 0].tolist():
            first.setdefault(int(one.image_index[row]), row)
        rows = list(first.values())[:batch]
        if len(rows) == batch:
            found.append(Inputs.of_batch(one, rows, config, work, device))
        if len(found) == _BATCHES:
            break
    if not found:
        raise ValueError(f"{where}: fewer than {batch} pictures, which is the batch; lower --batch")
    return found


def _check_inputs(folder: Path, modes: Sequence[str], data: Path | None) -> None:
    if data is None and "bucket" not in modes:
        raise ValueError(
            f"{folder}: config.json has no counts for its sites (trimming.vision_keep, ...), so "
            "random inputs say nothing: name real ones with --data FOLDER"
        )


def bench_modes(
    folder: Path,
    batch_sizes: Sequence[int] = (1, 8, 32, 128),
    work: Workload | None = None,
    *,
    data: Path | None = None,
    split: str = "val",
    repeats: int = 40,
    warm_up: int = 3,
    threads: int | None = None,
    device: str = "cpu",
    dtype: str = "fp32",
) -> dict[str, Any]:
    """Latency of each mode of a trimmed model in each batch size, and the fastest.

    Args:
        data, split: held-out inputs, whose decisions are their own. None: random inputs, on which
            decisions would mean nothing, so every site keeps its calibrated count in every mode.

    Returns:
        {"folder", "form", "inputs", "modes": [...], "latency": {batch: {mode: row}}, "macs":
        {batch: {mode: of a row}}, "speedup": {batch: {mode: ratios over "off"}}, "best": {batch:
        mode}, "out_of_memory": [batch], "device", "dtype", "threads", "repeats"}; a row is {"median",
        "q1", "q3" in ms, "repeats", "seconds"}.

    Raises:
        ValueError, FileNotFoundError: no trimmers, no counts for random inputs, no such data.
    """
    from models import from_pretrained

    work, place = work or Workload(), torch.device(device)
    model = from_pretrained(folder, dtype=DTYPES[dtype], device=place)
    modes = modes_of(model)
    _check_inputs(folder, modes, data)

    def measured(size: int) -> dict[str, Any]:
        if data is None:
            inputs, fixed = [Inputs.random(model.config, size, work, place)], True
        else:
            inputs = held_out(folder, model.config, data, split, size, work, place)
            fixed = None
        return _one_batch(model, modes, inputs, work, place, fixed, repeats, warm_up)

    with threads_of(threads), torch.inference_mode():
        batches, too_large = fitting(batch_sizes, measured)
        used = torch.get_num_threads()
    return {
        "folder": str(folder.resolve()),
        "form": model.config.form,
        "inputs": "random, calibrated counts" if data is None else str(data / model.config.form),
        "modes": list(modes),
        **{name: {size: row[name] for size, row in batches.items()} for name in batches[
            next(iter(batches))
        ]},
        "out_of_memory": too_large,
        "device": device_name(place),
        "dtype": dtype,
        "threads": used,
        "repeats": repeats,
    }  # fmt: skip


def _one_batch(
    model: XVLM,
    modes: Sequence[str],
    inputs: Sequence[Inputs],
    work: Workload,
    device: torch.device,
    fixed: bool | None,
    repeats: int,
    warm_up: int,
) -> dict[str, Any]:
    """ "latency", "macs" and "speedup" by mode, and "best"."""
    rows = len(inputs[0].ids)

    def call_of(mode: str) -> Callable[[], object]:
        def set_mode() -> None:
            model.set_trimming(mode, fixed=None if mode == "off" else fixed)

        set_mode()
        own = [calls_of(model, rows, work, device, one)[WHOLE] for one in inputs]
        turn = cycle(own)

        def call() -> object:
            set_mode()
            return next(turn)()

        return call

    calls = {mode: call_of(mode) for mode in modes}
    macs = {}
    for mode, call in calls.items():
        with FlopCounterMode(display=False) as counter:
            for _ in inputs:  # all of them once: the rounds begin with the first again
                call()
        macs[mode] = counter.get_total_flops() // 2 // (rows * len(inputs))
    seconds = interleave(list(calls.items()), repeats, warm_up, waiter(device), progress=True)
    latency = {mode: summarise(found) | {"seconds": found} for mode, found in seconds.items()}
    speedup = {
        mode: ratios(seconds["off"], found) for mode, found in seconds.items() if mode != "off"
    }
    return {"latency": latency, "macs": macs, "speedup": speedup, "best": _best(speedup)}


def _fastest(speedup: Mapping[str, Mapping[str, float]]) -> str:
    """The trimmed mode that gained most, round by round."""
    served = [mode for mode in SERVED if mode in speedup]
    return max(served, key=lambda mode: speedup[mode]["median"])


def _best(speedup: Mapping[str, Mapping[str, float]]) -> str:
    """That mode, if it beat the full model in three of four rounds; else "off"."""
    mode = _fastest(speedup)
    return mode if speedup[mode]["q1"] > 1 else "off"


def verdict(result: Mapping[str, Any], size: str) -> str:
    """What to do at a batch size, in words. Trimming pays where the fastest mode is faster than the
    full model in three of four rounds.
    """
    speedup, macs = result["speedup"][size], result["macs"][size]
    mode = _fastest(speedup)
    found = speedup[mode]
    fewer = f"{macs['off'] / max(1, macs[mode]):.2f}x fewer MACs"
    spread = f"quartiles {found['q1']:.2f} to {found['q3']:.2f}, {fewer}"
    if result["best"][size] != "off":
        return f"batch {size}: {mode} is the fastest, {found['median']:.2f}x as fast ({spread})"
    if found["median"] > 1:
        return (
            f"batch {size}: trimming does not pay for certain: {mode} is {found['median']:.2f}x as "
            f"fast as the full model ({spread}), less than its noise; run with mode off"
        )
    return (
        f"batch {size}: trimming does not pay on this device: the fastest mode, {mode}, takes "
        f"{1 / found['median']:.2f}x the time of the full model ({spread}); run with mode off"
    )


def mode_table(result: Mapping[str, Any]) -> str:
    """The numbers as text, with a verdict for each batch size."""
    lines = [
        f"{result['device']}, {result['threads']} threads, {result['dtype']}, form "
        f"{result['form']}, {result['repeats']} interleaved rounds, inputs: {result['inputs']}"
    ]
    for size, rows in result["latency"].items():
        lines += ["", f"batch {size}: {'ms':>14} {'(quartiles)':>20} {'GMACs a row':>13}  speed-up"]
        for mode, row in rows.items():
            quartiles = f"({row['q1']:.2f} to {row['q3']:.2f})"
            found = result["speedup"][size].get(mode)
            faster = f"{found['median']:.2f}x" if found else ""
            macs = result["macs"][size][mode] / 1e9
            lines.append(f"{mode:8}{row['median']:>16.2f} {quartiles:>20} {macs:>13.4f}  {faster}")
    for size in result["out_of_memory"]:
        lines += ["", f"batch {size}: does not fit into the memory"]
    lines += ["", *(verdict(result, size) for size in result["latency"])]
    if "bucket" in result["modes"]:
        lines.append("bucket keeps fixed counts: its answers differ, see espalier eval")
    return "\n".join(lines)


def write_mode(folder: Path, mode: str) -> None:
    """Stores the mode that the model starts in, in its config.json."""
    from models.config import ModelConfig

    path = folder / "config.json"
    config = ModelConfig.load(path)
    assert config.trimming is not None  # its modes have been measured
    trimming = replace(config.trimming, mode=mode)  # type: ignore[arg-type]
    replace(config, trimming=trimming).save(path)
