"""DeepSpeed's own monitor and flops profiler, as the engine's JSON file turns them on.

DeepSpeed would open event files of its own. Instead its events come to ours: what it measures that we
do not (the times of forward, backward, reduction and step, with "wall_clock_breakdown": true) stands
in our record, and what both know (loss, learning rate, loss scale) is written once.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

__all__ = ["EngineEvents", "attach"]

_PREFIX = "Train/Samples/"
_OURS = ("train_loss", "lr", "loss_scale")
PROFILE = "flops_profile.txt"


class EngineEvents:
    """Stands in the place of `engine.monitor` and keeps the latest value of each event."""

    enabled = True

    def __init__(self) -> None:
        self._latest: dict[str, float] = {}

    def write_events(self, events: Iterable[tuple[str, Any, int]]) -> None:
        """What DeepSpeed calls: (tag, value, samples) each."""
        for tag, value, _ in events:
            name = tag.removeprefix(_PREFIX)
            if name not in _OURS:
                self._latest[name] = float(value)

    def take(self) -> dict[str, float]:
        """Name -> value of the latest step; empty when there was none since the last call."""
        latest, self._latest = self._latest, {}
        return latest


def attach(engine: Any, directory: Path) -> EngineEvents | None:
    """Connects an engine whose settings ask for either; a profile without a file of its own goes
    into the run directory.

    Returns:
        the events, when the engine breaks down its time.
    """
    if engine.flops_profiler_enabled() and engine.flops_profiler_output_file() is None:
        engine._config.flops_profiler_config.output_file = str(directory / PROFILE)
    if not engine.wall_clock_breakdown():
        return None
    engine.monitor = EngineEvents()
    return engine.monitor
