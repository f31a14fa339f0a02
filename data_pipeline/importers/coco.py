"""COCO captions: the official annotation JSON and a folder of images, to shards.

Format: {"images": [{"id", "file_name", ...}], "annotations": [{"image_id", "caption", ...}]}, as in
captions_train2017.json (cocodataset.org). Image bytes are kept as they are unless `max_side` asks
for smaller ones: reading is then about twice as fast, because decoding is most of its cost.
"""

from __future__ import annotations

import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from PIL import Image

from data_pipeline.decode import decode_image
from data_pipeline.faults import SkipSample
from data_pipeline.shards import ShardSet, clear_shards, dump_json, progress

__all__ = ["COCO_TASKS", "build_coco_captions", "read_annotations"]

COCO_TASKS = ("pretrain", "captioning", "retrieval")


def read_annotations(file: Path) -> list[tuple[str, str, list[str]]]:
    """(image id, file name, captions) of every image with a caption, in the file's order.

    Raises: FileNotFoundError, or ValueError naming the key that is wrong.
    """
    if not file.is_file():
        raise FileNotFoundError(f"{file}: no such captions file")
    try:
        content = json.loads(file.read_bytes())
    except ValueError as error:
        raise ValueError(f"{file}: not valid JSON: {error}") from None
    if not isinstance(content, dict):
        raise ValueError(f"{file}: not a COCO captions file: expected an object with 'images'")
    for name in ("images", "annotations"):
        if not isinstance(content.get(name), list):
            raise ValueError(f"{file}: key '{name}' must be a list (COCO captions format)")
    captions: dict[Any, list[str]] = {}
    names: dict[Any, str] = {}
    for place, entry in enumerate(content["images"]):
        try:
            names[entry["id"]] = str(entry["file_name"])
        except (TypeError, KeyError):
            raise ValueError(f"{file}: images[{place}] needs 'id' and 'file_name'") from None
    for place, entry in enumerate(content["annotations"]):
        try:
            image, caption = entry["image_id"], entry["caption"]
        except (TypeError, KeyError):
            raise ValueError(
                f"{file}: annotations[{place}] needs 'image_id' and 'caption'"
            ) from None
        if image not in names:
            raise ValueError(f"{file}: annotations[{place}]: image_id {image} is not in 'images'")
        text = " ".join(str(caption).split())
        if text:
            captions.setdefault(image, []).append(text)
    if not captions:
        raise ValueError(f"{file}: no captions in 'annotations'")
    return [(str(i), name, captions[i]) for i, name in names.items() if i in captions]


def _image(path: Path, max_side: int) -> tuple[str, bytes, int, int]:
    """(extension, bytes, width, height), decoded once to be sure that it can be."""
    raw = path.read_bytes()
    picture = decode_image(raw)
    height, width = picture.shape[:2]
    kind = "png" if raw[:4] == b"\x89PNG" else "jpg"
    if not max_side or max(width, height) <= max_side:
        return kind, raw, width, height
    scale = max_side / max(width, height)
    size = (max(1, round(width * scale)), max(1, round(height * scale)))
    buffer = io.BytesIO()
    Image.fromarray(picture).resize(size, Image.Resampling.BICUBIC).save(buffer, "JPEG", quality=92)
    return "jpg", buffer.getvalue(), *size


def _record(task: str, image: str, captions: list[str], width: int, height: int) -> dict[str, Any]:
    record: dict[str, Any] = {"image_id": image, "captions": captions}
    if task == "pretrain":
        record |= {"elems": [], "width": width, "height": height}
    return record


def _checked(
    rows: list[tuple[str, str, list[str]]], images: Path, max_side: int, skip_bad: bool
) -> Iterator[tuple[str, list[str], tuple[str, bytes, int, int] | None]]:
    """Rows with their image; None for a bad one that is skipped."""
    for image, name, captions in rows:
        path = images / name
        if not path.resolve().is_relative_to(images.resolve()):
            raise ValueError(f"file_name {name!r} leads out of {images}: refused")
        try:
            yield image, captions, _image(path, max_side)
        except (FileNotFoundError, SkipSample) as error:
            why = error.reason if isinstance(error, SkipSample) else "no such image"
            if not skip_bad:
                raise ValueError(
                    f"{path}: {why} (image_id {image}). Add or repair it, or use --skip-bad to "
                    "leave such images out"
                ) from None
            yield image, captions, None


def build_coco_captions(
    captions: Path,
    images: Path,
    out: Path,
    *,
    tasks: tuple[str, ...] = ("pretrain",),
    split: str = "train",
    max_side: int = 0,
    per_shard: int = 1000,
    skip_bad: bool = False,
) -> dict[str, int]:
    """Write OUT/TASK/SPLIT shards, indexes and manifests; return {"images", "captions", "skipped"}.

    Args:
        captions: captions_*.json.   images: the folder that `file_name` is relative to.
        max_side: longest side in pixels of larger images, which are scaled down (0: keep all).
        skip_bad: leave out images that are missing or cannot be decoded, and count them.

    Raises: ValueError / FileNotFoundError naming file and remedy.
    """
    unknown = sorted(set(tasks) - set(COCO_TASKS))
    if unknown or not tasks:
        raise ValueError(f"--tasks {unknown}: COCO captions serve {', '.join(COCO_TASKS)}")
    if not split or any(mark in split for mark in "./\\"):
        raise ValueError(f"--split {split!r}: use a plain name such as train, val or test")
    if not images.is_dir():
        raise FileNotFoundError(f"{images}: no such image folder")
    rows = read_annotations(captions)
    folders = {task: out / task / split for task in tasks}
    for folder in folders.values():
        if (folder / "manifest.json").exists():
            raise ValueError(f"{folder} already holds shards; give another --out or remove it")
        clear_shards(folder)
    counts = {"images": 0, "captions": 0, "skipped": 0}
    sets = {task: ShardSet(folder, per_shard) for task, folder in folders.items()}
    try:
        checked = _checked(rows, images, max_side, skip_bad)
        for image, said, found in progress(checked, len(rows), "coco-captions", "images"):
            if found is None:
                counts["skipped"] += 1
                continue
            kind, raw, width, height = found
            counts["images"] += 1
            counts["captions"] += len(said)
            for task, shards in sets.items():
                content = dump_json(_record(task, image, said, width, height))
                shards.write(f"coco-{split}-{image}", {kind: raw, "json": content})
    except BaseException as error:
        for shards in sets.values():
            shards.__exit__(type(error), error, None)
        raise
    if not counts["images"]:
        raise ValueError(f"{images}: none of the {len(rows)} images can be used")
    for task, shards in sets.items():
        shards.__exit__(None, None, None)
        extra = {"source": "coco-captions", "max_side": max_side, "skipped": counts["skipped"]}
        shards.manifest(task, split, extra)
    return counts
