"""The training stages: pretrain, distill, finetune, prune. One walk; they differ in their run file."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from train.config import RunConfig

__all__ = ["run"]


def run(
    config: RunConfig,
    resume: str = "auto",
    dry_run: bool = False,
    rebase: bool = False,
    plan: Mapping[str, Any] | None = None,
) -> int:
    """Run one stage, or describe it without data or devices (`dry_run`).

    Args:
        plan: "ranks", "samples_per_s" and "like" of a dry run, see `dry_run.Asked`.

    Returns:
        0 when done, 75 when stopped by a signal with a checkpoint saved (or before there was
        anything to save).
    Raises:
        ValueError, FileNotFoundError: bad input; the command line shows the message and exits 2.
    """
    from train.stages.check import check_stage

    check_stage(config)
    if dry_run:
        if os.environ.get("RANK", "0") == "0":  # under a launcher every rank would say the same
            _describe(config, plan or {})
        return 0
    from train.runtime.signals import alone, stop_on_signals

    with stop_on_signals():
        with alone("while the libraries were loaded"):
            from train.stages.walk import walk
        return walk(config, resume, rebase)


def _describe(config: RunConfig, plan: Mapping[str, Any]) -> None:
    from train.stages.dry_run import Asked, describe

    like = plan.get("like")
    asked = Asked(
        tuple(plan.get("ranks") or ()),
        plan.get("samples_per_s"),
        None if like is None else Path(like),
    )
    print(describe(config, asked))
