"""The encoder passes of a model under torch.compile."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any

import torch

__all__ = ["compiled"]

# A pass is compiled once for each combination of captures, gates, masks, train or eval, gradients,
# and fixed or changing sizes. A run meets more of them than torch's default of 8, and teacher and
# student, which share their code, would use up one budget; beyond it torch goes back to eager.
_BUDGET = {"isolate_recompiles": True, "recompile_limit": 32}


def compiled(
    passes: Mapping[str, Callable[..., Any]],
    mode: str | None,
    backend: str | Callable[..., Any],
    fullgraph: bool,
) -> dict[str, Callable[..., Any]]:
    """The passes by name, compiled; arguments as of `XVLM.compile_encoders`."""
    known = inspect.signature(torch.compile).parameters
    options: dict[str, Any] = {name: value for name, value in _BUDGET.items() if name in known}
    return {
        name: torch.compile(part, mode=mode, backend=backend, fullgraph=fullgraph, **options)
        for name, part in passes.items()
    }
