"""`espalier data index`: indexes and manifest of a folder of shards, over processes and MPI ranks.

Shards whose index is current (size and time of change) are not read again. What was noticed on the
way, such as a shard whose content is no longer what the old manifest listed, is reported and never
passed over.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any, Literal

import numpy as np

from data_pipeline.compressed import COMPRESSED, decompress_command
from data_pipeline.index import ShardError, load_index
from data_pipeline.manifest import MANIFEST_NAME, OWN_VALUES, Manifest, load_manifest
from data_pipeline.manifest_writer import write_manifest
from data_pipeline.parallel import gather, my_part, run_units, together
from data_pipeline.records import TASKS
from data_pipeline.survey import ShardFacts, survey

__all__ = ["IndexReport", "data_folders", "index_folder"]

# Members that img2dataset writes beside each picture.
_IMG2DATASET = "txt"
OldFilter = Literal["keep", "drop", "replace"]
_SPLITS = ("train", "val", "test", "validation", "minival", "dev")


@dataclass(frozen=True)
class IndexReport:
    """What was written for a folder. `read`: shards that were read; `notes`: what to look at."""

    folder: Path
    content: dict[str, Any]
    read: int
    notes: tuple[str, ...]

    def line(self) -> str:
        """One line for people."""
        shards = self.content["shards"]
        there = sum(shard["samples"] for shard in shards)
        kept = self.content["samples"]
        samples = f"{there} samples" if kept == there else f"{kept} of {there} samples"
        return f"{self.folder}: {samples} in {len(shards)} shards, {self.read} of them read"


def data_folders(root: Path) -> list[Path]:
    """The folders of shards at or below `root`, with or without a manifest.

    Raises: FileNotFoundError where `root` is missing or holds no shards; ShardError with the
        command to run where there are only compressed ones.
    """
    if not root.is_dir():
        raise FileNotFoundError(f"{root}: no such folder")
    found = {path.parent for name in (MANIFEST_NAME, "*.tar") for path in root.rglob(name)}
    if not found:
        _refuse_compressed(root.rglob("*"))
        raise FileNotFoundError(f"{root}: no shards (*.tar) and no {MANIFEST_NAME} in it or below")
    return sorted(found)


def _refuse_compressed(paths: Iterable[Path]) -> None:
    for path in sorted(paths):
        suffix = next((end for end in COMPRESSED if path.name.endswith(end)), None)
        if suffix is not None:
            raise ShardError(
                f"{path}: compressed shards cannot be read by position; decompress all of them: "
                f"{decompress_command(path.parent, '*' + suffix)}"
            )


def _old_content(folder: Path) -> dict[str, Any]:
    """manifest.json about to be replaced, of any version; {} if unreadable."""
    try:
        content = json.loads((folder / MANIFEST_NAME).read_bytes())
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def _place(
    folder: Path, paths: Sequence[Path], old: dict[str, Any], task: str | None, split: str | None
) -> tuple[str, str]:
    """(task, split): as asked for, as in the old manifest, or from TASK/SPLIT in the path.

    Shards of img2dataset, which know nothing of tasks, are for pre-training.
    """
    full = folder.resolve()
    task = task or old.get("task") or full.parent.name
    split = split or old.get("split")
    if task not in TASKS and paths and _IMG2DATASET in survey(paths[0]).members:
        task = "pretrain"
        split = split or (full.name if full.name in _SPLITS else "train")
    if task not in TASKS:
        raise ValueError(f"{folder}: task {task!r} is unknown; give --task {'|'.join(TASKS)}")
    return task, split or full.name


def index_folder(
    folder: Path,
    *,
    task: str | None = None,
    split: str | None = None,
    force: bool = False,
    processes: int | None = None,
    old_filter: OldFilter = "keep",
) -> IndexReport | None:
    """Writes the indexes and the manifest of the shards in a folder; every rank must call it.

    Args:
        task, split: of the shards (default: the old manifest's, else from the path TASK/SPLIT).
        force: read every shard again and compare.
        processes: on this rank (None: all cores).
        old_filter: "keep" one, which needs unchanged shards; "drop" it; or keep it for as long as
            it fits, because the caller will "replace" it.

    Returns: the report on rank 0, None on the others.

    Raises: ShardError for a damaged or compressed shard, or shards that no longer fit the filter;
        ValueError for an unknown task.
    """
    with together():
        _refuse_compressed(folder.iterdir())
        paths = sorted(folder.glob("*.tar"))
        old = _old_content(folder)
        place = _place(folder, paths, old, task, split)
    with together():
        work = partial(survey, force=force)
        found = run_units(work, my_part(paths), processes, "index", "shards")
    parts = gather(found)
    with together():
        report = None
        if parts is not None:
            facts = sorted(chain.from_iterable(parts), key=lambda fact: fact.name)
            report = _write(folder, place, old, facts, old_filter)
    return report


def _write(
    folder: Path,
    place: tuple[str, str],
    old: dict[str, Any],
    facts: Sequence[ShardFacts],
    old_filter: OldFilter,
) -> IndexReport:
    extra = {name: value for name, value in old.items() if name not in OWN_VALUES}
    extra.pop("layout", None)
    extra["schema"] = place[0]
    if any(_IMG2DATASET in fact.members for fact in facts):
        extra["layout"] = "img2dataset"
    filtered_as = None
    if old_filter != "drop" and old.get("filter"):
        try:
            filtered_as = _standing_filter(folder, old, facts)
        except ShardError:
            if old_filter == "keep":
                raise
    content = write_manifest(folder, *place, extra, facts, filtered_as)
    notes = tuple(chain(_changes(old, facts), _duplicates(folder, facts), _failures(folder, facts)))
    return IndexReport(folder, content, sum(fact.was_read for fact in facts), notes)


def _standing_filter(folder: Path, old: dict[str, Any], facts: Sequence[ShardFacts]) -> Manifest:
    """The old manifest, whose filter must fit the shards as they are."""
    way_out = "give the filter options again, or --no-filter to train on everything"
    try:
        manifest = load_manifest(folder)
    except (ShardError, FileNotFoundError) as error:
        raise ShardError(
            f"{folder}: the filter of its samples cannot be kept ({error}); {way_out}"
        ) from None
    before = [(s.name, s.bytes, s.samples, s.xxh3) for s in manifest.shards]
    if before != [(f.name, f.bytes, f.samples, f.xxh3) for f in facts]:
        raise ShardError(
            f"{folder}: the shards changed since their samples were filtered "
            f"({old['filter'].get('rules')}); {way_out}"
        )
    return manifest


def _changes(old: dict[str, Any], facts: Sequence[ShardFacts]) -> Iterator[str]:
    """Shards that are not what the old manifest, or their own index, says."""
    listed = {line["name"]: line for line in old.get("shards", []) if isinstance(line, dict)}
    for fact in facts:
        before = listed.pop(fact.name, None)
        if fact.rotten:
            yield (
                f"{fact.name}: its content changed, but neither its size nor its time of change: "
                "a damaged disk or copy? Compare it with a good copy"
            )
        elif before is not None and before.get("xxh3") != fact.xxh3:
            counts = f"{before.get('samples')} samples then, {fact.samples} now"
            yield f"{fact.name}: its content is not what the manifest listed ({counts})"
    for name in listed:
        yield f"{name}: was listed in the manifest and is gone"


def _duplicates(folder: Path, facts: Sequence[ShardFacts]) -> Iterator[str]:
    """Keys that occur in more than one shard, by their 64-bit hashes."""
    hashes = np.concatenate([fact.key_hashes for fact in facts])
    order = np.argsort(hashes, kind="stable")
    ordered = hashes[order]
    again = np.flatnonzero(ordered[1:] == ordered[:-1])
    if not len(again):
        return
    ends = np.cumsum([fact.samples for fact in facts])
    where, keys = [], []
    for position in order[again[0] : again[0] + 2].tolist():
        shard = int(np.searchsorted(ends, position, side="right"))
        fact = facts[shard]
        keys.append(load_index(folder / fact.name).key(position - int(ends[shard]) + fact.samples))
        where.append(fact.name)
    yield (
        f"{len(again)} samples have the key of an earlier one, such as '{keys[0]}' in "
        f"{where[0]} and {where[1]}; list them: espalier data verify {folder}"
    )


def _failures(folder: Path, facts: Sequence[ShardFacts]) -> Iterator[str]:
    """Shards of img2dataset with fewer samples than its statistics beside them count."""
    for fact in facts:
        path = folder / f"{fact.name.removesuffix('.tar')}_stats.json"
        if _IMG2DATASET not in fact.members or not path.is_file():
            continue
        try:
            written = json.loads(path.read_bytes())["successes"]
        except (ValueError, KeyError, TypeError) as error:
            yield f"{path.name}: cannot be read ({error!r})"
            continue
        if written != fact.samples:
            yield f"{fact.name}: {fact.samples} samples, but {path.name} says {written}"
