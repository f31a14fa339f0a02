"""Pictures of scenes: antialiased shapes on a dark, slightly tinted background with light noise.

Coverage masks are supersampled 8 x 8 and kept: a shape has few different sub-pixel positions,
because positions are whole units. A thing's box is the extent of its mask: exact in pixels.
"""

from __future__ import annotations

import functools
import hashlib
import io

import numpy as np
from PIL import Image

from data_pipeline.blocksworld.scenes import DIAMETER, UNITS, Scene, Thing, box_units

__all__ = ["Picture", "encode", "mask_and_corner", "pixel_box", "render"]

Picture = np.ndarray  # (size, size, 3) uint8 RGB

_RGB = {
    "red": (222, 38, 38),
    "green": (30, 170, 56),
    "blue": (40, 84, 230),
    "yellow": (244, 214, 36),
    "purple": (168, 50, 196),
    "white": (240, 240, 240),
}
_SUPER = 8
_VISIBLE = (
    0.06  # coverage below this is dropped: it would change a pixel by less than the noise does
)
_NOISE = 3.0  # standard deviation in grey levels
_SHADE = 6  # colour variation per thing, grey levels to either side


def _inside(shape: str, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Whether points lie in a shape that fills the box [-1, 1] x [-1, 1] (y points down)."""
    if shape == "circle":
        return x * x + y * y <= 1.0
    if shape == "square":
        return (np.abs(x) <= 1.0) & (np.abs(y) <= 1.0)
    if shape == "triangle":
        return (np.abs(y) <= 1.0) & (np.abs(x) <= (y + 1.0) / 2.0)
    if shape == "cross":
        bar = 0.36
        return ((np.abs(x) <= bar) & (np.abs(y) <= 1.0)) | ((np.abs(y) <= bar) & (np.abs(x) <= 1.0))
    raise ValueError(f"no drawing for shape {shape!r}")


@functools.lru_cache(maxsize=4096)
def _mask(
    shape: str, size: str, fraction_x: int, fraction_y: int, image: int
) -> tuple[int, int, np.ndarray]:
    """(column offset, row offset, (h, w, 1) float32 coverage) of a shape at a sub-pixel position.

    `fraction_*` is the left / top edge's position inside its pixel, in 1/UNITS pixels.
    """
    side = DIAMETER[size] * image / UNITS
    left, top = fraction_x / UNITS, fraction_y / UNITS
    width, height = int(np.ceil(left + side)), int(np.ceil(top + side))
    steps = (np.arange(max(width, height) * _SUPER) + 0.5) / _SUPER
    x = (steps[: width * _SUPER] - left) * 2.0 / side - 1.0
    y = (steps[: height * _SUPER] - top) * 2.0 / side - 1.0
    hit = _inside(shape, x[None, :], y[:, None])
    cover = hit.reshape(height, _SUPER, width, _SUPER).mean(axis=(1, 3)).astype(np.float32)
    cover[cover < _VISIBLE] = 0.0
    rows, columns = np.flatnonzero(cover.any(axis=1)), np.flatnonzero(cover.any(axis=0))
    cut = cover[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1, None]
    cut.setflags(write=False)
    return int(columns[0]), int(rows[0]), cut


def mask_and_corner(thing: Thing, image: int) -> tuple[int, int, np.ndarray]:
    """(column, row, (h, w, 1) float32 coverage) of a thing in a picture of `image` pixels."""
    left, top, _, _ = box_units(thing)
    column, fraction_x = divmod(left * image, UNITS)
    row, fraction_y = divmod(top * image, UNITS)
    offset_x, offset_y, cover = _mask(thing.shape, thing.size, fraction_x, fraction_y, image)
    return column + offset_x, row + offset_y, cover


def pixel_box(thing: Thing, image: int) -> list[int]:
    """[x, y, w, h] in pixels: the extent of the pixels that the thing changes."""
    column, row, cover = mask_and_corner(thing, image)
    return [column, row, cover.shape[1], cover.shape[0]]


def _background(rng: np.random.Generator, image: int) -> np.ndarray:
    base = rng.integers(22, 60) + rng.integers(-8, 9, 3)
    slope = rng.integers(-14, 15, 2)
    ramp = np.linspace(-0.5, 0.5, image, dtype=np.float32)
    plane = slope[0] * ramp[None, :] + slope[1] * ramp[:, None]
    return plane[:, :, None] + base.astype(np.float32)


def render(scene: Scene, image: int, noise: bool = True) -> Picture:
    """(image, image, 3) uint8 RGB. The same scene and key give the same pixels."""
    digest = hashlib.blake2b(scene.key.encode(), digest_size=8, person=b"picture").digest()
    rng = np.random.Generator(np.random.PCG64(int.from_bytes(digest, "little")))
    canvas = _background(rng, image)
    shades = rng.integers(-_SHADE, _SHADE + 1, (len(scene.things), 3))
    for thing, shade in zip(scene.things, shades, strict=True):
        column, row, cover = mask_and_corner(thing, image)
        area = canvas[row : row + cover.shape[0], column : column + cover.shape[1]]
        colour = (np.asarray(_RGB[thing.colour]) + shade).astype(np.float32)
        area += cover * (colour - area)
    if noise:
        canvas += rng.standard_normal(canvas.shape, dtype=np.float32) * np.float32(_NOISE)
    return np.clip(canvas + 0.5, 0.0, 255.0).astype(np.uint8)


def encode(picture: Picture, kind: str) -> bytes:
    """JPEG (4:4:4, so that small shapes keep their colour) or PNG bytes."""
    buffer = io.BytesIO()
    image = Image.fromarray(picture)
    if kind == "jpg":
        image.save(buffer, "JPEG", quality=90, subsampling=0)
    elif kind == "png":
        image.save(buffer, "PNG", compress_level=3)
    else:
        raise ValueError(f"unknown picture format {kind!r}; use jpg or png")
    return buffer.getvalue()
