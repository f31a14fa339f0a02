"""Ranks of these tests are processes on the CPU, on a machine with GPUs too: there are more of them
than GPUs (NCCL takes one rank on each), and what they compute with is on the CPU.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest


@pytest.fixture(autouse=True, scope="module")  # before fixtures of a module that start ranks
def _child_processes_see_no_gpu() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CUDA_VISIBLE_DEVICES", "")
        patch.setenv("DS_ACCELERATOR", "cpu")
        yield
