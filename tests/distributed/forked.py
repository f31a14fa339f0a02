"""Ranks as forks of one fresh process that has imported everything: two ranks cost one import of
torch and DeepSpeed where `spawn.run_ranks` costs two.

Not forks of the tests' own process: once autograd has run there on threads of its own, it refuses to
run in a fork.
"""

from __future__ import annotations

import contextlib
import faulthandler
import importlib
import operator
import os
import pickle
import select
import signal
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch.distributed import TCPStore

from tests.distributed.spawn import (
    GRACE_SECONDS,
    ROOT,
    RanksFailed,
    _environment,
    _reference,
)

__all__ = ["fork_ranks"]


def fork_ranks(
    function: Callable[..., Any], world_size: int, *args: Any, timeout: float = 120.0
) -> list[Any]:
    """Calls `function(*args)`, a module-level function, on every rank of a group of `world_size` and
    returns the results.

    Raises RanksFailed with what the ranks printed; ranks that hang print their stacks.
    """
    with tempfile.TemporaryDirectory(prefix="forked-") as name:
        folder = Path(name)
        call = (_reference(function), world_size, args, timeout)
        (folder / "call.pkl").write_bytes(pickle.dumps(call))
        done = subprocess.run(
            [sys.executable, "-m", "tests.distributed.forked", str(folder)],
            cwd=ROOT,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
            capture_output=True,
            check=False,
        )
        if done.returncode:
            told = [done.stderr.decode(errors="replace")]
            told += [path.read_text(errors="replace") for path in sorted(folder.glob("out_*"))]
            raise RanksFailed("\n".join([call[0], *(text[-6000:] for text in told)]))
        return [
            pickle.loads((folder / f"result_{rank}").read_bytes()) for rank in range(world_size)
        ]


def _fork_all(folder: Path) -> int:
    """In the fresh process: 0 when every rank left with 0."""
    reference, world_size, args, timeout = pickle.loads((folder / "call.pkl").read_bytes())
    import deepspeed  # noqa: F401  imported once, here

    module, _, attribute = reference.partition(":")
    function = operator.attrgetter(attribute)(importlib.import_module(module))
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    pids = []
    for rank in range(world_size):
        environment = _environment(rank, world_size, store.port, {"DS_ACCELERATOR": "cpu"})
        pid = os.fork()
        if pid == 0:
            _child(function, args, folder, rank, environment, timeout)
        pids.append(pid)
    codes = _reap(pids, timeout + GRACE_SECONDS)
    if any(codes):
        print(f"ranks ended with {codes}", file=sys.stderr)
    return int(any(codes))


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


if __name__ == "__main__":
    sys.exit(_fork_all(Path(sys.argv[1])))
