"""From decoded samples to typed batches. One assembler per task: `draw` makes an item of a sample,
`collate` a batch.

Whatever is random comes from generators keyed by (seed, stream position), so a batch does not
depend on rank, worker or restart. Images go into the batch's buffer one by one; strings are
tokenised a batch at a time.
"""

from __future__ import annotations

import random
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch

from data_pipeline import slots
from data_pipeline.batches import Batch, PretrainBatch, VqaBatch
from data_pipeline.faults import SkipSample
from data_pipeline.records import CaptionRecord, PretrainRecord, Question, VqaRecord
from data_pipeline.regions import RegionRow, choose_rows, count_rows, draw_region_rows, patch_mask
from data_pipeline.text import IGNORE, MaskedTokens, Masking, TextEncoder
from data_pipeline.transforms import Augmentation, sample_random

__all__ = ["Assembler", "Item", "PretrainAssembler", "RegionAssembler", "VqaAssembler"]

# Purposes of a sample's generators: what is drawn for one never shifts what is drawn for another.
_DRAW, _MASK, _ROWS = 0, 1, 2


@dataclass(frozen=True, slots=True)
class Item:
    """A prepared sample. `valid` is False on samples that only fill up an evaluation step."""

    image: np.ndarray
    key: str
    position: int
    valid: bool
    captions: tuple[str, ...] = ()
    regions: tuple[RegionRow, ...] = ()
    questions: tuple[Question, ...] = ()


class ImageRows:
    """The image buffer of the batch that is being drawn, (N, H, W, 3) uint8.

    Each picture is copied into its row as soon as it is drawn, while it is in the processor's
    cache, and its own memory is free for the next one. Copying all of them when the batch is
    complete costs twice as much, and takes twice the memory.

    N is learnt from the batch before; pictures that do not find a row (those of the first batch)
    stay where they are, and `collect` copies.
    """

    def __init__(self) -> None:
        self._size = 0
        self._buffer: np.ndarray | None = None
        self._rows: list[np.ndarray] = []

    def put(self, image: np.ndarray) -> np.ndarray:
        """The image in the next row, or as it is where there is none."""
        if self._buffer is None and self._size:
            self._buffer = slots.allocate((self._size, *image.shape))
        buffer, used = self._buffer, len(self._rows)
        if buffer is None or used == len(buffer) or buffer.shape[1:] != image.shape:
            return image
        row = buffer[used]
        row[...] = image
        self._rows.append(row)
        return row

    def collect(self, images: Sequence[np.ndarray]) -> torch.Tensor:
        """(N, 3, H, W) uint8 in channels_last memory; the next picture begins a new buffer."""
        buffer, rows = self._buffer, self._rows
        self._size, self._buffer, self._rows = len(images), None, []
        whole = buffer is not None and len(images) == len(buffer) == len(rows)
        # Only rows of this very buffer, in order: two streams may share an assembler.
        if not whole or any(a is not b for a, b in zip(images, rows, strict=True)):
            buffer = slots.allocate((len(images), *images[0].shape))
            np.stack(images, out=buffer)
        return torch.from_numpy(buffer).permute(0, 3, 1, 2)

    def __reduce__(self) -> tuple:
        return ImageRows, ()


@dataclass(frozen=True)
class Assembler(ABC):
    """What all tasks share. Picklable; workers each have a copy (with its own token cache).

    Attributes:
        text: tokeniser of the task's strings.   seed: of the run.   train: draw, or keep
            everything in order.
    """

    text: TextEncoder
    augmentation: Augmentation
    seed: int
    train: bool
    _rows: ImageRows = field(default_factory=ImageRows, init=False, repr=False, compare=False)

    def draw(self, sample: dict[str, Any]) -> Item:
        """Augments the image and picks texts.

        Args:
            sample: has __key__, __position__, __attempt__, __valid__, `record`, `image` (a Picture,
                or (H, W, 3) uint8).

        Raises:
            SkipSample: the sample has nothing usable for the task.
        """
        # A substitute draws with other numbers than the sample that it replaces.
        rng = sample_random(self.seed, sample["__position__"], _DRAW + 16 * sample["__attempt__"])
        item = self._draw(sample, rng)
        return replace(item, image=self._rows.put(item.image))

    @abstractmethod
    def _draw(self, sample: dict[str, Any], rng: random.Random) -> Item: ...

    def _images(self, items: Sequence[Item]) -> torch.Tensor:
        """(N, 3, H, W) uint8 in channels_last memory."""
        return self._rows.collect([item.image for item in items])

    @abstractmethod
    def collate(self, items: Sequence[Item]) -> Batch:
        """The batch of one micro-batch of items, in their order."""


def _mask_rows(
    masking: Masking, text: TextEncoder, rows: Sequence[list[int]], generators: Sequence
) -> dict[str, torch.Tensor]:
    """The five text tensors of a PretrainBatch."""
    masked: list[MaskedTokens] = [
        masking(ids, rng) for ids, rng in zip(rows, generators, strict=True)
    ]
    ids, mask = text.pad_rows(rows)
    mlm_ids, _ = text.pad_rows([row.ids for row in masked])
    positions = np.zeros((len(rows), masking.limit), np.int64)
    labels = np.full((len(rows), masking.limit), IGNORE, np.int64)
    for number, row in enumerate(masked):
        positions[number, : len(row.positions)] = row.positions
        labels[number, : len(row.labels)] = row.labels
    return {
        "text_ids": torch.from_numpy(ids),
        "text_mask": torch.from_numpy(mask),
        "mlm_ids": torch.from_numpy(mlm_ids),
        "mlm_positions": torch.from_numpy(positions),
        "mlm_labels": torch.from_numpy(labels),
    }


@dataclass(frozen=True)
class PretrainAssembler(Assembler):
    """General batches: one caption per image, drawn."""

    masking: Masking

    def _draw(self, sample: dict[str, Any], rng: random.Random) -> Item:
        record = sample["record"]
        assert isinstance(record, PretrainRecord | CaptionRecord)
        if not record.captions:
            raise SkipSample("missing", "the sample has no caption (field 'captions')")
        caption = rng.choice(record.captions)
        image = self.augmentation(sample["image"], rng, (caption,))
        return Item(
            image, sample["__key__"], sample["__position__"], sample["__valid__"], (caption,)
        )

    def collate(self, items: Sequence[Item]) -> PretrainBatch:
        rows = self.text.encode([item.captions[0] for item in items])
        generators = [sample_random(self.seed, item.position, _MASK) for item in items]
        return PretrainBatch(
            images=self._images(items),
            image_index=torch.arange(len(items)),
            valid=torch.tensor([item.valid for item in items]),
            keys=tuple(item.key for item in items),
            **_mask_rows(self.masking, self.text, rows, generators),
        )


@dataclass(frozen=True)
class RegionAssembler(Assembler):
    """Region batches: `rows` rows about the images, always the same number.

    Rows are drawn and filled up within units of neighbouring images, keyed by the unit's first
    position. A rank takes whole units, so the global batch is the same on any number of ranks.

    Attributes:
        rows: rows per micro-batch.   max_regions: rows per image at most.
        units: equal parts of the micro-batch.
        min_fraction: share of a box that must lie in the crop.   patch_size: pixels per patch side.
    """

    masking: Masking
    rows: int
    max_regions: int
    min_fraction: float
    patch_size: int
    units: int = 1

    def __post_init__(self) -> None:
        if self.rows % self.units:
            raise ValueError(f"{self.rows} region rows cannot be cut into {self.units} units")
        if self.rows < 1 or self.max_regions < 1:
            raise ValueError("data.region.rows and data.region.max_regions must be at least 1")
        if not 0 <= self.min_fraction < 1:
            raise ValueError("data.region.min_fraction_in_crop must lie in [0, 1)")
        if self.augmentation.size % self.patch_size:
            raise ValueError(
                f"image size {self.augmentation.size} is not a multiple of patch size "
                f"{self.patch_size}"
            )

    def _draw(self, sample: dict[str, Any], rng: random.Random) -> Item:
        record = sample["record"]
        assert isinstance(record, PretrainRecord)
        image, rows = draw_region_rows(
            record,
            sample["image"],
            rng,
            self.augmentation,
            max_regions=self.max_regions,
            min_fraction=self.min_fraction,
        )
        return Item(
            image,
            sample["__key__"],
            sample["__position__"],
            sample["__valid__"],
            regions=tuple(rows),
        )

    def _unit(self, items: Sequence[Item], wanted: int) -> tuple[list[int], list[RegionRow], int]:
        """(image of each row, the rows, how many of them are not copies) of one unit."""
        groups = [item.regions for item in items]
        flat = [row for rows in groups for row in rows]
        image = count_rows(groups)
        rng = sample_random(self.seed, items[0].position, _ROWS)
        chosen = choose_rows(len(flat), wanted, rng)
        return [image[n] for n in chosen], [flat[n] for n in chosen], min(len(flat), wanted)

    def collate(self, items: Sequence[Item]) -> PretrainBatch:
        share, wanted = len(items) // self.units, self.rows // self.units
        images: list[int] = []
        taken: list[RegionRow] = []
        first_use: list[bool] = []
        generators = []
        for first in range(0, len(items), share):
            part = items[first : first + share]
            owners, rows, distinct = self._unit(part, wanted)
            images += [first + owner for owner in owners]
            taken += rows
            # A row that fills up evaluation is no new evidence; in training every row counts.
            first_use += [self.train or place < distinct for place in range(wanted)]
            # Copies of a row are masked differently: their number takes part in the key.
            generators += [
                sample_random(self.seed, part[0].position, _MASK + 16 * (1 + number))
                for number in range(wanted)
            ]
        valid = [items[n].valid and use for n, use in zip(images, first_use, strict=True)]
        boxes = np.asarray([row.box for row in taken], np.float32)
        mask = patch_mask(boxes, self.augmentation.size, self.patch_size)
        return PretrainBatch(
            images=self._images(items),
            image_index=torch.tensor(images),
            valid=torch.tensor(valid),
            keys=tuple(items[n].key for n in images),
            region_mask=torch.from_numpy(mask),
            boxes=torch.from_numpy(boxes),
            is_region=torch.tensor([row.is_region for row in taken]),
            **_mask_rows(
                self.masking, self.text, self.text.encode([row.text for row in taken]), generators
            ),
        )


@dataclass(frozen=True)
class VqaAssembler(Assembler):
    """Questions about images: `rows_per_image` drawn in training, all of them in evaluation.

    Attributes:
        answer_text: tokeniser of answers, padded to its own length.
    """

    answer_text: TextEncoder
    rows_per_image: int = 1
    _no_answer: dict[str, float] = field(default_factory=lambda: {"": 0.0}, repr=False)

    def __post_init__(self) -> None:
        if self.rows_per_image < 1:
            raise ValueError("data.rows_per_image must be at least 1")

    def _questions(
        self, record: VqaRecord, rng: random.Random, valid: bool
    ) -> tuple[Question, ...]:
        if not self.train:
            # An image that only fills up the step brings one row, so that no batch is empty.
            return record.questions if valid else record.questions[:1]
        usable = [question for question in record.questions if question.answers]
        if not usable:
            raise SkipSample("missing", "no question has an answer (field 'answers')")
        # Each question at most once while there are enough of them.
        chosen = choose_rows(len(usable), self.rows_per_image, rng)
        return tuple(usable[number] for number in chosen)

    def _draw(self, sample: dict[str, Any], rng: random.Random) -> Item:
        record = sample["record"]
        assert isinstance(record, VqaRecord)
        questions = self._questions(record, rng, sample["__valid__"])
        texts = [question.question for question in questions]
        texts += [answer for question in questions for answer in question.answers]
        return Item(
            self.augmentation(sample["image"], rng, texts),
            sample["__key__"],
            sample["__position__"],
            sample["__valid__"],
            questions=questions,
        )

    def collate(self, items: Sequence[Item]) -> VqaBatch:
        rows = [(number, q) for number, item in enumerate(items) for q in item.questions]
        questions = [question for _, question in rows]
        question_ids, question_mask = self.text([question.question for question in questions])
        answers = [
            (row, answer, weight)
            for row, question in enumerate(questions)
            # A question with hidden answers keeps one empty answer of weight 0: there are A >= B
            # answers.
            for answer, weight in (question.answers or self._no_answer).items()
        ]
        answer_ids, answer_mask = self.answer_text([answer for _, answer, _ in answers])
        return VqaBatch(
            images=self._images(items),
            image_index=torch.tensor([image for image, _ in rows]),
            valid=torch.tensor([items[image].valid for image, _ in rows]),
            keys=tuple(items[image].key for image, _ in rows),
            question_ids=torch.from_numpy(question_ids),
            question_mask=torch.from_numpy(question_mask),
            answer_ids=torch.from_numpy(answer_ids),
            answer_mask=torch.from_numpy(answer_mask),
            answer_row=torch.tensor([row for row, _, _ in answers]),
            answer_weight=torch.tensor([weight for _, _, weight in answers], dtype=torch.float32),
            answers=tuple(question.answers for question in questions),
            questions=tuple(question.question for question in questions),
            question_types=tuple(question.kind for question in questions),
            question_names=tuple(question.question_id for question in questions),
        )
