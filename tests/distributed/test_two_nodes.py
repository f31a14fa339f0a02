"""Two "hosts" on one machine, one process each: through a stand-in pdsh, and each host started by
hand. A real stage on tiny data; one host is lost, and the run goes on.
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

from data_pipeline.blocksworld.build import build_blocksworld
from launchers.processes import session_members
from models import presets
from tests.distributed import stand_in_pdsh
from tests.distributed.spawn import ROOT

STEPS = 40


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Data, a model, a hostfile and a folder with `pdsh` in it."""
    root = tmp_path_factory.mktemp("nodes")
    build_blocksworld(
        root / "data",
        scenes=24, val=8, test=8, image_size=48, seed=5, tasks=("pretrain",), per_shard=12,
    )  # fmt: skip
    torch.manual_seed(0)
    model = presets.create("blocksworld-micro-student", form="pretrain", text={"vocab_size": 80})
    model.save_pretrained(root / "student")
    (root / "hosts").write_text("node0 slots=1\nnode1 slots=1\n")
    (root / "bin").mkdir()
    (root / "bin" / "pdsh").write_text(
        f'#!/bin/sh\nexec "{sys.executable}" "{stand_in_pdsh.__file__}" "$@"\n'
    )
    (root / "bin" / "pdsh").chmod(0o755)
    return root


def command(folder: Path, out: Path, *options: str) -> list[str]:
    data = folder / "data" / "pretrain"
    return [
        sys.executable, "-m", "train.main", "launch", "--hostfile", str(folder / "hosts"), *options,
        "--", "pretrain", "blocksworld-pretrain-teacher", f"model={folder / 'student'}",
        f"data.train={data / 'train'}", "data.val=null", "data.batch=2", "data.workers=0",
        "optim.warmup_steps=0", f"optim.steps={STEPS}", "log.every=1", "checkpoint.every=4",
        # On disk before the next step begins, so that there is one when a host is killed.
        "checkpoint.asynchronous=false",
        "engine.config=zero1", f"out={out}",
    ]  # fmt: skip


@contextmanager
def running(words: list[str], cwd: Path, **extra: str) -> Iterator[subprocess.Popen[str]]:
    """The launcher, its output line by line; it and its session are gone afterwards."""
    known = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
    environment = {name: value for name, value in os.environ.items() if name not in known}
    process = subprocess.Popen(
        words,
        cwd=cwd,
        env=environment | {"PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1"} | extra,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    try:
        yield process
    finally:
        process.kill()  # the ranks follow: they watch it
        process.wait()
        if process.stdout is not None:
            process.stdout.close()


def read_until(process: subprocess.Popen[str], word: str) -> str:
    """Output up to the line with `word`."""
    assert process.stdout is not None
    seen = []
    for line in process.stdout:
        seen.append(line)
        if word in line:
            return "".join(seen)
    raise AssertionError(f"{word!r} never came:\n{''.join(seen)}")


def kill_host(folder: Path, host: str) -> None:
    """All its processes at once, and nothing answers any more."""
    (folder / f"{host}.down").touch()
    for pid in session_members(int((folder / f"{host}.pid").read_text())):
        os.kill(pid, signal.SIGKILL)


@pytest.mark.world_size(2)
def test_a_host_is_lost_and_the_other_goes_on(folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "a run, 50% %n $HOME"  # words must survive DeepSpeed, pdsh and two shells
    words = command(folder, out, "--master-addr", "127.0.0.1", "--max-restarts", "1")
    path = f"{folder / 'bin'}:{os.environ['PATH']}"
    with running(words, tmp_path, PATH=path, PDSH_FOLDER=str(tmp_path)) as process:
        read_until(process, f"step 6/{STEPS}")
        kill_host(tmp_path, "node1")
        text = read_until(process, f"step {STEPS}/{STEPS}")
        assert process.stdout is not None
        rest = process.stdout.read()
        assert process.wait() == 0, text + rest
    silent = text.index("rank 1 (pid ")
    assert "ended without a word, last seen at: " in text[silent:]
    assert silent < text.index("noticed it first")
    assert "going on without node1" in text
    log = (out / "events.log").read_text()
    assert "was written by 2 rank(s) at ZeRO 1, this run has 1 at ZeRO 1" in log
    assert "resumed at step" in log
    assert (out / "model" / "model.safetensors").is_file()
    assert not (tmp_path / ".espalier").exists()
    assert "--num_nodes 1" in text
    assert "deepspeed.launcher.launch" in (tmp_path / "calls.log").read_text()


@pytest.mark.world_size(2)
def test_hosts_started_by_hand_stop_together(folder: Path, tmp_path: Path) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    out = tmp_path / "run"
    shared = ("--master-addr", "127.0.0.1", "--port", port)

    def words(node: int) -> list[str]:
        # Endless: only the signal ends it.
        return [*command(folder, out, *shared, "--node-rank", str(node)), "optim.steps=100000"]

    with (
        running(words(0), tmp_path, PATH="/usr/bin:/bin") as first,
        running(words(1), tmp_path, PATH="/usr/bin:/bin") as second,
    ):
        read_until(first, "step 3/")
        second.send_signal(signal.SIGUSR1)
        texts = [process.communicate()[0] for process in (first, second)]
        assert [first.returncode, second.returncode] == [75, 75], texts
    assert (out / "checkpoints" / "latest").is_file()
