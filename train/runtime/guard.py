"""What watches over a run: losses that are not finite or leap up, and the log files."""

from __future__ import annotations

import logging
import math
import statistics
from collections import deque
from pathlib import Path
from typing import Any

from train.config import OptimConfig

__all__ = ["NonFiniteError", "StepGuard", "close_logs", "open_logs"]

_ENOUGH = 20  # losses from which a median says something
_FORMAT = "%(asctime)s %(levelname)s %(name)s: %(message)s"


class NonFiniteError(RuntimeError):
    """So many steps in a row were skipped that training has diverged."""


class StepGuard:
    """Counts skipped steps and says when a loss is a spike. Every rank sees the same numbers, so
    every rank decides alike.

    A spike is a total loss above `spike_factor` times the median of the last `spike_window` steps
    of its kind. Region steps have terms that general steps have not, so each kind has a median of
    its own; it counts once it is of 20 steps (or the whole window, if that is shorter).

    Args:
        limit: skipped steps in a row that end the run.   spike_factor: 0 takes no loss for a spike.

    Attributes:
        nonfinite, spikes: steps skipped for either reason.
    """

    def __init__(self, limit: int = 20, spike_factor: float = 0.0, spike_window: int = 100) -> None:
        if limit < 1 or spike_window < 1 or (spike_factor and spike_factor <= 1.0):
            raise ValueError(
                f"optim.skip_limit ({limit}) and optim.spike_window ({spike_window}) must be 1 or "
                f"more, optim.spike_factor ({spike_factor:g}) above 1, or 0 for off"
            )
        self.limit, self.factor, self.window = limit, spike_factor, spike_window
        self.nonfinite = self.spikes = self.in_a_row = 0
        self._losses: dict[str, deque[float]] = {}

    @classmethod
    def of(cls, optim: OptimConfig) -> StepGuard:
        """The guard that a run file asks for. Raises ValueError naming the keys."""
        return cls(optim.skip_limit, optim.spike_factor, optim.spike_window)

    @property
    def total(self) -> int:
        """All skipped steps."""
        return self.nonfinite + self.spikes

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run goes on with: losses seen and steps skipped, in plain values."""
        return {
            "losses": {kind: list(seen) for kind, seen in self._losses.items()},
            "in_a_row": self.in_a_row,
            "nonfinite": self.nonfinite,
            "spikes": self.spikes,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes on from `state_dict`; the window may have another length now."""
        self._losses = {
            kind: deque(seen, maxlen=self.window) for kind, seen in state["losses"].items()
        }
        self.in_a_row = state["in_a_row"]
        self.nonfinite, self.spikes = state["nonfinite"], state["spikes"]

    def loss_limit(self, kind: str = "general") -> float:
        """The largest total loss that a step of this kind may have; infinity while it is unknown."""
        seen = self._losses.get(kind, ())
        if not self.factor or len(seen) < min(_ENOUGH, self.window):
            return math.inf
        return self.factor * statistics.median(seen)

    def see(
        self,
        finite: bool,
        step: int,
        *,
        kind: str = "general",
        loss: float = math.nan,
        spike: bool = False,
    ) -> None:
        """Takes note of a step (`StepResult`'s fields).

        Raises:
            NonFiniteError: it was the `limit`-th skipped step in a row.
        """
        skipped = spike or not finite
        self.nonfinite += not finite
        self.spikes += finite and spike
        self.in_a_row = self.in_a_row + 1 if skipped else 0
        if not skipped and math.isfinite(loss):
            self._losses.setdefault(kind, deque(maxlen=self.window)).append(loss)
        if self.in_a_row < self.limit:
            return
        told = "a spike" if spike else "not finite"
        raise NonFiniteError(
            f"{self.in_a_row} steps in a row were skipped, the last because the total loss was "
            f"{told} (general step {step}): training has diverged. Lower optim.lr, lengthen "
            "optim.warmup_steps, or use engine.precision=fp32, and resume from the last checkpoint"
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
