"""The shards that every contestant reads: pictures drawn by a rule, with the statistics of photographs.

Occluding shapes of all sizes, as in the "dead leaves" model of natural images, with textures and
light whose spectrum falls as a power of the frequency, and a little sensor noise. At quality 90 they
compress like photographs: about 30 kB at 384 x 288, 70 kB at 640 x 480.
"""

from __future__ import annotations

import io
import json
import os
import shutil
import subprocess
import sys
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFilter

from data_pipeline.blocksworld.vocabulary import write_tokenizer
from data_pipeline.shards import write_shard

__all__ = ["PROFILES", "energon_copy", "index_folder", "photograph", "warm", "write_profile"]

PROFILES = {"384": (384, 288), "640": (640, 480)}
PER_SHARD = 128
_WORDS = (
    "the", "small", "large", "red", "green", "blue", "circle", "square", "triangle", "left", "above",
    "below", "next", "two", "three", "shapes", "with", "and", "on", "in", "picture", "there", "are",
)  # fmt: skip


def _noise(rng: np.random.Generator, height: int, width: int, power: float) -> np.ndarray:
    """(H, W) float32 with amplitude 1 / frequency**power, standard deviation 1."""
    down, across = np.fft.fftfreq(height)[:, None], np.fft.rfftfreq(width)[None]
    frequency = np.hypot(down, across)
    frequency[0, 0] = 1
    spectrum = rng.standard_normal(frequency.shape) + 1j * rng.standard_normal(frequency.shape)
    spectrum /= frequency**power
    spectrum[0, 0] = 0
    values = np.fft.irfft2(spectrum, (height, width))
    return (values / values.std()).astype(np.float32)


def photograph(seed: int, width: int, height: int) -> Image.Image:
    """One picture; a function of the seed and size."""
    rng = np.random.default_rng(seed)
    grey = rng.integers(30, 225, (12, 1))
    palette = np.clip(grey + rng.normal(0, 30, (12, 3)), 0, 255)
    picture = Image.new("RGB", (width, height), tuple(int(v) for v in palette[0]))
    draw = ImageDraw.Draw(picture)
    for _ in range(220):
        half = min(height / 2.5, 6 / (rng.random() ** 0.6 + 1e-3) * height / 200)
        across = half * rng.uniform(0.5, 1.6)
        x, y = rng.random() * width, rng.random() * height
        colour = np.clip(palette[rng.integers(12)] + rng.normal(0, 12, 3), 0, 255)
        shape = draw.ellipse if rng.random() < 0.5 else draw.rectangle
        shape((x - across, y - half, x + across, y + half), fill=tuple(int(v) for v in colour))
    picture = picture.filter(ImageFilter.GaussianBlur(0.8 * width / 640))
    values = np.asarray(picture, np.float32)
    texture = _noise(rng, height, width, 1.2) * 14 * rng.uniform(0.4, 1.3)
    light = _noise(rng, height, width, 2.0) * 18
    values = values + (texture + light)[..., None]
    values += np.stack([_noise(rng, height, width, 1.6) for _ in range(3)], -1) * 3
    values += rng.normal(0, 1.5, (height, width, 1))
    return Image.fromarray(np.clip(values, 0, 255).astype(np.uint8))


def _samples(profile: str, numbers: range, seed: int):
    width, height = PROFILES[profile]
    for number in numbers:
        key = seed * 1_000_000 + number
        buffer = io.BytesIO()
        photograph(key, width, height).save(buffer, "JPEG", quality=90, subsampling=2)
        words = np.random.default_rng(key).choice(_WORDS, 11)
        record = {
            "image_id": f"photo-{number}",
            "captions": [" ".join(words), " ".join(words[::-1])],
            "width": width,
            "height": height,
        }
        yield f"{number:08d}", {"jpg": buffer.getvalue(), "json": json.dumps(record).encode()}


def _write(folder: Path, profile: str, shard: int, seed: int) -> int:
    numbers = range(shard * PER_SHARD, (shard + 1) * PER_SHARD)
    return write_shard(folder, shard, _samples(profile, numbers, seed))


def index_folder(folder: Path) -> None:
    """Indexes and manifest, by the command that users have."""
    command = [sys.executable, "-m", "train.main", "data", "index", str(folder)]
    command += ["--task", "pretrain", "--split", "train"]
    subprocess.run(command, check=True, cwd=Path(__file__).resolve().parents[2])


def write_profile(root: Path, profile: str, samples: int, seed: int) -> Path:
    """ROOT/PROFILE-SAMPLES-SEED with shards, index, manifest and a tokenizer; kept if it is there."""
    folder = root / f"{profile}-{samples}-{seed}"
    if (folder / "manifest.json").is_file():
        return folder
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    shards = -(-samples // PER_SHARD)
    with ProcessPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        list(
            pool.map(
                _write, *zip(*[(folder, profile, n, seed) for n in range(shards)], strict=True)
            )
        )
    write_tokenizer(folder)
    index_folder(folder)
    return folder


def energon_copy(folder: Path, command: Path) -> Path:
    """The same tar files (hard links) as Energon prepares them.

    In a folder of its own: Energon's index files have the names of ours.
    """
    copy = folder.with_name(folder.name + "-energon")
    if (copy / ".nv-meta" / "dataset.yaml").is_file():
        return copy
    shutil.rmtree(copy, ignore_errors=True)
    copy.mkdir()
    for tar in sorted(folder.glob("*.tar")):
        os.link(tar, copy / tar.name)
    subprocess.run(
        [
            str(command), "prepare", str(copy), "--non-interactive", "--split-parts",
            r"train:.*\.tar", "--sample-type", "CrudeWebdataset", "--num-workers", "1",
        ],
        check=True,
        stdout=subprocess.DEVNULL,
    )  # fmt: skip
    return copy


def warm(folder: Path) -> int:
    """Reads all shards once, so that they lie in the page cache. Their bytes."""
    return sum(len(path.read_bytes()) for path in folder.glob("*.tar"))
