"""VQA v2 (visualqa.org): question and annotation files, and COCO's 2014/2015 pictures, to shards.

    questions    {"data_subtype": "train2014", "questions": [{"image_id", "question_id",
                 "question"}]}: v2_OpenEnded_mscoco_train2014_questions.json
    annotations  {"annotations": [{"question_id", "answers": [{"answer"} x 10], "answer_type",
                 "question_type", "multiple_choice_answer"}]}: v2_mscoco_train2014_annotations.json

All questions about a picture become one sample. The weight of an answer is its share of the
annotators, as X-VLM and EfficientVLM train. Answers are put in lower case and on one line, no more:
the published training targets are the annotators' words. The rules of the official evaluation
("two" is "2", no articles, no full stops) belong to scoring, and would merge targets that the
published weights keep apart.

answers.json, beside the splits, lists the candidates that evaluation ranks: those of --answers
(X-VLM's answer_list.json, 3,128 strings), or the answers that were the most frequent one of at least
`min_count` training questions (9 gives about the same list).
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from data_pipeline.files import write_atomically
from data_pipeline.importers import annotations as source
from data_pipeline.importers.common import Counts, PictureFinder, run_import
from data_pipeline.importers.json_stream import read_lists
from data_pipeline.importers.unit import ImportItem
from data_pipeline.parallel import shares
from data_pipeline.shards import dump_json

__all__ = ["MIN_COUNT", "Answered", "Asked", "build_vqa", "read_answers", "read_questions"]

MIN_COUNT = 9
ANSWERS_NAME = "answers.json"


@dataclass(frozen=True, slots=True)
class Asked:
    """One question. `picture`: the file name of its picture."""

    image: int
    number: int
    text: str
    picture: str


@dataclass(frozen=True, slots=True)
class Answered:
    """What annotators said. `weights`: answer -> share; `chosen`: the most frequent answer."""

    weights: dict[str, float]
    kind: str
    form: str
    chosen: str


@dataclass
class _Split:
    """The questions of a split by picture, and what was counted on the way."""

    by_image: dict[int, list[Asked]] = field(default_factory=dict)
    answered: dict[int, Answered] = field(default_factory=dict)
    counts: Counter[str] = field(default_factory=Counter)


def _clean(answer: str) -> str:
    return source.one_line(answer.lower())


def read_questions(file: Path) -> Iterator[Asked]:
    """The questions of a v2_OpenEnded_mscoco_*_questions.json, in order.

    Raises: FileNotFoundError, or ValueError naming the key that is wrong.
    """
    content = source.read_json(file, "VQA questions file")
    subset = source.field(content, "data_subtype", str, f"{file}:").replace("-dev", "")
    if not subset.isalnum():
        raise ValueError(f"{file}: data_subtype {subset!r} is no name such as 'train2014'")
    for place, entry in enumerate(source.field(content, "questions", list, f"{file}:")):
        where = f"{file}: questions[{place}]"
        image = source.field(entry, "image_id", int, where)
        number = source.field(entry, "question_id", int, where)
        text = source.one_line(source.field(entry, "question", str, where))
        yield Asked(image, number, text, f"COCO_{subset}_{image:012d}.jpg")


def read_answers(file: Path, found: dict[int, Answered], counts: Counter[str]) -> None:
    """Adds question id -> answers of a v2_mscoco_*_annotations.json to `found`.

    An empty answer is left out and counted; the others keep their share of all annotators.

    Raises: FileNotFoundError, or ValueError naming the key that is wrong.
    """

    def annotation(place: int, entry: Any) -> None:
        where = f"{file}: annotations[{place}]"
        number = source.field(entry, "question_id", int, where)
        if number in found:
            raise ValueError(f"{where}: question_id {number} is annotated twice")
        given = source.field(entry, "answers", list, where)
        said = Counter(
            _clean(source.field(one, "answer", str, f"{where}.answers")) for one in given
        )
        if not given:
            raise ValueError(f"{where}: 'answers' is empty")
        counts["empty_answers"] += said.pop("", 0)
        found[number] = Answered(
            {answer: count / len(given) for answer, count in said.items()},
            source.field(entry, "answer_type", str, where),
            source.field(entry, "question_type", str, where),
            _clean(source.field(entry, "multiple_choice_answer", str, where)),
        )

    read_lists(file, {"annotations": annotation})


def _read(questions: Sequence[Path], annotations: Sequence[Path]) -> _Split:
    split = _Split()
    for file in annotations:
        read_answers(file, split.answered, split.counts)
    seen: set[int] = set()
    for file in questions:
        for asked in read_questions(file):
            if asked.number in seen:
                raise ValueError(f"{file}: question_id {asked.number} occurs twice")
            seen.add(asked.number)
            if annotations and asked.number not in split.answered:
                raise ValueError(
                    f"{file}: question_id {asked.number} has no annotation; give the --annotations "
                    "of every --questions file, or of none (hidden answers)"
                )
            split.by_image.setdefault(asked.image, []).append(asked)
    if not seen:
        raise ValueError(f"{questions[0]}: no questions in it")
    split.counts["annotations_without_question"] = len(split.answered.keys() - seen)
    return split


def _question(asked: Asked, answered: Answered | None) -> dict[str, Any]:
    content: dict[str, Any] = {"question_id": str(asked.number), "question": asked.text}
    if answered is None:
        return content | {"answers": {}}
    kinds = {"type": answered.kind, "question_type": answered.form}
    return content | {"answers": answered.weights} | kinds


def _item(split: _Split, image: int, finder: PictureFinder) -> ImportItem:
    asked = split.by_image[image]
    names = {question.picture for question in asked}
    if len(names) > 1:
        raise ValueError(f"image_id {image} is asked about in two sets of pictures: {names}")
    rows = [_question(question, split.answered.get(question.number)) for question in asked]
    record = dump_json({"image_id": f"coco-{image}", "questions": rows})
    return ImportItem(f"vqa-{image}", (finder.find(*source.coco_names(names.pop())),), record)


def _candidates(split: _Split, file: Path | None, min_count: int) -> list[str]:
    """The answer list: that of a file, or the frequent answers, the most frequent first."""
    if file is None:
        asked = (question.number for rows in split.by_image.values() for question in rows)
        tally = Counter(split.answered[number].chosen for number in asked)
        tally.pop("", None)
        ordered = sorted(tally.items(), key=lambda pair: (-pair[1], pair[0]))
        found = [answer for answer, count in ordered if count >= min_count]
        if not found:
            raise ValueError(
                f"no answer is the most frequent one of {min_count} questions; lower --min-count"
            )
        return found
    if not file.is_file():
        raise FileNotFoundError(f"{file}: no such answer list (--answers)")
    try:
        listed = json.loads(file.read_bytes())
    except ValueError as error:
        raise ValueError(f"{file}: not valid JSON: {error}") from None
    if not isinstance(listed, list) or not all(isinstance(a, str) and a.strip() for a in listed):
        raise ValueError(f"{file}: an answer list is a JSON list of strings, none of them empty")
    if len(set(listed)) != len(listed):
        twice = next(answer for answer, count in Counter(listed).items() if count > 1)
        raise ValueError(f"{file}: answer {twice!r} is listed twice")
    if not listed:
        raise ValueError(f"{file}: the answer list is empty")
    return listed


def _check_answers(path: Path, listed: list[str]) -> None:
    """Raises: ValueError where answers.json is another list: the splits of a folder share it."""
    try:
        known = json.loads(path.read_bytes()) if path.is_file() else listed
    except ValueError:
        known = None
    if known != listed:
        raise ValueError(
            f"{path} holds another answer list than this import would write, and models are ranked "
            "over it; remove it to have a new one, or give another --out"
        )


def _unlisted(split: _Split, listed: list[str]) -> int:
    """Questions that have no right answer in the list: what even a perfect ranking gets wrong."""
    known = set(listed)
    numbers = (question.number for rows in split.by_image.values() for question in rows)
    return sum(
        split.answered[number].weights.keys().isdisjoint(known)
        for number in numbers
        if number in split.answered
    )


def build_vqa(
    questions: Sequence[Path],
    annotations: Sequence[Path],
    images: Sequence[Path],
    out: Path,
    *,
    split: str = "train",
    answers: Path | None = None,
    min_count: int | None = None,
    max_side: int = 0,
    per_shard: int = 1000,
    processes: int | None = None,
    skip_bad: bool = False,
) -> Counts:
    """Write OUT/vqa/SPLIT, and OUT/vqa/answers.json where this import decides about it.

    It does for the split "train" and wherever `answers` or `min_count` is given.

    Args:
        questions: one or more questions files, which become one split.
        annotations: those of all of them; none for hidden answers (test-dev, test-std).
        images: folders or zips of COCO_train2014_*.jpg and the like.
        answers: candidate list to copy.   min_count: see the module; default MIN_COUNT.

    Raises: ValueError / FileNotFoundError naming file, key and remedy.
    """
    if answers is not None and min_count is not None:
        raise ValueError("--answers gives the list and --min-count makes one: use one of them")
    if min_count is not None and not annotations:
        raise ValueError("--min-count counts answers: give --annotations")
    if min_count is not None and min_count < 1:
        raise ValueError(f"--min-count must be at least 1, is {min_count}")
    finder = PictureFinder(images)
    content = _read(questions, annotations)
    place, listed = out / "vqa" / ANSWERS_NAME, None
    if answers is not None or min_count is not None or (split == "train" and annotations):
        listed = _candidates(content, answers, min_count or MIN_COUNT)
        content.counts["questions_without_listed_answer"] = _unlisted(content, listed)
        _check_answers(place, listed)
    counts = run_import(
        "vqa",
        [_item(content, image, finder) for image in content.by_image],
        out,
        task="vqa",
        split=split,
        settings={},
        inputs=[*questions, *annotations],
        max_side=max_side,
        per_shard=per_shard,
        processes=processes,
        skip_bad=skip_bad,
        left_out=content.counts,
    )
    if listed is not None and shares()[0] == 0:
        write_atomically(place, [dump_json(listed), b"\n"])
    return counts
