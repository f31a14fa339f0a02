"""A million samples: how soon does a run go on in the middle, what does it read, what does it keep?

The samples are tiny (a picture of 16 x 16 and a caption; 2 KiB in the tar), so the shards take 2 GB
and the numbers are those of the order, the index and the state, not of decoding.
"""

from __future__ import annotations

import io
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from benchmarks.loading.shards import index_folder
from data_pipeline.blocksworld.vocabulary import write_tokenizer

__all__ = ["resume"]

PER_SHARD = 20_000
BATCH, SIZE = 64, 16
SETTLE = 50
EPOCHS, EPOCH_SAMPLES = 10, 50_000
_DIGITS = 9


def _header(name: str, size: int) -> bytes:
    """A ustar header whose name has `_DIGITS` zeros to be filled in; its checksum counts them."""
    import tarfile

    info = tarfile.TarInfo(name)
    info.size = size
    return info.tobuf(tarfile.USTAR_FORMAT)


def _write_shard(path: Path, first: int, samples: int) -> None:
    """Samples of 2 KiB each, alike but for the number in their names and records."""
    buffer = io.BytesIO()
    pixels = np.random.default_rng(0).integers(0, 256, (4, 4, 3), dtype=np.uint8)
    Image.fromarray(pixels.repeat(4, 0).repeat(4, 1)).save(
        buffer, "JPEG", quality=30, optimize=True
    )
    zeros = "0" * _DIGITS
    record = json.dumps({"image_id": zeros, "captions": ["a red circle"]}).encode()
    members = (("jpg", buffer.getvalue()), ("json", record))
    block, names, checksums = b"", [], []
    for extension, content in members:
        names.append(len(block))
        checksums.append(len(block) + 148)
        block += _header(f"{zeros}.{extension}", len(content))
        if extension == "json":
            names.append(len(block) + content.index(zeros.encode()))
        block += content + bytes(-len(content) % 512)
    rows = np.tile(np.frombuffer(block, np.uint8), (samples, 1))
    numbers = np.arange(first, first + samples)
    digits = numbers[:, None] // 10 ** np.arange(_DIGITS - 1, -1, -1) % 10
    for place in names:
        rows[:, place : place + _DIGITS] = digits + ord("0")
    for place in checksums:
        # Six octal digits of the sum over the header; the digits above zero are what changed.
        total = int(block[place : place + 6], 8) + digits.sum(axis=1)
        octal = total[:, None] // 8 ** np.arange(5, -1, -1) % 8
        rows[:, place : place + 6] = octal + ord("0")
    with open(path, "wb") as file:
        file.write(rows.data)
        file.write(bytes(1024))


def write_tiny(root: Path, samples: int) -> tuple[Path, float]:
    """The folder, and the seconds that `data index` took (0.0 when it was there already)."""
    folder = root / f"tiny-{samples}"
    if (folder / "manifest.json").is_file():
        return folder, 0.0
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    for number, first in enumerate(range(0, samples, PER_SHARD)):
        count = min(PER_SHARD, samples - first)
        _write_shard(folder / f"shard-{number:06d}.tar", first, count)
    write_tokenizer(folder)
    began = time.perf_counter()
    index_folder(folder)
    return folder, time.perf_counter() - began


def _loader(folder: Path, limit: int = 0):
    from data_pipeline.loader import build_loader
    from data_pipeline.text import load_tokenizer

    return build_loader(
        "pretrain", folder, tokenizer=load_tokenizer(folder), batch=BATCH, train=True,
        image_size=SIZE, patch_size=8, limit=limit,
    )  # fmt: skip


def _bytes_read() -> int:
    """What this process has read by system calls, the cache included (index files are mapped)."""
    for line in Path("/proc/self/io").read_text().splitlines():
        if line.startswith("rchar"):
            return int(line.split()[1])
    raise OSError("/proc/self/io has no rchar")


def _resident() -> float:
    """MB of memory in use, without pages of files."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssAnon"):
            return int(line.split()[1]) / 1024
    raise OSError("/proc/self/status has no RssAnon")


def first_batch(folder: Path, samples: int) -> dict[str, Any]:
    """In a fresh process: from `build_loader` to the first batch in the middle of the epoch."""
    import torch

    torch.set_num_threads(1)
    _loader(folder)  # imports and the tokenizer's file
    state = _loader(folder).state_dict()
    state["samples_consumed"] = samples // 2 // BATCH * BATCH
    began = time.perf_counter()
    loader = _loader(folder)
    loader.load_state_dict(state)
    made = time.perf_counter() - began
    before = _bytes_read()
    stream = iter(loader)
    batch = next(stream)
    total = time.perf_counter() - began
    read = _bytes_read() - before
    # When every shard has been opened once, only samples are read.
    for _ in range(SETTLE):
        next(stream)
    before = _bytes_read()
    for _ in range(SETTLE):
        next(stream)
    return {
        "seconds_to_first_batch": round(total, 4),
        "of_which_making_the_loader": round(made, 4),
        "samples_in_first_batch": len(batch.keys),
        "bytes_read_for_first_batch_and_opening_shards": read,
        "bytes_read_for_a_later_batch": round((_bytes_read() - before) / SETTLE),
        "state_bytes": len(json.dumps(loader.state_dict())),
        "resumed_at": state["samples_consumed"],
    }


def epochs(folder: Path) -> dict[str, Any]:
    """Resident memory at the end of each of ten epochs of one endless stream."""
    import torch

    torch.set_num_threads(1)
    loader = _loader(folder, limit=EPOCH_SAMPLES)
    stream = iter(loader)
    memory, began = [], time.perf_counter()
    for epoch in range(1, EPOCHS + 1):
        while loader.epoch < epoch:
            next(stream)
        memory.append(round(_resident(), 1))
    return {
        "samples_per_epoch": EPOCH_SAMPLES,
        "resident_mb_after_each_epoch": memory,
        "growth_mb_epoch_1_to_10": round(memory[-1] - memory[0], 1),
        "samples_per_second": round(EPOCHS * EPOCH_SAMPLES / (time.perf_counter() - began)),
    }


def _fresh(what: str, folder: Path, samples: int) -> dict[str, Any]:
    """One of the two measurements in a process of its own."""
    found = subprocess.run(
        [sys.executable, "-m", "benchmarks.loading.resume", what, str(folder), str(samples)],
        check=True, capture_output=True, text=True, cwd=Path(__file__).resolve().parents[2],
    )  # fmt: skip
    return json.loads(found.stdout)


def resume(root: Path, samples: int) -> dict[str, Any]:
    """Writes and indexes the samples, then measures in fresh processes."""
    folder, seconds = write_tiny(root, samples)
    for path in folder.glob("*.tar"):
        path.read_bytes()
    index_bytes = sum(path.stat().st_size for path in folder.glob("*.idx"))
    return {
        "samples": samples,
        "seconds_of_data_index": round(seconds, 1) or None,
        "index_bytes_per_sample": round(index_bytes / samples, 1),
        "load": os.getloadavg(),
        "resume": [_fresh("first_batch", folder, samples) for _ in range(3)],
        "stream": _fresh("epochs", folder, samples),
    }


if __name__ == "__main__":
    action = {"first_batch": first_batch, "epochs": lambda folder, samples: epochs(folder)}
    result = action[sys.argv[1]](Path(sys.argv[2]), int(sys.argv[3]))
    print(json.dumps(result))
