"""What watches over a run: too many non-finite losses in a row, and the log files."""

from __future__ import annotations

import logging
from pathlib import Path

__all__ = ["NonFiniteError", "NonFiniteGuard", "open_logs"]

_FORMAT = "%(asctime)s %(levelname)s %(name)s: %(message)s"


class NonFiniteError(RuntimeError):
    """The loss was not finite for so many steps in a row that training has diverged."""


class NonFiniteGuard:
    """Counts steps whose total loss was not finite. Every rank sees the same flags, so every rank
    raises alike.
    """

    def __init__(self, limit: int = 20) -> None:
        self.limit = limit
        self.total = 0
        self.in_a_row = 0

    def see(self, finite: bool, step: int) -> None:
        """Raises NonFiniteError at the `limit`-th bad step in a row."""
        self.in_a_row = 0 if finite else self.in_a_row + 1
        self.total += not finite
        if self.in_a_row >= self.limit:
            raise NonFiniteError(
                f"the total loss was not finite {self.in_a_row} steps in a row (general step "
                f"{step}): training has diverged. Lower optim.lr, lengthen optim.warmup_steps, or "
                "use engine.precision=fp32, and resume from the last checkpoint"
            )


def open_logs(directory: Path, rank: int) -> list[logging.Handler]:
    """`rank_NNNN.log` for every rank and `events.log` for rank 0, on the root logger at INFO.

    Returns the handlers; close them with `close_logs`.
    """
    directory.mkdir(parents=True, exist_ok=True)
    names = [f"rank_{rank:04d}.log"] + (["events.log"] if rank == 0 else [])
    root = logging.getLogger()
    handlers: list[logging.Handler] = []
    for name in names:
        handler = logging.FileHandler(directory / name, encoding="utf-8")
        handler.setLevel(logging.INFO)
        handler.setFormatter(logging.Formatter(_FORMAT))
        root.addHandler(handler)
        handlers.append(handler)
    # Only our own packages are lowered to INFO: libraries keep their level.
    for package in ("train", "data_pipeline", "models"):
        logging.getLogger(package).setLevel(logging.INFO)
    return handlers


def close_logs(handlers: list[logging.Handler]) -> None:
    """Takes the handlers of `open_logs` away again."""
    for handler in handlers:
        logging.getLogger().removeHandler(handler)
        handler.close()
