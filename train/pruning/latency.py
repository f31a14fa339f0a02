"""Measures what a latency table holds, and whether a cut model is as fast as the table said.

Kinds of layers are timed alone, on the inputs that they get in one pass of the task. Whole models take
turns with each other, so that a busy moment of the machine hits both. Times do not depend on
weights: models are made from configurations, with random ones.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from models.attention import Attention, KeyValueCache
from models.config import ModelConfig
from models.layers import FeedForward
from models.pruning.latency import VERSION, LatencyTable, kind_of
from models.pruning.surgery import pruned_config, widths
from models.xvlm import XVLM
from train.evaluation.bench import DTYPES
from train.evaluation.latency import device_name, interleave, ratios, threads_of, waiter
from train.evaluation.workload import WHOLE, Workload, calls_of
from train.pruning.budgets import Measured

__all__ = ["Stopwatch", "cached_table", "measure_speedup", "measure_table"]

_LOG = logging.getLogger(__name__)
_STEPS = 8  # FFN widths that are timed, in equal steps
_SHORT = 1e-3  # seconds below which a call is repeated inside one reading of the clock
_MOST = 120.0  # seconds a measurement takes where its rounds are long
_LEAST = 5  # rounds at any rate
Call = Callable[[], object]


class Stopwatch:
    """How to time: device, dtype, threads, rounds."""

    def __init__(
        self,
        device: torch.device | str = "cpu",
        dtype: str = "fp32",
        threads: int | None = None,
        repeats: int = 30,
        seconds: float = _MOST,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self.device, self.dtype, self.threads = torch.device(device), dtype, threads
        self.repeats, self.seconds, self.clock = repeats, seconds, clock
        self.wait = waiter(self.device)

    @contextmanager
    def running(self) -> Iterator[None]:
        """Threads and inference mode; the run's random state stays as it is."""
        devices = [self.device] if self.device.type == "cuda" else []
        with ExitStack() as stack:
            stack.enter_context(threads_of(self.threads))
            stack.enter_context(torch.random.fork_rng(devices))
            stack.enter_context(torch.inference_mode())
            yield

    def model(self, config: ModelConfig) -> XVLM:
        """A model of this shape with random weights."""
        model = XVLM(config).to(self.device, DTYPES[self.dtype])
        return model.eval().requires_grad_(False)

    def times(self, calls: Sequence[tuple[str, Call]]) -> dict[str, list[float]]:
        """name -> seconds of each round; short calls are repeated in a round and averaged."""
        loops, one_round = {}, 0.0
        for name, call in calls:
            call()
            took = self._once(call)
            loops[name] = max(1, round(_SHORT / max(took, 1e-6)))
            one_round += took * loops[name]
        rounds = int(self.seconds / max(one_round, 1e-9))
        rounds = min(self.repeats, max(_LEAST, rounds))
        repeated = [(name, _repeated(call, loops[name])) for name, call in calls]
        found = interleave(repeated, rounds, 1, self.wait, self.clock)
        return {name: [value / loops[name] for value in row] for name, row in found.items()}

    def _once(self, call: Call) -> float:
        self.wait()
        begin = self.clock()
        call()
        self.wait()
        return self.clock() - begin

    def about(self) -> dict[str, Any]:
        """What its readings belong to."""
        return {
            "device": device_name(self.device),
            "dtype": self.dtype,
            "threads": self.threads or torch.get_num_threads(),
            "torch": torch.__version__,
        }


def _repeated(call: Call, times: int) -> Call:
    def run() -> None:
        for _ in range(times):
            call()

    return run


# --- layers alone ---------------------------------------------------------------------------------


def _first_of_kind(model: XVLM) -> dict[str, tuple[str, nn.Module]]:
    """kind -> (slot, sub-layer) of its first layer that has any units."""
    owners = {
        id(part.gate): part for part in model.modules() if isinstance(part, Attention | FeedForward)
    }
    found: dict[str, tuple[str, nn.Module]] = {}
    for name, slot in model.gate_slots().items():
        if slot.units:
            found.setdefault(kind_of(name), (name, owners[id(slot)]))
    return found


_Inputs = list[tuple[tuple[Any, ...], dict[str, Any]]]


def _inputs_of(parts: Mapping[str, nn.Module], whole: Call) -> dict[str, _Inputs]:
    """kind -> arguments of every call of its layer in one pass of the whole model."""
    seen: dict[str, _Inputs] = {kind: [] for kind in parts}

    def hook(kind: str) -> Any:
        return lambda _, args, kwargs: seen[kind].append((args, dict(kwargs)))

    handles = [
        part.register_forward_pre_hook(hook(kind), with_kwargs=True) for kind, part in parts.items()
    ]
    try:
        whole()
    finally:
        for handle in handles:
            handle.remove()
    return seen


def _alone(part: nn.Module, width: int, inputs: _Inputs, like: Tensor) -> Call:
    """The sub-layer at another width, called as in one pass of the model.

    Heads that two layers share (NLVR2) are timed as if each had its own: each projects the keys of
    its own image anyway. Caches start empty and fill up again.
    """
    if isinstance(part, Attention):
        layer: nn.Module = Attention(
            part.width, width, part.head_dim, key_width=part.key_width, qkv_bias=part.qkv_bias
        )
    else:
        assert isinstance(part, FeedForward)
        layer = FeedForward(part.width, width, "gelu", "pre" if part.gate_first else "post")
        layer.activation = part.activation
    layer = layer.to(like.device, like.dtype).eval().requires_grad_(False)
    plain = [(args, kwargs | {"memory": None} if "memory" in kwargs else kwargs)
             for args, kwargs in inputs]  # fmt: skip
    cached = any(kwargs.get("cache") is not None for _, kwargs in plain)

    def call() -> None:
        fresh = {"cache": KeyValueCache()} if cached else {}
        for args, kwargs in plain:
            layer(*args, **(kwargs | fresh))

    return call


def _grid(kind: str, units: int) -> list[int]:
    """Widths that are timed: every number of heads, FFN units in steps."""
    if kind.endswith("heads"):
        return list(range(units + 1))
    return sorted({round(units * step / _STEPS) for step in range(_STEPS + 1)})


# --- tables ---------------------------------------------------------------------------------------


def measure_table(
    student: ModelConfig,
    reference: ModelConfig,
    work: Workload,
    batch: int,
    watch: Stopwatch | None = None,
) -> LatencyTable:
    """Times the dense student, itself without heads and units, the reference, and its layers alone.

    Everything takes turns, and the fastest round of each counts: what else the machine does only ever
    adds time, and adds more often to long calls than to short ones, which would bend the table. What
    is claimed in the end is told by medians (`measure_speedup`).

    Raises:
        ValueError: from `LatencyTable`, when the machine was too busy for numbers that make sense.
    """
    watch = watch or Stopwatch()
    with watch.running():
        model = watch.model(student)
        like = next(model.parameters())
        nothing = {name: torch.zeros(units) for name, units in widths(student).items()}
        others = {"empty": pruned_config(student, nothing), "reference": reference}
        models = {"dense": model} | {name: watch.model(one) for name, one in others.items()}
        whole = {n: calls_of(m, batch, work, watch.device)[WHOLE] for n, m in models.items()}
        firsts = _first_of_kind(model)
        inputs = _inputs_of({kind: part for kind, (_, part) in firsts.items()}, whole["dense"])
        units = widths(student)
        most = {
            kind: max(count for name, count in units.items() if kind_of(name) == kind)
            for kind in firsts
        }
        alone = {
            (kind, width): _alone(part, width, inputs[kind], like)
            for kind, (_, part) in firsts.items()
            for width in _grid(kind, most[kind])
        }
        calls = [*whole.items(), *((f"{kind}:{width}", c) for (kind, width), c in alone.items())]
        seconds = watch.times(calls)
    fastest = {name: min(values) for name, values in seconds.items()}
    kinds = {
        kind: [(float(width), fastest[f"{kind}:{width}"]) for width in _grid(kind, most[kind])]
        for kind in firsts
    }
    return LatencyTable(
        kinds,
        units,
        fastest["dense"],
        fastest["empty"],
        fastest["reference"],
        _about(watch, work, batch) | {"rounds": len(seconds["dense"])},
    )


def _about(watch: Stopwatch, work: Workload, batch: int) -> dict[str, Any]:
    return watch.about() | {"batch": batch, "workload": asdict(work)}


def cached_table(
    folder: Path,
    student: ModelConfig,
    reference: ModelConfig,
    work: Workload,
    batch: int,
    watch: Stopwatch,
) -> LatencyTable:
    """The table of this device and these shapes from `folder`, measured first where it is not there.

    The file's name is a hash of everything that times depend on. Raises what `measure_table` raises,
    and ValueError naming a file that is no table.
    """
    key = _about(watch, work, batch) | {
        "version": VERSION,
        "student": student.to_dict() | {"name": ""},
        "reference": reference.to_dict() | {"name": ""},
    }
    text = json.dumps(key, sort_keys=True)
    path = folder / f"{hashlib.blake2b(text.encode(), digest_size=12).hexdigest()}.json"
    if path.is_file():
        _LOG.info("latency table from %s", path)
        return LatencyTable.load(path)
    _LOG.info("measuring the latency of layers on %s (kept in %s)", watch.about()["device"], path)
    table = measure_table(student, reference, work, batch, watch)
    folder.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
    partial.write_text(json.dumps(table.to_json(), indent=1) + "\n", encoding="utf-8")
    os.replace(partial, path)
    return table


def measure_speedup(
    reference: ModelConfig, slim: ModelConfig, work: Workload, batch: int, watch: Stopwatch
) -> Measured:
    """How many times as fast `slim` does the work: both models take turns, round by round."""
    with watch.running():
        models = (("reference", watch.model(reference)), ("slim", watch.model(slim)))
        calls = [(n, calls_of(m, batch, work, watch.device)[WHOLE]) for n, m in models]
        seconds = watch.times(calls)
    return Measured(**ratios(seconds["reference"], seconds["slim"]))
