"""What one sample is, per task: typed records parsed from the JSON member of a shard sample.

Validation is by hand, because it runs once per sample: a few isinstance checks cost microseconds.
Every error names shard, key and field, so that a bad sample can be found and repaired.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from data_pipeline.faults import SkipSample
from data_pipeline.shards import dump_json

__all__ = [
    "IMAGE_EXTENSIONS",
    "TASKS",
    "Box",
    "CaptionRecord",
    "Expression",
    "GroundingRecord",
    "Nlvr2Record",
    "PretrainRecord",
    "Question",
    "Record",
    "RecordError",
    "RegionElement",
    "Statement",
    "VqaRecord",
    "image_members",
    "parse_record",
    "record_member",
]

IMAGE_EXTENSIONS = ("jpg", "jpeg", "png")
Box = tuple[float, float, float, float]
_MAX_SIDE = 2**31 - 1  # of a PNG


class RecordError(ValueError):
    """A sample that breaks its task's schema. `reason`: the message without shard and key."""

    reason: str = ""

    @classmethod
    def about(cls, shard: str, key: str, reason: str) -> RecordError:
        """The error of one sample."""
        error = cls(f"{shard}: sample '{key}': {reason}")
        error.reason = reason
        return error


@dataclass(frozen=True, slots=True)
class RegionElement:
    """One described region. `captions`: wordings, one is drawn. `box`: x, y, w, h in pixels."""

    captions: tuple[str, ...]
    box: Box
    attributes: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class PretrainRecord:
    """An image with captions and described regions; boxes are in the frame `width` x `height`."""

    image_id: str
    captions: tuple[str, ...]
    elements: tuple[RegionElement, ...] = ()
    width: int = 0
    height: int = 0


@dataclass(frozen=True, slots=True)
class Question:
    """One question; `answers` maps answer -> share of annotators (empty where hidden)."""

    question_id: str
    question: str
    answers: dict[str, float]
    kind: str = ""


@dataclass(frozen=True, slots=True)
class VqaRecord:
    image_id: str
    questions: tuple[Question, ...]


@dataclass(frozen=True, slots=True)
class Statement:
    sentence: str
    label: bool


@dataclass(frozen=True, slots=True)
class Nlvr2Record:
    image_ids: tuple[str, str]
    statements: tuple[Statement, ...]


@dataclass(frozen=True, slots=True)
class CaptionRecord:
    """Retrieval and captioning: an image and its captions."""

    image_id: str
    captions: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Expression:
    text: str
    box: Box


@dataclass(frozen=True, slots=True)
class GroundingRecord:
    image_id: str
    width: int
    height: int
    expressions: tuple[Expression, ...]


Record = PretrainRecord | VqaRecord | Nlvr2Record | CaptionRecord | GroundingRecord


class _Field(Exception):
    """A field that is wrong: where and why. It becomes a RecordError that names the sample."""


def _get(data: dict[str, Any], name: str, path: str = "") -> Any:
    try:
        return data[name]
    except KeyError:
        raise _Field(f"field '{path}{name}' is missing") from None


def _text(value: Any, path: str) -> str:
    if not isinstance(value, str):
        raise _Field(f"field '{path}' must be a string, is {type(value).__name__}")
    _check_utf8(value, path)
    return value


def _check_utf8(text: str, path: str) -> None:
    """JSON can spell half a character ("\\ud83d"), which no tokenizer takes."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        what = f"character {error.start + 1} is half of a surrogate pair"
        raise _Field(f"field '{path}' is not valid Unicode: {what}") from None


def _texts(value: Any, path: str) -> tuple[str, ...]:
    """A string, or a list of strings, as a tuple."""
    texts = [value] if isinstance(value, str) else value
    if not isinstance(texts, list) or not all(isinstance(item, str) for item in texts):
        raise _Field(f"field '{path}' must be a string or a list of strings")
    for text in texts:
        _check_utf8(text, path)
    return tuple(texts)


def _items(value: Any, path: str, *, empty: bool = False) -> list[dict[str, Any]]:
    if not isinstance(value, list) or not all(isinstance(item, dict) for item in value):
        raise _Field(f"field '{path}' must be a list of objects")
    if not value and not empty:
        raise _Field(f"field '{path}' is empty")
    return value


def _size(value: Any, path: str) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or not 0 < value <= _MAX_SIDE:
        raise _Field(f"field '{path}' must be a positive whole number of pixels, is {value!r}")
    return value


def _finite(number: int | float) -> bool:
    try:
        return math.isfinite(number)
    except OverflowError:  # a whole number beyond all floats
        return False


def _box(value: Any, path: str) -> Box:
    numbers = isinstance(value, list) and all(
        isinstance(number, int | float) and not isinstance(number, bool) for number in value
    )
    if not numbers or len(value) != 4 or not all(map(_finite, value)):
        raise _Field(f"field '{path}' must be [x, y, width, height] in pixels, is {value!r}")
    x, y, width, height = (float(number) for number in value)
    if width <= 0 or height <= 0:
        raise _Field(f"field '{path}' has no area: {value!r}")
    return x, y, width, height


def _captions(data: dict[str, Any], *, empty: bool = False) -> tuple[str, ...]:
    captions = _texts(_get(data, "captions"), "captions")
    if not empty and not captions:
        raise _Field("field 'captions' is empty")
    return captions


def _element(data: dict[str, Any], path: str) -> RegionElement:
    captions = _texts(_get(data, "caption", path), path + "caption")
    if not captions:
        raise _Field(f"field '{path}caption' is empty")
    attributes = _texts(data.get("attributes", []), path + "attributes")
    return RegionElement(captions, _box(_get(data, "bb", path), path + "bb"), attributes)


def _pretrain(data: dict[str, Any]) -> PretrainRecord:
    elems = _items(data.get("elems", []), "elems", empty=True)
    elements = tuple(_element(item, f"elems[{n}].") for n, item in enumerate(elems))
    # Regions alone are enough (Visual Genome has no captions), and so are captions (SBU).
    captions = _captions(data, empty=True) if elements and "captions" in data else ()
    if not elements:
        captions = _captions(data)
    width = height = 0
    if elements or "width" in data:
        width, height = _size(_get(data, "width"), "width"), _size(_get(data, "height"), "height")
    return PretrainRecord(
        _text(_get(data, "image_id"), "image_id"), captions, elements, width, height
    )


def _question(data: dict[str, Any], path: str) -> Question:
    answers = _get(data, "answers", path)
    valid = isinstance(answers, dict) and all(
        isinstance(weight, int | float) and not isinstance(weight, bool) and 0 <= weight <= 1
        for weight in answers.values()
    )
    if not valid:
        raise _Field(f"field '{path}answers' must map answer to a weight between 0 and 1")
    for answer in answers:
        _check_utf8(answer, path + "answers")
    return Question(
        _text(_get(data, "question_id", path), path + "question_id"),
        _text(_get(data, "question", path), path + "question"),
        answers,
        _text(data.get("type", ""), path + "type"),
    )


def _vqa(data: dict[str, Any]) -> VqaRecord:
    questions = _items(_get(data, "questions"), "questions")
    return VqaRecord(
        _text(_get(data, "image_id"), "image_id"),
        tuple(_question(item, f"questions[{n}].") for n, item in enumerate(questions)),
    )


def _statement(data: dict[str, Any], path: str) -> Statement:
    label = _get(data, "label", path)
    if not isinstance(label, bool):
        raise _Field(f"field '{path}label' must be true or false, is {label!r}")
    return Statement(_text(_get(data, "sentence", path), path + "sentence"), label)


def _nlvr2(data: dict[str, Any]) -> Nlvr2Record:
    ids = _texts(_get(data, "image_ids"), "image_ids")
    if len(ids) != 2:
        raise _Field(f"field 'image_ids' must name two images, has {len(ids)}")
    statements = _items(_get(data, "statements"), "statements")
    return Nlvr2Record(
        (ids[0], ids[1]),
        tuple(_statement(item, f"statements[{n}].") for n, item in enumerate(statements)),
    )


def _caption(data: dict[str, Any]) -> CaptionRecord:
    return CaptionRecord(_text(_get(data, "image_id"), "image_id"), _captions(data))


def _expression(data: dict[str, Any], path: str) -> Expression:
    text = _text(_get(data, "text", path), path + "text")
    return Expression(text, _box(_get(data, "bb", path), path + "bb"))


def _grounding(data: dict[str, Any]) -> GroundingRecord:
    expressions = _items(_get(data, "expressions"), "expressions")
    return GroundingRecord(
        _text(_get(data, "image_id"), "image_id"),
        _size(_get(data, "width"), "width"),
        _size(_get(data, "height"), "height"),
        tuple(_expression(item, f"expressions[{n}].") for n, item in enumerate(expressions)),
    )


_PARSERS: dict[str, Callable[[dict[str, Any]], Record]] = {
    "pretrain": _pretrain,
    "vqa": _vqa,
    "nlvr2": _nlvr2,
    "retrieval": _caption,
    "captioning": _caption,
    "grounding": _grounding,
}
TASKS = tuple(_PARSERS)


def parse_record(task: str, raw: bytes, shard: str, key: str) -> Record:
    """The record in a sample's JSON member.

    Args:
        task: one of TASKS.   raw: the JSON member, UTF-8.   shard, key: named in errors.

    Raises:
        RecordError: the JSON cannot be read or does not follow the task's schema.
        ValueError: unknown task.
    """
    if task not in _PARSERS:
        raise ValueError(f"unknown task '{task}': expected one of {', '.join(TASKS)}")
    try:
        data = json.loads(raw)
        if not isinstance(data, dict):
            raise _Field(f"the JSON member must be an object, is {type(data).__name__}")
        return _PARSERS[task](data)
    except _Field as error:
        raise RecordError.about(shard, key, f"{error} (task {task})") from None
    except (ValueError, OverflowError, RecursionError) as error:
        reason = f"the JSON member is not valid: {error}"
        raise RecordError.about(shard, key, reason) from None


def record_member(task: str, members: Mapping[str, Any], key: str) -> bytes:
    """What `parse_record` reads of a sample: its JSON member; of img2dataset's layout, a JSON object
    with the caption that stands in a member of its own.

    Args:
        members: extension -> bytes; other entries are not looked at.

    Raises:
        SkipSample: there is none, or it cannot be read.
    """
    if task != "pretrain" or "txt" not in members:
        if "json" not in members:
            raise SkipSample("missing", "the sample has no .json member (captions or questions)")
        return members["json"]
    try:
        caption = " ".join(members["txt"].decode("utf-8").split())
        known = json.loads(members.get("json", b"{}"))
        if isinstance(known, dict) and "captions" in known:
            return members["json"]
        if caption:
            return dump_json({"image_id": key, "captions": [caption]})
    except (ValueError, RecursionError) as error:
        reason = f"the caption (.txt), JSON member or key is not valid: {error}"
        raise SkipSample("record", reason) from None
    raise SkipSample("missing", "the caption (.txt) is empty")


def image_members(task: str) -> tuple[tuple[str, ...], ...]:
    """Extensions that may hold each image of a sample: one tuple of alternatives per image."""
    if task == "nlvr2":
        return tuple(tuple(f"{n}.{name}" for name in IMAGE_EXTENSIONS) for n in (0, 1))
    return (IMAGE_EXTENSIONS,)
