"""RefCOCO, RefCOCO+ and RefCOCOg (github.com/lichengunc/refer), to shards of the task grounding.

    refs(unc).p     RefCOCO, RefCOCO+: splits train, val, testA (people), testB (other objects)
    refs(umd).p     RefCOCOg: train, val, test; refs(google).p: train, val, of overlapping pictures
    instances.json  boxes ("bbox", x, y, width, height) and sizes of the pictures: COCO train2014

refs(...).p is a Python 2 pickle, a list of {"ref_id", "ann_id", "image_id", "split", "sentences":
[{"sent_id", "sent", "raw", ...}]}. A pickle may run any code when it is read; this one is read by a
machine that builds lists, dicts, strings and numbers and refuses everything else. Expressions are
"sent", the lower-case words that all published results use. All expressions about a picture become
one sample.
"""

from __future__ import annotations

import pickle
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

from data_pipeline.importers import annotations as source
from data_pipeline.importers.common import Counts, PictureFinder, run_import
from data_pipeline.importers.json_stream import read_lists
from data_pipeline.importers.unit import ImportItem
from data_pipeline.shards import dump_json

__all__ = ["Referred", "build_refcoco", "read_plain_pickle", "read_referred"]

_DAMAGED = (
    pickle.UnpicklingError,
    EOFError,
    ValueError,  # UnicodeDecodeError as well
    TypeError,
    KeyError,
    IndexError,
    AttributeError,
    OverflowError,
    MemoryError,
    RecursionError,
)


class _PlainUnpickler(pickle.Unpickler):
    """Plain data only: whatever names a class or function, and so could run code, is refused."""

    def find_class(self, module_name: str, global_name: str, /) -> NoReturn:
        """Called for every global name in the pickle."""
        raise pickle.UnpicklingError(f"it asks for {module_name}.{global_name}")

    def persistent_load(self, pid: Any) -> NoReturn:
        """Called for every reference out of the pickle."""
        raise pickle.UnpicklingError("it refers to something outside")


def read_plain_pickle(file: Path) -> Any:
    """The lists, dicts, tuples, strings and numbers in a pickle; nothing in it is run.

    Strings of Python 2 are read as Latin-1, which cannot fail.

    Raises: FileNotFoundError, or ValueError for a pickle that holds anything else, or is damaged.
    """
    if not file.is_file():
        raise FileNotFoundError(f"{file}: no such file")
    with file.open("rb") as stream:
        try:
            return _PlainUnpickler(stream, encoding="latin1").load()
        except _DAMAGED as error:
            raise ValueError(
                f"{file}: refused, not a pickle of plain data ({error}); get refs(unc).p or "
                "refs(umd).p from its publisher (github.com/lichengunc/refer)"
            ) from None


@dataclass
class Referred:
    """One picture and the expressions about its objects. `size`: (width, height) of the boxes."""

    number: int
    name: str
    size: tuple[int, int]
    expressions: list[dict[str, Any]] = field(default_factory=list)


def _read_instances(file: Path) -> tuple[dict[int, Referred], dict[int, tuple[int, Any]]]:
    """(pictures by id, annotation id -> (image id, box)) of instances.json."""
    images: dict[int, Referred] = {}
    boxes: dict[int, tuple[int, Any]] = {}

    def image(place: int, entry: Any) -> None:
        where = f"{file}: images[{place}]"
        number = source.field(entry, "id", int, where)
        size = (source.field(entry, "width", int, where), source.field(entry, "height", int, where))
        images[number] = Referred(number, source.field(entry, "file_name", str, where), size)

    def annotation(place: int, entry: Any) -> None:
        where = f"{file}: annotations[{place}]"
        number = source.field(entry, "image_id", int, where)
        box = source.field(entry, "bbox", list, where)
        boxes[source.field(entry, "id", int, where)] = (number, box)

    read_lists(file, {"images": image, "annotations": annotation})
    return images, boxes


def read_referred(refs: Path, instances: Path, split: str) -> tuple[list[Referred], Counter[str]]:
    """(pictures of a split, in the order of the refs; counts) of refs(...).p and instances.json.

    Raises: FileNotFoundError, or ValueError naming the place and key that are wrong.
    """
    content = read_plain_pickle(refs)
    if not isinstance(content, list):
        raise ValueError(f"{refs}: not a file of refs: it must hold a list")
    images, boxes = _read_instances(instances)
    found: dict[int, Referred] = {}
    counts: Counter[str] = Counter()
    splits: set[str] = set()
    for place, ref in enumerate(content):
        where = f"{refs}: refs[{place}]"
        splits.add(source.field(ref, "split", str, where))
        if ref["split"] != split:
            continue
        number = source.field(ref, "ann_id", int, where)
        image, box = boxes.get(number, (None, None))
        if image not in images or image != source.field(ref, "image_id", int, where):
            raise ValueError(
                f"{where}: ann_id {number} of image_id {ref['image_id']} is not in {instances}; "
                "both files must be of the same data set"
            )
        referred = found.setdefault(image, images[image])
        for said in source.field(ref, "sentences", list, where):
            text = source.one_line(source.field(said, "sent", str, f"{where}.sentences"))
            counts["expressions_empty"] += not text
            if text:
                ids = {"ref_id": ref.get("ref_id"), "sent_id": said.get("sent_id")}
                referred.expressions.append({"text": text, "bb": box} | ids)
    pictures = [referred for referred in found.values() if referred.expressions]
    if not pictures:
        known = ", ".join(sorted(splits)) or "none"
        raise ValueError(f"{refs}: no expressions of the split '{split}'; its splits are: {known}")
    return pictures, counts


def _item(referred: Referred, finder: PictureFinder) -> ImportItem:
    width, height = referred.size
    record = {"image_id": f"coco-{referred.number}", "width": width, "height": height}
    record["expressions"] = referred.expressions
    picture = finder.find(*source.coco_names(referred.name))
    return ImportItem(f"coco-{referred.number}", (picture,), dump_json(record))


def build_refcoco(
    refs: Path,
    instances: Path,
    images: Sequence[Path],
    out: Path,
    *,
    split: str = "train",
    max_side: int = 0,
    per_shard: int = 1000,
    processes: int | None = None,
    skip_bad: bool = False,
) -> Counts:
    """Writes OUT/grounding/SPLIT.

    Args:
        refs: refs(unc).p, refs(umd).p or refs(google).p.   instances: instances.json beside it.
        images: folders or zips of COCO train2014.   split: one that the refs have, such as testA.
        max_side ... skip_bad: as for `run_import`.

    Raises: ValueError / FileNotFoundError naming file, place and remedy.
    """
    finder = PictureFinder(images)
    rows, counts = read_referred(refs, instances, split)
    return run_import(
        "refcoco",
        [_item(row, finder) for row in rows],
        out,
        task="grounding",
        split=split,
        settings={},
        inputs=[refs, instances],
        max_side=max_side,
        per_shard=per_shard,
        processes=processes,
        skip_bad=skip_bad,
        left_out=counts,
    )
