"""File locks that end with the process, and that no forked child keeps alive."""

from __future__ import annotations

import errno
import fcntl
import os
import weakref
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

__all__ = ["Held", "flock", "locked"]


class Held:
    """An open, locked file. A forked child closes its copy: the lock would outlive the parent's."""

    alive: weakref.WeakSet[Held] = weakref.WeakSet()

    def __init__(self, descriptor: int) -> None:
        self.descriptor = descriptor
        Held.alive.add(self)

    def close(self) -> None:
        if self.descriptor >= 0:
            os.close(self.descriptor)
        self.descriptor = -1


def _forget_locks() -> None:
    for held in list(Held.alive):
        with suppress(OSError):
            held.close()


os.register_at_fork(after_in_child=_forget_locks)


def flock(descriptor: int, kind: int) -> bool:
    """Whether the lock was had. `kind` with LOCK_NB does not wait."""
    try:
        fcntl.flock(descriptor, kind)
    except BlockingIOError:
        return False
    except OSError as error:
        if error.errno in (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP):
            raise OSError(
                "data.remote.cache: the file system has no file locks; use a folder on a local disk"
            ) from None
        raise
    return True


@contextmanager
def locked(path: Path, kind: int = fcntl.LOCK_EX) -> Iterator[Held | None]:
    """A file, made if need be, open and locked; None when LOCK_NB finds it taken.

    The one that held the lock before may have renamed or removed the file: then its name stands
    for another file or none, and the lock would protect nothing.
    """
    while True:
        held = Held(os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644))
        try:
            if not flock(held.descriptor, kind):
                yield None
                return
            with suppress(FileNotFoundError):
                if os.path.samestat(os.fstat(held.descriptor), os.stat(path)):
                    yield held
                    return
        finally:
            held.close()
