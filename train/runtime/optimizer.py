"""The engine's optimizer: its parameter groups, and which AdamW does the arithmetic."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterable, Mapping
from itertools import chain
from typing import Any

import torch
from torch import nn

from train.config import OptimConfig
from train.runtime.distributed import all_reduce_flag, barrier

__all__ = ["GuardedAdamW", "make_optimizer", "parameter_groups"]

_LOG = logging.getLogger(__name__)
# Linear, LayerNorm, GELU, Linear; published as nn.Sequential, so that the norm is called "1".
_HEADS_WITH_NORMS = ("itm_head", "bbox_head", "cls_head", "contrastive")


def parameter_groups(
    student: nn.Module,
    new_modules: set[str],
    optim: OptimConfig,
    extras: Mapping[str, nn.Module] | None = None,
) -> list[dict[str, Any]]:
    """AdamW groups {decay, no decay} x {lr, new lr}, empty ones left out, in a fixed order.

    Biases, norm weights and every other parameter of at most one dimension do not decay. Parameters
    below a module named in `new_modules` (or named there themselves) get `new_lr_multiplier`
    (EfficientVLM section 4). With `optim.published_decay` the norm weights inside the MLP heads and
    the temperature do decay: the published rule goes by names and misses theirs. A multiplier
    without anything new is warned of.

    Args:
        extras: modules trained beside the student (`Task.trainable_modules`), all of them new.

    Raises:
        ValueError: a name in `new_modules` matches nothing.
    """
    groups = {
        (decays, new): {
            "params": [],
            "name": f"{'decay' if decays else 'no_decay'}{'_new' if new else ''}",
            "weight_decay": optim.weight_decay if decays else 0.0,
            "lr_multiplier": optim.new_lr_multiplier if new else 1.0,
        }
        for new in (False, True)
        for decays in (True, False)
    }
    extras = extras or {}
    unmatched = set(new_modules)
    new_modules = new_modules | extras.keys()
    beside = (extra.named_parameters(prefix=name) for name, extra in extras.items())
    for name, parameter in chain(student.named_parameters(), *beside):
        if not parameter.requires_grad:
            continue
        hits = {module for module in new_modules if name == module or name.startswith(f"{module}.")}
        unmatched -= hits
        decays = parameter.ndim > 1 or (optim.published_decay and _missed_by_name(name))
        groups[decays, bool(hits)]["params"].append(parameter)
    if unmatched:
        raise ValueError(
            "new modules with no trainable parameter in the student: "
            f"{', '.join(sorted(unmatched))}"
        )
    kept = [group for group in groups.values() if group["params"]]
    if optim.new_lr_multiplier != 1.0 and not any(
        groups[key]["params"] for key in groups if key[1]
    ):
        _LOG.warning(
            "optim.new_lr_multiplier has no effect: no trained parameter is fresh beside loaded ones"
        )
    for group in kept:
        group["lr"] = optim.lr * group["lr_multiplier"]
    return kept


def _missed_by_name(name: str) -> bool:
    """Of one dimension, and neither "bias" nor a norm's name in the published models."""
    return name.split(".")[0] in _HEADS_WITH_NORMS and not name.endswith("bias")


class GuardedAdamW(torch.optim.AdamW):
    """AdamW for ZeRO stage 0: clips by the global norm, keeps that norm, and skips a step with
    non-finite gradients.

    At stages 1-3 DeepSpeed does all three; at stage 0 in fp32 it only clips, and would write NaN
    into the weights. The engine reads `overflow` and `_global_grad_norm` from its optimizer.
    Gradients are already averaged over ranks here, so all ranks decide alike.
    """

    def __init__(self, groups: Iterable[dict[str, Any]], clip: float, **options: Any) -> None:
        super().__init__(groups, **options)
        self.clip = clip
        self.overflow = False
        self._global_grad_norm: float | None = None

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        parameters = [
            p for group in self.param_groups for p in group["params"] if p.grad is not None
        ]
        norm = nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
        self._global_grad_norm = norm.item()
        self.overflow = not bool(torch.isfinite(norm))
        if self.overflow:
            return None
        if self.clip > 0.0:
            nn.utils.clip_grads_with_norm_(parameters, self.clip, norm)
        return super().step(closure)


def make_optimizer(
    groups: list[dict[str, Any]], optim: OptimConfig, stage: int, on_host: bool
) -> torch.optim.Optimizer:
    """AdamW as a client optimizer: DeepSpeed's own would compile fused_adam on a CPU (45 s).

    Args:
        groups: from `parameter_groups`.   stage: of ZeRO.
        on_host: the optimizer states are offloaded. Collective then.
    """
    options = {
        "lr": optim.lr,
        "betas": tuple(optim.betas),
        "eps": optim.eps,
        "weight_decay": optim.weight_decay,
    }
    if stage == 0:
        return GuardedAdamW(groups, clip=optim.clip, **options)
    if on_host:
        return _cpu_optimizer(groups, options)
    if torch.cuda.is_available():
        return torch.optim.AdamW(groups, fused=True, **options)
    return torch.optim.AdamW(groups, **options)


def _cpu_optimizer(groups: list[dict[str, Any]], options: dict[str, Any]) -> torch.optim.Optimizer:
    """DeepSpeed's vectorised Adam where it can be compiled (about a minute, once for a machine),
    torch's otherwise. Collective: the ranks take the same one, as their rounding differs.
    """
    import deepspeed.ops.op_builder

    # The accelerator decides which builder goes by this name.
    builder = getattr(deepspeed.ops.op_builder, "CPUAdamBuilder", None)
    # One rank of each machine compiles; the others find the result.
    first = int(os.environ.get("LOCAL_RANK", "0")) == 0
    problem = _load(builder) if first else None
    barrier("compiling cpu_adam")
    problem = problem if first else _load(builder)
    if not all_reduce_flag(problem is not None):
        from deepspeed.ops.adam import DeepSpeedCPUAdam

        return DeepSpeedCPUAdam(groups, adamw_mode=True, **options)
    _LOG.warning(
        "offloading: cpu_adam cannot be compiled (%s); torch's AdamW does the updates, several "
        "times slower. Install a C++ compiler and ninja (`espalier doctor` looks for them)",
        problem or "on another rank",
    )
    return torch.optim.AdamW(groups, **options)


def _load(builder: Any) -> str | None:
    """Why an operator of DeepSpeed cannot be compiled and loaded here; None: it can."""
    try:
        builder().load(verbose=False)
    except Exception as error:  # compilers, linkers, missing tools: each has its own
        return f"{type(error).__name__}: {error}".strip().splitlines()[-1]
    return None
