"""The largest batch that a downstream task can meet, for estimates: every text as long as it may be."""

from __future__ import annotations

from typing import Any

import torch

from data_pipeline.batches import Batch, VqaBatch
from data_pipeline.task_batches import CaptionBatch, GroundingBatch, Nlvr2Batch, RetrievalBatch
from models.config import ModelConfig
from train.config import RunConfig

__all__ = ["downstream_batch"]


def downstream_batch(config: RunConfig, student: ModelConfig) -> Batch:
    """One micro-batch of `config.task` in the sizes of a rank, all zeros."""
    data, side = config.data, student.vision.image_size
    samples, pair = data.batch, config.task == "nlvr2"
    images, rows = samples * (2 if pair else 1), samples * data.rows_per_image
    whole: dict[str, Any] = {
        "images": torch.zeros(images, 3, side, side, dtype=torch.uint8),
        "image_index": torch.arange(rows) % samples * (2 if pair else 1),
        "valid": torch.ones(rows, dtype=torch.bool),
        "keys": ("",) * rows,
    }
    ids = torch.zeros(rows, data.max_tokens, dtype=torch.int64)
    seen = torch.ones(rows, data.max_tokens, dtype=torch.bool)
    if config.task == "vqa":
        answers = torch.zeros(rows, data.max_answer_tokens, dtype=torch.int64)
        return VqaBatch(
            **whole,
            question_ids=ids,
            question_mask=seen,
            answer_ids=answers,
            answer_mask=torch.ones_like(answers, dtype=torch.bool),
            answer_row=torch.arange(rows),
            answer_weight=torch.ones(rows),
            answers=({},) * rows,
            questions=("",) * rows,
            question_types=("",) * rows,
        )
    text: dict[str, Any] = {"text_ids": ids, "text_mask": seen}
    names, strings = ("",) * images, ("",) * rows
    if config.task == "nlvr2":
        label = torch.zeros(rows, dtype=torch.int64)
        second = whole["image_index"] + 1
        return Nlvr2Batch(**whole, **text, second_index=second, label=label, sentences=strings)
    if config.task in ("retrieval", "nlvr2_pretrain"):
        groups = whole["image_index"]
        return RetrievalBatch(**whole, **text, groups=groups, captions=strings, image_ids=names)
    if config.task == "captioning":
        return CaptionBatch(
            **whole, **text, prompt_tokens=1, references=((),) * images, image_ids=names
        )
    if config.task == "grounding":
        return GroundingBatch(**whole, **text, boxes=torch.ones(rows, 4), expressions=strings)
    raise ValueError(f"task {config.task!r} is no downstream task")
