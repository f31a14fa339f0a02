"""Filters of a data folder: leaks from test sets, duplicates, small pictures, short captions.

Nothing is removed from a shard: the result is one bit a sample beside the manifest (`write_keep`),
so that the stream reads the rest, and what was left out is listed in dropped.jsonl with the rule and
the sample that it was left out for. Rules apply in the order of RULES; a sample counts for the first
that it breaks:

    min_side      a picture's shorter side is less than so many pixels
    min_words     no caption has so many words (tasks without captions: never)
    leak_id       a picture has the id of one in a test folder, or both are the same COCO picture
    leak_picture  a picture has the bytes of one in a test folder, or looks the same: perceptual
                  hashes at most `distance` bits apart (see `phash` for what that finds)
    same_bytes    the same picture files as an earlier sample that no rule above leaves out, whatever
                  is said of them: the like of "image not available" has thousands of captions
    same_look     the same perceptual hash and texts as an earlier sample that no rule above leaves out

A picture that cannot be decoded passes; it and those without structure (blank, plain gradients) can
only be compared by their bytes and ids. Both are counted.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from data_pipeline.files import write_atomically
from data_pipeline.fingerprints import PRINT, PrintUnit, make_prints, stored_prints, units_of
from data_pipeline.index import load_index
from data_pipeline.indexing import data_folders
from data_pipeline.manifest import Manifest, load_manifest
from data_pipeline.manifest_writer import write_keep
from data_pipeline.parallel import gather, my_part, run_units, shares, together
from data_pipeline.phash import MAX_DISTANCE, NO_HASH, PHASH_VERSION, nearest

__all__ = ["DROPPED_NAME", "RULES", "FilterRules", "apply"]

DROPPED_NAME = "dropped.jsonl"
RULES = ("min_side", "min_words", "leak_id", "leak_picture", "same_bytes", "same_look")


@dataclass(frozen=True)
class FilterRules:
    """What to leave out of a folder.

    Attributes:
        leaks: test folders, or folders with test folders in them.
        duplicates: leave out samples that repeat an earlier one.
        min_side: pixels of a picture's shorter side.   min_words: of the longest caption.
        distance: bits by which perceptual hashes of the same picture may differ.
    """

    leaks: tuple[Path, ...] = ()
    duplicates: bool = False
    min_side: int = 0
    min_words: int = 0
    distance: int = MAX_DISTANCE


# -- the samples of some folders ------------------------------------------------------------------


@dataclass
class _Side:
    """The samples of one or more folders, one after the other, and where they come from."""

    manifests: Sequence[Manifest]
    prints: np.ndarray = field(default_factory=lambda: np.zeros(0, PRINT))

    @property
    def units(self) -> list[PrintUnit]:
        return [unit for manifest in self.manifests for unit in units_of(manifest)]

    def names(self, samples: np.ndarray) -> Iterator[tuple[str, str, str]]:
        """(folder, shard, key) of each of these sample numbers."""
        units = self.units
        ends = np.cumsum([unit.samples for unit in units])
        opened: dict[int, Any] = {}
        for sample, shard in zip(
            samples.tolist(), np.searchsorted(ends, samples, side="right").tolist(), strict=True
        ):
            unit = units[shard]
            if shard not in opened:
                opened[shard] = load_index(unit.path)
            key = opened[shard].key(sample - int(ends[shard]) + unit.samples)
            yield str(unit.path.parent), unit.path.name, key


def _open(folder: Path, rules: FilterRules) -> tuple[_Side, _Side]:
    """(the folder, the test folders). Raises: ValueError where they overlap."""
    if rules.min_side < 0 or rules.min_words < 0:
        raise ValueError("min_side and min_words must be at least 0")
    found: dict[Path, Path] = {}
    for root in rules.leaks:
        for place in data_folders(root):
            found.setdefault(place.resolve(), place)
            if place.resolve() == folder.resolve():
                raise ValueError(
                    f"--drop-leaks {root} holds {folder} itself: all of its samples would be leaks; "
                    "name the test folders only"
                )
    return _Side([load_manifest(folder)]), _Side([load_manifest(place) for place in found.values()])


def _fingerprint(sides: Sequence[_Side], processes: int | None) -> None:
    """Gives each side its fingerprints, on rank 0; every rank makes its part of the missing ones."""
    units = [unit for side in sides for unit in side.units]
    with together():
        missing = [unit for unit in my_part(units) if stored_prints(unit) is None]
        made = run_units(
            make_prints, missing, processes, "fingerprints", "samples", lambda unit: unit.samples
        )
    unstored = {u.path: p for u, p in zip(missing, made, strict=True) if p is not None}
    parts = gather(unstored)
    if parts is None:
        return
    known = {path: prints for part in parts for path, prints in part.items()}
    for place in sorted({str(path.parent) for path in known}):
        print(f"{place}: not writable; its fingerprints are not kept", file=sys.stderr)
    for side in sides:
        side.prints = np.concatenate([np.zeros(0, PRINT), *(_prints(u, known) for u in side.units)])


def _prints(unit: PrintUnit, known: dict[Path, np.ndarray]) -> np.ndarray:
    if unit.path in known:
        return known[unit.path]
    # NFS remembers for a while that a file was missing; listing its folder ends that.
    os.listdir(unit.path.parent)
    prints = stored_prints(unit)
    if prints is None:
        raise ValueError(
            f"{unit.path}: its fingerprints vanished or it was changed; run this again"
        )
    return prints


# -- the rules ------------------------------------------------------------------------------------


@dataclass
class _Verdict:
    """What was decided. `rule`: (N,) number in RULES, -1 kept.

    Attributes:
        of: (N,) the test sample, or the earlier sample, that it was left out for; -1 none.
        apart: (N,) bits between the looks of both.
    """

    rule: np.ndarray
    of: np.ndarray
    apart: np.ndarray

    @classmethod
    def none_of(cls, samples: int) -> _Verdict:
        """Nothing left out."""
        return cls(np.full(samples, -1, np.int8), np.full(samples, -1), np.zeros(samples, np.uint8))

    def drop(
        self, name: str, broken: np.ndarray, of: np.ndarray | None = None, apart: Any = 0
    ) -> None:
        """Leaves out the samples that `broken` (N,) marks and no rule before did."""
        rows = np.flatnonzero(broken & (self.rule < 0))
        self.rule[rows] = RULES.index(name)
        self.of[rows] = -1 if of is None else of[rows]
        self.apart[rows] = np.broadcast_to(apart, self.rule.shape)[rows]

    def counts(self) -> dict[str, int]:
        """Samples that each rule left out, for the rules that did."""
        counts = np.bincount(self.rule[self.rule >= 0], minlength=len(RULES)).tolist()
        return {name: count for name, count in zip(RULES, counts, strict=True) if count}


def _first_with(values: np.ndarray, known: np.ndarray) -> np.ndarray:
    """(N,) the first row of `known` (M, 2) that shares a value with each row of `values` (N, 2).

    0 is no value; -1: no row does.
    """
    flat = known.ravel()
    places = np.flatnonzero(flat)
    unique, first = np.unique(flat[places], return_index=True)
    if not len(unique):
        return np.full(len(values), -1)
    rows = places[first] // 2
    at = np.minimum(np.searchsorted(unique, values), len(unique) - 1)
    found = np.where(unique[at] == values, rows[at], len(known)).min(axis=1)
    return np.where(found == len(known), -1, found)


def _leaks(samples: np.ndarray, tests: np.ndarray, distance: int, verdict: _Verdict) -> None:
    """The rules leak_id and leak_picture."""
    of = _first_with(samples["ids"], tests["ids"])
    verdict.drop("leak_id", of >= 0, of)
    of = _first_with(samples["bytes"], tests["bytes"])
    verdict.drop("leak_picture", of >= 0, of)
    found, apart = nearest(samples["look"].ravel(), tests["look"].ravel(), distance)
    found, apart = found.reshape(-1, 2), apart.reshape(-1, 2)
    # Of two pictures (NLVR2) the one that is closer to a test picture is the reason.
    best = np.arange(len(samples)), apart.argmin(axis=1)
    of = np.where(found[best] < 0, -1, found[best] // 2)
    verdict.drop("leak_picture", of >= 0, of, apart[best])


def _mixed(*columns: np.ndarray) -> np.ndarray:
    """(N,) u64 that are equal where all columns are, and else, in all likelihood, not."""
    total = np.zeros(len(columns[0]), np.uint64)
    for column in columns:
        total = (total ^ column) * np.uint64(0x9E3779B97F4A7C15)
        total ^= total >> np.uint64(29)
    return total


def _repeats(name: str, values: np.ndarray, known: np.ndarray, verdict: _Verdict) -> None:
    """Leaves out the kept samples whose value (N,) an earlier kept one has; `known`: that have one."""
    rows = np.flatnonzero(known & (verdict.rule < 0))
    _, first, inverse = np.unique(values[rows], return_index=True, return_inverse=True)
    earliest = rows[first][inverse]
    of = np.full(len(values), -1)
    of[rows] = np.where(earliest == rows, -1, earliest)
    verdict.drop(name, of >= 0, of)


def _duplicates(samples: np.ndarray, verdict: _Verdict) -> None:
    """The rules same_bytes and same_look."""
    files, looks = samples["bytes"], samples["look"]
    _repeats("same_bytes", _mixed(files[:, 0], files[:, 1]), files[:, 0] != 0, verdict)
    # The second picture, where there is one, needs a hash as well.
    comparable = (looks[:, 0] != NO_HASH) & ((files[:, 1] == 0) | (looks[:, 1] != NO_HASH))
    comparable &= samples["text"] != 0
    _repeats("same_look", _mixed(looks[:, 0], looks[:, 1], samples["text"]), comparable, verdict)


def _decide(samples: np.ndarray, tests: np.ndarray, rules: FilterRules) -> _Verdict:
    verdict = _Verdict.none_of(len(samples))
    known, words = samples["side"] > 0, samples["words"]
    verdict.drop("min_side", known & (samples["side"] < rules.min_side))
    verdict.drop("min_words", (words >= 0) & (words < rules.min_words))
    if len(tests):
        _leaks(samples, tests, rules.distance, verdict)
    if rules.duplicates:
        _duplicates(samples, verdict)
    return verdict


# -- the result -----------------------------------------------------------------------------------


def _because(name: str, row: Any, apart: int, other: tuple[str, str, str] | None) -> str:
    if name == "min_side":
        return f"{row['side']} pixels"
    if name == "min_words":
        return f"{row['words']} words"
    assert other is not None
    folder, _, key = other
    if not name.startswith("leak"):
        return key
    return f"{folder}: {key}" + (f" ({apart} bits apart)" if apart else "")


def _lines(samples: _Side, tests: _Side, verdict: _Verdict) -> Iterator[bytes]:
    """One JSON line for each sample that is left out."""
    rows = np.flatnonzero(verdict.rule >= 0)
    of, rule = verdict.of[rows], verdict.rule[rows]
    leak = (rule == RULES.index("leak_id")) | (rule == RULES.index("leak_picture"))
    others: dict[int, tuple[str, str, str]] = {}
    for side, chosen in ((tests, leak), (samples, ~leak & (of >= 0))):
        others |= zip(rows[chosen].tolist(), side.names(of[chosen]), strict=True)
    for row, (_, shard, key) in zip(rows.tolist(), samples.names(rows), strict=True):
        name = RULES[verdict.rule[row]]
        why = _because(name, samples.prints[row], int(verdict.apart[row]), others.get(row))
        line = {"key": key, "shard": shard, "rule": name, "because": why}
        yield json.dumps(line, ensure_ascii=False).encode("utf-8", "surrogateescape") + b"\n"


def _described(rules: FilterRules, samples: _Side, tests: _Side) -> dict[str, Any]:
    """The rules for the manifest, whose hash must not depend on where folders lie."""
    prints = samples.prints
    plain = (prints["look"] == NO_HASH) & (prints["bytes"] != 0)
    described: dict[str, Any] = {
        "duplicates": rules.duplicates,
        "min_side": rules.min_side,
        "min_words": rules.min_words,
        "leaks": [{"task": m.task, "split": m.split, "hash": m.hash} for m in tests.manifests],
        "unreadable_samples": int(np.count_nonzero(~prints["readable"])),
        "pictures_without_structure": int(np.count_nonzero(plain[prints["readable"]])),
    }
    if tests.manifests or rules.duplicates:
        described |= {"distance": rules.distance, "phash_version": PHASH_VERSION}
    return described


def apply(folder: Path, rules: FilterRules, processes: int | None = None) -> dict[str, Any] | None:
    """Filters a folder, in place of its earlier filter. Under MPI every rank must call it.

    Fingerprints are kept beside the shards, of the test folders as well: a second run is fast, and
    one that was killed goes on.

    Args:
        processes: on this rank (None: one per core).

    Returns: the content of the new manifest, with "filter": {"rules", "dropped": {rule: samples}};
        None on ranks other than 0.

    Raises: ValueError where nothing would be left, or the folder is among the test folders;
        FileNotFoundError for a folder without shards; ShardError for one that is not indexed.
    """
    with together():
        samples, tests = _open(folder, rules)
    _fingerprint((samples, tests), processes)
    content = None
    with together():
        if shares()[0] == 0:
            verdict = _decide(samples.prints, tests.prints, rules)
            described = _described(rules, samples, tests)
            if (verdict.rule >= 0).all():
                raise ValueError(f"{folder}: these filters would leave no sample: {described}")
            write_atomically(folder / DROPPED_NAME, list(_lines(samples, tests, verdict)))
            content = write_keep(folder, verdict.rule < 0, described, verdict.counts())
    return content
