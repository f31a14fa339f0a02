"""Progress for people: a tqdm bar on a terminal, one line an interval anywhere else."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import TextIO

from tqdm import tqdm

from train.monitor.throughput import duration

__all__ = ["Console"]

# What a reader looks for first, in this order; tags of the metrics.
_SHOWN = {
    "loss/total": "loss",
    "lr": "lr",
    "sparsity/actual": "sparsity",
    "sparsity/target": "target",
    "samples_per_s": "samples/s",
    "mfu": "mfu",
}


class Console:
    """Shows where a run stands on a stream.

    Args:
        total_steps: steps of the whole run.   start: steps already done.
        stream: default stderr; a bar when it is a terminal.
    """

    def __init__(self, total_steps: int, start: int = 0, stream: TextIO | None = None) -> None:
        self._stream = stream or sys.stderr
        self._total = total_steps
        self._bar = None
        if self._stream.isatty():
            self._bar = tqdm(
                total=total_steps, initial=start, file=self._stream, unit="step", dynamic_ncols=True
            )

    def show(self, step: int, scalars: Mapping[str, float]) -> None:
        """Brings the display to `step`. `scalars`: tag -> value; "eta" is in seconds."""
        values = {name: f"{scalars[tag]:.4g}" for tag, name in _SHOWN.items() if tag in scalars}
        if self._bar is not None:
            self._bar.set_postfix(values, refresh=False)
            self._bar.update(step - self._bar.n)
            return
        parts = [f"step {step}/{self._total}", *(f"{name} {text}" for name, text in values.items())]
        if "eta" in scalars:
            parts.append(f"eta {duration(scalars['eta'])}")
        print("  ".join(parts), file=self._stream, flush=True)

    def message(self, text: str) -> None:
        """A line of its own, without breaking the bar."""
        if self._bar is not None:
            self._bar.write(text, file=self._stream)
        else:
            print(text, file=self._stream, flush=True)

    def close(self) -> None:
        """Leaves the bar as it stands."""
        if self._bar is not None:
            self._bar.close()
