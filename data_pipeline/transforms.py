"""Image augmentation on (H, W, 3) uint8 arrays, with the sample's own generator. No global random
state.

"none"         resize only when the size differs (bicubic, antialiased)
"blocksworld"  small shifts and brightness; never changes left and right, or a colour's name
"pretrain"     RandomResizedCrop 0.2-1.0, flip 0.5, RandAugment N=2 M=7        (X-VLM, arXiv
2111.08276) "finetune"     the same with scale 0.5-1.0; no flip when a text says left or right
Regions crop by themselves (regions.py) and take only the colour operations.
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

__all__ = [
    "AUGMENTATIONS",
    "Augmentation",
    "mentions_side",
    "random_resized_box",
    "resize",
    "sample_random",
]

AUGMENTATIONS = ("none", "blocksworld", "pretrain", "finetune")
_SIDES = re.compile(r"\b(left|right)\b", re.IGNORECASE)
_FILL = (128, 128, 128)
_COLOUR = ("identity", "auto_contrast", "equalize", "brightness", "sharpness")
_GEOMETRY = ("shear_x", "shear_y", "translate_x", "translate_y", "rotate")
# RandAugment at magnitude 7 of 10, as published: factor 0.1 + 1.8 * 0.7, shear 0.3 * 0.7, 10 px *
# 0.7, 30 deg * 0.7.
_ENHANCE, _SHEAR, _SHIFT, _DEGREES = 1.36, 0.21, 7.0, 21.0
_OPERATIONS, _APPLY = 2, 0.5


def sample_random(seed: int, position: int, purpose: int = 0) -> random.Random:
    """The generator of one sample: a function of (seed, stream position, purpose) only.

    The position counts through all epochs, so a sample is augmented differently each time it
    returns.
    """
    return random.Random(((seed & 0xFFFFFFFF) << 96) | (position << 16) | (purpose & 0xFFFF))


def mentions_side(texts: Iterable[str]) -> bool:
    """True when a text says left or right, so that a mirrored picture would make it wrong."""
    return any(_SIDES.search(text) for text in texts)


def resize(image: np.ndarray, width: int, height: int) -> np.ndarray:
    """(height, width, 3) uint8, bicubic with antialias; the same array when nothing changes."""
    if image.shape[:2] == (height, width):
        return image
    tensor = torch.from_numpy(np.ascontiguousarray(image)).permute(2, 0, 1)[None]
    scaled = functional.interpolate(tensor, (height, width), mode="bicubic", antialias=True)
    return np.ascontiguousarray(scaled[0].permute(1, 2, 0).numpy())


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


@cache
def _timm_operations() -> dict[str, Callable[..., Any]]:
    from PIL import Image
    from timm.data import auto_augment as timm

    # timm's own RandAugment draws from global generators; its operations are pure.
    def geometric(operation: Callable[..., Any], amount: float) -> Callable[..., Any]:
        def apply(image, rng: random.Random):
            value = amount if rng.random() < 0.5 else -amount
            return operation(image, value, resample=Image.Resampling.BILINEAR, fillcolor=_FILL)

        return apply

    return {
        "identity": lambda image, rng: image,
        "auto_contrast": lambda image, rng: timm.auto_contrast(image),
        "equalize": lambda image, rng: timm.equalize(image),
        "brightness": lambda image, rng: timm.brightness(image, _ENHANCE),
        "sharpness": lambda image, rng: timm.sharpness(image, _ENHANCE),
        "shear_x": geometric(timm.shear_x, _SHEAR),
        "shear_y": geometric(timm.shear_y, _SHEAR),
        "translate_x": geometric(timm.translate_x_abs, _SHIFT),
        "translate_y": geometric(timm.translate_y_abs, _SHIFT),
        "rotate": geometric(timm.rotate, _DEGREES),
    }


def _rand_augment(image: np.ndarray, rng: random.Random, names: tuple[str, ...]) -> np.ndarray:
    from PIL import Image

    operations = _timm_operations()
    chosen = [rng.choice(names) for _ in range(_OPERATIONS) if rng.random() < _APPLY]
    if not chosen:
        return image
    picture = Image.fromarray(image)
    for name in chosen:
        picture = operations[name](picture, rng)
    return np.array(picture)


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
        self, image: np.ndarray, rng: random.Random, texts: Iterable[str] = ()
    ) -> np.ndarray:
        """(size, size, 3) uint8.

        Args:
            texts: what is said about the image; decides whether "finetune" may mirror it.
        """
        if self.name == "none":
            return resize(image, self.size, self.size)
        if self.name == "blocksworld":
            return _shift_and_brighten(resize(image, self.size, self.size), rng)
        scale = (0.2, 1.0) if self.name == "pretrain" else (0.5, 1.0)
        x, y, w, h = random_resized_box(image.shape[1], image.shape[0], scale, rng)
        image = resize(image[y : y + h, x : x + w], self.size, self.size)
        # Captions are not checked in pre-training, as published.
        keep = self.name == "finetune" and mentions_side(texts)
        if rng.random() < 0.5 and not keep:
            image = image[:, ::-1]
        return _rand_augment(np.ascontiguousarray(image), rng, _COLOUR + _GEOMETRY)

    def colours(self, image: np.ndarray, rng: random.Random) -> np.ndarray:
        """Only what leaves every pixel in its place: for regions, whose boxes must stay true."""
        if not self.flips:
            return image
        return _rand_augment(np.ascontiguousarray(image), rng, _COLOUR)
