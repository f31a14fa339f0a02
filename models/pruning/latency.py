"""How long each kind of layer takes at each width: a measured table, and speed-ups that it predicts.

Measuring is not done here (train.pruning.latency); this is what measurements become.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from models.gates import GateBank
from models.pruning.budget import WidthCosts

__all__ = ["LatencyTable", "kind_of", "rising"]

VERSION = 1
_SLACK = 5e-4  # of the time that gates can save; a table does not know it any better


def kind_of(slot: str) -> str:
    """The layers whose times are alike: "vision.3.heads" -> "vision.heads"."""
    modality, _, kind = slot.split(".")
    return f"{modality}.{kind}"


def rising(values: Sequence[float]) -> list[float]:
    """The closest values (least squares) that never fall: neighbours in the wrong order are pooled.

    Source: pool adjacent violators, Ayer et al. 1955.
    """
    pools: list[tuple[float, int]] = []
    for value in values:
        pools.append((float(value), 1))
        while len(pools) > 1 and pools[-2][0] > pools[-1][0]:
            (a, n), (b, m) = pools[-2], pools[-1]
            pools[-2:] = [((a * n + b * m) / (n + m), n + m)]
    return [value for value, count in pools for _ in range(count)]


def _at(points: Sequence[tuple[float, float]], width: float) -> float:
    for (a, low), (b, high) in zip(points, points[1:], strict=False):
        if width <= b:
            return low + (high - low) / (b - a) * (width - a)
    return points[-1][1]


@dataclass(frozen=True)
class LatencyTable:
    """Seconds of one batch on one device.

    Kinds are timed alone, so what they add up to is scaled to the difference between the whole model
    and the same model without any heads and units, which is timed as well.

    Attributes:
        kinds: kind -> ascending (width, seconds) of one layer alone, 0 first.
        units: slot -> width of the model that was measured.
        dense, empty: seconds of the whole model, and of what is left when every width is 0.
        reference: seconds of the model that a speed-up is told against.
        about: device, dtype, shapes: what the numbers belong to.
    """

    kinds: Mapping[str, Sequence[tuple[float, float]]]
    units: Mapping[str, int]
    dense: float
    empty: float
    reference: float
    about: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not 0.0 <= self.empty < self.dense or self.reference <= 0.0:
            raise ValueError(
                f"latency table: {self.empty:.3g} s without heads and units, {self.dense:.3g} s with "
                "them: measure again on a quieter machine, or with a larger prune.budget.batch"
            )

    def _points(self, slot: str, units: int) -> list[tuple[float, float]]:
        """(width, seconds saved by not having that much), rising from (0, 0) to `units`."""
        row = list(self.kinds[kind_of(slot)])
        row = [point for point in row if point[0] < units] + [(float(units), _at(row, units))]
        seconds = rising([value for _, value in row])
        return [(width, value - seconds[0]) for (width, _), value in zip(row, seconds, strict=True)]

    def costs(self, bank: GateBank) -> WidthCosts:
        """The times as costs of a bank's rows; layers that it does not gate are constant.

        Raises:
            ValueError: the bank has rows that were not measured, or layers take no time at all.
        """
        missing = [row.name for row in bank.rows if self.units.get(row.name) != row.units]
        if missing:
            raise ValueError(f"latency table: {missing[0]} was measured at another width or not")
        points = {slot: self._points(slot, units) for slot, units in self.units.items() if units}
        alone = sum(row[-1][1] for row in points.values())
        if alone <= 0.0:
            raise ValueError("latency table: no layer takes any time; measure again")
        scale = (self.dense - self.empty) / alone
        scaled = {
            row.name: [(width, scale * value) for width, value in points[row.name]]
            for row in bank.rows
        }
        gated = sum(row[-1][1] for row in scaled.values())
        return WidthCosts("seconds", scaled, self.dense - gated, _SLACK * gated)

    def share_for(self, costs: WidthCosts, speedup: float) -> float:
        """The share of the gated time whose removal makes the model `speedup` times as fast as the
        reference; below 0 where it is already, 1 and more where it cannot be."""
        return (self.dense - self.reference / speedup) / costs.total

    def speedup(self, costs: WidthCosts, widths: Tensor) -> float:
        """Predicted speed-up over the reference at widths (R,)."""
        return self.reference / (costs.constant + float(costs.sizes(widths).sum()))

    def to_json(self) -> dict[str, Any]:
        """For a file; `of_json` reads it."""
        return {
            "version": VERSION,
            "about": dict(self.about),
            "dense": self.dense,
            "empty": self.empty,
            "reference": self.reference,
            "units": dict(self.units),
            "kinds": {kind: [list(point) for point in row] for kind, row in self.kinds.items()},
        }

    @classmethod
    def of_json(cls, values: Mapping[str, Any]) -> LatencyTable:
        """Raises ValueError on anything that `to_json` did not write."""
        try:
            if values["version"] != VERSION:
                raise ValueError(f"latency table of version {values['version']}, not {VERSION}")
            return cls(
                {
                    kind: [(float(width), float(seconds)) for width, seconds in row]
                    for kind, row in values["kinds"].items()
                },
                {slot: int(units) for slot, units in values["units"].items()},
                float(values["dense"]),
                float(values["empty"]),
                float(values["reference"]),
                values["about"],
            )
        except (KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"not a latency table: {error!r}") from error

    @classmethod
    def load(cls, path: Path) -> LatencyTable:
        """Raises ValueError naming the file when it is no table."""
        try:
            return cls.of_json(json.loads(path.read_text(encoding="utf-8")))
        except ValueError as error:  # also not JSON
            raise ValueError(f"{path}: {error}; remove it, and it is measured again") from error
