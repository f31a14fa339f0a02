"""What every converter shares: the report of a conversion, and copying it into a module."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, field
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor, nn

from models.checkpoints.files import read_weights
from models.part_configs import VisionConfig
from models.vision import resize_positions

__all__ = [
    "ConversionReport",
    "check_tied",
    "fit_positions",
    "grid_of",
    "load_converted",
    "matches",
    "read_weights",
    "spread",
]

_LISTED = 5


@dataclass
class ConversionReport:
    """What a conversion did with every key; lists are sorted.

    Attributes:
        loaded: our keys that received a tensor.
        renamed: foreign key -> our keys (several where a fused tensor was split, or a layer copied).
        missing: our keys that the file has nothing for (they keep their fresh values).
        unexpected: foreign keys that have no place here.
        ignored: foreign keys left out on purpose (index buffers, copies of tied weights, poolers).
        resized: our keys whose tensor was resampled.
        notes: what a reader should know besides.
    """

    loaded: list[str] = field(default_factory=list)
    renamed: dict[str, list[str]] = field(default_factory=dict)
    missing: list[str] = field(default_factory=list)
    unexpected: list[str] = field(default_factory=list)
    ignored: list[str] = field(default_factory=list)
    resized: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def took(self, foreign: str, ours: str) -> None:
        """Notes that (a part of) a foreign tensor goes under one of our keys."""
        self.renamed.setdefault(foreign, []).append(ours)

    def below(self, prefix: str) -> ConversionReport:
        """The same report for the model that holds the converted module under `prefix`."""
        return ConversionReport(
            loaded=[prefix + key for key in self.loaded],
            renamed={old: [prefix + key for key in new] for old, new in self.renamed.items()},
            missing=[prefix + key for key in self.missing],
            unexpected=self.unexpected,
            ignored=self.ignored,
            resized=[prefix + key for key in self.resized],
            notes=self.notes,
        )

    def to_dict(self) -> dict[str, Any]:
        """For a JSON file."""
        return asdict(self)

    def __str__(self) -> str:
        counts = ("loaded", "missing", "unexpected", "ignored", "resized")
        return ", ".join(f"{len(getattr(self, name))} {name}" for name in counts)


def matches(key: str, patterns: Iterable[str]) -> bool:
    """Whether a pattern names the key: the key itself, a module above it, or a glob of either."""
    return any(fnmatchcase(key, p) or fnmatchcase(key, f"{p}.*") for p in patterns)


def spread(layer_map: Iterable[int], layer: int) -> list[int]:
    """Our layers that are taken from a foreign layer; a foreign layer may be taken repeatedly."""
    return [ours for ours, theirs in enumerate(layer_map) if theirs == layer]


def check_tied(state: Mapping[str, Tensor], copy: str, original: str, where: str) -> None:
    """A stored copy of a tied weight must equal its original: only the original is kept here.

    Raises:
        ValueError: naming both keys when they differ.
    """
    first, second = state.get(copy), state.get(original)
    if first is None or second is None or first.is_meta or second.is_meta:
        return
    if not torch.equal(first, second):
        raise ValueError(
            f"{where}: {copy} differs from {original}; the model here ties them, so one of the two "
            "would be lost"
        )


def grid_of(positions: Tensor, where: str, prefix: int = 1) -> int:
    """Patches per side of a position table (prefix + g*g, D).

    Raises:
        ValueError: when the patches do not fill a square.
    """
    grid = round(max(0, positions.shape[0] - prefix) ** 0.5)
    if positions.ndim != 2 or prefix + grid * grid != positions.shape[0]:
        first = "a class token" if prefix == 1 else f"{prefix} tokens"
        raise ValueError(
            f"{where}: position table of shape {tuple(positions.shape)} is not {first} and a "
            "square of patches"
        )
    return grid


def fit_positions(
    converted: dict[str, Tensor],
    report: ConversionReport,
    key: str,
    vision: VisionConfig,
    where: str,
) -> None:
    """Resamples a converted position table to the image size of `vision`, in place. Its rows in
    front of the patches (`VisionConfig.position_prefix`) are kept.

    Raises:
        ValueError: when its patches do not fill a square.
    """
    if key not in converted or converted[key].shape[0] == vision.position_rows:
        return
    grid_of(converted[key], where, vision.position_prefix)
    grid = vision.image_size // vision.patch_size
    converted[key] = resize_positions(converted[key].float(), grid, vision.position_prefix)
    report.resized.append(key)


def load_converted(
    module: nn.Module,
    converted: Mapping[str, Tensor],
    report: ConversionReport,
    *,
    allow_missing: Iterable[str] | Callable[[str], bool] = (),
    allow_unexpected: bool | Iterable[str] = False,
    where: str = "checkpoint",
) -> ConversionReport:
    """Copies converted tensors into a module and completes the report.

    Args:
        converted: tensors under the module's own keys.
        allow_missing: keys, modules or globs (`matches`) of ours that may be absent, or a predicate.
        allow_unexpected: True, or keys, modules or globs of foreign keys without a place here that
            are reported only.

    Raises:
        ValueError: naming `where` and the missing, misshapen or unexpected keys.
    """
    state = module.state_dict()
    report.missing = sorted(state.keys() - converted.keys())
    report.unexpected = sorted({*report.unexpected, *(converted.keys() - state.keys())})
    report.loaded = sorted(state.keys() & converted.keys())
    report.ignored.sort()
    missing_patterns = () if callable(allow_missing) else tuple(allow_missing)
    allowed = allow_missing if callable(allow_missing) else lambda k: matches(k, missing_patterns)
    problems = [f"missing {key}" for key in report.missing if not allowed(key)]
    if allow_unexpected is not True:
        patterns = tuple(allow_unexpected or ())
        problems += [f"unexpected {key}" for key in report.unexpected if not matches(key, patterns)]
    for key in report.loaded:
        if converted[key].shape != state[key].shape:
            problems.append(
                f"{key} has shape {tuple(converted[key].shape)}, the model "
                f"{tuple(state[key].shape)}"
            )
        elif not converted[key].is_floating_point():
            problems.append(f"{key} holds {converted[key].dtype} values, not weights")
    if problems:
        more = f" and {len(problems) - _LISTED} more" if len(problems) > _LISTED else ""
        raise ValueError(f"{where} does not fit the model: {'; '.join(problems[:_LISTED])}{more}")
    with torch.no_grad():
        for key in report.loaded:
            state[key].copy_(converted[key])
    return report
