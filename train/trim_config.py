"""The `trim` section of a run file: adaptive trimming of tokens and heads (docs/trimming.md)."""

from __future__ import annotations

from typing import Literal

from pydantic import ConfigDict
from pydantic.dataclasses import dataclass

__all__ = ["TrimConfig"]


@dataclass(frozen=True, kw_only=True, config=ConfigDict(extra="forbid"))
class TrimConfig:
    """Training of trimmers together with the model (SmartTrim 2305.15033; weights and schedule are
    ours).

    total = trimmed task losses + full_weight * those of the full pass
            + distil_weight * distance of the trimmed outputs from the full ones
            + cost_weight * max(0, cost - target)^2

    Attributes:
        budget: share of the full model's multiply-accumulates (or of its tokens, see `cost`) that an
            example costs on average in the end.
        warmup, ramp: shares of the steps. Over the first the target stays 1, over the second it
            falls linearly to `budget`.
        cost: "macs" counts multiply-accumulates, "ratio" the kept shares of tokens and of heads, each
            with a target of its own (the form that the paper is remembered to have).
        head_budget: with cost "ratio", the share of heads kept in the end.
        tau, final_tau: temperature of the decisions' gradient, falling linearly over the run.
        settle: share of the steps, the last ones, that decide without noise, as inference does.
        init_logit: fresh trimmers keep a token with probability sigmoid(init_logit) in training (and
            always in evaluation): what is dropped at random at first teaches both the model to go
            without and the trimmers what is missed.
        vision, fusion, text: sites, see `models.config.TrimmingConfig`; None: as
            `models.trimming.default_trimming` chooses.
        guided: vision sites see the text; None: where an image is seen with one text.
        heads: encoders whose heads are trimmed, too.
        keep: how many tokens mode "bucket" keeps at each site, from held-out inputs: their "mean",
            or the smallest number that is enough for 9 in 10 of them ("most").
        multiple: those numbers are rounded up to multiples of it.
    """

    budget: float = 0.5
    warmup: float = 0.1
    ramp: float = 0.4
    cost: Literal["macs", "ratio"] = "macs"
    head_budget: float = 1.0
    full_weight: float = 1.0
    distil_weight: float = 1.0
    cost_weight: float = 100.0
    tau: float = 1.0
    final_tau: float = 1.0
    settle: float = 0.2
    init_logit: float = 2.0
    vision: tuple[int, ...] | None = None
    fusion: tuple[int, ...] | None = None
    text: tuple[int, ...] | None = None
    guided: bool | None = None
    heads: tuple[Literal["vision", "text", "fusion"], ...] = ()
    bottleneck: int = 64
    projection: int = 64
    keep: Literal["mean", "most"] = "mean"
    multiple: int = 8

    def __post_init__(self) -> None:
        for name in ("budget", "head_budget"):
            if not 0 < getattr(self, name) <= 1:
                raise ValueError(f"trim.{name}: {getattr(self, name)} is not in (0, 1]")
        if min(self.warmup, self.ramp) < 0 or self.warmup + self.ramp > 1:
            raise ValueError(
                f"trim.warmup {self.warmup} and trim.ramp {self.ramp} are shares of the steps: not "
                "negative, together at most 1"
            )
        for name in ("full_weight", "distil_weight", "cost_weight"):
            if getattr(self, name) < 0:
                raise ValueError(f"trim.{name}: {getattr(self, name)} is negative")
        if not self.init_logit > 1:
            raise ValueError(
                f"trim.init_logit: {self.init_logit} is not above 1; the comparison with the text is "
                "worth up to 1 at first, and a fresh trimmer is to keep everything"
            )
        if not 0 <= self.settle <= 1:
            raise ValueError(f"trim.settle: {self.settle} is a share of the steps, from 0 to 1")
        if min(self.tau, self.final_tau) <= 0 or self.multiple < 1:
            raise ValueError("trim.tau and trim.final_tau are above 0, trim.multiple at least 1")
        if self.head_budget < 1 and (not self.heads or self.cost != "ratio"):
            raise ValueError(
                "trim.head_budget needs trim.heads and trim.cost=ratio; multiply-accumulates count "
                "heads already"
            )

    def target(self, step: int, steps: int, budget: float | None = None) -> float:
        """The share to aim for at a GLOBAL step: a pure function of it, so a resume continues it."""
        goal = self.budget if budget is None else budget
        begin, length = self.warmup * steps, self.ramp * steps
        if step < begin:
            return 1.0
        done = 1.0 if length <= 0 else min(1.0, (step - begin) / length)
        return 1.0 + done * (goal - 1.0)

    def noise(self, step: int, steps: int) -> float | None:
        """Temperature of the decisions' noise at a global step; None: no noise."""
        if step >= (1 - self.settle) * steps:
            return None
        return self.tau + min(1.0, step / max(1, steps)) * (self.final_tau - self.tau)
