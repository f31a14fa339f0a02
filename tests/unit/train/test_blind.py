"""Evaluation without pictures: grey ones, and chance."""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import Any

import pytest
import torch

from train.evaluation.downstream import BlankPictures, chance_recalls, table


@dataclass(frozen=True)
class Pictures:
    images: torch.Tensor
    label: int


def test_all_pictures_are_one_colour_and_nothing_else_changes() -> None:
    images = torch.randint(0, 256, (2, 3, 4, 4), dtype=torch.uint8)
    loader = [Pictures(images, 7)]
    blank: Any = next(iter(BlankPictures(loader, (0.5, 0.0, 1.0))))  # type: ignore[arg-type]
    assert blank.label == 7 and blank.images.shape == images.shape
    assert blank.images.flatten(2).amin(2).tolist() == [[128, 0, 255]] * 2
    assert torch.equal(blank.images.flatten(2).amin(2), blank.images.flatten(2).amax(2))
    assert loader[0].images is images and not torch.equal(images, blank.images)


def test_chance_is_what_random_orders_find() -> None:
    images, captions = 12, 3
    found = chance_recalls(images, images * captions)
    rng, hits, rounds = random.Random(0), 0, 4000
    texts = [text // captions for text in range(images * captions)]
    for _ in range(rounds):
        rng.shuffle(texts)
        hits += 0 in texts[:5]
    assert found["blind_image_to_text_r5"] == pytest.approx(hits / rounds, abs=0.025)
    assert found["blind_text_to_image_r5"] == pytest.approx(5 / 12)
    six = [value for name, value in found.items() if name != "blind_r_mean"]
    assert len(six) == 6 and found["blind_r_mean"] == pytest.approx(sum(six) / 6)
    assert chance_recalls(3, 3)["blind_text_to_image_r10"] == 1.0


def test_blind_numbers_stand_beside_their_own() -> None:
    lines = table({"accuracy": 0.75, "accuracy_count": 8.0, "blind_accuracy": 0.5}).splitlines()
    assert len(lines) == 2 and "75.00 %   blind  50.00 %" in lines[0] and "8" in lines[1]
