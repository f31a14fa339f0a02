"""Ranks as forks of this process, which has imported everything: a job of a few steps costs a second
where `spawn.run_ranks` costs ten.

The parent must not have run torch on several threads (conftest.py sets OMP_NUM_THREADS=1).
"""

from __future__ import annotations

import contextlib
import faulthandler
import os
import pickle
import select
import signal
import tempfile
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch.distributed import TCPStore

from tests.distributed.spawn import GRACE_SECONDS, RanksFailed, _environment

__all__ = ["fork_ranks"]


def fork_ranks(
    function: Callable[..., Any], world_size: int, *args: Any, timeout: float = 120.0
) -> list[Any]:
    """Calls `function(*args)` on every rank of a group of `world_size` and returns the results.

    Raises RanksFailed with what the ranks printed; ranks that hang print their stacks.
    """
    import deepspeed  # noqa: F401  imported once, here

    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    with tempfile.TemporaryDirectory(prefix="forked-") as name:
        folder = Path(name)
        pids = []
        for rank in range(world_size):
            environment = _environment(rank, world_size, store.port, {"DS_ACCELERATOR": "cpu"})
            pid = os.fork()
            if pid == 0:
                _child(function, args, folder, rank, environment, timeout)
            pids.append(pid)
        codes = _reap(pids, timeout + GRACE_SECONDS)
        if any(codes):
            told = [(folder / f"out_{rank}").read_text()[-6000:] for rank in range(world_size)]
            raise RanksFailed(f"{function.__name__}: ranks ended with {codes}\n" + "\n".join(told))
        return [
            pickle.loads((folder / f"result_{rank}").read_bytes()) for rank in range(world_size)
        ]


def _child(
    function: Callable[..., Any],
    args: tuple[Any, ...],
    folder: Path,
    rank: int,
    environment: dict[str, str],
    timeout: float,
) -> NoReturn:
    code = 1
    try:
        os.setsid()
        os.environ.update(environment)
        log = os.open(folder / f"out_{rank}", os.O_WRONLY | os.O_CREAT)
        os.dup2(log, 1)
        os.dup2(log, 2)
        faulthandler.enable(file=log)
        faulthandler.dump_traceback_later(timeout, exit=True, file=log)
        torch.set_num_threads(1)
        from train.runtime.distributed import finish, start

        start()
        result = function(*args)
        (folder / f"result_{rank}").write_bytes(pickle.dumps(result))
        finish()
        code = 0
    except BaseException:
        os.write(2, traceback.format_exc().encode())
    finally:
        os._exit(code)


def _reap(pids: list[int], seconds: float) -> list[int]:
    """Exit statuses; once a rank has failed the others get a short grace, as they may be stuck."""
    poller = select.poll()
    waiting = {os.pidfd_open(pid): pid for pid in pids}
    for descriptor in waiting:
        poller.register(descriptor, select.POLLIN)
    codes: dict[int, int] = {}
    while waiting:
        events = poller.poll(seconds * 1000)
        if not events:
            for pid in waiting.values():
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            seconds = GRACE_SECONDS
            continue
        for descriptor, _ in events:
            poller.unregister(descriptor)
            os.close(descriptor)
            pid = waiting.pop(descriptor)
            codes[pid] = os.waitpid(pid, 0)[1]
            seconds = GRACE_SECONDS if codes[pid] else seconds
    return [codes[pid] for pid in pids]
