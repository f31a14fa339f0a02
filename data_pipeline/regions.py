"""Region rows: crops that keep a described box, boxes in the crop, and the patches a region may
see.

After X-VLM (arXiv 2111.08276): a random element is chosen, the crop contains its box, and every
other element counts when enough of its area is left. Boxes are pixels in the record's frame until
they become normalised (cx, cy, w, h) in the crop.
"""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from data_pipeline.decode import Picture
from data_pipeline.faults import SkipSample
from data_pipeline.records import Box, PretrainRecord, RegionElement
from data_pipeline.transforms import Augmentation, crop, mirror, resize

__all__ = [
    "RegionRow",
    "check_box",
    "choose_crop",
    "choose_rows",
    "clip_box",
    "crop_frame",
    "draw_region_rows",
    "patch_mask",
]

_WHOLE = (0.5, 0.5, 1.0, 1.0)


@dataclass(frozen=True, slots=True)
class RegionRow:
    """One text about a part of an image (or about all of it, when not `is_region`).

    `box`: normalised (cx, cy, w, h) in the crop.
    """

    text: str
    box: tuple[float, float, float, float]
    is_region: bool


def choose_crop(box: Box, width: int, height: int, rng: random.Random) -> tuple[int, int, int, int]:
    """(x0, y0, x1, y1) in whole pixels of a crop around `box`, edges uniform up to the border."""
    x, y, w, h = box
    x0, y0 = rng.randint(0, math.floor(x)), rng.randint(0, math.floor(y))
    x1 = rng.randint(min(math.ceil(x + w), width), width)
    y1 = rng.randint(min(math.ceil(y + h), height), height)
    return x0, y0, x1, y1


def clip_box(
    box: Box, crop: tuple[int, int, int, int], min_fraction: float
) -> tuple[float, float, float, float] | None:
    """Normalised (cx, cy, w, h) of the part of `box` in the crop; None when too little is left."""
    x, y, w, h = box
    x0, y0, x1, y1 = crop
    left, top = max(x, x0), max(y, y0)
    right, bottom = min(x + w, x1), min(y + h, y1)
    if right <= left or bottom <= top or (right - left) * (bottom - top) <= min_fraction * w * h:
        return None
    across, down = x1 - x0, y1 - y0
    return (
        ((left + right) / 2 - x0) / across,
        ((top + bottom) / 2 - y0) / down,
        (right - left) / across,
        (bottom - top) / down,
    )


def patch_mask(boxes: np.ndarray, image_size: int, patch_size: int) -> np.ndarray:
    """(B, 1 + patches) bool: the class token, and the patches that each box touches (at least one
    per axis).

    Args:
        boxes: (B, 4) normalised (cx, cy, w, h).
    """
    side = image_size // patch_size
    # Rounding keeps an edge that lies on a patch border from spilling over by an ulp.
    scaled = np.round(np.asarray(boxes, np.float64) * side, 6)
    half = scaled[:, 2:] / 2
    low = np.floor(np.round(scaled[:, :2] - half, 5)).astype(np.int64)
    high = np.ceil(np.round(scaled[:, :2] + half, 5)).astype(np.int64)
    low = np.clip(low, 0, side - 1)
    high = np.clip(np.maximum(high, low + 1), 1, side)
    cells = np.arange(side)
    inside = (cells >= low[..., None]) & (cells < high[..., None])  # (B, axis, side)
    grid = inside[:, 1, :, None] & inside[:, 0, None, :]
    return np.concatenate([np.ones((len(boxes), 1), bool), grid.reshape(len(boxes), -1)], axis=1)


def _caption(element: RegionElement, rng: random.Random) -> str:
    caption = rng.choice(element.captions)
    if element.attributes:
        return f"{rng.choice(element.attributes)} {caption}"
    return caption


def check_box(box: Box, width: int, height: int, field: str) -> None:
    """Raises SkipSample naming the JSON field when a box leaves the image."""
    x, y, w, h = box
    if x < 0 or y < 0 or x + w > width + 1e-3 or y + h > height + 1e-3:
        raise SkipSample("box", f"field '{field}' {list(box)} leaves the image ({width}x{height})")


def _check_boxes(record: PretrainRecord) -> None:
    for number, element in enumerate(record.elements):
        check_box(element.box, record.width, record.height, f"elems[{number}].bb")


def crop_frame(
    image: np.ndarray | Picture,
    box: tuple[int, int, int, int],
    frame_width: int,
    frame_height: int,
    least: int,
) -> np.ndarray:
    """The crop (x0, y0, x1, y1) of the image, whose size may differ from the record's frame.

    `least`: see `transforms.crop`.
    """
    height, width = image.shape[:2]
    across, down = width / frame_width, height / frame_height
    # In a much smaller picture a narrow crop at the border may be rounded out of it.
    x0, x1 = min(round(box[0] * across), width - 1), round(box[2] * across)
    y0, y1 = min(round(box[1] * down), height - 1), round(box[3] * down)
    return crop(image, x0, y0, max(x1 - x0, 1), max(y1 - y0, 1), least)


def draw_region_rows(
    record: PretrainRecord,
    image: np.ndarray | Picture,
    rng: random.Random,
    augmentation: Augmentation,
    *,
    max_regions: int,
    min_fraction: float,
) -> tuple[np.ndarray, list[RegionRow]]:
    """The crop of one image, (size, size, 3) uint8, and 1..max_regions rows about it.

    The caption row, where there is one, comes first and counts. With augmentation "none" the whole
    image is used.

    Raises:
        SkipSample: a box leaves the image, or there is nothing to say about it.
    """
    _check_boxes(record)
    if not record.elements and not record.captions:
        raise SkipSample("missing", "no caption and no region")
    seen = (0, 0, max(1, record.width), max(1, record.height))
    if record.elements and augmentation.name != "none":
        anchor = rng.choice(record.elements)
        seen = choose_crop(anchor.box, record.width, record.height, rng)
    rows = []
    if record.captions:
        rows.append(RegionRow(rng.choice(record.captions), _WHOLE, False))
    flip = augmentation.flips and rng.random() < 0.5
    elements = list(record.elements)
    rng.shuffle(elements)
    for element in elements:
        if len(rows) >= max_regions:
            break
        box = clip_box(element.box, seen, min_fraction)
        if box is not None:
            mirrored = (1.0 - box[0], *box[1:]) if flip else box
            rows.append(RegionRow(_caption(element, rng), mirrored, True))
    least = augmentation.size if augmentation.flips else 0
    if record.width:
        pixels = crop_frame(image, seen, record.width, record.height, least)
    else:
        pixels = crop(image, 0, 0, image.shape[1], image.shape[0], least)
    pixels = resize(pixels, augmentation.size, augmentation.size)
    if flip:
        pixels = mirror(pixels)
    return augmentation.colours(pixels, rng), rows


def choose_rows(available: int, wanted: int, rng: random.Random) -> list[int]:
    """Exactly `wanted` row numbers: a sample without replacement, or all of them and drawn
    duplicates.

    A fixed number of rows keeps every rank's collectives the same size.
    """
    if available >= wanted:
        return sorted(rng.sample(range(available), wanted))
    return [*range(available), *rng.choices(range(available), k=wanted - available)]


def count_rows(groups: Sequence[Sequence[RegionRow]]) -> list[int]:
    """The image of each row when the images' rows are laid end to end."""
    return [image for image, rows in enumerate(groups) for _ in rows]
