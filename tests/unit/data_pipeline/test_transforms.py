"""Augmentation: shapes, determinism, and what each kind never changes."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from data_pipeline import transforms
from data_pipeline.transforms import (
    AUGMENTATIONS,
    Augmentation,
    mentions_side,
    random_resized_box,
    resize,
    sample_random,
)


def picture(height=40, width=60, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


@pytest.mark.parametrize("name", AUGMENTATIONS)
def test_shape_and_determinism_without_global_state(name):
    augment = Augmentation(name, 32)
    random.seed(1)
    np.random.seed(1)
    torch.manual_seed(1)
    first = [augment(picture(), sample_random(5, n), ("a cat",)) for n in range(12)]
    random.seed(2)
    np.random.seed(2)
    torch.manual_seed(2)
    state = random.getstate(), torch.get_rng_state()
    again = [augment(picture(), sample_random(5, n), ("a cat",)) for n in range(12)]
    assert all(image.shape == (32, 32, 3) and image.dtype == np.uint8 for image in first)
    for one, two in zip(first, again, strict=True):
        np.testing.assert_array_equal(one, two)
    assert random.getstate() == state[0] and torch.equal(torch.get_rng_state(), state[1])
    if name != "none":
        assert any((image != first[0]).any() for image in first[1:])


def test_none_keeps_a_picture_of_the_right_size():
    image = picture(32, 32)
    assert Augmentation("none", 32)(image, random.Random(0)) is image


def test_blocksworld_keeps_sides_and_colours():
    image = np.zeros((48, 48, 3), np.uint8)
    image[:, :24] = (200, 30, 30)
    image[:, 24:] = (30, 30, 200)
    augment = Augmentation("blocksworld", 48)
    for number in range(50):
        out = augment(image, sample_random(0, number)).astype(int)
        assert (out[:, :20, 0] > 3 * out[:, :20, 2]).all()
        assert (out[:, 28:, 2] > 3 * out[:, 28:, 0]).all()
        assert np.abs(out[5, 5] - image[5, 5]).max() <= 25


def is_mirrored(image):
    return image[..., 0][:, :10].mean() < image[..., 0][:, -10:].mean()


@pytest.mark.parametrize(("text", "flips"), [("a cat on the left", False), ("a cat", True)])
def test_finetune_mirrors_only_without_sides(text, flips):
    image = np.broadcast_to(np.linspace(250, 5, 48)[None, :, None], (48, 48, 3)).astype(np.uint8)
    augment = Augmentation("finetune", 48)
    seen = [is_mirrored(augment(image, sample_random(0, n), (text,))) for n in range(40)]
    assert any(seen) == flips


def test_side_words():
    assert mentions_side(["what", "is Left of it"]) and mentions_side(["RIGHT?"])
    assert not mentions_side(["bright leftover"])


@settings(max_examples=80, deadline=None)
@given(width=st.integers(1, 300), height=st.integers(1, 300), seed=st.integers(0, 99))
def test_random_resized_box_stays_inside(width, height, seed):
    x, y, w, h = random_resized_box(width, height, (0.2, 1.0), random.Random(seed))
    assert x >= 0 and y >= 0 and w >= 1 and h >= 1 and x + w <= width and y + h <= height


def test_resize_matches_float_interpolation():
    image = picture()
    found = resize(image, 24, 16)
    tensor = torch.from_numpy(image).permute(2, 0, 1)[None].float()
    exact = torch.nn.functional.interpolate(tensor, (16, 24), mode="bicubic", antialias=True)
    expected = exact[0].permute(1, 2, 0).clamp(0, 255).numpy()
    assert np.abs(found - expected).max() <= 1.5


def test_every_operation_runs_and_is_applied_half_of_the_time():
    image = picture(32, 32)
    for operation in transforms._timm_operations().values():
        from PIL import Image

        assert operation(Image.fromarray(image), random.Random(0)).size == (32, 32)
    names = ("brightness",)
    same = sum(
        np.array_equal(transforms._rand_augment(image, random.Random(n), names), image)
        for n in range(400)
    )
    assert 60 < same < 140  # (1/2)^2 of them


def test_unknown_name():
    with pytest.raises(ValueError, match="data.augment"):
        Augmentation("strong", 32)


def test_generators_of_neighbours_differ():
    draws = {sample_random(s, p, k).random() for s in range(4) for p in range(50) for k in range(3)}
    assert len(draws) == 600
