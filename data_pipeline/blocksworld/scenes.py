"""Scene graphs: one to six coloured shapes on a canvas of 96 x 96 units.

A scene is drawn from (seed, split, index, attempt) alone, so any process can redraw any scene.
Its digest is a hash of the canonical graph (things sorted, with positions; background and noise
left out). The digest also decides the split it may appear in, so the splits are disjoint for all
seeds at once: a test scene of one data folder is never a training scene of another.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Sequence
from typing import NamedTuple, TypeVar

__all__ = [
    "COLOURS",
    "DIAMETER",
    "MAX_THINGS",
    "SHAPES",
    "SIZES",
    "SPLITS",
    "UNITS",
    "Draw",
    "Scene",
    "Thing",
    "box_units",
    "draw_scene",
    "scene_digest",
    "split_of",
]

UNITS = 96
COLOURS = ("red", "green", "blue", "yellow", "purple", "white")
SHAPES = ("circle", "square", "triangle", "cross")
SIZES = ("small", "large")
DIAMETER = {"small": 20, "large": 30}
SPLITS = ("train", "val", "test")
MAX_THINGS = 6

_GAP = 3  # free units between two boxes: at least one pixel at 48 px
_CELL = UNITS // 3
_TRIES = 12
_RESTARTS = 6
# One thing is an easy but poor picture, six a crowded one: most scenes lie between.
_COUNT_WEIGHTS = (5, 15, 25, 25, 18, 12)
# Share of things that take colour or shape from an earlier one, so that counts above 1 occur.
_COPY = 0.3
_LARGE = 0.45

T = TypeVar("T")


class Draw:
    """Random choices that depend on the key alone, and on no library's shuffling.

    Only `random.Random.random` is used: Python promises its sequence for a given seed.
    """

    __slots__ = ("_next",)

    def __init__(self, *key: int | str) -> None:
        text = "/".join(map(str, key)).encode()
        seed = int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "little")
        self._next = random.Random(seed).random

    def below(self, n: int) -> int:
        """An integer in [0, n)."""
        return int(self._next() * n)

    def between(self, low: int, high: int) -> int:
        """An integer in [low, high], both included."""
        return low + int(self._next() * (high - low + 1))

    def unit(self) -> float:
        """A float in [0, 1)."""
        return self._next()

    def coin(self, chance: float = 0.5) -> bool:
        """True with the given chance."""
        return self._next() < chance

    def pick(self, items: Sequence[T]) -> T:
        """One of the items."""
        return items[int(self._next() * len(items))]

    def weighted(self, weights: Sequence[float]) -> int:
        """An index, in proportion to its weight."""
        left = self._next() * sum(weights)
        for index, weight in enumerate(weights):
            left -= weight
            if left < 0:
                return index
        return len(weights) - 1

    def shuffled(self, items: Sequence[T]) -> list[T]:
        """The items in random order (Fisher-Yates)."""
        out = list(items)
        for last in range(len(out) - 1, 0, -1):
            other = int(self._next() * (last + 1))
            out[last], out[other] = out[other], out[last]
        return out


class Thing(NamedTuple):
    """One shape. `x`, `y`: its centre in units; its box is a square of DIAMETER[size] units."""

    size: str
    colour: str
    shape: str
    x: int
    y: int


class Scene(NamedTuple):
    """Things in random order, and the key from which background, noise and wordings are drawn."""

    things: tuple[Thing, ...]
    key: str


def box_units(thing: Thing) -> tuple[int, int, int, int]:
    """(left, top, right, bottom) of a thing in units."""
    half = DIAMETER[thing.size] // 2
    return thing.x - half, thing.y - half, thing.x + half, thing.y + half


def scene_digest(things: Sequence[Thing]) -> int:
    """64-bit hash of the canonical graph; the order of the things does not matter."""
    text = repr(sorted(tuple(thing) for thing in things)).encode()
    return int.from_bytes(
        hashlib.blake2b(text, digest_size=8, person=b"scene-v1").digest(), "little"
    )


def split_of(digest: int) -> str:
    """The only split in which a scene may appear: 3/4 of all scenes train, 1/8 val, 1/8 test."""
    return SPLITS[max(0, (digest & 7) - 5)]


def _looks(draw: Draw) -> list[tuple[str, str, str]]:
    count = 1 + draw.weighted(_COUNT_WEIGHTS)
    looks: list[tuple[str, str, str]] = []
    for _ in range(count):
        size = SIZES[draw.coin(_LARGE)]
        copy_colour = looks and draw.coin(_COPY)
        colour = draw.pick(looks)[1] if copy_colour else draw.pick(COLOURS)
        copy_shape = looks and draw.coin(_COPY)
        shape = draw.pick(looks)[2] if copy_shape else draw.pick(SHAPES)
        looks.append((size, colour, shape))
    return looks


def _scatter(draw: Draw, halves: list[int]) -> list[tuple[int, int]] | None:
    """Positions anywhere, boxes apart; None where the canvas got too full."""
    placed: list[tuple[int, int, int]] = []
    for half in halves:
        for _ in range(_TRIES):
            x = draw.between(half + 1, UNITS - half - 1)
            y = draw.between(half + 1, UNITS - half - 1)
            if all(
                abs(x - px) >= half + ph + _GAP or abs(y - py) >= half + ph + _GAP
                for px, py, ph in placed
            ):
                placed.append((x, y, half))
                break
        else:
            return None
    return [(x, y) for x, y, _ in placed]


def _grid(draw: Draw, halves: list[int]) -> list[tuple[int, int]]:
    """Positions in the cells of a 3 x 3 grid, each box inside its cell: always possible."""
    places = []
    for cell, half in zip(draw.shuffled(range(9)), halves, strict=False):
        slack = max(0, (_CELL - _GAP - 2 * half) // 2)
        x = _CELL * (cell % 3) + _CELL // 2 + draw.between(-slack, slack)
        y = _CELL * (cell // 3) + _CELL // 2 + draw.between(-slack, slack)
        places.append((x, y))
    return places


def _draw_things(draw: Draw) -> tuple[Thing, ...]:
    looks = sorted(_looks(draw), key=lambda look: -DIAMETER[look[0]])  # large ones need room first
    halves = [DIAMETER[size] // 2 for size, _, _ in looks]
    places = None
    for _ in range(_RESTARTS):
        places = _scatter(draw, halves)
        if places is not None:
            break
    if places is None:
        places = _grid(draw, halves)
    things = [Thing(*look, *place) for look, place in zip(looks, places, strict=True)]
    return tuple(draw.shuffled(things))


def draw_scene(seed: int, split: str, index: int, attempt: int = 0) -> tuple[Scene, int]:
    """The scene of (seed, split, index) and its digest; another `attempt` gives another scene.

    Raises: ValueError for an unknown split.
    """
    if split not in SPLITS:
        raise ValueError(f"unknown split {split!r}; the splits are {', '.join(SPLITS)}")
    draw = Draw("scene", seed, split, index, attempt)
    while True:
        things = _draw_things(draw)
        digest = scene_digest(things)
        if split_of(digest) == split:
            return Scene(things, f"bw{seed}-{split}-{index:07d}"), digest
