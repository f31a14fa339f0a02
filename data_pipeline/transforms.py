"""Image augmentation on (H, W, 3) uint8 arrays, with the sample's own generator. No global random
state.

"none"         resize only when the size differs (bicubic, antialiased)
"blocksworld"  small shifts and brightness; never changes left and right, or a colour's name
"pretrain"     RandomResizedCrop 0.2-1.0, flip 0.5, RandAugment N=2 M=7 (X-VLM, arXiv 2111.08276)
"finetune"     the same with scale 0.5-1.0; no flip when a text says left or right

Regions crop by themselves (regions.py) and take only the colour operations.

RandAugment's operations are timm's. Those whose pixels a few array operations can give exactly
(translations, brightness, sharpness) are computed that way; tests compare every pixel with timm's.
"""

from __future__ import annotations

import math
import random
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
import torch
from torch.nn import functional

from data_pipeline.decode import Picture

__all__ = [
    "AUGMENTATIONS",
    "Augmentation",
    "crop",
    "mentions_side",
    "mirror",
    "random_resized_box",
    "resize",
    "sample_random",
]

AUGMENTATIONS = ("none", "blocksworld", "pretrain", "finetune")
_SIDES = re.compile(r"\b(left|right)\b", re.IGNORECASE)
_GREY = 128
_COLOUR = ("identity", "auto_contrast", "equalize", "brightness", "sharpness")
_GEOMETRY = ("shear_x", "shear_y", "translate_x", "translate_y", "rotate")
# RandAugment at magnitude 7 of 10, as published: factor 0.1 + 1.8 * 0.7, shear 0.3 * 0.7, 10 px *
# 0.7, 30 deg * 0.7.
_ENHANCE, _SHEAR, _SHIFT, _DEGREES = 1.36, 0.21, 7, 21.0
_LAYERS, _APPLY = 2, 0.5


def sample_random(seed: int, position: int, purpose: int = 0) -> random.Random:
    """The generator of one sample: a function of (seed, stream position, purpose) only.

    The position counts through all epochs, so a sample is augmented differently each time it
    returns.
    """
    return random.Random(((seed & 0xFFFFFFFF) << 96) | (position << 16) | (purpose & 0xFFFF))


def mentions_side(texts: Iterable[str]) -> bool:
    """True when a text says left or right, so that a mirrored picture would make it wrong."""
    return any(_SIDES.search(text) for text in texts)


def crop(
    image: np.ndarray | Picture, x: int, y: int, width: int, height: int, least: int = 0
) -> np.ndarray:
    """The pixels of a box: a view, nothing is copied.

    Args:
        image: (H, W, 3) uint8, or a picture that is not decoded yet.
        least: side that the crop is going to be resized to; a picture whose crop is at least twice
            as large may be decoded at half size. 0: always at full size.
    """
    if isinstance(image, Picture):
        return image.crop(x, y, width, height, least)
    return image[y : y + height, x : x + width]


def resize(image: np.ndarray, width: int, height: int) -> np.ndarray:
    """(height, width, 3) uint8, bicubic with antialias; the same array when nothing changes."""
    if image.shape[:2] == (height, width):
        return image
    # The batch axis comes first, so that torch sees a channels_last batch: it reads a crop without
    # a slow copy, and its answer is (H, W, 3) in memory.
    tensor = torch.from_numpy(image)[None].permute(0, 3, 1, 2)
    scaled = functional.interpolate(tensor, (height, width), mode="bicubic", antialias=True)
    return np.ascontiguousarray(scaled[0].permute(1, 2, 0).numpy())


def mirror(image: np.ndarray) -> np.ndarray:
    """Left and right exchanged; contiguous. torch does it ten times as fast as numpy."""
    return torch.from_numpy(np.ascontiguousarray(image)).flip(1).numpy()


def random_resized_box(
    width: int, height: int, scale: tuple[float, float], rng: random.Random
) -> tuple[int, int, int, int]:
    """(x, y, width, height) of a random crop: area share in `scale`, aspect in 3/4..4/3."""
    for _ in range(10):
        area = width * height * rng.uniform(*scale)
        aspect = math.exp(rng.uniform(math.log(3 / 4), math.log(4 / 3)))
        w, h = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 0 < w <= width and 0 < h <= height:
            return rng.randint(0, width - w), rng.randint(0, height - h), w, h
    # An extreme aspect: the largest centred crop within the allowed ones.
    w, h = min(width, round(height * 4 / 3)), min(height, round(width * 4 / 3))
    return (width - w) // 2, (height - h) // 2, w, h


def _translate(image: np.ndarray, axis: int, shift: int) -> np.ndarray:
    """Moves the content by `shift` pixels towards the start of an axis, as timm.translate_*_abs."""
    moved = np.full_like(image, _GREY)
    source, target = np.moveaxis(image, axis, 0), np.moveaxis(moved, axis, 0)
    if shift > 0:
        target[:-shift] = source[shift:]
    else:
        target[-shift:] = source[:shift]
    return moved


@cache
def _brightness_table() -> bytes:
    values = np.arange(256, dtype=np.float32) * np.float32(_ENHANCE)
    return np.minimum(values, 255).astype(np.uint8).tobytes()


def _brightness(image: np.ndarray) -> np.ndarray:
    """timm.brightness: a table of 256 values."""
    changed = bytearray(image).translate(_brightness_table())
    return np.frombuffer(changed, np.uint8).reshape(image.shape)


def _smooth(image: np.ndarray) -> np.ndarray:
    """PIL's SMOOTH filter: neighbours 1, centre 5, over 13, rounded; the border stays."""
    wide = image.astype(np.uint16)
    rows = wide[:-2] + wide[1:-1]
    rows += wide[2:]
    total = rows[:, :-2] + rows[:, 1:-1]
    total += rows[:, 2:]
    total += 4 * wide[1:-1, 1:-1]
    # floor(total / 13 + 1/2) in whole numbers; 13 is odd, so there is no tie.
    total *= 2
    total += 13
    total //= 26
    smooth = image.copy()
    smooth[1:-1, 1:-1] = total
    return smooth


def _extrapolate(base: np.ndarray, image: np.ndarray, factor: float) -> np.ndarray:
    """base + factor * (image - base), cut to 0..255: PIL's Image.blend in its own precision."""
    values = image.astype(np.float32)
    values -= base
    values *= np.float32(factor)
    values += base
    return np.clip(values, 0, 255, out=values).astype(np.uint8)


def _sharpness(image: np.ndarray) -> np.ndarray:
    """timm.sharpness."""
    return _extrapolate(_smooth(image), image, _ENHANCE)


def _signed(amount: float, rng: random.Random) -> float:
    return amount if rng.random() < 0.5 else -amount


@cache
def _operations() -> dict[str, Callable[[np.ndarray, random.Random], np.ndarray]]:
    """RandAugment's operations on (H, W, 3) uint8, contiguous. They never change their input."""
    from PIL import Image
    from timm.data import auto_augment as timm

    def colour(operation: Callable[..., Any]) -> Callable[..., np.ndarray]:
        return lambda image, rng: np.array(operation(Image.fromarray(image)))

    # timm's own RandAugment draws from global generators; its operations are pure.
    def geometric(operation: Callable[..., Any], amount: float) -> Callable[..., np.ndarray]:
        def apply(image: np.ndarray, rng: random.Random) -> np.ndarray:
            value = _signed(amount, rng)
            bilinear = Image.Resampling.BILINEAR
            picture = Image.fromarray(image)
            return np.array(operation(picture, value, resample=bilinear, fillcolor=(_GREY,) * 3))

        return apply

    return {
        "identity": lambda image, rng: image,
        "auto_contrast": colour(timm.auto_contrast),
        "equalize": colour(timm.equalize),
        "brightness": lambda image, rng: _brightness(image),
        "sharpness": lambda image, rng: _sharpness(image),
        "shear_x": geometric(timm.shear_x, _SHEAR),
        "shear_y": geometric(timm.shear_y, _SHEAR),
        "translate_x": lambda image, rng: _translate(image, 1, int(_signed(_SHIFT, rng))),
        "translate_y": lambda image, rng: _translate(image, 0, int(_signed(_SHIFT, rng))),
        "rotate": geometric(timm.rotate, _DEGREES),
    }


def _rand_augment(image: np.ndarray, rng: random.Random, names: tuple[str, ...]) -> np.ndarray:
    operations = _operations()
    chosen = [rng.choice(names) for _ in range(_LAYERS) if rng.random() < _APPLY]
    if chosen:
        image = np.ascontiguousarray(image)
    for name in chosen:
        image = operations[name](image, rng)
    return image


def _shift_and_brighten(image: np.ndarray, rng: random.Random) -> np.ndarray:
    """Moves by up to 1/24 of the side (edge pixels repeat) and scales brightness by 0.9..1.1."""
    height, width = image.shape[:2]
    reach_x, reach_y = max(1, width // 24), max(1, height // 24)
    dx, dy = rng.randint(-reach_x, reach_x), rng.randint(-reach_y, reach_y)
    rows = np.clip(np.arange(height) + dy, 0, height - 1)
    columns = np.clip(np.arange(width) + dx, 0, width - 1)
    table = np.clip(np.arange(256) * rng.uniform(0.9, 1.1) + 0.5, 0, 255).astype(np.uint8)
    return table[image[rows[:, None], columns]]


@dataclass(frozen=True)
class Augmentation:
    """One named augmentation to a square of `size` pixels. Picklable and stateless.

    Raises:
        ValueError: unknown name.
    """

    name: str
    size: int

    def __post_init__(self) -> None:
        if self.name not in AUGMENTATIONS:
            raise ValueError(
                f"data.augment must be one of {', '.join(AUGMENTATIONS)}, is '{self.name}'"
            )

    @property
    def flips(self) -> bool:
        """Whether pictures may be mirrored."""
        return self.name in ("pretrain", "finetune")

    def __call__(
        self, image: np.ndarray | Picture, rng: random.Random, texts: Iterable[str] = ()
    ) -> np.ndarray:
        """(size, size, 3) uint8.

        Args:
            image: (H, W, 3) uint8, or a picture that is not decoded yet.
            texts: what is said about the image; decides whether "finetune" may mirror it.

        Raises:
            SkipSample: the picture cannot be decoded.
        """
        height, width = image.shape[:2]
        if not self.flips:
            whole = resize(crop(image, 0, 0, width, height), self.size, self.size)
            return whole if self.name == "none" else _shift_and_brighten(whole, rng)
        scale = (0.2, 1.0) if self.name == "pretrain" else (0.5, 1.0)
        box = random_resized_box(width, height, scale, rng)
        pixels = resize(crop(image, *box, least=self.size), self.size, self.size)
        # Captions are not checked in pre-training, as published.
        keep = self.name == "finetune" and mentions_side(texts)
        if rng.random() < 0.5 and not keep:
            pixels = mirror(pixels)
        return _rand_augment(pixels, rng, _COLOUR + _GEOMETRY)

    def colours(self, image: np.ndarray, rng: random.Random) -> np.ndarray:
        """Only what leaves every pixel in its place: for regions, whose boxes must stay true."""
        return _rand_augment(image, rng, _COLOUR) if self.flips else image
