"""Captions of a whole split: beam search behind the prompt, then BLEU-4 and CIDEr over all ranks.

Generation is that of the published evaluation (X-VLM 2111.08276): beam 3, 5 to 20 tokens in all.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed

from models.generation import GenerationSettings, generate
from models.trimming import see
from train.evaluation.caption_metrics import caption_scores

if TYPE_CHECKING:
    from data_pipeline.task_batches import CaptionBatch
    from models.xvlm import XVLM

__all__ = ["CaptionWriter", "Caption", "evaluate_captions", "write_split"]


@dataclass(frozen=True)
class Caption:
    """What was written about an image, and what people wrote."""

    image_id: str
    text: str
    references: tuple[str, ...]


@dataclass(frozen=True)
class CaptionWriter:
    """How captions are written.

    Attributes:
        tokenizer: of the model.   beams: 1 is greedy.
        max_length, min_length: tokens in all, [CLS] and prompt counted.
    """

    tokenizer: Any
    beams: int = 3
    max_length: int = 20
    min_length: int = 5

    def __call__(self, model: XVLM, batch: CaptionBatch) -> list[str]:
        """One caption for each row, without the prompt."""
        _, ((states, seen),) = see(model, batch.images, (batch.image_index,), batch.prompt, None)
        settings = GenerationSettings(
            end_id=self.tokenizer.sep_token_id,
            pad_id=self.tokenizer.pad_token_id,
            beams=self.beams,
            max_length=min(self.max_length, model.config.text.max_positions),
            min_length=self.min_length,
        )
        found = generate(model, batch.prompt, states, seen, settings=settings)
        rows = zip(found.ids.tolist(), found.lengths.tolist(), strict=True)
        return [
            self.tokenizer.decode(ids[batch.prompt_tokens : length], skip_special_tokens=True)
            for ids, length in rows
        ]


def write_split(
    model: XVLM,
    writer: CaptionWriter,
    batches: Callable[[], Iterator[CaptionBatch]],
    dist: Any = None,
) -> list[Caption]:
    """A caption for every image of the split, in the order of ranks, the same list on each."""
    own: list[Caption] = []
    for batch in batches():
        written = writer(model, batch)
        for row, valid in enumerate(batch.valid.tolist()):
            if valid:
                image = int(batch.image_index[row])
                own.append(Caption(batch.image_ids[image], written[row], batch.references[image]))
    if dist is None or dist.world_size == 1:
        return own
    gathered: list[Any] = [None] * dist.world_size
    torch.distributed.all_gather_object(gathered, own)
    return [caption for part in gathered for caption in part]


def evaluate_captions(
    model: XVLM,
    writer: CaptionWriter,
    batches: Callable[[], Iterator[CaptionBatch]],
    dist: Any = None,
) -> dict[str, float]:
    """ "bleu4" and "cider" (1.0 stands for the 100 of published tables), and "captions", how many.

    See `caption_metrics` for what is counted. Collective.
    """
    found = write_split(model, writer, batches, dist)
    texts, references = [c.text for c in found], [c.references for c in found]
    return caption_scores(texts, references) | {"captions": float(len(found))}
