"""What a run file says about budgets: is it sound, and in one line. Loads nothing heavy."""

from __future__ import annotations

from train.config import RunConfig

__all__ = ["budget_line", "check_budget"]


def check_budget(config: RunConfig) -> None:
    """Raises ValueError on budgets that contradict themselves or the rest of the run file."""
    prune = config.prune
    if prune is None:
        return
    if not 0 < prune.sparsity < 1:
        raise ValueError(f"prune.sparsity: {prune.sparsity} is not between 0 and 1")
    if prune.round_to < 1:
        raise ValueError(f"prune.round_to: {prune.round_to} is not a positive number of units")
    freeze = prune.freeze_step
    if prune.constraint == "projection" and freeze is not None and freeze < prune.ramp_steps:
        raise ValueError(
            f"prune.freeze_step: {freeze} lies before the end of the ramp (prune.ramp_steps="
            f"{prune.ramp_steps}), and prune.constraint=projection holds gates to the ramp: the "
            "structure would be fixed short of the target. Freeze later, or ramp faster"
        )
    budget = prune.budget
    if budget is None:
        return
    if (budget.macs is None) == (budget.speedup is None):
        raise ValueError("prune.budget: give either macs or speedup")
    if budget.macs is not None and not 0 < budget.macs < 1:
        raise ValueError(f"prune.budget.macs: {budget.macs} is not between 0 and 1")
    if budget.speedup is not None and budget.speedup <= 0:
        raise ValueError(f"prune.budget.speedup: {budget.speedup} must be positive")
    if budget.speedup is not None and budget.against == "teacher" and not config.teacher.path:
        raise ValueError(
            "prune.budget.speedup is told against the teacher: name one in teacher.path, or set "
            "prune.budget.against=student"
        )
    for key in ("batch", "repeats"):
        if getattr(budget, key) < 1:
            raise ValueError(f"prune.budget.{key}: {getattr(budget, key)} is not positive")
    if not 0 < budget.tolerance < 1:
        raise ValueError(f"prune.budget.tolerance: {budget.tolerance} is not between 0 and 1")


def budget_line(config: RunConfig) -> str:
    """One line for people: what is to be saved, and who decides where."""
    prune = config.prune
    assert prune is not None
    budget = prune.budget
    if budget is None:
        told = f"{prune.sparsity:.0%} of the prunable parameters"
    elif budget.macs is not None:
        told = f"{budget.macs:.0%} of the prunable multiply-accumulates"
    else:
        told = f"to {budget.speedup:g} times the {budget.against}'s speed at batch {budget.batch}"
    rounded = f", FFN widths in multiples of {prune.round_to}" if prune.round_to > 1 else ""
    return f"prune {told}, {prune.scope}, by {prune.constraint}{rounded}"
