"""Shared by all tests: CPU by default where there is no GPU, one thread, build cache inside the
project.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TORCH_EXTENSIONS_DIR", str(ROOT / ".cache" / "torch_extensions"))
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("HF_HUB_OFFLINE", "1")  # a test that needs the network is a mistake


def _gpus() -> int:
    import torch

    return torch.cuda.device_count() if torch.cuda.is_available() else 0


def pytest_configure(config: pytest.Config) -> None:
    # Before anything imports deepspeed: with a CUDA build of torch and no GPU it would pick CUDA
    # and fail.
    if _gpus() == 0:
        os.environ.setdefault("DS_ACCELERATOR", "cpu")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    gpus = _gpus()
    for item in items:
        # Tests that start processes share the cores: one after the other, also under `pytest -n 2
        # --dist loadgroup`.
        place = item.path.relative_to(ROOT).parts if item.path.is_relative_to(ROOT) else ()
        several = item.get_closest_marker("world_size") is not None
        if several or place[:2] in (("tests", "distributed"), ("tests", "e2e"), ("tests", "gpu")):
            item.add_marker(pytest.mark.xdist_group("processes"))
        mark = item.get_closest_marker("gpu")
        if mark is None:
            continue
        needed = mark.kwargs.get("count", 1)
        if gpus < needed:
            item.add_marker(pytest.mark.skip(reason=f"needs {needed} GPU, {gpus} here"))


@pytest.fixture(autouse=True)
def _environment_comes_back() -> Iterator[None]:
    """A stage that runs inside the test process leaves RANK, MASTER_PORT and so on behind; the next
    test's child processes would take themselves for ranks of a group that is gone.
    """
    before = dict(os.environ)
    yield
    os.environ.clear()
    os.environ.update(before)
