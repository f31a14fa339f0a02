"""Where a stream stands, as a few hundred bytes of JSON that are the same on every rank.

What may change between saving and resuming: ranks, workers, prefetch, the location of the data, and
the step size as far as the canonical groups divide it. What may not, because the order is a
function of it: the data, their weights, seed and plan settings. Such a change is refused with what
differs, unless it is intended (`rebase`): then a new segment of the order begins at this position,
and the state remembers it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import PurePosixPath
from typing import Any, NamedTuple, TypeVar

import numpy as np

from data_pipeline.mixture import Mixture, Segment, period_counts
from data_pipeline.plan import PLAN_VERSION, Plan

__all__ = ["STATE_VERSION", "DataSet", "PlanSettings", "Position", "check_unit"]

STATE_VERSION = 2
T = TypeVar("T")


@dataclass(frozen=True)
class PlanSettings:
    """What the order is a function of, beside the data."""

    task: str
    seed: int
    block: int
    window_blocks: int
    groups: int
    shuffle: bool
    limit: int = 0

    def plan(self, samples: np.ndarray, manifest_hash: str) -> Plan:
        """The plan of one data set."""
        return Plan(
            samples, manifest_hash, self.seed, self.block, self.window_blocks,
            shuffle=self.shuffle, limit=self.limit, groups=self.groups,
        )  # fmt: skip

    def state(self) -> dict[str, Any]:
        """For the resume state, without task and seed."""
        values = asdict(self)
        return {"version": PLAN_VERSION} | {k: values[k] for k in values if k not in _IDENTITY}


_IDENTITY = ("task", "seed")


class DataSet(NamedTuple):
    """One data set of the mixture: `weight` None is as many shares as it has samples."""

    location: str
    hash: str
    samples: np.ndarray
    weight: float | None = None


@dataclass(frozen=True)
class _Entry:
    """A data set in the state's list. `since`: the segment in which it begins at its first sample.
    `left`: it was taken out and only counts in earlier segments.
    """

    name: str
    hash: str
    since: int = 0
    left: bool = False


def _name(location: str) -> str:
    """The last parts of a location, which say enough and do not tie a state to a machine."""
    return "/".join(PurePosixPath(location.rstrip("/")).parts[-3:])


def check_unit(unit: tuple[int, int], images: int, rows: int) -> None:
    """Raises ValueError when a rank's region batch does not hold whole units."""
    if images % unit[0] or rows != images // unit[0] * unit[1]:
        raise ValueError(
            f"data.region: {images} images and {rows} rows on a rank do not hold whole units of "
            f"{unit[0]} images and {unit[1]} rows, as the run had; use a multiple of both, such as "
            f"data.region.images={unit[0]} data.region.rows={unit[1]}, or pass --rebase"
        )


class Position:
    """How far the stream of a mixture was delivered, and what the order is made of.

    Args:
        settings: of the plan.   datasets: in order.   step_samples: images of a micro-batch over
            all ranks.   ranks: only to say what would work.   mix_period: see `period_counts`.
        unit: (images, rows) within which region rows are drawn.   auto_groups: settings.groups is
            a default, which gives way to that of a resumed run.

    Attributes:
        consumed: stream positions delivered.   mixture: the order.

    Raises:
        ValueError: a step that the groups do not divide, or settings the plan refuses.
    """

    def __init__(
        self, settings: PlanSettings, datasets: Sequence[DataSet], *, step_samples: int,
        ranks: int = 1, mix_period: int = 1000, unit: tuple[int, int] | None = None,
        auto_groups: bool = False,
    ) -> None:  # fmt: skip
        self.settings = settings
        self.datasets = tuple(datasets)
        self.step_samples, self.ranks, self.unit = step_samples, ranks, unit
        self.consumed = 0
        self._auto_groups = auto_groups
        weights = [int(np.sum(d.samples)) if d.weight is None else d.weight for d in self.datasets]
        self._counts = period_counts(weights, mix_period)
        self._adopt(
            [_Entry(_name(d.location), d.hash) for d in self.datasets],
            [Segment(0, self._counts)],
            range(len(self.datasets)),
        )

    def _adopt(
        self, entries: Sequence[_Entry], segments: Sequence[Segment], places: Sequence[int]
    ) -> None:
        """Builds the order. `places`: the entry of each data set."""
        self._check_step()
        self._entries, self._segments = tuple(entries), tuple(segments)
        self._places = tuple(places)
        plans = [self.settings.plan(d.samples, d.hash) for d in self.datasets]
        self.mixture = Mixture(self.by_entry(plans), segments, [entry.since for entry in entries])

    def _check_step(self) -> None:
        groups, step = self.settings.groups, self.step_samples
        if step % groups == 0:
            return
        unit = groups // math.gcd(groups, self.ranks)
        below = step // self.ranks // unit * unit
        valid = [n for n in (below, below + unit, below + 2 * unit) if n > 0]
        raise ValueError(
            f"a step of {step} images ({self.ranks} ranks x {step // self.ranks}) cannot be cut "
            f"into the order's {groups} groups; with {self.ranks} ranks use a batch that is a "
            f"multiple of {unit}, such as {', '.join(map(str, valid))} (data.batch, or "
            "data.region.images for region batches)"
        )

    def by_entry(self, values: Sequence[T]) -> list[T | None]:
        """One value per data set, laid out as the state's entries; None for those that left."""
        laid: list[T | None] = [None] * len(self._entries)
        for place, value in zip(self._places, values, strict=True):
            laid[place] = value
        return laid

    # -- state ------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """JSON values."""
        consumed = self.mixture.consumed(self.consumed)
        return {
            "version": STATE_VERSION,
            "task": self.settings.task,
            "seed": self.settings.seed,
            "samples_consumed": self.consumed,
            "step_samples": self.step_samples,
            "plan": self.settings.state(),
            "unit": None if self.unit is None else list(self.unit),
            "datasets": [
                asdict(entry) | {"consumed": seen}
                for entry, seen in zip(self._entries, consumed, strict=True)
            ],
            "segments": [[segment.start, list(segment.counts)] for segment in self._segments],
        }

    def load_state_dict(self, state: dict[str, Any], rebase: bool = False) -> list[str]:
        """Goes on where `state` was taken. Returns what people should know, one sentence each.

        Raises:
            ValueError: the state belongs to another task, seed or plan version, to other data or
                settings (unless `rebase`), or the step size does not fit its groups.
        """
        self._check_identity(state)
        plan = {name: state["plan"][name] for name in self.settings.state() if name != "version"}
        entries = [_Entry(e["name"], e["hash"], e["since"], e["left"]) for e in state["datasets"]]
        segments = [Segment(start, tuple(counts)) for start, counts in state["segments"]]
        unit = None if state["unit"] is None else tuple(state["unit"])
        differing = self._differences(plan, entries, segments)
        notes = []
        if rebase and self.step_samples % plan["groups"]:
            differing.append(f"{plan['groups']} groups do not divide {self.step_samples} images")
        if differing and not rebase:
            raise ValueError(
                f"{self._where()}: cannot resume the data position: {'; '.join(differing)}. "
                "Restore the data and settings, pass --rebase to begin a new order from here on, "
                "or start again with --resume none"
            )
        self.consumed = int(state["samples_consumed"])
        if differing:
            notes.append(f"a new order begins at sample {self.consumed}: {'; '.join(differing)}")
            self._rebase(plan, entries, segments)
        else:
            self.settings = replace(self.settings, **plan)
            self.unit = unit  # type: ignore[assignment] - a pair, or None
            self._adopt(entries, segments, self._match(entries))
        if self.step_samples != state["step_samples"]:
            notes.append(
                f"a step has {self.step_samples} images, it had {state['step_samples']}: every "
                "sample still comes once, but in-batch negatives are grouped differently"
            )
        return notes

    def _where(self) -> str:
        return ", ".join(dataset.location for dataset in self.datasets)

    def _check_identity(self, state: dict[str, Any]) -> None:
        mine = self.state_dict()
        for name in ("version", *_IDENTITY):
            if state.get(name) != mine[name]:
                raise ValueError(
                    f"{self._where()}: cannot resume the data position: '{name}' was "
                    f"{state.get(name)!r}, now {mine[name]!r}; put it back, or start again with "
                    "--resume none"
                )
        version = state["plan"]["version"]
        if version != PLAN_VERSION:
            raise ValueError(
                f"{self._where()}: the order was made by plan version {version}, this program has "
                f"{PLAN_VERSION}; use the program that began the run, or --resume none"
            )

    def _match(self, entries: Sequence[_Entry]) -> list[int]:
        """The entry of each data set by its hash, -1 where there is none; each at most once."""
        free = [number for number, entry in enumerate(entries) if not entry.left]
        places = []
        for dataset in self.datasets:
            found = next((n for n in free if entries[n].hash == dataset.hash), -1)
            if found >= 0:
                free.remove(found)
            places.append(found)
        return places

    def _differences(
        self, plan: dict[str, Any], entries: Sequence[_Entry], segments: Sequence[Segment]
    ) -> list[str]:
        told = []
        mine = self.settings.state()
        for name, value in plan.items():
            # Groups chosen by default follow the run that is resumed.
            if mine[name] != value and not (name == "groups" and self._auto_groups):
                told.append(f"data.{name} was {value}, now {mine[name]}")
        places = self._match(entries)
        gone = [entry for n, entry in enumerate(entries) if not entry.left and n not in places]
        told += [f"{entry.name} (hash {entry.hash[:8]}) is gone or changed" for entry in gone]
        told += [
            f"{dataset.location} (hash {dataset.hash[:8]}) is new or changed"
            for dataset, place in zip(self.datasets, places, strict=True)
            if place < 0
        ]
        if not told:
            before = [segments[-1].counts[place] for place in places]
            if before != list(self._counts):
                told.append(f"mixture shares were {before}, now {list(self._counts)}")
        return told

    def _rebase(
        self, plan: dict[str, Any], entries: Sequence[_Entry], segments: Sequence[Segment]
    ) -> None:
        """A new segment at this position: unchanged data sets go on, others begin."""
        number = len(segments)
        mine = self.settings.state()
        if self._auto_groups and self.step_samples % plan["groups"] == 0:
            self.settings = replace(self.settings, groups=plan["groups"])
            mine = self.settings.state()
        again = any(mine[name] != value for name, value in plan.items())
        places = [-1] * len(self.datasets) if again else self._match(entries)
        kept = [
            entry if n in places else replace(entry, left=True) for n, entry in enumerate(entries)
        ]
        for index, dataset in enumerate(self.datasets):
            if places[index] < 0:
                places[index] = len(kept)
                kept.append(_Entry(_name(dataset.location), dataset.hash, since=number))
        width = len(kept)
        old = [
            Segment(segment.start, segment.counts + (0,) * (width - len(segment.counts)))
            for segment in segments
        ]
        counts = [0] * width
        for place, count in zip(places, self._counts, strict=True):
            counts[place] = count
        self._adopt(kept, [*old, Segment(self.consumed, tuple(counts))], places)
