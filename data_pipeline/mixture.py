"""One endless stream over the canonical groups of one or more data sets. Needs numpy only.

Stream position p belongs to group p % groups at place p // groups. A step takes `step_samples`
consecutive positions, ordered group by group, and rank r the r-th part of them: ranks only slice.
The step holds the same set of positions however it is cut into micro-batches, so the only state is
how many positions were delivered.

Which data set a place reads is a schedule: a period of P places holds each data set an exact number
of times, spread evenly, and groups start at different points of it, so that single steps are mixed
in proportion as well. How many samples of a data set precede a place is a table look-up, so resuming
needs no replay.

An intended change (weights, a data set added, rewritten or taken away) starts a new segment: data
sets that stay go on where they were, a changed one starts at its beginning.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from data_pipeline.plan import Plan

__all__ = ["Mixture", "Segment", "Slot", "choose_groups", "period_counts", "step_positions"]


class Slot(NamedTuple):
    """What a stream position reads: `place` of `group` in data set number `dataset`."""

    dataset: int
    group: int
    place: int


@dataclass(frozen=True)
class Segment:
    """From stream position `start` on, a period holds `counts[d]` samples of data set d."""

    start: int
    counts: tuple[int, ...]


def period_counts(weights: Sequence[float], period: int) -> tuple[int, ...]:
    """Samples of each data set in a period of at most `period`: largest remainders, at least one of
    each, divided by their common factor.

    Raises:
        ValueError: no weight, one that is not positive, or more data sets than places.
    """
    if not weights or any(not (math.isfinite(w) and w > 0) for w in weights):
        raise ValueError(f"mixture weights must be positive numbers, are {list(weights)}")
    if len(weights) > period:
        raise ValueError(f"{len(weights)} data sets do not fit in data.mix_period={period}")
    total = math.fsum(weights)
    exact = [weight / total * period for weight in weights]
    counts = [max(1, math.floor(share)) for share in exact]
    # The largest remainder gains, or the best represented loses, until the period is full.
    while (left := period - sum(counts)) != 0:
        rest = [share - count for share, count in zip(exact, counts, strict=True)]
        if left > 0:
            counts[rest.index(max(rest))] += 1
        else:
            able = [r if c > 1 else math.inf for r, c in zip(rest, counts, strict=True)]
            counts[able.index(min(able))] -= 1
    factor = math.gcd(*counts)
    return tuple(count // factor for count in counts)


def choose_groups(step_samples: int, ranks: int, samples: int, window: int) -> int:
    """The default number of groups: a divisor of the step, at most 64.

    No more than there are windows of `window` samples: in smaller data one window mixes all of it.
    Among these a multiple of the ranks is preferred, so that each rank reads groups of its own.
    """
    most = max(1, min(64, step_samples, samples // max(1, window)))
    divisors = [n for n in range(1, most + 1) if step_samples % n == 0]
    own = [n for n in divisors if n % ranks == 0]
    return (own or divisors)[-1]


def step_positions(
    start: int, step_samples: int, groups: int, first: int, last: int
) -> tuple[int, ...]:
    """Stream positions of slots [first, last) in the step that begins at position `start`: group by
    group, ascending in each.
    """
    share = step_samples // groups
    slots = np.arange(first, last)
    return tuple((start + slots % share * groups + slots // share).tolist())


@dataclass(frozen=True)
class _Schedule:
    """One period: the data set of each place, and how many of each come before it.

    dataset: (P,).   before: (P + 1, data sets).
    """

    dataset: np.ndarray
    before: np.ndarray

    @classmethod
    def of(cls, counts: Sequence[int]) -> _Schedule:
        """Evenly spread: the k-th of n samples wants to stand at (k + 1/2) / n of the period."""
        wanted = [((k + 0.5) / n, d) for d, n in enumerate(counts) for k in range(n)]
        dataset = np.asarray([d for _, d in sorted(wanted)])
        hits = dataset[:, None] == np.arange(len(counts))
        return cls(dataset, np.concatenate([np.zeros((1, len(counts)), int), hits.cumsum(0)]))

    def seen(self, place: int) -> np.ndarray:
        """(data sets,) samples before `place` of the endlessly repeated period."""
        periods, inside = divmod(place, len(self.dataset))
        return periods * self.before[-1] + self.before[inside]


class Mixture:
    """The stream over data sets.

    Attributes:
        samples: of all data sets.   left_out: samples that their epochs leave out.

    Args:
        plans: one per data set, all with the same number of groups; None for one that was taken
            away, which still counts in earlier segments.
        segments: in order; the last one is in force. Counts of data sets that a segment did not
            have are 0.
        since: for each data set, the segment in which it begins at its first sample.

    Raises:
        ValueError: plans or segments that do not fit together.
    """

    def __init__(
        self, plans: Sequence[Plan | None], segments: Sequence[Segment], since: Sequence[int] = ()
    ) -> None:
        self.plans = tuple(plans)
        self.segments = tuple(segments)
        self.since = tuple(since) or (0,) * len(self.plans)
        live = [plan for plan in self.plans if plan is not None]
        if not live:
            raise ValueError("a mixture needs at least one data set")
        self.samples = sum(plan.samples for plan in live)
        self.left_out = sum(plan.left_out for plan in live)
        self.groups = live[0].groups
        if any(plan.groups != self.groups for plan in live):
            raise ValueError("all data sets of a mixture need the same number of groups")
        if any(len(segment.counts) != len(self.plans) for segment in self.segments):
            raise ValueError("each segment needs a count for each data set")
        if any(
            (plan is None) != (n == 0) for plan, n in zip(plans, segments[-1].counts, strict=True)
        ):
            raise ValueError("each data set needs a share in the segment in force")
        self._schedules = tuple(_Schedule.of(segment.counts) for segment in self.segments)
        self._origins = tuple(self._origin(group) for group in range(self.groups))

    def _turn(self, schedule: _Schedule, group: int) -> int:
        """Where in the period a group starts."""
        return group * len(schedule.dataset) // self.groups

    def _seen(self, segment: int, group: int, places: int) -> np.ndarray:
        schedule = self._schedules[segment]
        turn = self._turn(schedule, group)
        return schedule.seen(turn + places) - schedule.seen(turn)

    def _origin(self, group: int) -> np.ndarray:
        """(data sets,) samples of each that a group read before the segment in force."""
        total = np.zeros(len(self.plans), int)
        for number in range(len(self.segments) - 1):
            length = self.segments[number + 1].start - self.segments[number].start
            places = -(-(length - group) // self.groups) if length > group else 0
            total += self._seen(number, group, places) * (number >= np.asarray(self.since))
        return total

    def slot(self, position: int) -> Slot:
        """What a stream position reads. `position` lies in the segment in force."""
        place, group = divmod(position - self.segments[-1].start, self.groups)
        schedule = self._schedules[-1]
        turn = self._turn(schedule, group)
        dataset = int(schedule.dataset[(turn + place) % len(schedule.dataset)])
        seen = schedule.seen(turn + place)[dataset] - schedule.seen(turn)[dataset]
        return Slot(dataset, group, int(self._origins[group][dataset] + seen))

    def plan(self, dataset: int) -> Plan:
        """The plan of a data set in force."""
        plan = self.plans[dataset]
        if plan is None:
            raise ValueError(f"data set number {dataset} was taken out of the mixture")
        return plan

    def locate(self, position: int) -> tuple[int, int, int]:
        """(data set, shard, sample in the shard) at a stream position."""
        slot = self.slot(position)
        return (slot.dataset, *self.plan(slot.dataset).locate(slot.place, slot.group))

    def substitute(self, position: int, attempt: int) -> tuple[int, int, int]:
        """(data set, shard, sample) in the place of a bad one, from the same window."""
        slot = self.slot(position)
        return (
            slot.dataset,
            *self.plan(slot.dataset).substitute(slot.place, attempt, slot.group),
        )

    def consumed(self, position: int) -> tuple[int, ...]:
        """Samples of each data set before a stream position (a multiple of `groups`), since each
        began.
        """
        places = (position - self.segments[-1].start) // self.groups
        last = len(self.segments) - 1
        total = sum(
            self._origins[group] + self._seen(last, group, places) for group in range(self.groups)
        )
        return tuple(np.asarray(total).tolist())
