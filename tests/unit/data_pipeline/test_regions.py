"""Region rows against brute-force oracles on pixels."""

from __future__ import annotations

import random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_pipeline.faults import SkipSample
from data_pipeline.records import PretrainRecord, RegionElement
from data_pipeline.regions import (
    choose_crop,
    choose_rows,
    clip_box,
    crop_frame,
    draw_region_rows,
    patch_mask,
)
from data_pipeline.transforms import Augmentation

SIZE, PATCH = 48, 8


@st.composite
def pixel_boxes(draw, limit=SIZE):
    x, y = draw(st.integers(0, limit - 1)), draw(st.integers(0, limit - 1))
    return x, y, draw(st.integers(1, limit - x)), draw(st.integers(1, limit - y))


def normalised(box, width=SIZE, height=SIZE):
    x, y, w, h = box
    return ((x + w / 2) / width, (y + h / 2) / height, w / width, h / height)


@settings(max_examples=150, deadline=None)
@given(boxes=st.lists(pixel_boxes(), min_size=1, max_size=4), patch=st.sampled_from([4, 8, 16]))
def test_patch_mask_against_pixels(boxes, patch):
    found = patch_mask(np.asarray([normalised(box) for box in boxes], np.float32), SIZE, patch)
    side = SIZE // patch
    assert found.shape == (len(boxes), 1 + side * side) and found[:, 0].all()
    for row, (x, y, w, h) in zip(found, boxes, strict=True):
        covered = np.zeros((SIZE, SIZE), bool)
        covered[y : y + h, x : x + w] = True
        cells = covered.reshape(side, patch, side, patch).any(axis=(1, 3))
        np.testing.assert_array_equal(row[1:].reshape(side, side), cells)


def test_tiny_and_border_boxes_see_one_patch():
    boxes = np.asarray([[1.0, 1.0, 0.0, 0.0], [0.5, 0.5, 1e-7, 1e-7], [0.5, 0.5, 1, 1]])
    assert patch_mask(boxes, 32, 16)[:, 1:].sum(axis=1).tolist() == [1, 1, 4]


@settings(max_examples=100, deadline=None)
@given(box=pixel_boxes(), seed=st.integers(0, 1000))
def test_a_crop_contains_its_box(box, seed):
    x0, y0, x1, y1 = choose_crop(box, SIZE, SIZE, random.Random(seed))
    x, y, w, h = box
    assert 0 <= x0 <= x and 0 <= y0 <= y and x + w <= x1 <= SIZE and y + h <= y1 <= SIZE
    assert clip_box(box, (x0, y0, x1, y1), 0.5) is not None


@settings(max_examples=150, deadline=None)
@given(box=pixel_boxes(), crop=pixel_boxes(), share=st.sampled_from([0.0, 0.3, 0.5, 0.9]))
def test_clip_box_against_pixels(box, crop, share):
    image = np.zeros((SIZE, SIZE), bool)
    x, y, w, h = box
    image[y : y + h, x : x + w] = True
    left, top, across, down = crop
    inside = image[top : top + down, left : left + across]
    found = clip_box(box, (left, top, left + across, top + down), share)
    if inside.sum() <= share * w * h:
        assert found is None
        return
    rows, columns = np.nonzero(inside)
    x0, y0 = columns.min(), rows.min()
    expected = (x0, y0, columns.max() + 1 - x0, rows.max() + 1 - y0)
    np.testing.assert_allclose(found, normalised(expected, across, down))


def painted(boxes):
    """An image whose regions have colours of their own, so that a row's box can be found by colour."""
    image = np.zeros((SIZE, SIZE, 3), np.uint8)
    for number, (x, y, w, h) in enumerate(boxes):
        image[y : y + h, x : x + w] = 40 * (number + 1)
    return image


@pytest.mark.parametrize("name", ["none", "blocksworld", "pretrain"])
def test_boxes_follow_their_pixels_through_crop_and_flip(name, monkeypatch):
    monkeypatch.setattr(Augmentation, "colours", lambda self, image, rng: image)
    boxes = [(4, 6, 10, 12), (30, 5, 12, 9), (22, 28, 20, 16)]
    elements = tuple(RegionElement((str(n),), box) for n, box in enumerate(boxes))
    record = PretrainRecord("1", ("whole",), elements, SIZE, SIZE)
    seen = 0
    for seed in range(60):
        rng = random.Random(seed)
        image, rows = draw_region_rows(
            record, painted(boxes), rng, Augmentation(name, 96), max_regions=5, min_fraction=0.5
        )
        assert rows[0].text == "whole" and not rows[0].is_region
        assert rows[0].box == (0.5, 0.5, 1.0, 1.0)
        for row in rows[1:]:
            cx, cy, _, _ = row.box
            value = image[int(cy * 96), int(cx * 96), 0]
            assert abs(int(value) - 40 * (int(row.text) + 1)) <= 3
            seen += 1
    assert seen >= 60


def test_row_limits_attributes_and_wordings():
    elements = tuple(
        RegionElement(("cat", "a cat"), (n, n, 10, 10), ("big", "red")) for n in range(8)
    )
    record = PretrainRecord("1", ("x",), elements, SIZE, SIZE)
    texts = set()
    for seed in range(40):
        _, rows = draw_region_rows(
            record,
            painted([]),
            random.Random(seed),
            Augmentation("none", SIZE),
            max_regions=3,
            min_fraction=0.5,
        )
        assert len(rows) == 3 and [row.is_region for row in rows] == [False, True, True]
        texts |= {row.text for row in rows[1:]}
    assert texts == {"big cat", "red cat", "big a cat", "red a cat"}


def test_a_picture_stored_smaller_than_its_frame():
    boxes = [(12, 12, 24, 24)]
    record = PretrainRecord("1", (), (RegionElement(("c",), (24, 24, 48, 48)),), 96, 96)
    image, rows = draw_region_rows(
        record,
        painted(boxes),
        random.Random(0),
        Augmentation("none", SIZE),
        max_regions=5,
        min_fraction=0.5,
    )
    assert image.shape == (SIZE, SIZE, 3)
    np.testing.assert_allclose(rows[0].box, (0.5, 0.5, 0.5, 0.5))


def test_a_box_at_the_border_of_a_much_smaller_picture():
    """Its crop may be narrower than a pixel of the picture, and must not be empty."""
    pixels = np.arange(24 * 24 * 3).reshape(24, 24, 3).astype(np.uint8)
    seen = crop_frame(pixels, (495, 497, 500, 500), 500, 500, 0)
    np.testing.assert_array_equal(seen, pixels[23:, 23:])


def test_a_box_outside_is_a_fault():
    record = PretrainRecord("1", (), (RegionElement(("c",), (40, 0, 10, 5)),), SIZE, SIZE)
    with pytest.raises(SkipSample, match=r"elems\[0\].bb"):
        draw_region_rows(
            record,
            painted([]),
            random.Random(0),
            Augmentation("none", SIZE),
            max_regions=5,
            min_fraction=0.5,
        )


@settings(max_examples=80, deadline=None)
@given(available=st.integers(1, 60), wanted=st.integers(1, 60), seed=st.integers(0, 99))
def test_choose_rows(available, wanted, seed):
    chosen = choose_rows(available, wanted, random.Random(seed))
    assert len(chosen) == wanted and set(chosen) <= set(range(available))
    if available >= wanted:
        assert len(set(chosen)) == wanted
    else:
        assert chosen[:available] == list(range(available))
