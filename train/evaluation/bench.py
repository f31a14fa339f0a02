"""`espalier bench`: what models cost, measured. Whole and part by part, in several batch sizes, beside
the first of them.

Nothing here follows from MACs: the speed-up is that of the clock, round by round, with its quartiles;
MACs stand beside it, so that a model that computes less and is no faster is seen for what it is.
"""

from __future__ import annotations

import gc
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode

from train.evaluation.latency import (
    device_name,
    interleave,
    ratios,
    summarise,
    threads_of,
    waiter,
)
from train.evaluation.workload import PARTS, WHOLE, Workload, calls_of

if TYPE_CHECKING:
    from models.xvlm import XVLM

__all__ = ["bench", "fitting", "measure", "table"]

T = TypeVar("T")
DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
_Calls = dict[tuple[str, str], Callable[[], object]]


def measure(
    models: Mapping[str, XVLM],
    batch: int,
    work: Workload,
    *,
    repeats: int = 30,
    warm_up: int = 3,
    device: torch.device | str = "cpu",
    parts: bool = True,
    progress: bool = False,
) -> dict[str, dict[str, list[float]]]:
    """name -> part ("whole", "vision", ...) -> seconds of each round, in the models' own dtype.

    All models and parts take turns in one process, each round starting with another one. The models
    are moved to the device.
    """
    device = torch.device(device)
    calls = _calls(models, batch, work, device, parts)
    with torch.inference_mode():
        numbered = [(str(number), call) for number, call in enumerate(calls.values())]
        found = interleave(numbered, repeats, warm_up, waiter(device), progress=progress)
    result: dict[str, dict[str, list[float]]] = {name: {} for name in models}
    for number, (name, part) in enumerate(calls):
        result[name][part] = found[str(number)]
    return result


def _calls(
    models: Mapping[str, XVLM], batch: int, work: Workload, device: torch.device, parts: bool
) -> _Calls:
    calls: _Calls = {}
    for name, model in models.items():
        for part, call in calls_of(model.to(device).eval(), batch, work, device).items():
            if parts or part == WHOLE:
                calls[name, part] = call
    return calls


def _macs(model: XVLM, work: Workload, device: torch.device) -> dict[str, int]:
    """Multiply-accumulates of one row, part by part and in "total", as torch counts them in a run."""
    found = {}
    for part, call in calls_of(model, 1, work, device).items():
        with torch.inference_mode(), FlopCounterMode(display=False) as counter:
            call()
        found[part] = counter.get_total_flops() // 2
    total = found.pop(WHOLE)
    return found | {"total": total}


def _peak_bytes(call: Callable[[], object], device: torch.device) -> int:
    """Largest memory that one call holds on top of what was there: activations and caches."""
    if device.type == "cuda":
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        call()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    # It writes lines of its own to the terminal otherwise, one of which calls a missing GPU an error.
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True, acc_events=True) as record:
        call()
    events = record.profiler.kineto_results.events()  # type: ignore[union-attr]
    moves = sorted(
        (event.start_ns(), event.nbytes())  # type: ignore[attr-defined]
        for event in events
        if event.name() == "[memory]"
    )
    held = most = 0
    for _, size in moves:
        held += size
        most = max(most, held)
    return most


def _one_batch(
    models: Mapping[str, XVLM],
    batch: int,
    work: Workload,
    device: torch.device,
    options: Mapping[str, Any],
) -> dict[str, Any]:
    """{"latency": name -> part -> row, "speedup": name -> part -> ratios, "peak": name -> bytes}."""
    seconds = measure(models, batch, work, device=device, progress=True, **options)
    latency = {
        name: {
            part: summarise(values)
            | {"rows_per_s": batch / summarise(values)["median"] * 1e3, "seconds": values}
            for part, values in parts.items()
        }
        for name, parts in seconds.items()
    }
    first = seconds[next(iter(seconds))]
    speedup = {
        name: {part: ratios(first[part], parts[part]) for part in parts if part in first}
        for name, parts in list(seconds.items())[1:]
    }
    with torch.inference_mode():
        calls = _calls(models, batch, work, device, parts=False)
        peak = {name: _peak_bytes(call, device) for (name, _), call in calls.items()}
    return {"latency": latency, "speedup": speedup, "peak": peak}


def fitting(sizes: Sequence[int], measured: Callable[[int], T]) -> tuple[dict[str, T], list[int]]:
    """What is measured in each batch size, and the sizes that do not fit into the memory.

    Raises:
        ValueError: none fits.
    """
    found: dict[str, T] = {}
    too_large = []
    for size in sizes:
        try:
            found[str(size)] = measured(size)
        except torch.OutOfMemoryError:
            too_large.append(size)
        gc.collect()
    if not found:
        raise ValueError(f"no batch of {', '.join(map(str, sizes))} fits into the memory")
    return found, too_large


def _of_model(
    name: str, folder: Path, model: XVLM, macs: dict[str, int], batches: Mapping[str, Any]
) -> dict[str, Any]:
    """The entry of one model in the result of `bench`."""
    from models.summary import parameters

    trimming = model.config.trimming
    return {
        "folder": str(folder.resolve()),
        "latency": {size: row["latency"][name][WHOLE] for size, row in batches.items()},
        "parts": {size: row["latency"][name] for size, row in batches.items()},
        "parameters": parameters(model),
        "macs": macs,
        "weights_bytes": sum(p.numel() * p.element_size() for p in model.parameters()),
        "peak_bytes": {size: row["peak"][name] for size, row in batches.items()},
        **({} if trimming is None else {"trimming": trimming.mode}),
    }


def bench(
    folders: Mapping[str, Path],
    batch_sizes: Sequence[int] = (1, 8, 32, 128),
    work: Workload | None = None,
    *,
    repeats: int = 40,
    warm_up: int = 3,
    threads: int | None = None,
    device: str = "cpu",
    dtype: str = "fp32",
    parts: bool = True,
) -> dict[str, Any]:
    """Latency, memory, parameters and MACs of model folders by name; speed-up over the first.

    Returns:
        {"models": {name: {"folder", "latency": {batch: row}, "parts": {batch: {part: row}},
        "parameters", "macs", "weights_bytes", "peak_bytes": {batch: bytes}, and "trimming", its
        mode, of a model that trims}}, "speedup": {name:
        {batch: {part: {"median", "q1", "q3"}}}}, "macs_ratio": {name: ratio}, "break_even": {name:
        batch or None}, "out_of_memory": [batch], "form", "device", "threads", ...}. A row is
        {"median", "q1", "q3" in ms, "repeats", "rows_per_s", "seconds"}.

    Raises:
        ValueError, FileNotFoundError: models of different forms, folders that are none, or a trimmed
            model without counts.
    """
    from models import from_pretrained

    work, place = work or Workload(), torch.device(device)
    models = {name: from_pretrained(f, dtype=DTYPES[dtype]) for name, f in folders.items()}
    for name, model in models.items():
        _keep_counts(folders[name], model)
    form = _one_form(models, folders)
    options = {"repeats": repeats, "warm_up": warm_up, "parts": parts}
    with threads_of(threads):
        macs = {name: _macs(model.to(place).eval(), work, place) for name, model in models.items()}
        batches, too_large = fitting(
            batch_sizes, lambda size: _one_batch(models, size, work, place, options)
        )
        used = torch.get_num_threads()
    others = list(models)[1:]
    speedup = {
        name: {size: row["speedup"][name] for size, row in batches.items()} for name in others
    }
    return {
        "models": {
            name: _of_model(name, folders[name], model, macs[name], batches)
            for name, model in models.items()
        },
        "speedup": speedup,
        "macs_ratio": {n: macs[next(iter(models))]["total"] / macs[n]["total"] for n in others},
        "break_even": {name: break_even(rows) for name, rows in speedup.items()},
        "out_of_memory": too_large,
        "form": form,
        "device": device_name(place),
        "dtype": dtype,
        "threads": used,
        "repeats": repeats,
        "text_tokens": work.text_tokens,
        "top_k": min(work.top_k, work.answers),
    }


def break_even(rows: Mapping[str, Mapping[str, Mapping[str, float]]]) -> int | None:
    """The smallest measured batch from which on a model is faster in all larger ones too.

    Faster is: in three of four rounds (the lower quartile of the whole is above 1). None: nowhere.
    """
    smallest = None
    for size in sorted(rows, key=int, reverse=True):
        if rows[size][WHOLE]["q1"] <= 1:
            break
        smallest = int(size)
    return smallest


def _keep_counts(folder: Path, model: XVLM) -> None:
    """Every site keeps its calibrated count: what trimmers decide about noise says nothing.

    Raises:
        ValueError: a site has no count.
    """
    trimming = model.config.trimming
    if trimming is None or trimming.mode == "off":
        return
    from train.evaluation.trim_bench import modes_of

    if "bucket" not in modes_of(model):
        raise ValueError(
            f"{folder}: config.json has no counts for the sites of its trimmers (trimming.vision_keep, "
            "...), and what they keep of random inputs says nothing; time it on real ones with "
            "--modes --data FOLDER"
        )
    model.set_trimming(trimming.mode, fixed=True)


def _one_form(models: Mapping[str, XVLM], folders: Mapping[str, Path]) -> str:
    forms = {name: model.config.form for name, model in models.items()}
    if len(set(forms.values())) != 1:
        told = ", ".join(f"{folders[name]} is of form {form!r}" for name, form in forms.items())
        raise ValueError(f"models of one form can be compared: {told}")
    return next(iter(forms.values()))


# --- for people -----------------------------------------------------------------------------------


def table(result: Mapping[str, Any]) -> str:
    """The numbers as text: costs, times of the whole and of the parts, and what to conclude."""
    names = list(result["models"])
    width = max(8, *map(len, names))
    lines = [
        f"{result['device']}, {result['threads']} threads, {result['dtype']}, form "
        f"{result['form']}, {result['repeats']} interleaved rounds",
        f"{'':{width}}  {'parameters':>12} {'GMACs':>9} {'weights MB':>10}",
    ]
    for name, model in result["models"].items():
        lines.append(
            f"{name:{width}}  {model['parameters']['total']:>12,} "
            f"{model['macs']['total'] / 1e9:>9.3f} {model['weights_bytes'] / 1e6:>10.1f}"
        )
        if model.get("trimming", "off") != "off":
            lines.append(
                f"  trims in mode {model['trimming']}: random inputs, so each site keeps its "
                "calibrated count (--modes --data times real ones)"
            )
    sizes = list(result["models"][names[0]]["latency"])
    for size in sizes:
        lines += ["", *_batch_table(result, size, width)]
    for size in result["out_of_memory"]:
        lines += ["", f"batch {size}: does not fit into the memory"]
    return "\n".join([*lines, "", *_verdicts(result)])


def _batch_table(result: Mapping[str, Any], size: str, width: int) -> list[str]:
    names = list(result["models"])
    parts = [part for part in PARTS if part in result["models"][names[0]]["parts"][size]]
    head = "".join(f"{part:>10}" for part in parts)
    lines = [
        f"batch {size}: median ms (quartiles)",
        f"{'':{width}}{'whole':>10} {'':>19}{head}{'rows/s':>10}{'peak MB':>9}  speed-up",
    ]
    for name, model in result["models"].items():
        row, own = model["latency"][size], model["parts"][size]
        quartiles = f"({row['q1']:.2f} to {row['q3']:.2f})"
        medians = "".join(f"{own[part]['median']:>10.2f}" for part in parts)
        found = result["speedup"].get(name, {}).get(size)
        faster = f"{found[WHOLE]['median']:.2f}x" if found else ""
        lines.append(
            f"{name:{width}}{row['median']:>10.2f} {quartiles:>19}{medians}"
            f"{row['rows_per_s']:>10.1f}{model['peak_bytes'][size] / 1e6:>9.1f}  {faster}"
        )
    return lines


def _verdicts(result: Mapping[str, Any]) -> list[str]:
    """One line a model: from which batch on it is faster, and what is left of its MACs."""
    first, lines = next(iter(result["models"])), []
    for name, rows in result["speedup"].items():
        largest = list(rows)[-1]
        found, macs = rows[largest][WHOLE], result["macs_ratio"][name]
        even = result["break_even"][name]
        if even is None:
            told = f"not faster than {first} at batch {largest}"
        elif even == min(map(int, rows)):
            told = f"faster than {first} at every batch measured"
        else:
            told = f"breaks even with {first} at batch {even}"
        lines.append(
            f"{name}: {told}; at batch {largest} {found['median']:.2f}x as fast (quartiles "
            f"{found['q1']:.2f} to {found['q3']:.2f}) with {macs:.2f}x fewer MACs"
        )
    return lines
