"""Visual Genome, as published (homes.cs.washington.edu/~ranjay/visualgenome), to shards.

image_data.json lists the images. region_descriptions.json gives a region for each phrase,
objects.json one for each object (its names as wordings), attributes.json what the objects are like,
question_answers.json questions. The files are read element by element; what is kept is the JSON of
the records to be, about 0.7 GB for all of Visual Genome.

After X-VLM (arXiv 2111.08276) an image has regions and no caption of its own. With `captions`
"regions" it has the phrases as captions and no regions: the general stream of its 4M setting.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data_pipeline.importers.annotations import one_line
from data_pipeline.importers.common import Counts, PictureFinder, run_import
from data_pipeline.importers.json_stream import read_list
from data_pipeline.importers.unit import ImportItem
from data_pipeline.shards import dump_json

__all__ = ["CAPTIONS", "GenomeFiles", "GenomeImage", "build_visual_genome", "read_images"]

CAPTIONS = ("none", "regions")
# A question of Visual Genome has one annotator, of VQA ten: X-VLM gives its answer half the weight.
_ANSWER_WEIGHT = 0.5


@dataclass(frozen=True)
class GenomeFiles:
    """The published files that are used. `attributes` go with `objects`."""

    images: Path
    regions: Path | None = None
    objects: Path | None = None
    attributes: Path | None = None
    questions: Path | None = None

    def given(self) -> list[Path]:
        """All of them, in a fixed order."""
        files = (self.images, self.regions, self.objects, self.attributes, self.questions)
        return [file for file in files if file is not None]


@dataclass(frozen=True, slots=True)
class GenomeImage:
    """One line of image_data.json. `folder`: VG_100K or VG_100K_2."""

    number: int
    folder: str
    size: tuple[int, int]
    coco: int | None


def _number(entry: Any, file: Path, place: int) -> int:
    """The image id of an element: "image_id", in older files "id"."""
    number = entry.get("image_id", entry.get("id")) if isinstance(entry, dict) else None
    if not isinstance(number, int):
        raise ValueError(f"{file}: element {place} needs 'image_id' or 'id'")
    return number


def read_images(file: Path) -> list[GenomeImage]:
    """The images of image_data.json, in its order.

    Raises: FileNotFoundError, or ValueError naming element and key.
    """
    images: list[GenomeImage] = []
    seen: set[int] = set()
    for place, entry in enumerate(read_list(file)):
        number = _number(entry, file, place)
        if number in seen:
            raise ValueError(f"{file}: element {place}: image {number} is listed twice")
        seen.add(number)
        try:
            size = (int(entry["width"]), int(entry["height"]))
            folder = str(entry.get("url") or "").rsplit("/", 2)[-2:-1]
            coco = entry.get("coco_id")
            images.append(
                GenomeImage(
                    number, folder[0] if folder else "", size, None if coco is None else int(coco)
                )
            )
        except (TypeError, KeyError, ValueError) as error:
            raise ValueError(
                f"{file}: element {place} needs 'width', 'height', and 'coco_id' as a number or "
                f"null ({error!r})"
            ) from None
    if not images:
        raise ValueError(f"{file}: no images")
    return images


# -- per image, packed as JSON --------------------------------------------------------------------


def _per_image(
    file: Path, name: str, known: set[int], left_out: Counter[str]
) -> Iterator[tuple[int, list[dict[str, Any]]]]:
    """(image id, the objects in its list `name`) of each element of a file."""
    seen: set[int] = set()
    for place, entry in enumerate(read_list(file)):
        number = _number(entry, file, place)
        rows = entry.get(name)
        if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
            raise ValueError(f"{file}: element {place} needs the list of objects '{name}'")
        if number in seen:
            raise ValueError(f"{file}: element {place}: image {number} is listed twice")
        seen.add(number)
        if number in known:
            yield number, rows
        else:
            left_out[f"{name}_without_image"] += len(rows)


def _rows(
    file: Path, number: int, rows: Sequence[dict[str, Any]], read: Callable[[dict[str, Any]], Any]
) -> Iterator[Any]:
    """Each row as `read` gives it, which may miss a key."""
    for place, row in enumerate(rows):
        try:
            yield read(row)
        except (KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{file}: image {number}, entry {place}: {error!r} is wrong") from None


def _pack(entries: list[Any]) -> bytes:
    """The entries as JSON without the brackets, so that lists can be laid end to end."""
    return dump_json(entries)[1:-1]


def _read_attributes(file: Path, known: set[int], left_out: Counter[str]) -> dict[int, bytes]:
    """JSON of {object id: attributes} by image."""

    def read(row: dict[str, Any]) -> tuple[str, list[str]]:
        found = [one_line(name) for name in row.get("attributes") or ()]
        return str(row["object_id"]), [name for name in dict.fromkeys(found) if name]

    packed = {}
    for number, rows in _per_image(file, "attributes", known, left_out):
        found = {name: kinds for name, kinds in _rows(file, number, rows, read) if kinds}
        if found:
            packed[number] = dump_json(found)
    return packed


def _read_objects(
    file: Path, attributes: dict[int, bytes], known: set[int], left_out: Counter[str]
) -> dict[int, bytes]:
    """Region elements of objects by image. `attributes` are used up."""

    def read(row: dict[str, Any]) -> tuple[str, list[str], list[Any]]:
        wordings = [name for name in map(one_line, row["names"]) if name]
        return str(row["object_id"]), wordings, [row["x"], row["y"], row["w"], row["h"]]

    packed = {}
    for number, rows in _per_image(file, "objects", known, left_out):
        kinds = json.loads(attributes.pop(number, b"{}"))
        elems = []
        for name, wordings, box in _rows(file, number, rows, read):
            if not wordings:
                left_out["objects_without_name"] += 1
                continue
            elem = {"caption": wordings[0] if len(wordings) == 1 else wordings, "bb": box}
            elems.append(elem | ({"attributes": kinds[name]} if name in kinds else {}))
        packed[number] = _pack(elems)
    return packed


def _read_regions(
    file: Path, known: set[int], left_out: Counter[str], captions: bool
) -> dict[int, bytes]:
    """Region elements of phrases by image, or the different phrases alone."""

    def read(row: dict[str, Any]) -> tuple[str, list[Any]]:
        return one_line(row["phrase"]), [row["x"], row["y"], row["width"], row["height"]]

    packed = {}
    for number, rows in _per_image(file, "regions", known, left_out):
        found = list(_rows(file, number, rows, read))
        said = [(phrase, box) for phrase, box in found if phrase]
        left_out["phrases_empty"] += len(found) - len(said)
        if captions:
            phrases = list(dict.fromkeys(phrase for phrase, _ in said))
            left_out["phrases_repeated"] += len(said) - len(phrases)
            packed[number] = _pack(phrases)
        else:
            packed[number] = _pack([{"caption": phrase, "bb": box} for phrase, box in said])
    return packed


def _read_questions(file: Path, known: set[int], left_out: Counter[str]) -> dict[int, bytes]:
    """Questions by image. Answers are lower-case, without a full stop at the end, as VQA's."""

    def read(row: dict[str, Any]) -> tuple[int, str, str]:
        answer = one_line(row["answer"]).removesuffix(".").strip().lower()
        return int(row["qa_id"]), one_line(row["question"]), answer

    packed = {}
    for number, rows in _per_image(file, "qas", known, left_out):
        questions = []
        for name, question, answer in _rows(file, number, rows, read):
            if not question or not answer:
                left_out["questions_empty"] += 1
                continue
            entry = {"question_id": f"vg-{name}", "question": question}
            questions.append(entry | {"answers": {answer: _ANSWER_WEIGHT}, "type": "vg"})
        packed[number] = _pack(questions)
    return packed


# -- the records ----------------------------------------------------------------------------------


def _items(
    images: Sequence[GenomeImage],
    finder: PictureFinder,
    field: str,
    parts: Sequence[dict[int, bytes]],
) -> list[ImportItem]:
    """One item an image; its list `field` is the parts end to end. The parts are used up."""
    items = []
    for image in images:
        found = b",".join(text for part in parts if (text := part.pop(image.number, b"")))
        record: dict[str, Any] = {"image_id": f"vg-{image.number}"}
        if image.coco is not None:
            record["coco_id"] = image.coco
        if field != "questions":
            record |= {"width": image.size[0], "height": image.size[1]}
        raw = b'%s,"%s":[%s]}' % (dump_json(record)[:-1], field.encode(), found)
        name = f"{image.number}.jpg"
        picture = finder.find(f"{image.folder}/{name}" if image.folder else name, name)
        drop = "" if found else f"the annotations have no {field} for it"
        items.append(ImportItem(f"vg-{image.number}", (picture,), raw, drop))
    return items


def _check(files: GenomeFiles, captions: str) -> None:
    """Raises ValueError for files and options that do not belong together."""
    if captions not in CAPTIONS:
        raise ValueError(f"--captions {captions!r}: expected one of {', '.join(CAPTIONS)}")
    if files.attributes and not files.objects:
        raise ValueError("--attributes describes the objects of --objects, which is missing")
    if captions == "regions" and (files.regions is None or files.objects is not None):
        raise ValueError("--captions regions takes --regions, and no --objects: it keeps no boxes")
    if not (files.regions or files.objects or files.questions):
        raise ValueError("give at least one of --regions, --objects and --questions")


def _read_parts(
    files: GenomeFiles, known: set[int], left_out: Counter[str], phrases: bool
) -> list[dict[int, bytes]]:
    """Regions and objects by picture, of the files that were given."""
    parts: list[dict[int, bytes]] = []
    if files.regions:
        parts.append(_read_regions(files.regions, known, left_out, phrases))
    if files.objects:
        read = files.attributes
        attributes = _read_attributes(read, known, left_out) if read else {}
        parts.append(_read_objects(files.objects, attributes, known, left_out))
    return parts


def build_visual_genome(
    files: GenomeFiles,
    images: Sequence[Path],
    out: Path,
    *,
    captions: str = "none",
    split: str = "train",
    max_side: int = 0,
    per_shard: int = 1000,
    processes: int | None = None,
    skip_bad: bool = False,
) -> dict[str, Counts]:
    """Writes OUT/pretrain/SPLIT (of regions and objects), OUT/vqa/SPLIT (of questions), and returns
    their counts.

    Args:
        images: the folders VG_100K and VG_100K_2 (or what holds them), or images.zip, images2.zip.
        captions: "none": records have regions only; "regions": phrases as captions only.
        max_side ... skip_bad: as for `run_import`.

    Raises: ValueError / FileNotFoundError naming file and remedy.
    """
    _check(files, captions)
    finder = PictureFinder(images)
    listed = read_images(files.images)
    known = {image.number for image in listed}
    counts: dict[str, Counts] = {}

    def run(
        task: str, field: str, parts: Sequence[dict[int, bytes]], left_out: Counter[str],
        inputs: Sequence[Path | None],
    ) -> None:  # fmt: skip
        counts[task] = run_import(
            "visual-genome",
            _items(listed, finder, field, parts),
            out,
            task=task,
            split=split,
            settings={"field": field},
            inputs=[file for file in inputs if file is not None],
            max_side=max_side,
            per_shard=per_shard,
            processes=processes,
            skip_bad=skip_bad,
            left_out=left_out,
        )

    left_out: Counter[str] = Counter()
    phrases = captions == "regions"
    if parts := _read_parts(files, known, left_out, phrases):
        inputs = (files.images, files.regions, files.objects, files.attributes)
        run("pretrain", "captions" if phrases else "elems", parts, left_out, inputs)
    if files.questions:
        left_out = Counter()
        found = _read_questions(files.questions, known, left_out)
        run("vqa", "questions", [found], left_out, (files.images, files.questions))
    return counts
