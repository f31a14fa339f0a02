"""Augmentation: shapes, determinism, and what each kind never changes."""

from __future__ import annotations

import io
import random

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from timm.data import auto_augment as timm

from data_pipeline import decode, transforms
from data_pipeline.decode import Picture, decode_image
from data_pipeline.transforms import (
    AUGMENTATIONS,
    Augmentation,
    crop,
    mentions_side,
    mirror,
    random_resized_box,
    resize,
    sample_random,
)


def picture(height=40, width=60, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def jpeg(image):
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, "JPEG", quality=95)
    return buffer.getvalue()


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
    found = Augmentation("none", 32)(image, random.Random(0))
    assert np.shares_memory(found, image)
    np.testing.assert_array_equal(found, image)


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


def test_a_crop_is_a_view_and_resizing_it_equals_resizing_a_copy():
    image = picture(90, 120)
    view = crop(image, 11, 7, 64, 50)
    assert np.shares_memory(view, image)
    for width, height in ((32, 32), (100, 90), (64, 20)):
        found = resize(view, width, height)
        assert found.flags.c_contiguous
        np.testing.assert_array_equal(found, resize(view.copy(), width, height))
    np.testing.assert_array_equal(mirror(view), view[:, ::-1])


TIMM = {
    "auto_contrast": (timm.auto_contrast, None),
    "equalize": (timm.equalize, None),
    "brightness": (timm.brightness, 1.36),
    "sharpness": (timm.sharpness, 1.36),
    "shear_x": (timm.shear_x, 0.21),
    "shear_y": (timm.shear_y, 0.21),
    "translate_x": (timm.translate_x_abs, 7.0),
    "translate_y": (timm.translate_y_abs, 7.0),
    "rotate": (timm.rotate, 21.0),
}


def by_timm(name, image, positive):
    """What timm's operation at magnitude 7 makes of the image, through PIL."""
    operation, amount = TIMM[name]
    source = Image.fromarray(image)
    if amount is None:
        return np.asarray(operation(source))
    if name in ("brightness", "sharpness"):
        return np.asarray(operation(source, amount))
    options = {"resample": Image.Resampling.BILINEAR, "fillcolor": (128, 128, 128)}
    return np.asarray(operation(source, amount if positive else -amount, **options))


@pytest.mark.parametrize("name", TIMM)
@pytest.mark.parametrize("kind", ["noise", "extremes", "steps", "tiny"])
def test_operations_give_timms_pixels(name, kind):
    rng = np.random.default_rng(3)
    image = {
        "noise": picture(61, 47),
        "extremes": rng.choice(np.array([0, 1, 254, 255], np.uint8), (40, 33, 3)),
        "steps": np.ascontiguousarray(
            np.repeat(np.arange(256, dtype=np.uint8)[None, :, None], 9, 0).repeat(3, 2)
        ),
        "tiny": picture(7, 5),
    }[kind]
    before = image.copy()
    signs = set()
    for seed in range(6):
        positive = random.Random(seed).random() < 0.5
        signs.add(positive)
        found = transforms._operations()[name](image, random.Random(seed))
        np.testing.assert_array_equal(found, by_timm(name, image, positive), strict=True)
    assert signs == {True, False}
    np.testing.assert_array_equal(image, before)


def test_extrapolation_equals_pils_blend_for_all_pairs_of_values():
    base, image = np.mgrid[0:256, 0:256].astype(np.uint8)
    found = transforms._extrapolate(base, image, 1.36)
    expected = Image.blend(Image.fromarray(base), Image.fromarray(image), 1.36)
    np.testing.assert_array_equal(found, np.asarray(expected))


def test_operations_are_applied_half_of_the_time():
    image = picture(32, 32)
    names = ("brightness",)
    same = sum(
        np.array_equal(transforms._rand_augment(image, random.Random(n), names), image)
        for n in range(400)
    )
    assert 60 < same < 140  # (1/2)^2 of them
    assert set(transforms._COLOUR + transforms._GEOMETRY) == set(transforms._operations())


@pytest.mark.parametrize("name", AUGMENTATIONS)
def test_encoded_pictures_and_arrays_give_the_same(name):
    """Nothing is decoded at half size here: no crop of 96 px is twice as large as 64."""
    raw = jpeg(picture(96, 80))
    for position in range(20):
        augment = Augmentation(name, 64)
        found = augment(Picture(raw), sample_random(1, position))
        expected = augment(decode_image(raw), sample_random(1, position))
        np.testing.assert_array_equal(found, expected)


def test_large_crops_are_decoded_at_half_size_only_in_random_crops(monkeypatch):
    halves = []
    original = decode._decode_half
    monkeypatch.setattr(decode, "_decode_half", lambda *a: halves.append(a) or original(*a))
    rows, columns = np.mgrid[0:200, 0:260]
    smooth = np.stack([rows, columns * 255 // 260, rows * 0 + 90], -1).astype(np.uint8)
    raw = jpeg(smooth)
    for name, expected in (("none", 0), ("blocksworld", 0), ("pretrain", 12)):
        augment = Augmentation(name, 32)
        monkeypatch.setattr(transforms, "_rand_augment", lambda image, rng, names: image)
        for position in range(12):
            found = augment(Picture(raw), sample_random(2, position))
            exact = augment(decode_image(raw), sample_random(2, position))
            assert found.shape == (32, 32, 3)
            assert np.abs(found.astype(int) - exact).max() <= 4
        assert len(halves) == expected


def test_unknown_name():
    with pytest.raises(ValueError, match="data.augment"):
        Augmentation("strong", 32)


def test_generators_of_neighbours_differ():
    draws = {sample_random(s, p, k).random() for s in range(4) for p in range(50) for k in range(3)}
    assert len(draws) == 600
