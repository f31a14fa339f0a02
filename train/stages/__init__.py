"""The training stages: pretrain, distill, finetune, prune. One walk; they differ in their run file."""

from __future__ import annotations

from train.config import RunConfig

__all__ = ["run"]


def run(
    config: RunConfig, resume: str = "auto", dry_run: bool = False, rebase: bool = False
) -> int:
    """Run one stage, or describe it without data or devices (`dry_run`).

    Returns:
        0 when done, 75 when stopped by a signal with a checkpoint saved.
    Raises:
        ValueError, FileNotFoundError: bad input; the command line shows the message and exits 2.
    """
    from train.stages.check import check_stage

    check_stage(config)
    if dry_run:
        from train.stages.dry_run import describe

        print(describe(config))
        return 0
    from train.stages.walk import walk

    return walk(config, resume, rebase)
