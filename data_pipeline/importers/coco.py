"""COCO: captions, instances and Karpathy's splits, as published (cocodataset.org), to shards.

Captions come from captions_{train,val}{2014,2017}.json, or from Karpathy's dataset_coco.json, which
holds them together with the splits of retrieval and captioning. instances_*.json adds a region for
each object: its category's name and its box. Boxes of crowds cover many objects and are left out.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from data_pipeline.importers.annotations import coco_names, one_line
from data_pipeline.importers.common import Counts, PictureFinder, run_import
from data_pipeline.importers.json_stream import read_lists
from data_pipeline.importers.unit import ImportItem
from data_pipeline.shards import dump_json

__all__ = [
    "COCO_TASKS",
    "CocoImage",
    "Instances",
    "build_coco_captions",
    "read_captions",
    "read_instances",
    "read_karpathy",
]

COCO_TASKS = ("pretrain", "captioning", "retrieval")
_KARPATHY_SPLITS = ("train", "restval", "val", "test")


@dataclass
class CocoImage:
    """One image. `names`: of its file, the likeliest first. `size`: (width, height) if known."""

    number: int
    names: tuple[str, ...]
    size: tuple[int, int] | None = None
    captions: list[str] = field(default_factory=list)


@dataclass
class Instances:
    """Region elements by image id, the frame of their boxes, and the number of crowds left out."""

    elems: dict[int, list[dict[str, Any]]] = field(default_factory=dict)
    sizes: dict[int, tuple[int, int]] = field(default_factory=dict)
    crowds: int = 0


def _names(name: str) -> tuple[str, ...]:
    """Pictures of 2014 may lie in folders of theirs, or under their names of 2017."""
    return coco_names(name) if name.startswith("COCO_") else (name,)


def _size(entry: dict[str, Any]) -> tuple[int, int] | None:
    width, height = entry.get("width"), entry.get("height")
    return (width, height) if isinstance(width, int) and isinstance(height, int) else None


def read_captions(file: Path) -> tuple[list[CocoImage], Counter[str]]:
    """(every image with a caption, in the file's order; what was left out) of captions_*.json.

    Raises: FileNotFoundError, or ValueError naming the key that is wrong.
    """
    images: dict[int, CocoImage] = {}
    captions: dict[int, list[str]] = {}
    left_out: Counter[str] = Counter()

    def image(place: int, entry: Any) -> None:
        try:
            number = int(entry["id"])
            found = CocoImage(number, _names(str(entry["file_name"])), _size(entry))
        except (TypeError, KeyError, ValueError):
            raise ValueError(f"{file}: images[{place}] needs 'id' and 'file_name'") from None
        if number in images:
            raise ValueError(f"{file}: images[{place}]: id {number} occurs twice")
        images[number] = found

    def annotation(place: int, entry: Any) -> None:
        try:
            number, text = int(entry["image_id"]), one_line(str(entry["caption"]))
        except (TypeError, KeyError, ValueError):
            raise ValueError(
                f"{file}: annotations[{place}] needs 'image_id' and 'caption'"
            ) from None
        known = captions.setdefault(number, [])
        if text:
            known.append(text)
        else:
            left_out["captions_empty"] += 1

    read_lists(file, {"images": image, "annotations": annotation})
    for number, texts in captions.items():
        if number not in images:
            raise ValueError(f"{file}: an annotation's image_id {number} is not in 'images'")
        images[number].captions = texts
    found = [image for image in images.values() if image.captions]
    left_out["images_without_caption"] = len(images) - len(found)
    if not found:
        raise ValueError(f"{file}: no captions in 'annotations'")
    return found, left_out


def read_karpathy(file: Path, splits: Sequence[str]) -> tuple[list[CocoImage], Counter[str]]:
    """The same from Karpathy's dataset_coco.json, of some of its splits.

    Raises: FileNotFoundError, or ValueError naming the key that is wrong.
    """
    unknown = sorted(set(splits) - set(_KARPATHY_SPLITS))
    if unknown or not splits:
        raise ValueError(
            f"{file} has the splits {', '.join(_KARPATHY_SPLITS)}, not {', '.join(unknown)}; "
            "choose with --karpathy-splits (customary for training: train,restval)"
        )
    images: list[CocoImage] = []
    left_out: Counter[str] = Counter()

    def image(place: int, entry: Any) -> None:
        try:
            split, number = entry["split"], int(entry["cocoid"])
            names = _names(str(entry["filename"]))
            texts = [one_line(str(sentence["raw"])) for sentence in entry["sentences"]]
        except (TypeError, KeyError, ValueError) as error:
            raise ValueError(
                f"{file}: images[{place}] needs 'split', 'cocoid', 'filename' and "
                f"'sentences' with 'raw' ({error!r})"
            ) from None
        if split not in splits:
            return
        captions = [text for text in texts if text]
        left_out["captions_empty"] += len(texts) - len(captions)
        if not captions:
            left_out["images_without_caption"] += 1
            return
        images.append(CocoImage(number, names, None, captions))

    read_lists(file, {"images": image})
    if not images:
        raise ValueError(f"{file}: no image of the splits {', '.join(splits)}")
    return images, left_out


def read_instances(files: Sequence[Path]) -> Instances:
    """Region elements of instances_*.json: category name and box of each object that is no crowd.

    Raises: FileNotFoundError, or ValueError naming the key that is wrong.
    """
    found = Instances()
    for file in files:
        objects: list[tuple[int, Any, Any]] = []
        categories: dict[Any, str] = {}

        def image(place: int, entry: Any, file: Path = file) -> None:
            try:
                found.sizes[entry["id"]] = (int(entry["width"]), int(entry["height"]))
            except (TypeError, KeyError, ValueError):
                raise ValueError(
                    f"{file}: images[{place}] needs 'id', 'width' and 'height'"
                ) from None

        def category(
            place: int, entry: Any, file: Path = file, known: dict[Any, str] = categories
        ) -> None:
            try:
                known[entry["id"]] = one_line(str(entry["name"]))
            except (TypeError, KeyError):
                raise ValueError(f"{file}: categories[{place}] needs 'id' and 'name'") from None

        def annotation(
            place: int, entry: Any, file: Path = file, rows: list[tuple[int, Any, Any]] = objects
        ) -> None:
            try:
                row = (entry["image_id"], entry["category_id"], entry["bbox"])
                crowd = entry.get("iscrowd", 0)
            except (AttributeError, TypeError, KeyError):
                raise ValueError(
                    f"{file}: annotations[{place}] needs 'image_id', 'category_id' and 'bbox'"
                ) from None
            if crowd:
                found.crowds += 1
            else:
                rows.append(row)

        read_lists(file, {"images": image, "annotations": annotation, "categories": category})
        for number, kind, box in objects:
            if kind not in categories:
                raise ValueError(f"{file}: category_id {kind} is not in 'categories'")
            if number not in found.sizes:
                raise ValueError(f"{file}: an annotation's image_id {number} is not in 'images'")
            elem = {"caption": categories[kind], "bb": box}
            found.elems.setdefault(number, []).append(elem)
    return found


def _items(
    images: Sequence[CocoImage], finder: PictureFinder, task: str, split: str, known: Instances
) -> list[ImportItem]:
    items = []
    for image in images:
        record: dict[str, Any] = {"image_id": f"coco-{image.number}", "captions": image.captions}
        if task == "pretrain":
            size = known.sizes.get(image.number, image.size) or (None, None)
            elems = known.elems.get(image.number, [])
            record |= {"elems": elems, "width": size[0], "height": size[1]}
        picture = finder.find(*image.names)
        items.append(ImportItem(f"coco-{split}-{image.number}", (picture,), dump_json(record)))
    return items


def build_coco_captions(
    captions: Path | None,
    images: Sequence[Path],
    out: Path,
    *,
    tasks: Sequence[str] = ("pretrain",),
    split: str = "train",
    instances: Sequence[Path] = (),
    karpathy: Path | None = None,
    karpathy_splits: Sequence[str] = (),
    max_side: int = 0,
    per_shard: int = 1000,
    processes: int | None = None,
    skip_bad: bool = False,
) -> dict[str, Counts]:
    """Writes OUT/TASK/SPLIT for each task and returns their counts.

    Args:
        captions, karpathy: captions_*.json or dataset_coco.json, one of the two.
        images: folders and zips of the pictures.
        instances: instances_*.json, for regions (task pretrain).
        karpathy_splits: which of Karpathy's splits (default: the one called `split`).
        max_side ... skip_bad: as for `run_import`.

    Raises: ValueError / FileNotFoundError naming file and remedy.
    """
    unknown = sorted(set(tasks) - set(COCO_TASKS))
    if unknown or not tasks:
        raise ValueError(f"--tasks {unknown}: COCO captions serve {', '.join(COCO_TASKS)}")
    if instances and "pretrain" not in tasks:
        raise ValueError("--instances adds regions to the task pretrain, which --tasks leaves out")
    finder = PictureFinder(images)
    settings: dict[str, Any] = {}
    if captions is not None and karpathy is None:
        (rows, left_out), inputs = read_captions(captions), [captions]
    elif karpathy is not None and captions is None:
        settings["karpathy_splits"] = tuple(karpathy_splits) or (split,)
        (rows, left_out), inputs = read_karpathy(karpathy, settings["karpathy_splits"]), [karpathy]
    else:
        raise ValueError("give either --captions FILE or --karpathy FILE")
    counts = {}
    known = read_instances(instances)
    for task in tasks:
        pretrain = task == "pretrain"
        crowds = {"regions_of_crowds_left_out": known.crowds} if pretrain else {}
        counts[task] = run_import(
            "coco-captions",
            _items(rows, finder, task, split, known),
            out,
            task=task,
            split=split,
            settings=settings,
            inputs=[*inputs, *instances] if pretrain else inputs,
            max_side=max_side,
            per_shard=per_shard,
            processes=processes,
            skip_bad=skip_bad,
            left_out=left_out | Counter(crowds),
        )
    return counts
