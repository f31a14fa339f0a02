"""Small files in the publishers' formats, and a look at what was made of them."""

from __future__ import annotations

import argparse
import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw

from data_pipeline import commands
from data_pipeline.index import load_index
from data_pipeline.manifest import load_manifest
from data_pipeline.records import parse_record
from data_pipeline.verify import read_members, verify


def picture(path: Path, number: int, size: tuple[int, int] = (48, 32), kind: str = "JPEG") -> bytes:
    """Writes a picture of `size` (width, height) whose content depends on `number`."""
    pixels = np.random.default_rng(number).integers(0, 255, (*size[::-1], 3), dtype=np.uint8)
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path, kind)
    return path.read_bytes()


def photo(seed: int, width: int = 320, height: int = 240) -> Image.Image:
    """A picture with the spectrum of photographs (amplitude falls with frequency) and edges."""
    rng = np.random.default_rng(seed)
    fy, fx = np.fft.fftfreq(height)[:, None] * height, np.fft.rfftfreq(width)[None] * width
    slope = np.maximum(np.hypot(fy, fx), 1) ** -1.2
    noise = rng.normal(size=(3, *slope.shape)) + 1j * rng.normal(size=(3, *slope.shape))
    pixels = np.fft.irfft2(noise * slope, s=(height, width))
    pixels = np.cumsum(pixels, 0)
    pixels = 128 + 45 * pixels / pixels.std((1, 2), keepdims=True)
    image = Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8).transpose(1, 2, 0).copy())
    draw = ImageDraw.Draw(image)
    for _ in range(rng.integers(1, 5)):
        x, y, side = rng.integers((width, height, 90)).tolist()
        draw.rectangle((x, y, x + side, y + side), fill=tuple(rng.integers(0, 255, 3).tolist()))
    return image


def encode(image: Image.Image, kind: str = "JPEG", quality: int = 90) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, quality=quality)
    return buffer.getvalue()


def dump(path: Path, content: Any) -> Path:
    """Writes JSON; returns the path."""
    path.write_text(json.dumps(content))
    return path


def samples(folder: Path) -> Iterator[tuple[str, dict[str, bytes], dict[str, Any]]]:
    """(key, members, JSON) of all samples, after `data verify` had nothing to say about them."""
    assert verify(folder)[1] == []
    manifest = load_manifest(folder)
    for number in range(len(manifest.shards)):
        path = manifest.path(number)
        index, data = load_index(path), path.read_bytes()
        for sample in range(len(index)):
            members = read_members(data, index, sample)
            parse_record(manifest.task, members["json"], path.name, index.key(sample))
            yield index.key(sample), members, json.loads(members["json"])


def verb(*words: str | Path) -> int:
    """Runs `espalier data ...`."""
    parser = argparse.ArgumentParser()
    commands.add_parsers(parser.add_subparsers(dest="verb"))
    return commands.run(parser.parse_args(["data", *map(str, words)]))
