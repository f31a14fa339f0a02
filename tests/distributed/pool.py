"""Ranks that stay: `pool.run(function, *args)` without starting processes and importing DeepSpeed
for every case.

    with RankPool(2) as pool:
        first = pool.run(one_case, "zero1")
        second = pool.run(one_case, "zero2")

A function leaves the ranks as it found them: it destroys its engines (`destroyed`). When a rank
fails or hangs, its traceback or every rank's stack is the test's failure, all ranks are killed, and
the next `run` starts new ones.
"""

from __future__ import annotations

import contextlib
import faulthandler
import gc
import importlib
import os
import pickle
import socket
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from multiprocessing.connection import Connection, wait
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from tests.distributed.spawn import (
    GRACE_SECONDS,
    ROOT,
    RanksFailed,
    _environment,
    _kill,
    _reference,
)

__all__ = ["RankPool", "destroyed"]


class RankPool:
    """`world_size` processes in one group (gloo on a CPU), started at the first `run`.

    Args:
        env: additional environment variables of every rank.
    """

    def __init__(self, world_size: int, env: Mapping[str, str] | None = None) -> None:
        self.world_size = world_size
        self._extra = dict(env or {})
        self._processes: list[subprocess.Popen[bytes]] = []
        self._pipes: list[Connection] = []
        self._folder: tempfile.TemporaryDirectory[str] | None = None
        self._store: Any = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def run(self, function: str | Callable[..., Any], *args: Any, timeout: float = 120.0) -> list:
        """Calls `function(*args)` on every rank and returns the results, by rank.

        Args:
            function: a module-level function, or "package.module:name".
            args: picklable; the results must be, too.
            timeout: seconds until every rank's stack is printed and the ranks are killed.

        Raises:
            RanksFailed: with the traceback of the rank that failed first, and what it printed.
        """
        reference = _reference(function)
        if not self._processes:
            self._start()
        for pipe in self._pipes:
            pipe.send_bytes(pickle.dumps((reference, args, timeout)))
        try:
            return self._collect(reference, timeout + GRACE_SECONDS)
        except BaseException:
            self._stop()
            raise

    def close(self) -> None:
        """Sends the ranks home: they leave the group together."""
        for pipe in self._pipes:
            with contextlib.suppress(OSError):
                pipe.send_bytes(pickle.dumps(None))
        deadline = time.monotonic() + 30.0
        for process in self._processes:
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(max(0.0, deadline - time.monotonic()))
        self._stop()

    def _start(self) -> None:
        from torch.distributed import TCPStore

        self._store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        self._folder = tempfile.TemporaryDirectory(prefix="pool-")
        for rank in range(self.world_size):
            ours, theirs = socket.socketpair()
            with theirs, self._log(rank).open("wb") as output:
                self._processes.append(
                    subprocess.Popen(
                        [sys.executable, "-m", "tests.distributed.pool", str(theirs.fileno())],
                        cwd=ROOT,
                        env=_environment(rank, self.world_size, self._store.port, {**self._extra}),
                        pass_fds=[theirs.fileno()],
                        stdout=output,
                        stderr=subprocess.STDOUT,
                        start_new_session=True,
                    )
                )
            self._pipes.append(Connection(ours.detach()))

    def _log(self, rank: int) -> Path:
        assert self._folder is not None
        return Path(self._folder.name) / f"out_{rank}.log"

    def _collect(self, reference: str, seconds: float) -> list[Any]:
        deadline = time.monotonic() + seconds
        results: dict[int, Any] = {}
        while len(results) < self.world_size:
            open_pipes = [pipe for rank, pipe in enumerate(self._pipes) if rank not in results]
            ready = wait(open_pipes, max(0.0, deadline - time.monotonic()))
            if not ready:
                missing = [rank for rank in range(self.world_size) if rank not in results]
                raise self._complaint(reference, missing, "no answer")
            for pipe in ready:
                assert isinstance(pipe, Connection)
                rank = self._pipes.index(pipe)
                try:
                    good, value = pickle.loads(pipe.recv_bytes())
                except (EOFError, OSError):
                    raise self._complaint(reference, [rank], "the process is gone") from None
                if not good:
                    raise self._complaint(reference, [rank], value)
                results[rank] = value
        return [results[rank] for rank in range(self.world_size)]

    def _complaint(self, reference: str, ranks: list[int], what: str) -> RanksFailed:
        named = ", ".join(map(str, ranks))
        lines = [f"{reference} failed on rank {named} of {self.world_size}: {what}"]
        for rank in ranks:
            text = self._log(rank).read_text(errors="replace")
            lines.append(f"--- rank {rank} ---\n{text[-6000:]}")
        return RanksFailed("\n".join(lines))

    def _stop(self) -> None:
        for process in self._processes:
            _kill(process)
        for pipe in self._pipes:
            pipe.close()
        if self._folder is not None:
            self._folder.cleanup()
        self._processes, self._pipes, self._folder, self._store = [], [], None, None


@contextlib.contextmanager
def destroyed(engine: Any) -> Iterator[Any]:
    """A DeepSpeed engine for one case: its hooks, buffers and optimizer go with it."""
    try:
        yield engine
    finally:
        engine.destroy()
        gc.collect()  # engine and module refer to each other


def _serve(descriptor: int) -> None:
    faulthandler.enable()
    pipe = Connection(descriptor)
    from train.runtime.distributed import finish, start

    start()
    while (call := pickle.loads(pipe.recv_bytes())) is not None:
        reference, args, timeout = call
        faulthandler.dump_traceback_later(timeout, exit=True)
        try:
            module, _, attribute = reference.partition(":")
            function: Any = importlib.import_module(module)
            for part in attribute.split("."):
                function = getattr(function, part)
            answer = (True, function(*args))
        except BaseException:
            answer = (False, traceback.format_exc())
        faulthandler.cancel_dump_traceback_later()
        # Plain pickle: torch would send tensors through shared memory of a process that may be gone.
        pipe.send_bytes(pickle.dumps(answer))
    finish()


if __name__ == "__main__":
    os.set_inheritable(int(sys.argv[1]), False)
    _serve(int(sys.argv[1]))
