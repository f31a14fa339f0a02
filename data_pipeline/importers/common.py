"""What all importers share: items in, checked shards out; in parallel, and to be continued after a
kill.

A work unit is one shard: its items, and so its bytes, depend on the input alone, never on the
number of processes or ranks, nor on where an earlier run was stopped. In OUT/TASK/SPLIT:

    import.json          what is imported, from which files, how; written first
    .import/000012.json  the account of shard 12, written when that shard is durable
    shard-000012.tar     (none where every item of the unit was left out)
    skipped.jsonl        key, file and reason of every item that was left out
    manifest.json        written last: with it the import is complete

Pictures are decoded once each; boxes are scaled with them, clipped to them, and left out, counted,
where less than a pixel of them remains.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
from abc import abstractmethod
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import xxhash

from data_pipeline.importers.pictures import (
    Picture,
    PictureFinder,
    safe_path,
)
from data_pipeline.importers.unit import (
    ACCOUNTS,
    ImportItem,
    Job,
    Unit,
    import_unit,
    read_account,
    write_text,
)
from data_pipeline.manifest_writer import write_manifest
from data_pipeline.parallel import my_part, run_units, shares, together
from data_pipeline.records import TASKS
from data_pipeline.shards import check_key

__all__ = ["Counts", "LazyItems", "Picture", "PictureFinder", "run_import", "safe_path"]

IMPORT_NAME = "import.json"
SKIPPED_NAME = "skipped.jsonl"
_VERSION = 1
# Larger inputs are told apart by their size and their ends.
_WHOLE_HASH = 1 << 30


class LazyItems(Sequence[ImportItem]):
    """Items that are made where they are used, in the worker: for sources of millions.

    A slice must be a picklable sequence of items, and small.
    """

    @abstractmethod
    def keys(self) -> Iterable[str]:
        """The key of every item, in order, made without making the items."""


@dataclass(frozen=True)
class Counts:
    """What a finished import holds. `details`: boxes, conversions and the like by name."""

    images: int
    samples: int
    skipped: int
    shards: int
    details: dict[str, int] = field(default_factory=dict)

    def line(self) -> str:
        """One line for people."""
        shown = {"images": self.images, "samples": self.samples, "skipped": self.skipped}
        shown |= {"shards": self.shards} | self.details
        return ", ".join(f"{number} {name.replace('_', ' ')}" for name, number in shown.items())


def _fingerprint(path: Path) -> dict[str, Any]:
    """Name, bytes and XXH3 of an input."""
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file")
    size, digest = path.stat().st_size, xxhash.xxh3_64()
    with path.open("rb") as file:
        if size > _WHOLE_HASH:
            digest.update(file.read(1 << 20))
            file.seek(size - (1 << 20))
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return {"name": path.name, "bytes": size, "xxh3": digest.hexdigest()}


def _keys_digest(items: Sequence[ImportItem]) -> str:
    """A hash of all keys in order.

    Raises: ValueError for a key that occurs twice, or that a tar reader would change.
    """
    keys = items.keys() if isinstance(items, LazyItems) else (item.key for item in items)
    digest, seen = xxhash.xxh3_64(), set()
    for key in keys:
        check_key(key)
        if key in seen:
            raise ValueError(f"two items have the key {key!r}: the input lists a picture twice")
        seen.add(key)
        digest.update(f"{key}\n".encode())
    return digest.hexdigest()


def _begin(folder: Path, plan: dict[str, Any]) -> None:
    """Writes import.json, or checks that an import begun before is the same one.

    Raises: ValueError where the folder holds something else.
    """
    folder.mkdir(parents=True, exist_ok=True)
    remedy = "give another --out, or remove that folder"
    try:
        known = json.loads((folder / IMPORT_NAME).read_bytes())
    except FileNotFoundError:
        if any(folder.glob("*.tar")) or (folder / "manifest.json").exists():
            raise ValueError(f"{folder} already holds shards of something else; {remedy}") from None
        (folder / ACCOUNTS).mkdir(exist_ok=True)
        write_text(folder / IMPORT_NAME, json.dumps(plan, indent=1) + "\n")
        return
    except ValueError as error:
        raise ValueError(f"{folder / IMPORT_NAME}: damaged ({error}); {remedy}") from None
    for name, value in plan.items():
        if known.get(name) != value:
            raise ValueError(
                f"{folder} already holds (a part of) another import: its {name} is "
                f"{json.dumps(known.get(name))[:300]}, now {json.dumps(value)[:300]}; {remedy}"
            )
    for stale in (*folder.glob("*.partial"), *folder.glob(".*.idx.*")):
        stale.unlink(missing_ok=True)
    (folder / ACCOUNTS).mkdir(exist_ok=True)


def _finish(job: Job, source: str, split: str, units: int, left_out: Mapping[str, int]) -> None:
    """Adds the accounts up; writes skipped.jsonl and the manifest."""
    totals: Counter[str] = Counter()
    details: Counter[str] = Counter()
    skipped: list[str] = []
    for number in range(units):
        account = read_account(job, number)
        if account is None:
            raise ValueError(
                f"{job.folder}: shard {number} vanished while it was imported; run this again"
            )
        totals.update({name: account[name] for name in ("samples", "images")})
        details.update(account["details"])
        skipped += [json.dumps(line, ensure_ascii=False) + "\n" for line in account["skipped"]]
    if not totals["samples"]:
        shutil.rmtree(job.folder / ACCOUNTS)
        (job.folder / IMPORT_NAME).unlink()
        first = f"; the first: {skipped[0].strip()}" if skipped else ""
        raise ValueError(f"{source}: none of the {len(skipped)} items can be used{first}")
    details.update(left_out)
    if skipped:
        write_text(job.folder / SKIPPED_NAME, "".join(skipped))
    extra = {
        "source": source,
        "max_side": job.max_side,
        "images": totals["images"],
        "skipped": len(skipped),
        "counts": {name: number for name, number in sorted(details.items()) if number},
    }
    write_manifest(job.folder, job.task, split, extra)
    shutil.rmtree(job.folder / ACCOUNTS, ignore_errors=True)


def _counts(folder: Path) -> Counts:
    """The counts of a complete import."""
    # NFS remembers for a while that a file was missing; listing its folder ends that.
    os.listdir(folder)
    content = json.loads((folder / "manifest.json").read_bytes())
    return Counts(
        content["images"],
        content["samples"],
        content["skipped"],
        len(content["shards"]),
        content["counts"],
    )


def _check(task: str, split: str, max_side: int, per_shard: int) -> None:
    if task not in TASKS:
        raise ValueError(f"task {task!r} is unknown: expected one of {', '.join(TASKS)}")
    if not split or any(mark in split for mark in "./\\"):
        raise ValueError(f"--split {split!r}: use a plain name such as train, val or test")
    if max_side < 0 or per_shard < 1:
        raise ValueError("--max-side must be at least 0 and --per-shard at least 1")


def run_import(
    source: str,
    items: Sequence[ImportItem],
    out: Path,
    *,
    task: str,
    split: str,
    settings: dict[str, Any],
    inputs: Sequence[Path],
    max_side: int = 0,
    per_shard: int = 1000,
    processes: int | None = None,
    skip_bad: bool = False,
    left_out: Mapping[str, int] | None = None,
) -> Counts:
    """Writes OUT/TASK/SPLIT: shards, indexes and manifest. Run it again after a kill to go on.

    A complete import of the same kind is not done again. Under MPI every rank must call this with
    the same items.

    Args:
        source: name of the importer.   items: every sample, in the order of the shards.
        settings: what else of the command line decides about the content (JSON).
        inputs: files that were read to make `items`, by whose content the import is recognised.
        max_side: longest side in pixels of larger pictures, which are scaled down (0: keep all).
        per_shard: items of a shard; fewer samples where items are left out.
        processes: at most this many (None: one per core).
        skip_bad: leave out and list samples whose picture is missing or cannot be decoded, or that
            do not follow the task's schema.
        left_out: counts of what the importer itself did not pass on; kept in the manifest.

    Raises: ValueError / FileNotFoundError naming file, sample and remedy.
    """
    _check(task, split, max_side, per_shard)
    job = Job(out / task / split, task, max_side, skip_bad)
    rank, _ = shares()
    with together():
        if rank == 0:
            plan: dict[str, Any] = {"version": _VERSION, "source": source, "task": task}
            plan |= {"split": split, "settings": json.loads(json.dumps(settings))}
            plan |= {"inputs": [_fingerprint(path) for path in inputs], "max_side": max_side}
            plan |= {"per_shard": per_shard, "items": len(items), "keys": _keys_digest(items)}
            _begin(job.folder, plan)
    if not (job.folder / "manifest.json").exists():
        starts = range(0, len(items), per_shard)
        numbers = [n for n in my_part(range(len(starts))) if read_account(job, n) is None]
        if rank == 0 and len(numbers) < len(my_part(range(len(starts)))):
            print(f"{job.folder}: going on with {len(numbers)} shards", file=sys.stderr)
        units = [Unit(n, items[starts[n] : starts[n] + per_shard]) for n in numbers]
        label = f"{source} ({task})"
        with together():
            work = partial(import_unit, job)
            run_units(work, units, processes, label, "images", lambda unit: len(unit.items))
        with together():
            if rank == 0:
                _finish(job, source, split, len(starts), left_out or {})
    return _counts(job.folder)
