"""Samples that cannot be used: what is raised, counted, written down, and when it is too much.

A permanent fault (undecodable image, missing member, bad record, bytes that are not those of the
index) either stops the run with one message, or the sample is skipped: another sample of the same
window, chosen by (seed, position, attempt), takes its place, so the batch size never changes and a
replay gives the same batch. I/O errors are never substituted: they are not a property of the
sample.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

__all__ = ["FAULT_KINDS", "MAX_CONSECUTIVE", "Fault", "FaultError", "FaultLedger", "SkipSample"]

MAX_CONSECUTIVE = 100
FAULT_KINDS = ("decode", "missing", "record", "pixels", "box", "hash")


class FaultError(ValueError):
    """A sample that stops the run, or too many of them."""


class SkipSample(Exception):
    """Raised by a pipeline stage for a sample that can never be used.

    Args:
        kind: what to count it as, one of FAULT_KINDS.
        reason: one sentence for people.
    """

    def __init__(self, kind: str, reason: str) -> None:
        super().__init__(kind, reason)
        self.kind = kind
        self.reason = reason


@dataclass(frozen=True, slots=True)
class Fault:
    """One bad sample met at a stream position. `attempt` 0 is the planned one, then substitutes."""

    kind: str
    shard: str
    key: str
    reason: str
    position: int
    attempt: int

    def message(self) -> str:
        """Names shard, key, reason and remedy."""
        return (
            f"{self.shard}: sample '{self.key}': {self.reason}. Repair or remove the sample "
            "(espalier data verify DIR lists all bad ones), or set data.faults=skip"
        )


class FaultLedger:
    """Counts delivered samples and faults of this rank, in the main process.

    Args:
        policy: "raise" or "skip".   max_rate: largest share of samples that may be skipped.
        epoch_samples: samples of one epoch on this rank, the least the rate is taken of.
        quarantine: JSONL file to which every new fault is appended; None keeps no list.
    """

    def __init__(
        self, policy: str, max_rate: float, epoch_samples: int, quarantine: Path | None = None
    ) -> None:
        if policy not in ("raise", "skip"):
            raise ValueError(f"data.faults must be 'raise' or 'skip', is '{policy}'")
        self.policy = policy
        self.max_rate = max_rate
        self.epoch_samples = max(1, epoch_samples)
        self.quarantine = quarantine
        self.counts: Counter[str] = Counter()
        self.samples = 0
        self.consecutive = 0
        self._written: set[tuple[str, str]] = set()

    def deliver(self, positions: Sequence[int], faults: tuple[Fault, ...]) -> None:
        """Accounts for one delivered batch of samples.

        Raises:
            FaultError: policy "raise" and any fault; or the rate or the run of faults is too high.
        """
        for fault in faults:
            if self.policy == "raise":
                raise FaultError(fault.message())
            self.counts[fault.kind] += 1
            self._record(fault)
        self.samples += len(positions)
        self._check_run(positions, faults)
        total = sum(self.counts.values())
        rate = total / max(self.samples, self.epoch_samples)
        if faults and rate > self.max_rate:
            raise FaultError(
                f"{total} bad samples, {rate:.2%} of the data, above data.max_fault_rate="
                f"{self.max_rate:g}; last: {faults[-1].message()}"
            )

    def _check_run(self, positions: Sequence[int], faults: tuple[Fault, ...]) -> None:
        """Faults in a row, substitutes included: a bad shard shows here long before the rate."""
        bad = Counter(fault.position for fault in faults)
        for position in positions:
            self.consecutive = self.consecutive + bad[position] if bad[position] else 0
            if self.consecutive >= MAX_CONSECUTIVE:
                raise FaultError(
                    f"{self.consecutive} bad samples in a row; last: {faults[-1].message()}"
                )

    def _record(self, fault: Fault) -> None:
        name = (fault.shard, fault.key)
        if self.quarantine is None or name in self._written:
            return
        self._written.add(name)
        self.quarantine.parent.mkdir(parents=True, exist_ok=True)
        # A key may hold bytes that are not UTF-8; backslashreplace writes them as JSON does.
        with self.quarantine.open("a", encoding="utf-8", errors="backslashreplace") as file:
            file.write(json.dumps(asdict(fault), ensure_ascii=False) + "\n")
