"""SIGKILL at random steps, restart with other ranks and workers: the samples that were delivered are
those of a run that nobody disturbed, byte for byte.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from torch.distributed import TCPStore

from data_pipeline.blocksworld.build import build_blocksworld
from tests.distributed.spawn import ROOT, _environment

STEPS = 32
# (ranks, workers) of each life; the last one is left to finish.
LIVES = [(2, 1), (3, 0), (4, 0), (1, 2)]


def run(folder: Path, out: Path, ranks: int, workers: int, kill_after: int | None) -> None:
    """Starts a job; kills all of its processes after rank 0 has said `kill_after` steps."""
    out.mkdir(exist_ok=True)
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    command = [sys.executable, "-m", "tests.distributed.kill_job", str(folder), str(out)]
    command += ["--steps", str(STEPS), "--workers", str(workers)]
    jobs = [
        subprocess.Popen(
            command,
            cwd=ROOT,
            env=_environment(rank, ranks, store.port, {}),
            stdout=subprocess.PIPE if rank == 0 else subprocess.DEVNULL,
            stderr=(out / f"stderr_{rank}.txt").open("w"),
            start_new_session=True,
        )
        for rank in range(ranks)
    ]
    assert jobs[0].stdout is not None
    try:
        said = 0
        for line in jobs[0].stdout:
            said += line.strip().isdigit()
            if kill_after is not None and said >= kill_after:
                break
        else:
            codes = [job.wait(timeout=60) for job in jobs]
            complaint = "\n".join(p.read_text()[-2000:] for p in out.glob("stderr_*.txt"))
            assert codes == [0] * ranks, complaint
    finally:
        for job in jobs:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(job.pid, signal.SIGKILL)
            job.wait()


def delivered(out: Path) -> list[str]:
    """One line a step: the rows of its region batch and of its general batch over all ranks.

    A step that was logged in two lives must be the same in both.
    """
    steps: dict[tuple[int, int], dict[int, list[str]]] = {}
    for path in out.glob("rank_*.log"):
        for text in path.read_text().splitlines():
            try:
                step, rank, ranks, rows = json.loads(text)
            except ValueError:
                continue  # the kill came while this line was written; its step comes again
            earlier = steps.setdefault((step, ranks), {}).setdefault(rank, rows)
            assert earlier == rows, f"step {step} of rank {rank} came again and is another"
    lines: dict[int, str] = {}
    for (step, ranks), parts in sorted(steps.items()):
        if len(parts) < ranks:
            continue  # not all ranks wrote the step before the kill
        general, region = [], []
        for rank in range(ranks):
            rows = parts[rank]
            split = rows.index("general")
            region += rows[1:split]
            general += rows[split + 1 :]
        line = json.dumps([step, region, general])
        assert lines.setdefault(step, line) == line, f"step {step} differs with {ranks} ranks"
    return [lines[step] for step in sorted(lines)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("kill")
    for seed, name in enumerate(("one", "two")):
        build_blocksworld(
            root / name, 150, val=2, test=2, image_size=32, seed=seed, tasks=("pretrain",),
            processes=1,
        )  # fmt: skip
    return root


@pytest.mark.slow
@pytest.mark.world_size(4)
@pytest.mark.timeout(280)
def test_a_killed_job_delivers_what_an_undisturbed_one_does(folder, tmp_path):
    run(folder, tmp_path / "whole", 1, 0, None)
    whole = delivered(tmp_path / "whole")
    assert len(whole) == STEPS
    assert any(json.loads(line)[1] for line in whole), "no region step was drawn"
    rng = random.Random(int.from_bytes(os.urandom(4), "big"))
    for number, (ranks, workers) in enumerate(LIVES):
        last = number == len(LIVES) - 1
        run(folder, tmp_path / "killed", ranks, workers, None if last else rng.randint(3, 8))
    assert delivered(tmp_path / "killed") == whole
