"""One shard of an import: its samples, and the account of what became of them.

A unit is done when shard and account are there; a killed import goes on with the others.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

# In the server of the pool, not in each worker: it imports torch.
import webdataset.writer  # noqa: F401

from data_pipeline.faults import SkipSample
from data_pipeline.importers.boxes import check_frame, fit_boxes, read_frame
from data_pipeline.importers.pictures import (
    Picture,
    PictureReader,
    Prepared,
    prepare_picture,
)
from data_pipeline.records import RecordError, parse_record
from data_pipeline.shards import dump_json, write_shard

__all__ = ["ACCOUNTS", "ImportItem", "Job", "Unit", "import_unit", "read_account", "write_text"]

ACCOUNTS = ".import"


@dataclass(frozen=True, slots=True)
class ImportItem:
    """One sample to be.

    Attributes:
        key: unique, and a valid webdataset key (`check_key`).
        pictures: one, or two for nlvr2.
        record: what `records.parse_record` expects of the task, or its JSON (a tenth of the memory
            where there are millions of boxes). "width" and "height" are the frame of its boxes;
            None is filled in from the picture.
        drop: why the item is left out, listed and counted; "" imports it.
    """

    key: str
    pictures: tuple[Picture, ...]
    record: dict[str, Any] | bytes
    drop: str = ""


@dataclass(frozen=True)
class Job:
    """What every unit of an import needs to know."""

    folder: Path
    task: str
    max_side: int
    skip_bad: bool


@dataclass(frozen=True)
class Unit:
    """Shard `number` and the items that go into it."""

    number: int
    items: Sequence[ImportItem]


def _members(
    job: Job, item: ImportItem, reader: PictureReader, details: Counter[str]
) -> dict[str, bytes]:
    """The members of one sample: extension -> bytes. Raises SkipSample."""
    data = json.loads(item.record) if isinstance(item.record, bytes) else dict(item.record)
    frame = read_frame(data)
    prepared: list[Prepared] = []
    for picture in item.pictures:
        try:
            prepared.append(prepare_picture(reader.read(picture), job.max_side, frame))
        except SkipSample as bad:
            which = f"{picture}: " if len(item.pictures) > 1 else ""
            raise SkipSample(bad.kind, which + bad.reason) from None
    found: Counter[str] = Counter()
    if "width" in data:
        shown = prepared[0]
        if frame is not None:
            check_frame(frame, shown.frame)
        size = (shown.width, shown.height)
        found = fit_boxes(data, frame or shown.frame, size)
        data["width"], data["height"] = size
        if not any(data.get(name) for name in ("captions", "elems", "expressions")):
            raise SkipSample("drop", "no caption, and no box of a pixel or more")
    lists = ("captions", "elems", "expressions", "questions", "statements")
    found.update({name: len(data[name]) for name in lists if isinstance(data.get(name), list)})
    raw = dump_json(data)
    try:
        parse_record(job.task, raw, str(job.folder), item.key)
    except RecordError as error:
        raise SkipSample("record", error.reason) from None
    members = {}
    for number, picture in enumerate(prepared):
        name = f"{number}.{picture.extension}" if len(prepared) > 1 else picture.extension
        members[name] = picture.raw
        found.update(f"images_{change}" for change in picture.changes)
    details.update(found)
    return members | {"json": raw}


def _account_path(folder: Path, number: int) -> Path:
    return folder / ACCOUNTS / f"{number:06d}.json"


def _shard_path(folder: Path, number: int) -> Path:
    return folder / f"shard-{number:06d}.tar"


def write_text(path: Path, text: str) -> None:
    """Beside `path` first: a reader sees the old file or the new one."""
    partial_file = path.with_name(path.name + ".partial")
    partial_file.write_text(text, encoding="utf-8")
    partial_file.replace(path)


def read_account(job: Job, number: int) -> dict[str, Any] | None:
    """The account of a finished unit; None where it has to be done (again)."""
    try:
        account = json.loads(_account_path(job.folder, number).read_bytes())
        shard = _shard_path(job.folder, number)
        if account["samples"] and shard.stat().st_size != account["bytes"]:
            return None
        # What was left out is an error now: the unit is done again, and says so.
        return None if account["bad"] and not job.skip_bad else account
    except (OSError, ValueError, KeyError):
        return None


def import_unit(job: Job, unit: Unit) -> None:
    """Writes one shard and its account.

    Raises: ValueError for a sample that cannot be used, without --skip-bad.
    """
    details: Counter[str] = Counter()
    skipped: list[dict[str, str]] = []
    account = {"samples": 0, "images": 0, "bytes": 0, "bad": 0}

    def samples() -> Iterable[tuple[str, dict[str, bytes]]]:
        with PictureReader() as reader:
            for item in unit.items:
                try:
                    if item.drop:
                        raise SkipSample("drop", item.drop)
                    yield item.key, _members(job, item, reader, details)
                    account["images"] += len(item.pictures)
                except SkipSample as bad:
                    if bad.kind != "drop" and not job.skip_bad:
                        raise ValueError(
                            f"{_files(item)}: sample {item.key}: {bad.reason}. Add or repair it, "
                            "or use --skip-bad to leave such samples out and list them"
                        ) from None
                    account["bad"] += bad.kind != "drop"
                    line = {"key": item.key, "file": _files(item), "reason": bad.reason}
                    skipped.append(line)

    account["samples"] = write_shard(job.folder, unit.number, samples())
    if account["samples"]:
        account["bytes"] = _shard_path(job.folder, unit.number).stat().st_size
    content = account | {"skipped": skipped, "details": details}
    write_text(_account_path(job.folder, unit.number), json.dumps(content))


def _files(item: ImportItem) -> str:
    return ", ".join(str(picture) for picture in item.pictures)
