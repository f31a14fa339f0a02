"""What workers set is seen in a process of its own: mallopt and gc.freeze cannot be undone."""

from __future__ import annotations

import subprocess
import sys
from types import SimpleNamespace

import pytest

from data_pipeline import worker

SCRIPT = """
import gc, os, sys, torch, types
sys.modules["cv2"] = types.SimpleNamespace(setNumThreads=lambda n: print("cv2", n))
torch.set_num_threads(3)
from data_pipeline.worker import start_worker
start_worker(1)
print("torch", torch.get_num_threads())
print("tokenizers", os.environ["TOKENIZERS_PARALLELISM"])
print("frozen", gc.get_freeze_count() > 10000)
"""

MEMORY = """
import resource, sys
from data_pipeline.worker import keep_memory
if sys.argv[1] == "keep":
    assert keep_memory()
def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(20):
        b"x" * (48 << 20)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
faults()
print(faults())
"""


def run(script, *arguments):
    found = subprocess.run(
        [sys.executable, "-c", script, *arguments], capture_output=True, text=True, check=True
    )
    return found.stdout


def test_one_thread_everywhere():
    lines = run(SCRIPT).splitlines()
    assert lines == ["cv2 0", "torch 1", "tokenizers false", "frozen True"]


@pytest.mark.skipif(sys.platform != "linux", reason="glibc's allocator")
def test_large_blocks_are_kept():
    """48 MiB twenty times: every page is new each time, unless the block stays in the heap."""
    assert int(run(MEMORY, "keep")) < 1000 < int(run(MEMORY, "default"))


def calls(monkeypatch, accepts):
    seen = []

    def mallopt(parameter, value):
        seen.append((parameter, value))
        return int(accepts(parameter, value))

    library = SimpleNamespace(mallopt=mallopt)
    monkeypatch.setattr(worker.ctypes, "CDLL", lambda name: library)
    return seen


def test_an_older_library_takes_32_mib(monkeypatch):
    seen = calls(monkeypatch, lambda parameter, value: parameter == -1 or value <= 32 << 20)
    assert worker.keep_memory()
    assert seen == [(-3, 256 << 20), (-3, 32 << 20), (-1, 1 << 30)]


def test_a_library_that_refuses_is_left_alone(monkeypatch):
    seen = calls(monkeypatch, lambda parameter, value: False)
    assert not worker.keep_memory()
    assert all(parameter == -3 for parameter, _ in seen)
    monkeypatch.setattr(worker.ctypes, "CDLL", lambda name: SimpleNamespace())
    assert not worker.keep_memory()
