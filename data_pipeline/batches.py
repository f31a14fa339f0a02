"""Typed batches: what the loader hands to a training step.

Shape legend: N images, B text rows (rows may share an image), L tokens, M masked slots, A answers,
P = 1 + patches (the class token comes first). Images are uint8 RGB; they are normalised on the
device.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from multiprocessing.reduction import ForkingPickler
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor

from data_pipeline import slots

__all__ = ["Batch", "PretrainBatch", "VqaBatch"]


@dataclass(frozen=True, kw_only=True)
class Batch:
    """What every batch has.

    Attributes:
        images: (N, 3, H, W) uint8, channels_last in memory.
        image_index: (B,) int64, the image of each text row; `arange(N)` when rows and images are
            one to one.
        valid: (B,) bool; False marks padding rows, which evaluation adds so that all ranks step
            equally often.
        keys: B sample keys, for provenance and error messages.
    """

    images: Tensor
    image_index: Tensor
    valid: Tensor
    keys: tuple[str, ...]

    @property
    def rows(self) -> int:
        """B, the number of text rows."""
        return self.image_index.shape[0]

    def _map_tensors(self, change) -> Self:
        changed = {
            field.name: change(value)
            for field in dataclasses.fields(self)
            if isinstance(value := getattr(self, field.name), Tensor)
        }
        return dataclasses.replace(self, **changed)

    def to(self, device: torch.device | str, non_blocking: bool = False) -> Self:
        """The same batch with every tensor on `device`."""
        return self._map_tensors(lambda tensor: tensor.to(device, non_blocking=non_blocking))

    def record_stream(self, stream: Any) -> None:
        """Tells the allocator that `stream` uses the tensors too (see Tensor.record_stream)."""

        def record(tensor: Tensor) -> Tensor:
            tensor.record_stream(stream)
            return tensor

        self._map_tensors(record)

    def __getstate__(self) -> dict[str, Any]:
        """Only the images travel as a tensor, in shared memory.

        Each tensor that a worker sends costs a shared memory file and a descriptor; the others are
        a few kilobytes, and go through the pipe as arrays.
        """
        return {
            name: value.numpy()
            if isinstance(value, Tensor) and name != "images" and value.device.type == "cpu"
            else value
            for name, value in vars(self).items()
        }

    def __setstate__(self, state: dict[str, Any]) -> None:
        for name, value in state.items():
            tensor = torch.from_numpy(value) if isinstance(value, np.ndarray) else value
            object.__setattr__(self, name, tensor)

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        ForkingPickler.register(cls, _send)

    def pin_memory(self) -> Self:
        """The same batch in page-locked memory (called by torch's DataLoader)."""
        return self._map_tensors(lambda tensor: tensor.pin_memory())


def _send(batch: Batch) -> tuple | str:
    """How a batch goes to another process (not how it is pickled into a file)."""
    if (place := slots.share(batch.images)) is None:
        return batch.__reduce_ex__(2)
    return _arrive, (type(batch), batch.__getstate__() | {"images": None}, place)


def _arrive(kind: type[Batch], state: dict[str, Any], place: tuple) -> Batch:
    batch = kind.__new__(kind)
    batch.__setstate__(state | {"images": slots.receive(*place)})
    return batch


ForkingPickler.register(Batch, _send)


@dataclass(frozen=True, kw_only=True)
class PretrainBatch(Batch):
    """Image-text pairs, or region rows when `region_mask` is given (X-VLM, section 3 of
    2111.08276).

    Attributes:
        text_ids, text_mask: (B, L) int64 / bool, clean text; the mask is True on real tokens.
        mlm_ids: (B, L) int64, the same text with some tokens masked.
        mlm_positions, mlm_labels: (B, M) int64; unused slots have position 0 and label -100.
        region_mask: (B, P) bool, patches (and class token) that a region row may see; None on a
            general batch.
        boxes: (B, 4) float32 in normalised (cx, cy, w, h); None on a general batch.
        is_region: (B,) bool, False on rows that caption the whole image; None on a general batch.
    """

    text_ids: Tensor
    text_mask: Tensor
    mlm_ids: Tensor
    mlm_positions: Tensor
    mlm_labels: Tensor
    region_mask: Tensor | None = None
    boxes: Tensor | None = None
    is_region: Tensor | None = None


@dataclass(frozen=True, kw_only=True)
class VqaBatch(Batch):
    """Questions about images, with weighted answers.

    Attributes:
        question_ids, question_mask: (B, L) int64 / bool.
        answer_ids, answer_mask: (A, La) int64 / bool: [CLS] answer tokens [SEP]; A >= B, several
            per question.
        answer_row: (A,) int64, the question row of each answer.
        answer_weight: (A,) float32, share of annotators (sums to at most 1 for each question).
        answers: B dicts answer -> weight, as annotated (for metrics and pictures; plain strings).
        questions: B question strings.     question_types: B type names ("" where unknown).
        question_names: B `question_id` of the records; () in batches that no data set made.
    """

    question_ids: Tensor
    question_mask: Tensor
    answer_ids: Tensor
    answer_mask: Tensor
    answer_row: Tensor
    answer_weight: Tensor
    answers: tuple[dict[str, float], ...]
    questions: tuple[str, ...]
    question_types: tuple[str, ...]
    question_names: tuple[str, ...] = ()
