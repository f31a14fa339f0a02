"""Training with trimmers: a trimmed pass and a full pass of one model over the same batch.

What is published of SmartTrim (2305.15033): the task's loss, a cost term that pulls the kept share
to a target, self-distillation from the full-capacity pass, and a curriculum on the target. The
weights, the cost in multiply-accumulates and the loss of the full pass are ours.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from data_pipeline.batches import Batch
from models.outputs import TrimRecord
from models.trimming import Costs, expected_macs
from models.xvlm import XVLM
from train.losses.gather import all_gather_with_grad
from train.runtime.teacher import Teacher
from train.tasks.base import Losses, StepContext, Task
from train.tasks.scored import Scored
from train.trim_config import TrimConfig

__all__ = ["TrimTask", "costs_of", "kept_shares", "row_shares", "site_shares"]


@dataclass
class TrimTask(Task):
    """A task's losses with and without trimming, self-distillation, and the cost.

    Both passes run on every rank in every step, and trimming masks, so that all ranks run one
    graph. The cost is counted over the batches of all ranks: its term does not depend on how many
    ranks share a batch.

    Attributes:
        steps: of the run; the target is a function of the step.
    """

    base: Any  # Task and Trimmable
    trim: TrimConfig
    steps: int
    name: str = field(init=False)  # type: ignore[misc]

    def __post_init__(self) -> None:
        self.name = self.base.name
        for hook in ("evaluate", "evaluate_split"):  # the runner asks which of them there is
            if hook == "evaluate" or hasattr(self.base, hook):
                setattr(self, hook, getattr(self.base, hook))

    def counts(self, batch: Batch) -> dict[str, Tensor]:
        return self.base.counts(batch)

    def losses(
        self, student: XVLM, teacher: Teacher | None, batch: Batch, context: StepContext
    ) -> Losses:
        trim, base = self.trim, self.base
        share = base.shares(batch, context)
        full: Scored | None = None
        if trim.full_weight or trim.distil_weight:
            student.set_trimming("off")
            with torch.set_grad_enabled(trim.full_weight > 0 and torch.is_grad_enabled()):
                full = base.score(student, batch, context, share)
        student.set_trimming("mask", tau=trim.noise(context.step, self.steps))
        ours = base.score(student, batch, context, share, full)
        terms = dict(ours.terms)
        weights = {name: base.weights.get(name, 1.0) for name in terms}
        metrics = dict(ours.metrics)
        if full is not None:
            for name, value in full.terms.items():
                if trim.full_weight:
                    terms[f"full_{name}"] = value
                    weights[f"full_{name}"] = trim.full_weight * weights[name]
            metrics |= {f"full_{name}": value for name, value in full.metrics.items()}
            if trim.distil_weight:
                found = base.imitate(ours, full, batch, share)
                terms |= {f"self_{name}": value for name, value in found.items()}
                weights |= dict.fromkeys((f"self_{name}" for name in found), trim.distil_weight)
        costs = costs_of(student, ours)
        terms["cost"], spent = self._cost(costs, ours, context.step)
        weights["cost"] = trim.cost_weight
        metrics |= spent | site_shares(ours)
        # Never trained without trimmers by accident: whoever runs the model next finds them on.
        return Losses(terms, weights, metrics)

    def _cost(self, costs: Costs, ours: Scored, step: int) -> tuple[Tensor, dict[str, Tensor]]:
        trim = self.trim
        macs = _over_ranks(costs.total()) / _over_ranks(costs.total_dense())
        target = trim.target(step, self.steps)
        metrics = {
            "macs_share": macs.detach(),
            "target_share": torch.tensor(target, device=macs.device),
        }
        if trim.cost == "macs":
            return _excess(macs, target), metrics
        tokens, heads = kept_shares(ours)
        tokens = _over_ranks(tokens)
        term = _excess(tokens, target)
        metrics["tokens_share"] = tokens.detach()
        if heads is not None:
            heads = _over_ranks(heads)
            metrics["heads_share"] = heads.detach()
            term = term + _excess(heads, trim.target(step, self.steps, trim.head_budget))
        return term, metrics


def costs_of(model: XVLM, done: Scored) -> Costs:
    """Multiply-accumulates of a trimmed pass."""
    return expected_macs(
        model.config,
        image=done.image,
        text=done.text,
        fused=done.fused,
        answer_tokens=done.answer_tokens,
    )


def row_shares(costs: Costs) -> Tensor | None:
    """(B,) cost of each example over the full model's mean; None where texts share images."""
    try:
        return costs.per_example() / costs.total_dense()
    except ValueError:
        return None


def _excess(share: Tensor, target: float) -> Tensor:
    """The square of what a share has above its target. Below it nothing pulls it back up but the
    task: a cost that is missed from below would first drive every decision to a certain keep.
    """
    return (share - target).clamp_min(0.0) ** 2


def _over_ranks(share: Tensor) -> Tensor:
    """The mean of a scalar over all ranks, with the gradient of each. Collective."""
    return all_gather_with_grad(share.reshape(1)).mean()


def _records(done: Scored) -> dict[str, TrimRecord]:
    passes = {"vision": done.image, "text": done.text, "fusion": done.fused}
    return {
        name: output.trimming
        for name, output in passes.items()
        if output is not None and output.trimming is not None
    }


def kept_shares(done: Scored) -> tuple[Tensor, Tensor | None]:
    """Mean kept share over the token sites, and over attentions with a head trimmer (or None).

    Of the tokens that could go at all: neither protected ones nor padding; with gradient.
    """
    tokens = list(_token_shares(done).values())
    heads = [
        part.mean()
        for record in _records(done).values()
        for chosen in (record.heads, record.cross_heads)
        for part in chosen.values()
    ]
    if not tokens and not heads:
        raise ValueError("this pass has no trimmers: nothing to count")
    every = torch.stack(tokens).mean() if tokens else torch.stack(heads).mean().new_ones(())
    return every, torch.stack(heads).mean() if heads else None


def _token_shares(done: Scored) -> dict[str, Tensor]:
    """Token site -> kept share of what could go in front of the first site of its tokens."""
    values: dict[str, Tensor] = {}
    records = _records(done)
    # An image that comes trimmed to the fusion layers is compared with the whole image.
    seen = next(iter(records["vision"].sites.values()), None) if "vision" in records else None
    left: Tensor | float = 1.0  # of texts that come trimmed to a fusion pass, which has other rows
    for name, record in records.items():
        for kind, sites, whole in (
            (name, record.sites, None),
            ("image", record.context_sites, seen),
        ):
            begun = left if kind == "fusion" else 1.0
            for layer, site in sites.items():
                whole = site if whole is None else whole
                could = whole.movable.float().sum(1).mean()
                kept = (site.kept * site.movable).sum(1).mean()
                values[f"{kind}.{layer}"] = begun * kept / could.clamp_min(1.0)
                left = values[f"{kind}.{layer}"] if kind == "text" else left
    return values


@torch.no_grad()
def site_shares(done: Scored) -> dict[str, Tensor]:
    """Kept share of tokens at each site and of heads at each attention, by name, for the record."""
    values = {f"keep/{name}": share for name, share in _token_shares(done).items()}
    for name, record in _records(done).items():
        for kind in ("heads", "cross_heads"):
            for layer, part in getattr(record, kind).items():
                values[f"keep/{name}.{layer}.{kind}"] = part.mean()
    return {key: value.detach() for key, value in values.items()}
