"""`espalier data inspect`: what a data folder holds, in numbers and as a contact sheet."""

from __future__ import annotations

import textwrap
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw

from data_pipeline.decode import decode_image, image_size
from data_pipeline.index import load_index
from data_pipeline.indexing import data_folders
from data_pipeline.manifest import load_manifest
from data_pipeline.records import image_members, parse_record

__all__ = ["contact_sheet", "describe", "summary_lines"]

_TILE = 224
_TEXT_ROWS = 6
_ROW = 12
_COLUMNS = 4


def _read(path: Path, offset: int, size: int) -> bytes:
    with path.open("rb") as file:
        file.seek(offset)
        return file.read(size)


def _members(path: Path, sample: int) -> tuple[str, dict[str, bytes]]:
    index = load_index(path)
    members = index.members(sample)
    return index.key(sample), {name: _read(path, offset, size) for name, offset, size, _ in members}


def describe(root: Path) -> list[dict[str, Any]]:
    """One dict per folder: task, split, samples, shards, bytes, members, image size, key, hash.

    Raises: FileNotFoundError / ShardError (ValueError) for missing or stale files.
    """
    rows = []
    for folder in data_folders(root):
        manifest = load_manifest(folder)
        key, members = _members(manifest.path(0), 0)
        image = next(raw for name, raw in members.items() if not name.endswith("json"))
        rows.append(
            {
                "folder": str(folder),
                "task": manifest.task,
                "split": manifest.split,
                "samples": manifest.samples,
                "shards": len(manifest.shards),
                "bytes": sum(shard.bytes for shard in manifest.shards),
                "members": manifest.members,
                "first_key": key,
                "first_image": list(image_size(image)),
                "hash": manifest.hash,
                **{name: value for name, value in manifest.extra.items() if name != "schema"},
            }
        )
    return rows


def summary_lines(rows: list[dict[str, Any]]) -> list[str]:
    """A table for people."""
    lines = [
        f"{'task':<12} {'split':<6} {'samples':>9} {'shards':>7} {'MB':>8}  image    first key"
    ]
    for row in rows:
        image = "x".join(map(str, row["first_image"]))
        size = row["bytes"] / 1e6
        lines.append(
            f"{row['task']:<12} {row['split']:<6} {row['samples']:>9} {row['shards']:>7} "
            f"{size:>8.1f}  {image:<8} {row['first_key']}"
        )
    return lines


def _words(record: Any) -> list[str]:
    """What a record says, a line each."""
    if hasattr(record, "questions"):
        return [f"{q.question}? {' / '.join(q.answers)}" for q in record.questions]
    if hasattr(record, "statements"):
        return [f"{s.label}: {s.sentence}" for s in record.statements]
    if hasattr(record, "expressions"):
        return [e.text for e in record.expressions]
    return list(record.captions)


def _tile(task: str, shard: Path, sample: int) -> Image.Image:
    key, members = _members(shard, sample)
    record = parse_record(task, members["json"], shard.name, key)
    slots = [next(name for name in names if name in members) for names in image_members(task)]
    tile = Image.new("RGB", (_TILE, _TILE + _TEXT_ROWS * _ROW + 4), "white")
    draw = ImageDraw.Draw(tile)
    side = _TILE // len(slots)
    for place, name in enumerate(slots):
        picture = Image.fromarray(decode_image(members[name]))
        scale = min(side / picture.width, _TILE / picture.height)
        shown = (max(1, round(picture.width * scale)), max(1, round(picture.height * scale)))
        tile.paste(picture.resize(shown, Image.Resampling.NEAREST), (place * side, 0))
        for where in (*getattr(record, "elements", ()), *getattr(record, "expressions", ())):
            x, y, w, h = (value * scale for value in where.box)
            draw.rectangle((x, y, x + w - 1, y + h - 1), outline=(255, 255, 255))
    lines = [part for line in _words(record) for part in textwrap.wrap(line, 38)]
    for row, line in enumerate(lines[:_TEXT_ROWS]):
        draw.text((2, _TILE + 2 + row * _ROW), line, fill="black", font_size=10)
    return tile


def contact_sheet(root: Path, show: int, file: Path) -> Path:
    """Write a PNG of the first samples of each folder, `show` in all, with texts and boxes."""
    manifests = [load_manifest(folder) for folder in data_folders(root)]
    tiles: list[Image.Image] = []
    sample = 0
    while len(tiles) < show and any(sample < manifest.shards[0].samples for manifest in manifests):
        for manifest in manifests:
            if len(tiles) < show and sample < manifest.shards[0].samples:
                tiles.append(_tile(manifest.task, manifest.path(0), sample))
        sample += 1
    columns = min(_COLUMNS, len(tiles))
    rows = -(-len(tiles) // columns)
    width, height = tiles[0].size
    sheet = Image.new("RGB", (columns * (width + 4), rows * (height + 4)), "grey")
    for place, tile in enumerate(tiles):
        sheet.paste(tile, (place % columns * (width + 4), place // columns * (height + 4)))
    file.parent.mkdir(parents=True, exist_ok=True)
    sheet.save(file, "PNG")
    return file
