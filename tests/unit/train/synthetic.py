"""Batches of random pictures and questions."""

from __future__ import annotations

import torch

from data_pipeline.batches import VqaBatch
from train.evaluation.vqa import AnswerList

__all__ = ["synthetic_batch"]


def synthetic_batch(
    batch: int,
    image_size: int,
    text_tokens: int,
    answers: AnswerList,
    seed: int = 0,
    vocabulary: int = 1000,
) -> VqaBatch:
    """`batch` random pictures with one question of `text_tokens` tokens each; time does not depend
    on the values.
    """
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, vocabulary, (batch, text_tokens), generator=generator)
    ids[:, 0] = answers.ids[0, 0]
    return VqaBatch(
        images=torch.randint(
            0, 256, (batch, 3, image_size, image_size), generator=generator, dtype=torch.uint8
        ),
        image_index=torch.arange(batch),
        valid=torch.ones(batch, dtype=torch.bool),
        keys=tuple(str(row) for row in range(batch)),
        question_ids=ids,
        question_mask=torch.ones(batch, text_tokens, dtype=torch.bool),
        answer_ids=answers.ids[:1].expand(batch, -1),
        answer_mask=answers.mask[:1].expand(batch, -1),
        answer_row=torch.arange(batch),
        answer_weight=torch.ones(batch),
        answers=tuple({answers.strings[0]: 1.0} for _ in range(batch)),
        questions=("",) * batch,
        question_types=("",) * batch,
    )
