"""Trains a GateBank beside the engine: own fp32 optimizers, own gradient reduction."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed
from torch import Tensor
from torch.optim import AdamW

from models.compaction import ActiveUnits
from models.gates import GateBank
from models.pruning.budget import target_sparsity
from models.pruning.projection import check_reach, project, tangent
from train.config import PruneConfig
from train.pruning.budgets import PruneBudget

__all__ = ["GateOptimizer"]

_log = logging.getLogger(__name__)
_BETAS = (0.9, 0.98)
_FAR = 0.05  # a structure this far from its target says that the constraint had not converged


def _adamw(parameter: Tensor, lr: float, maximize: bool = False) -> AdamW:
    return AdamW([parameter], lr=lr, betas=_BETAS, eps=1e-8, weight_decay=0.0, maximize=maximize)


def _target_key(prune: PruneConfig) -> str:
    """The key that says how much is to go."""
    if prune.budget is None:
        return "prune.sparsity"
    return "prune.budget.speedup" if prune.budget.macs is None else "prune.budget.macs"


def _optimizer_state(optimizer: AdamW, parameter: Tensor) -> dict[str, Tensor]:
    """Moments under their names: torch's own state dict has integer keys, which JSON would turn
    into strings."""
    return {
        name: value.detach().cpu().clone() for name, value in optimizer.state[parameter].items()
    }


def _load_optimizer_state(optimizer: AdamW, moments: Mapping[str, Tensor]) -> None:
    state = optimizer.state_dict()
    state["state"] = {0: dict(moments)} if moments else {}
    optimizer.load_state_dict(state)


@dataclass(frozen=True)
class _Sample:
    """Gates of one step.

    Attributes:
        key: the step, and the seed of its noise.   z: (G,) with its graph to log-alpha.
        active: the units that take part; None where all do.
    """

    key: tuple[int, int]
    z: Tensor
    active: ActiveUnits | None


class GateOptimizer:
    """One step of the gates per optimizer step of the model.

        gates.begin_step(step, generator)  # leaves into the slots, shared by all micro-batches
        ... forward and backward of every micro-batch ...
        gates.finish_step(step, applied, grad_scale)
        gates.prepare(next_step, generator)  # optional: what begin_step would do, ahead of it

    Steps count applied or skipped general steps from 0. From `freeze_step` on the structure is
    fixed: gates that meet the budget exactly are made once and kept in the state; neither gates nor
    multipliers move any more (the published code let the Lagrangian push them on alone). Without it
    the loop fixes it after the last step; a run that is then given more steps moves them again.
    """

    def __init__(
        self,
        bank: GateBank,
        prune: PruneConfig,
        device: torch.device | str,
        world_size: int,
        budget: PruneBudget | None = None,
    ) -> None:
        """`budget`: what the gates are held to, made on this bank; None: `prune.sparsity` of its
        parameters.

        Raises ValueError when gates that are projected could not reach the target.
        """
        self.bank = bank.to(device)
        self.prune = prune
        self.budget = PruneBudget.parameters(bank, prune) if budget is None else budget
        if self._projects:
            check_reach(self.budget.constraint, _target_key(prune))
        self.world_size = world_size
        self.skipped = 0
        self._gate_optimizer = _adamw(bank.log_alpha, prune.lr)
        self._multiplier_optimizer = _adamw(bank.multipliers, prune.lr, maximize=True)
        self._sampled: Tensor | None = (
            None  # (G,) with its graph to log-alpha, of the step under way
        )
        self._ahead: _Sample | None = None  # of the coming step
        self._frozen: Tensor | None = None
        self._goal: float | None = None  # what the constraint asked for when it was fixed
        self._frozen_active: ActiveUnits | None = None
        self._step = 0

    @property
    def _projects(self) -> bool:
        return self.prune.constraint == "projection"

    @property
    def frozen(self) -> bool:
        """True once the structure is fixed."""
        return self._frozen is not None

    def begin_step(self, step: int, generator: torch.Generator) -> None:
        """Writes this step's gates into the slots: sampled, or the fixed structure from
        `freeze_step` on.

        `generator`: CPU, keyed by (seed, step), so that every rank draws the same noise (see
        GateBank.sample).
        """
        self._step = step
        if self.prune.freeze_step is not None and step >= self.prune.freeze_step:
            self.freeze()
            assert self._frozen is not None
            self._sampled = None
            self._write(self._frozen, self._frozen_active, requires_grad=False)
            return
        if self._frozen is not None:  # the run had ended here, and has more steps now
            self._thaw()
        sample, self._ahead = self._ahead, None
        if sample is None or sample.key != (step, generator.initial_seed()):
            sample = self._sample(step, generator)
        self._sampled = sample.z
        self._write(sample.z, sample.active)

    def prepare(self, step: int, generator: torch.Generator) -> None:
        """Samples the gates of the coming step now, so that the counts of its units are on the host
        when it begins.

        Changes no result: the noise is keyed by (seed, step), and log-alpha does not move between
        the steps. Another step than this one then samples for itself. `generator`: as `begin_step`
        will get it.
        """
        frozen = self.prune.freeze_step is not None and step >= self.prune.freeze_step
        self._ahead = None if frozen else self._sample(step, generator)

    def _sample(self, step: int, generator: torch.Generator) -> _Sample:
        key = (step, generator.initial_seed())
        z = self.bank.sample(generator)
        return _Sample(key, z, self._active(z))

    def _active(self, z: Tensor) -> ActiveUnits | None:
        return self.bank.active_units(z) if self.prune.gates == "compact" else None

    def _write(self, z: Tensor, active: ActiveUnits | None, requires_grad: bool = True) -> None:
        folded = self.prune.gates != "mask"
        self.bank.write(z, requires_grad, folded=folded, active=active)

    def finish_step(self, step: int, applied: bool, grad_scale: float = 1.0) -> None:
        """Updates gates and multipliers from the gradients that reached the slots, and clears the
        slots.

        applied: whether the engine applied its own update; it must be the same on every rank, as
            the engine's overflow flag is, because only then do all ranks enter the reduction.
        grad_scale: loss scale that is still in the gradients (fp16), by which they are divided.
        """
        sampled, self._sampled = self._sampled, None
        gradient = self.bank.gradient()
        self.bank.clear()
        if sampled is None:
            return
        if not applied:
            self.skipped += 1
            return
        gradient = self._reduced(gradient / grad_scale)
        # The reduced gradient is the same on every rank, and so is this decision.
        if not bool(torch.isfinite(gradient).all()):
            self.skipped += 1
            return
        (task,) = torch.autograd.grad(sampled, self.bank.log_alpha, gradient)
        self._update(task, self._ramp(step))

    def _reduced(self, gradient: Tensor) -> Tensor:
        """Mean over ranks of dL/dz. The noise is shared, so reducing before the sampling graph
        equals after it."""
        if self.world_size > 1:
            torch.distributed.all_reduce(gradient)
            gradient /= self.world_size
        return gradient

    def _ramp(self, step: int) -> float:
        """How much of the final target holds at a step, 0 to 1."""
        return target_sparsity(step, 1.0, self.prune.ramp_steps)

    def _update(self, task: Tensor, ramp: float) -> None:
        """task: (G,) gradient of the task loss by log-alpha. The constraint does not depend on the
        data: every rank has the same one, so it is added once, after the reduction."""
        if self._projects:
            self._descend(tangent(self.budget.constraint, task))
            project(self.budget.constraint, ramp)
            return
        bank = self.bank
        penalty = self.budget.constraint.penalty(ramp)
        constraint, ascent = torch.autograd.grad(penalty, (bank.log_alpha, bank.multipliers))
        bank.multipliers.grad = ascent
        self._descend(task + constraint)
        self._multiplier_optimizer.step()
        bank.multipliers.grad = None

    def _descend(self, gradient: Tensor) -> None:
        """One step of log-alpha (G,)."""
        bank = self.bank
        bank.log_alpha.grad = gradient
        self._gate_optimizer.step()
        bank.log_alpha.grad = None
        bank.clamp()

    def freeze(self) -> None:
        """Fixes the structure now; does nothing when it is fixed."""
        if self._frozen is None:
            self._goal = self.budget.constraint.sparsity
            self._fix(self._final())

    def _thaw(self) -> None:
        """Opens a structure that was fixed at the end of a shorter run. The gates have not moved
        since; a speed-up that was measured may have corrected the target.
        """
        constraint = self.budget.constraint
        if self._goal is not None:
            constraint.replace(constraint.costs, self._goal)
        self._goal = None
        self._fix(None)

    def _fix(self, structure: Tensor | None) -> None:
        self._frozen = structure
        self._frozen_active = None if structure is None else self._active(structure)

    def _final(self) -> Tensor:
        constraint = self.budget.constraint
        reached = float(constraint.actual(self.bank.deterministic()))
        if abs(reached - constraint.sparsity) > _FAR:
            _log.warning(
                "gates stand at sparsity %.3f, target %.3f: the rest is cut by rank; give the "
                "constraint more steps (prune.ramp_steps, prune.freeze_step), a larger prune.lr, or "
                "set prune.constraint=projection",
                reached,
                constraint.sparsity,
            )
        return self.budget.structure()

    def structure(self) -> dict[str, Tensor]:
        """Slot name -> (U,) gates of exactly 0 or 1 that meet the budget: what surgery cuts. Does
        not freeze."""
        final = self._final() if self._frozen is None else self._frozen
        return {name: part.clone() for name, part in self.bank.split(final).items()}

    def hard_gates(self) -> Tensor:
        """(G,) gates of 0 or 1 that evaluation uses: the fixed structure, else the deterministic
        gates."""
        return self.bank.deterministic() if self._frozen is None else self._frozen

    @contextmanager
    def evaluation(self) -> Iterator[None]:
        """Deterministic gates in the slots for the duration; what was there before comes back."""
        before, hard = self.bank.held(), self.hard_gates()
        self._write(hard, self._active(hard), requires_grad=False)
        try:
            yield
        finally:
            self.bank.restore(before)

    @torch.no_grad()
    def metrics(self) -> dict[str, float]:
        """Target, expected and actual sparsity, also by modality (see `PruneBudget.shares`), and the
        multipliers (their mean, where there are several pairs; a projection has none).

        Waits for the device; call it when a line is logged, not in every step.
        """
        ramp = self._ramp(self._step)
        record = self.budget.shares(self.hard_gates(), ramp)
        record["skipped"] = float(self.skipped)
        if self._projects:
            return record
        first, second = self.bank.multipliers.detach().reshape(2, -1).mean(1).tolist()
        return record | {"lambda1": first, "lambda2": second}

    def histograms(self) -> dict[str, Tensor]:
        """ "log_alpha/MODALITY" -> values, for TensorBoard."""
        log_alpha = self.bank.log_alpha.detach()
        return {
            f"log_alpha/{name}": log_alpha[self.bank.share(name)].cpu()
            for name in self.bank.modalities
        }

    def state_dict(self) -> dict[str, Any]:
        """Nested dict of tensors, numbers and strings; the same on every rank."""
        return {
            "bank": self.bank.state_dict(),
            "gate_optimizer": _optimizer_state(self._gate_optimizer, self.bank.log_alpha),
            "multiplier_optimizer": _optimizer_state(
                self._multiplier_optimizer, self.bank.multipliers
            ),
            "budget": self.budget.state_dict(),
            "frozen": None if self._frozen is None else self._frozen.cpu().clone(),
            "goal": self._goal,
            "skipped": self.skipped,
            "step": self._step,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Raises ValueError when the state belongs to other gates. Learning rates stay those of the
        configuration."""
        if "budget" in state:  # earlier checkpoints hold to parameters, as this run then does
            self.budget.load_state_dict(state["budget"])
        self.bank.load_state_dict(state["bank"])
        _load_optimizer_state(self._gate_optimizer, state["gate_optimizer"])
        _load_optimizer_state(self._multiplier_optimizer, state["multiplier_optimizer"])
        frozen, self._goal = state["frozen"], state.get("goal")
        self._fix(None if frozen is None else frozen.to(self.bank.log_alpha))
        self._ahead = None  # it was sampled from the gates before
        self.skipped, self._step = int(state["skipped"]), int(state["step"])
