"""The epoch that a record tells: passes over the images, however many texts each brings."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from data_pipeline.blocksworld.build import build_blocksworld
from data_pipeline.text import load_tokenizer
from models import presets
from train.build import _open_monitor, make_loader
from train.monitor.jsonl import read_jsonl
from train.recipes_io import find_recipe, load_run_config
from train.runtime.distributed import Distributed

IMAGES, BATCH, TEXTS = 16, 4, 4


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("scenes") / "data"
    build_blocksworld(folder, IMAGES, val=2, test=2, image_size=48, tasks=("vqa",), processes=1)
    return folder


@pytest.mark.parametrize("mixture", [False, True])
def test_an_image_with_several_texts_counts_once(data: Path, tmp_path: Path, mixture: bool) -> None:
    train = f"[{{path: {data}/vqa/train}}, {{path: {data}/vqa/val}}]" if mixture else None
    overrides = [
        f"out={tmp_path}",
        f"data.train={train or data / 'vqa' / 'train'}",
        f"data.batch={BATCH}",
        f"data.rows_per_image={TEXTS}",
        "log.every=1",
    ]
    config = load_run_config(find_recipe("blocksworld-finetune-teacher"), overrides)[0]
    words = load_tokenizer(data / "tokenizer")
    model = presets.config("blocksworld-micro-teacher", form="vqa")
    dist = Distributed(0, 1, 0, torch.device("cpu"), "gloo")

    def run() -> Any:
        loader = make_loader(config, "vqa", config.data.train, model, words, dist, True)
        return SimpleNamespace(config=config, directory=tmp_path, dist=dist, loader=loader)

    first = run()
    with _open_monitor(first, 0) as monitor:
        batches = iter(first.loader)
        for step in range(1, 7):
            rows = next(batches).rows
            monitor.step(step, rows * step, {"loss": {"total": 1.0}})
    again = run()
    again.loader.load_state_dict(first.loader.state_dict())
    with _open_monitor(again, 6) as monitor:
        next(iter(again.loader))
        monitor.step(7, 7 * rows, {"validation": {"accuracy": 0.5}})
    images = IMAGES + 2 * mixture
    lines = list(read_jsonl(tmp_path / "metrics.jsonl"))
    assert [line["samples"] for line in lines] == [step * BATCH * TEXTS for step in range(1, 8)]
    expected = [step * BATCH / images for step in range(1, 8)]
    assert [line["epoch"] for line in lines] == pytest.approx(expected)
