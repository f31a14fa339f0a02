"""What a run asks of the data pipeline."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from tests.distributed.stand_in import tiny_config
from train import build


@pytest.mark.parametrize(
    ("source", "train", "workers"),
    [("s3://bucket/x", True, 3), ("s3://bucket/x", False, 1), ("data/x", False, 0)],
)
def test_workers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, source: str, train: bool, workers: int
) -> None:
    asked: dict[str, Any] = {}
    monkeypatch.setattr(build, "build_loader", lambda *_, **options: asked.update(options))
    config = tiny_config(tmp_path, data={"workers": 3})
    model: Any = SimpleNamespace(vision=SimpleNamespace(image_size=32, patch_size=16))
    place: Any = SimpleNamespace(rank=0, world_size=1, device="cpu")
    build.make_loader(config, "pretrain", source, model, None, place, train)
    assert asked["workers"] == workers
