"""Several ranks inside one test: `run_ranks(function, world_size, *args)`.

Each rank is a fresh process that joins the group with `train.runtime.distributed.start()`, calls
the function and leaves with `finish()`. The parent owns the rendezvous store, so there is no race
for a port. When a rank fails, its traceback is the test's failure; when a rank hangs, every rank's
stack is.
"""

from __future__ import annotations

import contextlib
import faulthandler
import importlib
import os
import pickle
import select
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
GRACE_SECONDS = 5.0


class RanksFailed(AssertionError):
    """One or more ranks failed or hung; the message holds what they printed."""


def _reference(function: str | Callable[..., Any]) -> str:
    if isinstance(function, str):
        return function
    if "<" in function.__qualname__:
        raise ValueError(
            f"{function.__qualname__} cannot be imported by another process; use a module-level "
            "function"
        )
    return f"{function.__module__}:{function.__qualname__}"


def _environment(rank: int, world_size: int, port: int, extra: Mapping[str, str]) -> dict[str, str]:
    environment = dict(os.environ)
    # pytest's own variables would leak settings of the parent's run into the ranks.
    for name in ("PYTEST_CURRENT_TEST", "PYTEST_XDIST_WORKER", "COV_CORE_SOURCE"):
        environment.pop(name, None)
    environment |= {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(world_size),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        # The parent serves the store: ranks connect as clients (torch's env:// rendezvous honours
        # these two).
        "TORCHELASTIC_USE_AGENT_STORE": "True",
        "TORCHELASTIC_RESTART_COUNT": "0",
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": os.pathsep.join([str(ROOT), environment.get("PYTHONPATH", "")]).rstrip(
            os.pathsep
        ),
    }
    return environment | dict(extra)


def run_ranks(
    function: str | Callable[..., Any],
    world_size: int,
    *args: Any,
    timeout: float = 120.0,
    init: bool = True,
    env: Mapping[str, str] | None = None,
) -> list[Any]:
    """Calls `function(*args)` on every rank and returns the results, by rank.

    Args:
        function: a module-level function, or "package.module:name".
        args: picklable; the results must be, too (tensors are).
        timeout: seconds until every rank's stack is printed and the ranks are killed.
        init: join the process group first; False leaves it to the function.
        env: additional environment variables of every rank.

    Raises:
        RanksFailed: with the output of the ranks that failed first.
    """
    from torch.distributed import TCPStore

    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    with tempfile.TemporaryDirectory(prefix="ranks-") as name:
        folder = Path(name)
        call = (_reference(function), args, init, timeout)
        (folder / "call.pkl").write_bytes(pickle.dumps(call))
        processes = []
        for rank in range(world_size):
            with (folder / f"out_{rank}.log").open("wb") as output:
                processes.append(
                    subprocess.Popen(
                        [sys.executable, "-m", "tests.distributed.spawn", str(folder)],
                        cwd=ROOT,
                        env=_environment(rank, world_size, store.port, env or {}),
                        stdout=output,
                        stderr=subprocess.STDOUT,
                        start_new_session=True,
                    )
                )
        try:
            failed = _wait(processes, timeout + GRACE_SECONDS)
        finally:
            for process in processes:
                _kill(process)
        if failed:
            raise RanksFailed(_complaint(folder, call[0], processes, failed))
        return [
            pickle.loads((folder / f"result_{rank}.pkl").read_bytes()) for rank in range(world_size)
        ]


def _wait(processes: Sequence[subprocess.Popen[bytes]], seconds: float) -> list[int]:
    """Ranks that failed, first one first; after a failure the others get a short grace, as they may
    be stuck.
    """
    deadline = time.monotonic() + seconds
    poller = select.poll()
    ranks = {os.pidfd_open(process.pid): rank for rank, process in enumerate(processes)}
    for descriptor in ranks:
        poller.register(descriptor, select.POLLIN)
    failed: list[int] = []
    while ranks:
        events = poller.poll(max(0.0, deadline - time.monotonic()) * 1000)
        if not events:
            return failed or list(ranks.values())
        for descriptor, _ in events:
            poller.unregister(descriptor)
            os.close(descriptor)
            rank = ranks.pop(descriptor)
            if processes[rank].wait() != 0:
                if not failed:
                    deadline = min(deadline, time.monotonic() + GRACE_SECONDS)
                failed.append(rank)
    return failed


def _kill(process: subprocess.Popen[bytes]) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def _complaint(
    folder: Path, name: str, processes: Sequence[subprocess.Popen[bytes]], failed: Sequence[int]
) -> str:
    marks = {rank: folder / f"failed_{rank}" for rank in failed}
    failed = sorted(failed, key=lambda r: marks[r].stat().st_mtime_ns if marks[r].exists() else 0)
    lines = [f"{name} failed on rank {', '.join(map(str, failed))} of {len(processes)}"]
    for rank in failed:
        text = (folder / f"out_{rank}.log").read_text(errors="replace")
        lines.append(f"--- rank {rank}, exit code {processes[rank].returncode} ---\n{text[-6000:]}")
    return "\n".join(lines)


def _child(folder: Path) -> None:
    reference, args, init, timeout = pickle.loads((folder / "call.pkl").read_bytes())
    faulthandler.enable()
    faulthandler.dump_traceback_later(timeout, exit=True)
    from train.runtime.distributed import finish, start

    if init:
        start()
    module, _, attribute = reference.partition(":")
    function: Any = importlib.import_module(module)
    for part in attribute.split("."):
        function = getattr(function, part)
    try:
        result = function(*args)
    except BaseException:
        (
            folder / f"failed_{os.environ['RANK']}"
        ).touch()  # before the others notice that this rank is gone
        finish(failed=True)
        raise
    path = folder / f"result_{os.environ['RANK']}.pkl"
    path.write_bytes(pickle.dumps(result))
    finish()


if __name__ == "__main__":
    _child(Path(sys.argv[1]))
