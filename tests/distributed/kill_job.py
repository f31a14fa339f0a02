"""A job that only reads: each rank delivers region and general batches and logs what it got.

    RANK=... python -m tests.distributed.kill_job FOLDER OUT --steps N ...

Each step of each rank appends one line to OUT/rank_R_of_M.log: the step, and for every row its key
and a hash of its pixels and text, taken from the batch. The cursor is saved after every step by
rank 0, atomically, when all ranks have logged the step; steps behind it are logged again after a
restart. Rank 0 prints a line a step, for who waits.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
from pathlib import Path

import torch
import torch.distributed as dist

from data_pipeline.batches import PretrainBatch
from data_pipeline.loader import Loader, build_loader
from data_pipeline.text import load_tokenizer
from train.data_config import RegionConfig, SourceConfig
from train.runtime.distributed import finish, start
from train.runtime.step import keyed_generator

STEP_SAMPLES, REGION_IMAGES, REGION_ROWS = 24, 24, 48


def line_of(batch: PretrainBatch) -> list[str]:
    """key:hash of each row: its pixels, its masked text and, for regions, its box."""
    rows = []
    for row in range(batch.rows):
        digest = hashlib.blake2b(digest_size=8)
        digest.update(batch.images[batch.image_index[row]].numpy().tobytes())
        digest.update(batch.mlm_ids[row].numpy().tobytes())
        digest.update(batch.mlm_labels[row].numpy().tobytes())
        if batch.boxes is not None:
            digest.update(batch.boxes[row].numpy().tobytes())
        rows.append(f"{batch.keys[row]}:{digest.hexdigest()}")
    return rows


def loaders(args: argparse.Namespace, rank: int, ranks: int, workers: int) -> tuple[Loader, Loader]:
    """The general mixture and the region stream, with cursors of their own."""
    tokenizer = load_tokenizer(args.folder / "one" / "tokenizer")
    mixture = [
        SourceConfig(path=str(args.folder / "one" / "pretrain" / "train"), weight=2.0),
        SourceConfig(path=str(args.folder / "two" / "pretrain" / "train"), weight=1.0),
    ]
    region = RegionConfig(
        images=REGION_IMAGES // ranks, rows=REGION_ROWS // ranks, max_regions=4, unit_images=2
    )
    common = {
        "tokenizer": tokenizer, "rank": rank, "world_size": ranks, "seed": 9, "train": True,
        "image_size": 24, "patch_size": 8, "max_tokens": 12, "block": 4, "window_blocks": 3,
        "workers": workers, "augment": "pretrain", "groups": 12, "region": region,
    }  # fmt: skip
    general = build_loader("pretrain", mixture, batch=STEP_SAMPLES // ranks, **common)
    return general, build_loader("region", mixture[:1], batch=1, **common)


def restore(out: Path, general: Loader, region: Loader) -> int:
    path = out / "cursor.json"
    if not path.is_file():
        return 0
    state = json.loads(path.read_text())
    general.load_state_dict(state["general"])
    region.load_state_dict(state["region"])
    return state["step"]


def save(out: Path, step: int, general: Loader, region: Loader) -> None:
    state = {"step": step, "general": general.state_dict(), "region": region.state_dict()}
    partial = out / "cursor.json.partial"
    partial.write_text(json.dumps(state))
    os.replace(partial, out / "cursor.json")


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--steps", type=int, required=True)
    parser.add_argument("--workers", type=int, default=0)
    args = parser.parse_args()
    place = start()
    torch.set_num_threads(1)
    general, region = loaders(args, place.rank, place.world_size, args.workers)
    step = restore(args.out, general, region)
    general_batches, region_batches = iter(general), iter(region)
    with (args.out / f"rank_{place.rank}_of_{place.world_size}.log").open("a") as log:
        while step < args.steps:
            rows: list[str] = []
            # The same draw on every rank, from the step alone.
            if torch.rand((), generator=keyed_generator(9, step, "branch")).item() < 0.5:
                rows += ["region", *line_of(next(region_batches))]
            rows += ["general", *line_of(next(general_batches))]
            log.write(json.dumps([step, place.rank, place.world_size, rows]) + "\n")
            log.flush()
            # A collective in every step: a rank with a batch less would hang here.
            if place.world_size > 1:
                dist.all_reduce(torch.ones(1))
            step += 1
            if place.rank == 0:
                save(args.out, step, general, region)
                print(step, flush=True)
    finish()


if __name__ == "__main__":
    main()
