"""Flickr30k with Karpathy's splits (dataset_flickr30k.json) and the pictures, to shards.

{"images": [{"filename": "1000092795.jpg", "split": "train", "sentences": [{"raw"} x 5], ...}]},
29,000 train, 1,014 val and 1,000 test pictures. The sentences are taken as they were written.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data_pipeline.importers import annotations as source
from data_pipeline.importers.common import Counts, PictureFinder, run_import
from data_pipeline.importers.json_stream import read_lists
from data_pipeline.importers.unit import ImportItem
from data_pipeline.shards import dump_json

__all__ = ["FLICKR30K_TASKS", "FlickrImage", "build_flickr30k", "read_flickr30k"]

FLICKR30K_TASKS = ("retrieval", "captioning", "pretrain")


@dataclass(frozen=True)
class FlickrImage:
    """One picture. `name`: of its file; the stem is Flickr's number of it."""

    name: str
    captions: tuple[str, ...]

    @property
    def number(self) -> str:
        """Flickr's number."""
        return Path(self.name).stem


def read_flickr30k(file: Path, split: str) -> tuple[list[FlickrImage], Counter[str]]:
    """(pictures of a split in the file's order, what was left out) of dataset_flickr30k.json.

    Raises: FileNotFoundError, or ValueError naming the key that is wrong.
    """
    found: list[FlickrImage] = []
    left_out: Counter[str] = Counter()
    splits: Counter[str] = Counter()

    def image(place: int, entry: Any) -> None:
        where = f"{file}: images[{place}]"
        name = source.field(entry, "filename", str, where)
        splits[source.field(entry, "split", str, where)] += 1
        if entry["split"] != split:
            return
        said = source.field(entry, "sentences", list, where)
        texts = [
            source.one_line(source.field(one, "raw", str, f"{where}.sentences")) for one in said
        ]
        captions = tuple(text for text in texts if text)
        left_out["captions_empty"] += len(texts) - len(captions)
        if captions:
            found.append(FlickrImage(name, captions))
        else:
            left_out["images_without_caption"] += 1

    read_lists(file, {"images": image})
    if not found:
        known = ", ".join(sorted(splits)) or "none"
        raise ValueError(f"{file}: no captions of the split '{split}'; its splits are: {known}")
    return found, left_out


def _item(image: FlickrImage, finder: PictureFinder, task: str) -> ImportItem:
    number = image.number
    record: dict[str, Any] = {"image_id": f"flickr30k-{number}", "captions": image.captions}
    if task == "pretrain":
        record |= {"elems": [], "width": None, "height": None}
    names = (image.name, f"flickr30k-images/{image.name}", f"flickr30k_images/{image.name}")
    return ImportItem(f"flickr30k-{number}", (finder.find(*names),), dump_json(record))


def build_flickr30k(
    karpathy: Path,
    images: Sequence[Path],
    out: Path,
    *,
    tasks: Sequence[str] = ("retrieval",),
    split: str = "train",
    max_side: int = 0,
    per_shard: int = 1000,
    processes: int | None = None,
    skip_bad: bool = False,
) -> dict[str, Counts]:
    """Writes OUT/TASK/SPLIT for each task and returns their counts.

    Args:
        karpathy: dataset_flickr30k.json.   images: folders or zips of the pictures.
        tasks: of FLICKR30K_TASKS.   split: train, val or test.
        max_side ... skip_bad: as for `run_import`.

    Raises: ValueError / FileNotFoundError naming file, key and remedy.
    """
    unknown = sorted(set(tasks) - set(FLICKR30K_TASKS))
    if unknown or not tasks:
        raise ValueError(f"--tasks {unknown}: Flickr30k serves {', '.join(FLICKR30K_TASKS)}")
    finder = PictureFinder(images)
    rows, left_out = read_flickr30k(karpathy, split)
    return {
        task: run_import(
            "flickr30k",
            [_item(row, finder, task) for row in rows],
            out,
            task=task,
            split=split,
            settings={},
            inputs=[karpathy],
            max_side=max_side,
            per_shard=per_shard,
            processes=processes,
            skip_bad=skip_bad,
            left_out=left_out,
        )
        for task in tasks
    }
