"""A run whose data change: mixtures in a run file, refusal with the way out, and --rebase."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from data_pipeline.blocksworld.build import build_blocksworld
from train.main import main


@pytest.fixture(scope="module")
def worlds(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Two small data sets."""
    folders = []
    for seed in (3, 4):
        root = tmp_path_factory.mktemp(f"world{seed}")
        build_blocksworld(
            root, 24, val=4, test=4, image_size=48, seed=seed, tasks=("pretrain",), processes=1
        )
        folders.append(root / "pretrain" / "train")
    return folders


def pretrain(out: Path, data: str, tokenizer: Path, steps: int, *more: str) -> int:
    return main(
        [
            "pretrain",
            "blocksworld-pretrain-teacher",
            "model=blocksworld-micro-teacher",
            f"out={out}",
            f"data.train={data}",
            f"data.tokenizer={tokenizer}",
            "data.val=null",
            "data.global_batch=8",
            "data.region.global_images=4",
            "data.region.global_rows=8",
            "data.region.probability=0.5",
            f"optim.steps={steps}",
            "optim.warmup_steps=0",
            "log.every=1",
            "checkpoint.every=0",
            *more,
        ]
    )


def position(out: Path) -> dict:
    """The data position of the newest checkpoint."""
    folder = out / "checkpoints" / (out / "checkpoints" / "latest").read_text().strip()
    states = [path for path in folder.rglob("*.pt") if "state" in path.name]
    for path in states:
        state = torch.load(path, weights_only=True)
        if "loader" in state:
            return state["loader"]
    raise AssertionError(f"no state with a loader among {states}")


def test_data_that_change_are_refused_unless_it_is_meant(worlds, tmp_path, capsys):
    one, two = worlds
    tokenizer = one.parents[1] / "tokenizer"
    out = tmp_path / "run"
    assert pretrain(out, str(one), tokenizer, 3) == 0
    capsys.readouterr()

    both = json.dumps([{"path": str(one), "weight": 3.0}, {"path": str(two), "weight": 1.0}])
    assert pretrain(out, both, tokenizer, 6) == 2
    message = capsys.readouterr().err
    assert str(two) in message and "--rebase" in message and "Traceback" not in message

    assert pretrain(out, both, tokenizer, 6, "--rebase") == 0
    state = position(out)
    assert [start for start, _ in state["segments"]] == [0, 24]
    assert state["segments"][1][1] == [3, 1] and state["samples_consumed"] == 48
    first, second = (entry["consumed"] for entry in state["datasets"])
    assert first + second == 48 and second == 6
    # From here on it is an ordinary run.
    assert pretrain(out, both, tokenizer, 7) == 0
    records = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert [record["step"] for record in records] == list(range(1, 8))


def test_a_step_that_the_ranks_do_not_divide_is_refused(worlds, tmp_path, capsys):
    one = worlds[0]
    arguments = (tmp_path / "run", str(one), one.parents[1] / "tokenizer", 1)
    assert pretrain(*arguments, "data.region.global_rows=null") == 2
    assert "global_images and global_rows together" in capsys.readouterr().err
    assert pretrain(*arguments, "data.groups=3") == 2
    assert "3 groups" in capsys.readouterr().err
