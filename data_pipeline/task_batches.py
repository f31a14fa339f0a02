"""Typed batches of the downstream tasks beside question answering (see `batches` for `Batch`).

Shape legend: N images, B text rows, L tokens. Text masks are True on real tokens.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from data_pipeline.batches import Batch

__all__ = ["CaptionBatch", "GroundingBatch", "Nlvr2Batch", "RetrievalBatch"]


@dataclass(frozen=True, kw_only=True)
class RetrievalBatch(Batch):
    """Images and their captions.

    Attributes:
        text_ids, text_mask: (B, L) int64 / bool.
        groups: (B,) int64; rows about the same image (by its id, wherever it comes again) have equal
            values: they are no negatives of each other.
        captions: B strings.   image_ids: N ids.
    """

    text_ids: Tensor
    text_mask: Tensor
    groups: Tensor
    captions: tuple[str, ...]
    image_ids: tuple[str, ...]

    @property
    def image_valid(self) -> Tensor:
        """(N,) bool, False on images that only fill up an evaluation step."""
        found = torch.zeros(len(self.image_ids), dtype=torch.bool, device=self.valid.device)
        return found.index_put((self.image_index,), self.valid)


@dataclass(frozen=True, kw_only=True)
class CaptionBatch(Batch):
    """Images and a caption to be written for each row, behind a prompt.

    Attributes:
        text_ids, text_mask: (B, L) int64 / bool: [CLS] prompt caption [SEP], padded.
        prompt_tokens: how many ids in front, [CLS] included, are given and not predicted.
        references: all captions of each of the N images, as they stand in the data.
        image_ids: N ids.
    """

    text_ids: Tensor
    text_mask: Tensor
    prompt_tokens: int
    references: tuple[tuple[str, ...], ...]
    image_ids: tuple[str, ...]

    @property
    def prompt(self) -> Tensor:
        """(B, prompt_tokens) int64, without padding and end token: what generation starts from."""
        return self.text_ids[:, : self.prompt_tokens]

    @property
    def written(self) -> Tensor:
        """(B, L) bool, True on the tokens to be predicted: those behind the prompt, [SEP] too."""
        behind = torch.arange(self.text_ids.shape[1], device=self.text_ids.device)
        return self.text_mask & (behind >= self.prompt_tokens)


@dataclass(frozen=True, kw_only=True)
class Nlvr2Batch(Batch):
    """Statements about two images each. N = 2 * pairs: the images of pair p are 2p and 2p + 1.

    Attributes:
        second_index: (B,) int64, the right image of each row; `image_index` is the left one.
        text_ids, text_mask: (B, L) int64 / bool.
        label: (B,) int64, 1 where the statement is true.
        sentences: B strings.
    """

    second_index: Tensor
    text_ids: Tensor
    text_mask: Tensor
    label: Tensor
    sentences: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class GroundingBatch(Batch):
    """Expressions, and the box that each of them means.

    Attributes:
        text_ids, text_mask: (B, L) int64 / bool.
        boxes: (B, 4) float32, normalised (cx, cy, w, h) in the picture as it is in the batch.
        expressions: B strings.
    """

    text_ids: Tensor
    text_mask: Tensor
    boxes: Tensor
    expressions: tuple[str, ...]
