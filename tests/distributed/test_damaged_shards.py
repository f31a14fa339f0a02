"""Twenty kinds of damage through a real loader on two ranks: equal steps, no hang, nothing wrong."""

from __future__ import annotations

import hashlib
import json
import random
import shutil
from pathlib import Path
from typing import Any

import pytest

from data_pipeline.blocksworld.build import build_blocksworld
from data_pipeline.index import load_index
from tests.distributed.spawn import run_ranks

CASES, STEPS, SCENES = 20, 8, 40


def spoil(path: Path, rng: random.Random) -> str:
    """Damages a shard in one way; says which."""
    raw = bytearray(path.read_bytes())
    kind = rng.choice(("cut", "header", "data", "zero", "zero many"))
    place = rng.randrange(0, len(raw) - 1024)
    if kind == "cut":
        del raw[rng.randrange(1, len(raw) // 512) * 512 :]
    elif kind == "header":
        index = load_index(path)
        member = rng.choice(index.members(rng.randrange(len(index))))
        raw[member.offset - rng.randint(1, 512)] ^= 0xFF
    elif kind == "data":
        raw[place] ^= 1 << rng.randrange(8)
    else:
        blocks = 1 if kind == "zero" else 24
        start = place // 512 * 512
        raw[start : start + 512 * blocks] = bytes(min(512 * blocks, len(raw) - start))
    path.write_bytes(raw)
    return kind


def read(folders: list[str], tokenizer: str) -> list[dict[str, Any]]:
    """What each damaged folder gives on this rank: pictures by key, faults, or the error."""
    import torch
    import torch.distributed as dist

    from data_pipeline.loader import build_loader
    from data_pipeline.text import load_tokenizer

    words = load_tokenizer(tokenizer)
    results = []
    for folder in folders:
        found: dict[str, Any] = {"pictures": [], "steps": 0, "faults": {}, "error": ""}
        try:
            loader = build_loader(
                "pretrain", folder, tokenizer=words, batch=4, rank=dist.get_rank(), world_size=2,
                seed=1, train=True, image_size=32, block=4, window_blocks=4, groups=2,
                faults="skip", max_fault_rate=1.0,
                quarantine=Path(folder) / f"quarantine_{dist.get_rank()}.jsonl",
            )  # fmt: skip
            batches = iter(loader)
        except ValueError as error:
            found["error"] = str(error)
        for _ in range(0 if found["error"] else STEPS):
            batch = next(batches)
            dist.all_reduce(torch.ones(1))  # an unequal number of steps would hang here
            found["steps"] += 1
            found["pictures"] += [
                (key, hashlib.blake2b(image.numpy().tobytes()).hexdigest())
                for key, image in zip(batch.keys, batch.images, strict=True)
            ]
            found["faults"] = loader.faults
        results.append(found)
    return results


@pytest.mark.world_size(2)
def test_two_ranks_over_damaged_shards(tmp_path):
    build_blocksworld(
        tmp_path / "whole", SCENES, val=2, test=2, image_size=32, seed=3, tasks=("pretrain",),
        processes=1,
    )  # fmt: skip
    source, tokenizer = (
        tmp_path / "whole" / "pretrain" / "train",
        str(tmp_path / "whole" / "tokenizer"),
    )
    rng = random.Random(11)
    kinds, folders = [], [str(source)]
    for case in range(CASES):
        folder = tmp_path / f"case_{case:02d}"
        shutil.copytree(source, folder)
        kinds.append(spoil(rng.choice(sorted(folder.glob("*.tar"))), rng))
        folders.append(str(folder))
    whole, *cases = zip(*run_ranks(read, 2, folders, tokenizer, timeout=200), strict=True)
    true = dict(whole[0]["pictures"] + whole[1]["pictures"])
    assert whole[0]["steps"] == STEPS and len(true) == SCENES
    reported = 0
    for kind, ranks, folder in zip(kinds, cases, folders[1:], strict=True):
        assert len({(rank["steps"], bool(rank["error"])) for rank in ranks}) == 1, kind
        for rank in ranks:
            if rank["error"]:
                assert kind == "cut" and ".tar" in rank["error"]
                reported += 1
            for key, picture in rank["pictures"]:
                assert true[key] == picture, f"{kind}: {key} is another picture"
        lines = [
            json.loads(line)
            for path in Path(folder).glob("quarantine_*.jsonl")
            for line in path.read_text().splitlines()
        ]
        assert {line["kind"] for line in lines} <= {"hash"}
        assert all(line["key"] in true and line["shard"].endswith(".tar") for line in lines)
        assert bool(lines) == any(rank["faults"] for rank in ranks)
        reported += bool(lines)
        if kind == "header":
            assert not lines
    assert reported >= CASES // 3, "most kinds of damage must be seen"
