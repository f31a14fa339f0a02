"""What filters need to know of every sample, kept beside its shard (X.tar.prints.npz).

Making them decodes every picture once, a millisecond each; a second run reads them back. A file is
current for as long as its shard has the hash that it was made with.
"""

from __future__ import annotations

import errno
import io
import json
import mmap
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import xxhash

from data_pipeline.decode import image_size
from data_pipeline.faults import SkipSample
from data_pipeline.files import write_atomically
from data_pipeline.index import load_index
from data_pipeline.manifest import Manifest
from data_pipeline.phash import PHASH_VERSION, picture_hash
from data_pipeline.records import image_members

__all__ = ["PRINT", "PrintUnit", "make_prints", "prints_path", "stored_prints", "units_of"]

_VERSION = 1
# Hashes are XXH3-64 but for `look`, the perceptual one; 0 means none. Two columns: NLVR2 has two
# pictures, and a picture of Visual Genome may have a second id, that of COCO.
PRINT = np.dtype(
    [
        ("bytes", "<u8", 2),  # of each picture's file
        ("look", "<u8", 2),  # of each picture
        ("ids", "<u8", 2),  # of the pictures' ids
        ("text", "<u8"),  # of all texts, in lower case and single spaces
        ("side", "<u4"),  # shortest side of a picture in pixels
        ("words", "<i4"),  # of the longest caption; -1 for a task without captions
        ("readable", "?"),  # False: nothing above is known of (a part of) the sample
    ]
)


@dataclass(frozen=True)
class PrintUnit:
    """One shard to be fingerprinted. `layout`: "" or "img2dataset" (caption in a txt member)."""

    path: Path
    task: str
    layout: str
    samples: int
    xxh3: str


def units_of(manifest: Manifest) -> list[PrintUnit]:
    """A unit for each shard of a folder."""
    layout = manifest.extra.get("layout", "")
    return [
        PrintUnit(manifest.path(number), manifest.task, layout, shard.samples, shard.xxh3)
        for number, shard in enumerate(manifest.shards)
    ]


# -- one sample -----------------------------------------------------------------------------------


def _hash(text: str) -> int:
    return xxhash.xxh3_64_intdigest(text.encode("utf-8", "surrogateescape"))


def _listed(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]


def _ids(record: Mapping[str, Any]) -> list[str]:
    """Ids of the pictures, COCO's included: "coco-<id>"."""
    found = [record["image_id"]] if "image_id" in record else _listed(record.get("image_ids", []))
    if "coco_id" in record:
        found.append(f"coco-{record['coco_id']}")
    return list(dict.fromkeys(map(str, found)))


def _captions(record: Mapping[str, Any]) -> list[str] | None:
    """The captions; None where the task has none, or these are regions only."""
    captions = [str(text) for text in _listed(record.get("captions", []))]
    return captions or (None if "elems" in record or "captions" not in record else [])


def _texts(record: Mapping[str, Any]) -> Iterator[str]:
    """Everything that is said about the pictures."""
    yield from _captions(record) or ()
    for group, name in (
        ("elems", "caption"),
        ("expressions", "text"),
        ("questions", "question"),
        ("statements", "sentence"),
    ):
        for entry in record.get(group, ()):
            yield from map(str, _listed(entry[name]))


def _record(unit: PrintUnit, members: Mapping[str, bytes]) -> dict[str, Any]:
    if unit.layout == "img2dataset":
        return {"captions": [members["txt"].decode()]}
    return json.loads(members["json"])


def _pictures(unit: PrintUnit, members: Mapping[str, bytes]) -> list[bytes]:
    if unit.layout == "img2dataset":
        return [raw for name, raw in members.items() if name not in ("json", "txt")]
    return [
        next(members[name] for name in names if name in members)
        for names in image_members(unit.task)
    ]


def _fill(row: Any, unit: PrintUnit, members: Mapping[str, bytes]) -> None:
    """Fills one row of PRINT; what cannot be read stays 0, and `readable` False."""
    try:
        record = _record(unit, members)
        ids, captions = _ids(record)[:2], _captions(record)
        said = [" ".join(text.lower().split()) for text in _texts(record)]
        pictures = _pictures(unit, members)[:2]
    except (ValueError, KeyError, TypeError, AttributeError, StopIteration, RecursionError):
        return
    row["ids"][: len(ids)] = [_hash(name) for name in ids]
    row["text"] = _hash("\n".join(said)) if any(said) else 0
    row["words"] = -1 if captions is None else max((len(c.split()) for c in captions), default=0)
    sides: list[int] = []
    for number, raw in enumerate(pictures):
        row["bytes"][number] = xxhash.xxh3_64_intdigest(raw)
        try:
            sides += image_size(raw)
            row["look"][number] = picture_hash(raw)
        except SkipSample:
            return
    row["side"] = min(sides, default=0)
    row["readable"] = bool(sides)


# -- one shard ------------------------------------------------------------------------------------


def prints_path(tar_path: Path) -> Path:
    """Where the fingerprints of a shard lie: beside it, X.tar.prints.npz."""
    return tar_path.with_name(tar_path.name + ".prints.npz")


def _made_of(unit: PrintUnit) -> np.ndarray:
    """What stored fingerprints must have been made of to be current."""
    return np.array([_VERSION, PHASH_VERSION, unit.samples, int(unit.xxh3, 16)], np.uint64)


def stored_prints(unit: PrintUnit) -> np.ndarray | None:
    """(samples,) PRINT that was stored before; None where it has to be made (again)."""
    try:
        with np.load(prints_path(unit.path), allow_pickle=False) as content:
            made_of, prints = content["made_of"], content["prints"]
    except (OSError, ValueError, KeyError, EOFError):
        return None
    current = np.array_equal(made_of, _made_of(unit))
    return prints if current and prints.dtype == PRINT and len(prints) == unit.samples else None


def _read(unit: PrintUnit) -> Iterable[dict[str, bytes]]:
    index = load_index(unit.path)
    with (
        unit.path.open("rb") as file,
        mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data,
    ):
        for sample in range(unit.samples):
            yield {m.extension: data[m.offset : m.offset + m.size] for m in index.members(sample)}


def make_prints(unit: PrintUnit) -> np.ndarray | None:
    """Makes and stores the fingerprints of a shard.

    Returns: None, or (samples,) PRINT where the folder cannot be written to.

    Raises: ShardError for a shard without a current index.
    """
    prints = np.zeros(unit.samples, PRINT)
    prints["words"] = -1
    for row, members in zip(prints, _read(unit), strict=True):
        _fill(row, unit, members)
    buffer = io.BytesIO()
    np.savez(buffer, made_of=_made_of(unit), prints=prints)
    try:
        write_atomically(prints_path(unit.path), [buffer.getvalue()])
    except PermissionError:
        return prints
    except OSError as error:
        if error.errno != errno.EROFS:
            raise
        return prints
    return None
