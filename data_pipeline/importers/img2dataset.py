"""What img2dataset has downloaded (SBU, CC3M, any list of URLs), to shards of our own or in place.

Format: tars 00000.tar, ... with KEY.jpg, KEY.txt (the caption) and KEY.json (url, status, ...) of
every picture that could be downloaded; 00000_stats.json counts those that could not. The parquet
files repeat the JSON and are not read.

Shards of our own hold decoded-once pictures and records. In place, the tars stay as they are: only
indexes and a manifest of layout "img2dataset" are written beside them.
"""

from __future__ import annotations

import json
import mmap
import os
from array import array
from bisect import bisect_right
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, overload

from data_pipeline.importers.common import Counts, LazyItems, Picture, run_import
from data_pipeline.importers.unit import ImportItem
from data_pipeline.index import build_index, load_index
from data_pipeline.manifest_writer import write_manifest
from data_pipeline.parallel import my_part, run_units, shares, together
from data_pipeline.records import IMAGE_EXTENSIONS
from data_pipeline.tar_headers import ShardError, walk

__all__ = ["build_img2dataset", "index_in_place", "read_stats"]

# webp is what img2dataset writes with --encode_format webp.
_IMAGES = (*IMAGE_EXTENSIONS, "webp")
_COLUMNS = 6


@dataclass(frozen=True)
class _Tar:
    """The samples of a tar: keys, and per sample offset and size of picture, text and JSON.

    `places` is flat; a size of -1 says that there is no such member.
    """

    path: Path
    keys: tuple[str, ...]
    places: array

    def part(self, start: int, stop: int) -> _Tar:
        """Some of its samples."""
        places = self.places[start * _COLUMNS : stop * _COLUMNS]
        return _Tar(self.path, self.keys[start:stop], places)


def _walk(path: Path) -> _Tar:
    """Reads the headers of a tar, and none of its pictures.

    Raises: ShardError for a damaged or empty tar, or one of another layout.
    """
    if path.stat().st_size == 0:
        raise ShardError(f"{path}: the tar is empty (0 bytes); let img2dataset write it again")
    rows: dict[str, list[int]] = {}
    columns = {name: 0 for name in _IMAGES} | {"txt": 2, "json": 4}
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        for member in walk(data, path):
            key, _, extension = member.name.rpartition(".")
            column = columns.get(extension.lower())
            if column is None:
                continue
            row = rows.setdefault(key, [0, -1, 0, -1, 0, -1])
            if row[column + 1] >= 0:
                raise ShardError(f"{path}: sample '{key}' has two members like '.{extension}'")
            row[column : column + 2] = member.offset, member.size
    flat = array("q", (number for row in rows.values() for number in row))
    return _Tar(path, tuple(rows), flat)


class _TarItems(LazyItems):
    """The samples of tars as items; texts are read where an item is made."""

    def __init__(self, tars: Sequence[_Tar], prefix: str) -> None:
        self._tars = tars
        self._prefix = prefix
        self._starts = [0]
        for tar in tars:
            self._starts.append(self._starts[-1] + len(tar.keys))

    def __len__(self) -> int:
        return self._starts[-1]

    def keys(self) -> Iterator[str]:
        for tar in self._tars:
            for key in tar.keys:
                yield f"{self._prefix}-{key}"

    @overload
    def __getitem__(self, place: int) -> ImportItem: ...
    @overload
    def __getitem__(self, place: slice) -> _TarItems: ...
    def __getitem__(self, place: int | slice) -> ImportItem | _TarItems:
        if isinstance(place, slice):
            start, stop, _ = place.indices(len(self))
            parts = []
            for tar, first in zip(self._tars, self._starts, strict=False):
                low, high = max(start - first, 0), min(stop - first, len(tar.keys))
                if low < high:
                    parts.append(tar.part(low, high))
            return _TarItems(parts, self._prefix)
        if not -len(self) <= place < len(self):
            raise IndexError(place)
        place %= len(self)
        number = bisect_right(self._starts, place) - 1
        return self._item(self._tars[number], place - self._starts[number])

    def _item(self, tar: _Tar, place: int) -> ImportItem:
        row = tar.places[place * _COLUMNS : (place + 1) * _COLUMNS]
        key = tar.keys[place]
        picture = Picture(tar.path, "", row[0], max(row[1], 0))
        with tar.path.open("rb") as file:
            text, facts = (
                os.pread(file.fileno(), row[at + 1], row[at]) if row[at + 1] > 0 else b""
                for at in (2, 4)
            )
        caption, drop = _caption(text, facts)
        if row[1] < 0:
            drop = drop or "no picture in the tar"
        name = f"{self._prefix}-{key}"
        record = {"image_id": name, "captions": [caption]}
        return ImportItem(name, (picture,), record, drop and f"{drop} ({key})")


def _caption(text: bytes, facts: bytes) -> tuple[str, str]:
    """(caption, why the sample is left out) from the members txt and json."""
    try:
        said: dict[str, Any] = json.loads(facts) if facts else {}
        caption = " ".join((text.decode() or str(said.get("caption") or "")).split())
        status = said.get("status", "success")
    except (ValueError, AttributeError) as error:
        return "", f"its txt or json member cannot be read: {error}"
    if status != "success":
        return caption, f"img2dataset says status {status!r}"
    return caption, "" if caption else "the caption is empty"


def read_stats(folder: Path) -> Counter[str]:
    """Downloads that failed, from the *_stats.json of a folder; img2dataset left them out.

    Raises: ValueError naming the file that is damaged.
    """
    found: Counter[str] = Counter()
    for file in sorted(folder.glob("*_stats.json")):
        try:
            stats = json.loads(file.read_bytes())
            found["downloads_failed"] += int(stats["failed_to_download"])
            found["downloads_not_resized"] += int(stats["failed_to_resize"])
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{file}: not the statistics of img2dataset ({error!r})") from None
    return found


def _tars(folder: Path) -> list[Path]:
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder}: no such folder of img2dataset's tars")
    tars = sorted(folder.glob("*.tar"))
    if not tars:
        raise FileNotFoundError(
            f"{folder}: no tars (*.tar); run img2dataset with --output_format webdataset"
        )
    return tars


def build_img2dataset(
    folder: Path,
    out: Path,
    *,
    source: str = "img2dataset",
    prefix: str = "",
    task: str = "pretrain",
    split: str = "train",
    max_side: int = 0,
    per_shard: int = 1000,
    processes: int | None = None,
    skip_bad: bool = False,
) -> dict[str, Counts]:
    """Writes OUT/TASK/SPLIT from the tars in `folder`, and returns its counts.

    Args:
        source: name kept in the manifest.   prefix: of the keys (default: the source).
        task: one whose records have captions: pretrain, retrieval or captioning.
        max_side ... skip_bad: as for `run_import`.

    Raises: ValueError / FileNotFoundError naming file and remedy.
    """
    tars = _tars(folder)
    names = [{"name": tar.name, "bytes": tar.stat().st_size} for tar in tars]
    with together():
        walked = run_units(_walk, tars, processes, f"{source} (headers)", "tars")
    counts = run_import(
        source,
        _TarItems(walked, prefix or source),
        out,
        task=task,
        split=split,
        settings={"tars": names},
        inputs=[],
        max_side=max_side,
        per_shard=per_shard,
        processes=processes,
        skip_bad=skip_bad,
        left_out=read_stats(folder),
    )
    return {task: counts}


def _index(path: Path) -> tuple[int, dict[str, int]]:
    try:
        index = load_index(path)
    except ShardError:
        index = build_index(path)
    return len(index), index.member_counts()


def index_in_place(
    folder: Path,
    *,
    source: str = "img2dataset",
    task: str = "pretrain",
    split: str = "train",
    processes: int | None = None,
) -> dict[str, Counts]:
    """Writes indexes and a manifest of layout "img2dataset" beside the tars; nothing is copied.

    No picture is decoded: `espalier data verify` does that. Empty captions are left to the filters
    of `espalier data index`.

    Raises: ValueError / FileNotFoundError naming file and remedy.
    """
    tars = _tars(folder)
    with together():
        found = run_units(_index, my_part(tars), processes, f"{source} (index)", "tars")
        for tar, (samples, members) in zip(my_part(tars), found, strict=True):
            pictures = sum(members.get(name, 0) for name in IMAGE_EXTENSIONS)
            if pictures != samples or members.get("txt", 0) != samples:
                raise ValueError(
                    f"{tar}: {samples} samples, {pictures} pictures (jpg, png) and "
                    f"{members.get('txt', 0)} captions (txt); import it without --in-place"
                )
    failed = read_stats(folder)
    with together():
        if shares()[0] == 0:
            facts: dict[str, Any] = {"source": source, "layout": "img2dataset", "max_side": 0}
            facts |= {"skipped": 0, "counts": {k: n for k, n in sorted(failed.items()) if n}}
            write_manifest(folder, task, split, facts)
    content = json.loads((folder / "manifest.json").read_bytes())
    samples = content["samples"]
    return {task: Counts(samples, samples, 0, len(tars), content["counts"])}
