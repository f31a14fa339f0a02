"""Assemblers of retrieval, captioning, NLVR2 and grounding: from decoded samples to typed batches.

Training draws `rows_per_image` texts of each image; evaluation keeps them all, in order. A picture
is mirrored without looking at its captions, as in the published training (X-VLM, 2111.08276); only
grounding looks, because there a mirrored picture would make "the left one" wrong.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import numpy as np
import torch

from data_pipeline.collate import Assembler, Item
from data_pipeline.decode import Picture
from data_pipeline.faults import SkipSample
from data_pipeline.records import (
    CaptionRecord,
    Expression,
    GroundingRecord,
    Nlvr2Record,
    PretrainRecord,
)
from data_pipeline.regions import check_box, choose_crop, choose_rows, clip_box, crop_frame
from data_pipeline.task_batches import CaptionBatch, GroundingBatch, Nlvr2Batch, RetrievalBatch
from data_pipeline.text import clean_text
from data_pipeline.transforms import mentions_side, mirror, resize

__all__ = ["CaptionAssembler", "GroundingAssembler", "Nlvr2Assembler", "RetrievalAssembler"]

_T = TypeVar("_T")


@dataclass(frozen=True, slots=True)
class TaskItem(Item):
    """A prepared sample: one text for each of its rows, and what the task knows beside it."""

    texts: tuple[str, ...] = ()
    image_id: str = ""
    references: tuple[str, ...] = ()
    labels: tuple[bool, ...] = ()
    boxes: tuple[tuple[float, float, float, float], ...] = ()
    second: np.ndarray | None = None


@dataclass(frozen=True)
class TaskAssembler(Assembler):
    """What the four have in common.

    Attributes:
        rows_per_image: texts drawn per image in training (per pair of images, for NLVR2).
    """

    rows_per_image: int = 1

    def __post_init__(self) -> None:
        if self.rows_per_image < 1:
            raise ValueError(f"data.rows_per_image must be at least 1, is {self.rows_per_image}")

    def draw(self, sample: dict[str, Any]) -> TaskItem:
        item = super().draw(sample)
        assert isinstance(item, TaskItem)
        return item

    def _chosen(
        self, found: Sequence[_T], sample: dict[str, Any], rng: random.Random
    ) -> tuple[_T, ...]:
        if self.train:
            # A fixed number on every rank; each text at most once while there are enough of them.
            return tuple(found[n] for n in choose_rows(len(found), self.rows_per_image, rng))
        # An image that only fills up the step brings one row, so that no batch is empty.
        return tuple(found) if sample["__valid__"] else tuple(found[:1])

    def _item(self, sample: dict[str, Any], image: np.ndarray, **known: Any) -> TaskItem:
        return TaskItem(
            image, sample["__key__"], sample["__position__"], sample["__valid__"], **known
        )

    def _common(self, items: Sequence[TaskItem]) -> dict[str, Any]:
        """The fields of `Batch`, one row for each text."""
        owners = [number for number, item in enumerate(items) for _ in item.texts]
        return {
            "images": self._images(items),
            "image_index": torch.tensor(owners),
            "valid": torch.tensor([items[owner].valid for owner in owners]),
            "keys": tuple(items[owner].key for owner in owners),
        }

    def _texts(self, items: Sequence[TaskItem]) -> tuple[dict[str, Any], tuple[str, ...]]:
        """Ids and mask of all rows, and their strings."""
        strings = tuple(text for item in items for text in item.texts)
        ids, mask = self.text(strings)
        return {"text_ids": torch.from_numpy(ids), "text_mask": torch.from_numpy(mask)}, strings


def _captioned(sample: dict[str, Any]) -> CaptionRecord | PretrainRecord:
    """The record; SkipSample where it is about regions only."""
    record = sample["record"]
    assert isinstance(record, CaptionRecord | PretrainRecord)
    if not record.captions:
        raise SkipSample("missing", "the sample has no caption (field 'captions')")
    return record


def group_number(image_id: str) -> int:
    """A number in 0..2^63 - 1 for an image's id, the same in every process."""
    digest = hashlib.blake2b(image_id.encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


@dataclass(frozen=True)
class RetrievalAssembler(TaskAssembler):
    """Images with captions, and which captions belong together."""

    def _draw(self, sample: dict[str, Any], rng: random.Random) -> TaskItem:
        record = _captioned(sample)
        texts = self._chosen(record.captions, sample, rng)
        image = self.augmentation(sample["image"], rng)
        return self._item(sample, image, texts=texts, image_id=record.image_id)

    def collate(self, items: Sequence[TaskItem]) -> RetrievalBatch:
        encoded, captions = self._texts(items)
        common = self._common(items)
        numbers = torch.tensor([group_number(item.image_id) for item in items])
        return RetrievalBatch(
            **common,
            **encoded,
            groups=numbers[common["image_index"]],
            captions=captions,
            image_ids=tuple(item.image_id for item in items),
        )


@dataclass(frozen=True)
class CaptionAssembler(TaskAssembler):
    """A caption behind the prompt; evaluation has one row per image, with its first caption.

    `text` must not clean: captions are cleaned here, the prompt stays as it is.

    Attributes:
        prompt: words in front of every caption (published: "a picture of").
    """

    prompt: str = "a picture of"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.text.clean:
            raise ValueError("captions need a text encoder that does not clean")
        if self.prompt_tokens + 2 > self.text.max_tokens:
            raise ValueError(
                f"data.prompt {self.prompt!r} has {self.prompt_tokens} tokens with [CLS], "
                f"data.max_tokens is {self.text.max_tokens}: no room for a caption"
            )

    @property
    def prompt_tokens(self) -> int:
        """Ids in front of the caption, [CLS] included."""
        # At least [CLS] and [SEP]: an empty prompt leaves [CLS] alone.
        return len(self.text.encode([self.prompt])[0]) - 1

    def _draw(self, sample: dict[str, Any], rng: random.Random) -> TaskItem:
        record = _captioned(sample)
        chosen = self._chosen(record.captions, sample, rng)
        chosen = chosen if self.train else chosen[:1]
        texts = tuple(clean_text(text, self.text.max_words) for text in chosen)
        return self._item(
            sample,
            self.augmentation(sample["image"], rng),
            texts=tuple(f"{self.prompt.strip()} {text}".strip() for text in texts),
            image_id=record.image_id,
            references=record.captions,
        )

    def collate(self, items: Sequence[TaskItem]) -> CaptionBatch:
        encoded, _ = self._texts(items)
        return CaptionBatch(
            **self._common(items),
            **encoded,
            prompt_tokens=self.prompt_tokens,
            references=tuple(item.references for item in items),
            image_ids=tuple(item.image_id for item in items),
        )


@dataclass(frozen=True)
class Nlvr2Assembler(TaskAssembler):
    """Statements about two images. The two are augmented independently, as published."""

    def draw(self, sample: dict[str, Any]) -> TaskItem:
        item = super().draw(sample)
        assert item.second is not None
        return replace(item, second=self._rows.put(item.second))

    def _draw(self, sample: dict[str, Any], rng: random.Random) -> TaskItem:
        record = sample["record"]
        assert isinstance(record, Nlvr2Record)
        left, right = sample["image"]
        statements = self._chosen(record.statements, sample, rng)
        return self._item(
            sample,
            self.augmentation(left, rng),
            second=self.augmentation(right, rng),
            texts=tuple(statement.sentence for statement in statements),
            labels=tuple(statement.label for statement in statements),
        )

    def _images(self, items: Sequence[Item]) -> torch.Tensor:
        pictures: list[np.ndarray] = []
        for item in items:
            assert isinstance(item, TaskItem) and item.second is not None
            pictures += [item.image, item.second]
        return self._rows.collect(pictures)

    def collate(self, items: Sequence[TaskItem]) -> Nlvr2Batch:
        encoded, sentences = self._texts(items)
        common = self._common(items)
        left = 2 * common["image_index"]
        return Nlvr2Batch(
            **common | {"image_index": left},
            **encoded,
            second_index=left + 1,
            label=torch.tensor([int(label) for item in items for label in item.labels]),
            sentences=sentences,
        )


@dataclass(frozen=True)
class GroundingAssembler(TaskAssembler):
    """Expressions with their boxes, which follow the picture through crop and mirror.

    With an augmentation that mirrors, the picture is cropped around the drawn boxes, edges uniform
    up to its border (X-VLM); then only colours change. Pictures about which a drawn expression says
    left or right are not mirrored: RefCOCO's expressions do, unlike those of RefCOCO+, which the
    published training used.
    """

    def _draw(self, sample: dict[str, Any], rng: random.Random) -> TaskItem:
        record = sample["record"]
        assert isinstance(record, GroundingRecord)
        for number, expression in enumerate(record.expressions):
            check_box(expression.box, record.width, record.height, f"expressions[{number}].bb")
        chosen = self._chosen(record.expressions, sample, rng)
        texts = tuple(expression.text for expression in chosen)
        seen, flip = (0, 0, record.width, record.height), False
        if self.augmentation.flips:
            seen = choose_crop(_hull(chosen), record.width, record.height, rng)
            flip = rng.random() < 0.5 and not mentions_side(texts)
        return self._item(
            sample,
            self._pixels(sample["image"], seen, flip, record, rng),
            texts=texts,
            image_id=record.image_id,
            boxes=tuple(_box_in(expression, seen, flip) for expression in chosen),
        )

    def _pixels(
        self,
        image: np.ndarray | Picture,
        seen: tuple[int, int, int, int],
        flip: bool,
        record: GroundingRecord,
        rng: random.Random,
    ) -> np.ndarray:
        size = self.augmentation.size
        least = size if self.augmentation.flips else 0
        pixels = crop_frame(image, seen, record.width, record.height, least)
        pixels = resize(pixels, size, size)
        return self.augmentation.colours(mirror(pixels) if flip else pixels, rng)

    def collate(self, items: Sequence[TaskItem]) -> GroundingBatch:
        encoded, expressions = self._texts(items)
        boxes = [box for item in items for box in item.boxes]
        return GroundingBatch(
            **self._common(items),
            **encoded,
            boxes=torch.tensor(boxes, dtype=torch.float32),
            expressions=expressions,
        )


def _hull(expressions: Sequence[Expression]) -> tuple[float, float, float, float]:
    """The smallest box (x, y, w, h) around those of all expressions."""
    corners = np.asarray([expression.box for expression in expressions], np.float64)
    low = corners[:, :2].min(0)
    width, height = (corners[:, :2] + corners[:, 2:]).max(0) - low
    return float(low[0]), float(low[1]), float(width), float(height)


def _box_in(
    expression: Expression, seen: tuple[int, int, int, int], flip: bool
) -> tuple[float, float, float, float]:
    """Normalised (cx, cy, w, h) of the expression's box in what is seen of the picture."""
    box = clip_box(expression.box, seen, 0.0)
    if box is None:
        raise SkipSample("box", f"the box {list(expression.box)} of {expression.text!r} is empty")
    return (1.0 - box[0], *box[1:]) if flip else box
