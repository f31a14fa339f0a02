"""The one home of state outside DeepSpeed: random generators, gates, data positions, counters,
configuration.

Everything is numbers, strings, lists, dicts and tensors, so a state file loads with
`weights_only=True`.
"""

from __future__ import annotations

import hashlib
import random
from typing import Any, cast

import numpy
import torch

from train.config import RunConfig, UserError
from train.recipes_io import flatten, to_plain

__all__ = [
    "collect",
    "plain_config",
    "restore",
    "rng_state",
    "seed_rng",
    "set_rng_state",
]

VERSION = 2


def rng_state() -> dict[str, Any]:
    """State of Python's, numpy's and torch's generators (CUDA included) of this rank."""
    version, internal, gauss = random.getstate()
    name, keys, position, has_gauss, cached = cast("tuple[Any, ...]", numpy.random.get_state())
    return {
        "python": [version, list(internal), gauss],
        "numpy": [name, torch.from_numpy(keys.astype("int64")), position, has_gauss, cached],
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
    }


def seed_rng(seed: int, rank: int) -> None:
    """Seeds every generator that a fresh rank draws from (dropout, say), each rank differently: a run
    that is killed before its first checkpoint begins again with the same numbers.
    """
    text = f"{seed}:{rank}:rank"
    value = int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big") >> 1
    random.seed(value)
    numpy.random.seed(value % 2**32)
    torch.manual_seed(value)


def set_rng_state(state: dict[str, Any]) -> None:
    """Puts a state of `rng_state` back."""
    version, internal, gauss = state["python"]
    random.setstate((version, tuple(internal), gauss))
    name, keys, position, has_gauss, cached = state["numpy"]
    numpy.random.set_state((name, keys.numpy().astype("uint32"), position, has_gauss, cached))
    torch.set_rng_state(state["torch"])
    if state["cuda"] and len(state["cuda"]) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all(state["cuda"])


def plain_config(config: RunConfig) -> dict[str, Any]:
    """The configuration as it is stored in a checkpoint: dotted keys, JSON values."""
    return flatten(to_plain(config))


def collect(
    config: RunConfig,
    *,
    step: int,
    samples: int,
    loader: Any,
    region_loader: Any = None,
    gates: Any = None,
    guard: Any = None,
    best: Any = None,
) -> dict[str, Any]:
    """State of this rank after `step` applied general steps. All but `rng` is the same on every
    rank.

    Everything that a step reads and DeepSpeed does not keep is here: `gates` are log-alpha, the
    multipliers, both their optimizers and the frozen structure (`GateOptimizer.state_dict`); the
    loaders' states are data positions; `guard` is what the spike guard has seen; `best` is the best
    validation score. Learning rate, sparsity target, KD weights, region steps and gate noise are
    functions of (configuration, seed, step), so `step` is their state.
    """
    return {
        "version": VERSION,
        "step": step,
        "samples": samples,
        "config": plain_config(config),
        "loader": loader.state_dict(),
        "region_loader": None if region_loader is None else region_loader.state_dict(),
        "gates": _state_of(gates),
        "guard": _state_of(guard),
        "best": _state_of(best),
        "rng": rng_state(),
    }


def _state_of(part: Any) -> dict[str, Any] | None:
    return part.state_dict() if hasattr(part, "state_dict") else None


def restore(
    state: dict[str, Any],
    *,
    loader: Any,
    region_loader: Any = None,
    gates: Any = None,
    guard: Any = None,
    best: Any = None,
    rebase: bool = False,
) -> None:
    """Puts a state of `collect` back (not the counters: the loop owns them).

    Args:
        rebase: accept changed data; see `data_pipeline.loader.Loader.load_state_dict`.

    Raises:
        UserError: another version.   ValueError: the data are not those of the state.
    """
    if state.get("version") != VERSION:
        raise UserError(
            f"the checkpoint's state has version {state.get('version')!r}, this program reads "
            f"{VERSION}"
        )
    loader.load_state_dict(state["loader"], rebase)
    if region_loader is not None and state["region_loader"] is not None:
        region_loader.load_state_dict(state["region_loader"], rebase)
    for name, part in (("gates", gates), ("guard", guard), ("best", best)):
        if hasattr(part, "load_state_dict") and state[name] is not None:
            part.load_state_dict(state[name])
    if state["rng"] is not None:
        set_rng_state(state["rng"])
