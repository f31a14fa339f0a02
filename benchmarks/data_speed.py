"""How fast is the embedded data set written, and how fast is it read back as batches?

    python benchmarks/data_speed.py --scenes 6000

Writes scenes with all six tasks at 64 px on all cores, reads VQA and pre-training batches in one process, and puts
medians over the repeats into benchmarks/results/data_speed.json.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))


def write_speed(folder: Path, scenes: int, size: int, processes: int) -> float:
    """Scenes a second over the whole call, start-up of the processes included."""
    from data_pipeline.blocksworld.build import build_blocksworld

    began = time.perf_counter()
    build_blocksworld(
        folder, scenes, val=200, test=200, image_size=size, seed=7, processes=processes
    )
    return (scenes + 400) / (time.perf_counter() - began)


def read_speed(folder: Path, task: str, size: int, batches: int) -> float:
    """Images a second in one process, decoding, tokenising and collation included."""
    from data_pipeline.loader import build_loader
    from data_pipeline.text import load_tokenizer
    from train.data_config import DataConfig

    data = DataConfig(train="")
    loader = build_loader(
        task,
        folder / task / "train",
        tokenizer=load_tokenizer(folder / "tokenizer"),
        batch=64,
        rank=0,
        world_size=1,
        seed=0,
        train=True,
        image_size=size,
        patch_size=8,
        max_tokens=40,
        max_answer_tokens=3,
        mlm_probability=data.mlm_probability,
        mlm_max=data.mlm_max,
        rows_per_image=4,
        augment="none",
        workers=0,
        block=data.block,
        window_blocks=data.window_blocks,
        faults="raise",
        max_fault_rate=data.max_fault_rate,
        region=data.region,
    )
    stream = iter(loader)
    for _ in range(3):
        next(stream)
    began = time.perf_counter()
    for _ in range(batches):
        next(stream)
    return 64 * batches / (time.perf_counter() - began)


def spread(values: list[float]) -> dict[str, Any]:
    return {
        "median": statistics.median(values),
        "min": min(values),
        "max": max(values),
        "runs": len(values),
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--scenes", type=int, default=6000)
    parser.add_argument("--size", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--json", type=Path, default=ROOT / "benchmarks/results/data_speed.json")
    args = parser.parse_args()
    cores = len(os.sched_getaffinity(0))
    written, vqa, pretrain = [], [], []
    for _ in range(args.repeats):
        with tempfile.TemporaryDirectory() as place:
            folder = Path(place) / "data"
            written.append(write_speed(folder, args.scenes, args.size, cores))
            vqa.append(read_speed(folder, "vqa", args.size, 40))
            pretrain.append(read_speed(folder, "pretrain", args.size, 40))
    from train.provenance import provenance

    result = {
        "what": f"blocksworld at {args.size} px, six tasks, {cores} cores; reading in one process",
        "command": " ".join(["python", *sys.argv]),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "scenes_written_per_s": spread(written),
        "vqa_images_read_per_s": spread(vqa),
        "pretrain_images_read_per_s": spread(pretrain),
        "provenance": provenance(1),
    }
    args.json.parent.mkdir(parents=True, exist_ok=True)
    args.json.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
