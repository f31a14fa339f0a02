"""What batches of each task are made from: which shards, and which assembler."""

from __future__ import annotations

from typing import Protocol

from data_pipeline.assemblers import (
    CaptionAssembler,
    GroundingAssembler,
    Nlvr2Assembler,
    RetrievalAssembler,
)
from data_pipeline.collate import Assembler, PretrainAssembler, RegionAssembler, VqaAssembler
from data_pipeline.manifest import Manifest
from data_pipeline.text import Masking, TextEncoder
from data_pipeline.transforms import Augmentation

__all__ = ["RegionOptions", "SCHEMAS", "check_task", "make_assembler"]

# Which record a loader task reads, and which folders hold such records.
SCHEMAS = {
    "pretrain": "pretrain",
    "region": "pretrain",
    "vqa": "vqa",
    "nlvr2_pretrain": "pretrain",
    "nlvr2": "nlvr2",
    "retrieval": "retrieval",
    "captioning": "captioning",
    "grounding": "grounding",
}
_ACCEPTED = {
    "pretrain": ("pretrain", "captioning", "retrieval"),
    "region": ("pretrain",),
    "vqa": ("vqa",),
    "nlvr2_pretrain": ("pretrain", "captioning", "retrieval"),
    "nlvr2": ("nlvr2",),
    "retrieval": ("retrieval", "captioning"),
    "captioning": ("captioning", "retrieval", "pretrain"),
    "grounding": ("grounding",),
}
_SIMPLE = {
    "nlvr2_pretrain": RetrievalAssembler,
    "nlvr2": Nlvr2Assembler,
    "retrieval": RetrievalAssembler,
    "grounding": GroundingAssembler,
}


class RegionOptions(Protocol):
    """Settings of region batches (the run file's data.region)."""

    @property
    def images(self) -> int: ...
    @property
    def rows(self) -> int: ...
    @property
    def max_regions(self) -> int: ...
    @property
    def min_fraction_in_crop(self) -> float: ...
    @property
    def unit_images(self) -> int: ...


def make_assembler(
    task: str, *, tokenizer, seed: int, train: bool, image_size: int, patch_size: int,
    max_tokens: int, max_words: int, max_answer_tokens: int, mlm_probability: float, mlm_max: int,
    rows_per_image: int, augment: str, prompt: str, region: RegionOptions | None,
) -> Assembler:  # fmt: skip
    # Captions are cleaned before they get their prompt.
    text = TextEncoder(tokenizer, max_tokens, max_words or None, clean=task != "captioning")
    # Evaluation looks at whole, unchanged pictures whatever training does.
    augmentation = Augmentation(augment if train else "none", image_size)
    if task == "vqa":
        # As published, questions are cleaned and answers are not; nor are those that are ranked.
        answers = TextEncoder(tokenizer, max_answer_tokens, clean=False)
        return VqaAssembler(text, augmentation, seed, train, answers, rows_per_image)
    if task == "captioning":
        return CaptionAssembler(text, augmentation, seed, train, rows_per_image, prompt)
    if task in _SIMPLE:
        return _SIMPLE[task](text, augmentation, seed, train, rows_per_image)
    masking = Masking(tokenizer, mlm_probability, mlm_max)
    if task == "pretrain":
        return PretrainAssembler(text, augmentation, seed, train, masking)
    if region is None:
        raise ValueError("region batches need data.region")
    return RegionAssembler(
        text, augmentation, seed, train, masking,
        region.rows, region.max_regions, region.min_fraction_in_crop, patch_size,
    )  # fmt: skip


def check_task(manifest: Manifest, task: str) -> None:
    if manifest.task not in _ACCEPTED[task]:
        raise ValueError(
            f"{manifest.location}: holds '{manifest.task}' samples, but '{task}' batches need "
            f"'{SCHEMAS[task]}' (key data.train / data.val)"
        )
