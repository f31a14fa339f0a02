"""What every converter shares: reading a foreign weight file, and the report of a conversion."""

from __future__ import annotations

import pickle
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

__all__ = ["ConversionReport", "load_converted", "read_weights"]

_LISTED = 5


@dataclass
class ConversionReport:
    """What a conversion did; keys in lists are sorted.

    Attributes:
        loaded: our keys that received a tensor.
        renamed: foreign key -> our key.
        missing: our keys that the file has nothing for (they keep their fresh values).
        unexpected: foreign keys that have no place here.
        ignored: foreign keys left out on purpose (index buffers, copies of tied weights, poolers).
        resized: our keys whose tensor was resampled.
    """

    loaded: list[str] = field(default_factory=list)
    renamed: dict[str, str] = field(default_factory=dict)
    missing: list[str] = field(default_factory=list)
    unexpected: list[str] = field(default_factory=list)
    ignored: list[str] = field(default_factory=list)
    resized: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        counts = ("loaded", "missing", "unexpected", "ignored", "resized")
        return ", ".join(f"{len(getattr(self, name))} {name}" for name in counts)


def read_weights(path: str | Path) -> dict[str, Tensor]:
    """A state dict from .safetensors, or from a torch file without running any code in it.

    A dict with a "model" or "state_dict" entry is unwrapped; entries that are not tensors are left
    out.

    Raises:
        FileNotFoundError: when there is no such file.
        ValueError: when it cannot be read as weights.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such weight file")
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        values = torch.load(path, map_location="cpu", weights_only=True)
    except (SafetensorError, pickle.UnpicklingError, RuntimeError, EOFError) as error:
        raise ValueError(f"{path}: not a readable weight file: {error}") from error
    for wrapper in ("model", "state_dict"):
        if isinstance(values, dict) and isinstance(values.get(wrapper), dict):
            values = values[wrapper]
    if not isinstance(values, dict) or not any(isinstance(v, Tensor) for v in values.values()):
        raise ValueError(f"{path}: holds no state dict of tensors")
    return {key: value for key, value in values.items() if isinstance(value, Tensor)}


def load_converted(
    module: nn.Module,
    converted: Mapping[str, Tensor],
    report: ConversionReport,
    *,
    allow_missing: Iterable[str] | Callable[[str], bool] = (),
    allow_unexpected: bool = False,
    where: str = "checkpoint",
) -> ConversionReport:
    """Copies converted tensors into a module and completes the report.

    Args:
        converted: tensors under the module's own keys.
        allow_missing: prefixes of keys that may be absent, or a predicate on keys.
        allow_unexpected: foreign keys without a place are reported only.

    Raises:
        ValueError: naming `where` and the missing, misshapen or unexpected keys.
    """
    state = module.state_dict()
    report.missing = sorted(state.keys() - converted.keys())
    report.unexpected = sorted({*report.unexpected, *(converted.keys() - state.keys())})
    report.loaded = sorted(state.keys() & converted.keys())
    prefixes = () if callable(allow_missing) else tuple(allow_missing)
    allowed = allow_missing if callable(allow_missing) else lambda key: key.startswith(prefixes)
    problems = [f"missing {key}" for key in report.missing if not allowed(key)]
    if not allow_unexpected:
        problems += [f"unexpected {key}" for key in report.unexpected]
    problems += [
        f"{key} has shape {tuple(converted[key].shape)}, the model {tuple(state[key].shape)}"
        for key in report.loaded
        if converted[key].shape != state[key].shape
    ]
    if problems:
        more = f" and {len(problems) - _LISTED} more" if len(problems) > _LISTED else ""
        raise ValueError(f"{where} does not fit the model: {'; '.join(problems[:_LISTED])}{more}")
    with torch.no_grad():
        for key in report.loaded:
            state[key].copy_(converted[key])
    return report
