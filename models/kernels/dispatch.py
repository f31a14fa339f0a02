"""Which implementation of an op runs: reference, compiled, cuda, or auto.

    reference   plain torch (models/kernels/reference*.py), what the CPU always takes
    compiled    the reference under torch.compile
    cuda        the kernels of csrc/; without a device, or for tensors they do not take, an error
    auto        cuda where it can run, else reference: never an error

One word sets all ops; "auto,ffn_act_mask=reference" sets one of them apart. The run file's
`engine.kernels` is set with `configure`; the environment's ESPALIER_KERNELS comes before it. What
was picked for an op is logged once, with the reason.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from functools import cache
from typing import Any

import torch

from models.kernels import library

__all__ = ["BACKENDS", "call", "configure", "missing", "parse", "pick", "refuse", "setting"]

BACKENDS = ("auto", "reference", "compiled", "cuda")
ENVIRONMENT = "ESPALIER_KERNELS"
OPS = (
    "ffn_act_mask",
    "hard_concrete",
    "fold_cast",
    "compact",
    "attention_kd",
    "head_mask",
    "pack_tokens",
)

_log = logging.getLogger(__name__)
_configured: dict[str, str] | None = None
_refused: str | None = None
_told: set[tuple[str, str, str]] = set()


def parse(text: str) -> dict[str, str]:
    """ "auto,OP=BACKEND" -> backend of every op. Raises ValueError naming what is unknown."""
    default, single = "auto", {}
    for part in filter(None, (part.strip() for part in text.split(","))):
        op, separator, backend = part.rpartition("=")
        if backend not in BACKENDS:
            raise ValueError(
                f"engine.kernels or {ENVIRONMENT}: {part!r} names no backend; choose one of "
                f"{', '.join(BACKENDS)}"
            )
        if not separator:
            default = backend
        elif op in OPS:
            single[op] = backend
        else:
            raise ValueError(
                f"engine.kernels or {ENVIRONMENT}: there is no op {op!r}; ops are {', '.join(OPS)}"
            )
    return {op: single.get(op, default) for op in OPS}


def configure(text: str) -> None:
    """Sets what the run file asks for; ESPALIER_KERNELS still comes first."""
    global _configured, _refused
    _configured, _refused = parse(text), None
    _resolve.cache_clear()
    _told.clear()


def refuse(reason: str) -> None:
    """From here on, until `configure`, this process does as if it had no kernels.

    Ranks of one run must take the same path: the kernels draw other gates from the same key.
    """
    global _refused
    _refused = reason
    _resolve.cache_clear()


def missing(device: str) -> str | None:
    """Why no op can run its kernel on a kind of device, or None. May build them; never raises for
    what the machine lacks."""
    if all(setting(op) in ("reference", "compiled") for op in OPS):
        return "no kernel is asked for"
    if device != "cuda":
        return f"the tensors are on {device}"
    return _refused or library.unavailable()


def setting(op: str) -> str:
    """What is asked for, before the machine is considered."""
    text = os.environ.get(ENVIRONMENT)
    if text:
        return parse(text)[op]
    return "auto" if _configured is None else _configured[op]


@cache
def _resolve(op: str, asked: str, device: str, unsupported: str | None) -> tuple[str, str]:
    """Backend and reason for an op on a kind of device; `unsupported`: why the kernel does not take
    these tensors."""
    if asked in ("reference", "compiled"):
        return asked, "asked for"
    reason = unsupported
    if reason is None and device != "cuda":
        reason = f"the tensors are on {device}"
    if reason is None:
        reason = _refused or library.unavailable()
    if reason is None:
        return "cuda", "asked for" if asked == "cuda" else "kernels are available"
    if asked == "cuda":
        raise RuntimeError(
            f"kernel {op} was asked for explicitly, but {reason}; take 'auto' (engine.kernels or "
            f"{ENVIRONMENT}) to go on without it"
        )
    return "reference", reason


@torch.compiler.assume_constant_result
def pick(op: str, device: str, unsupported: str | None = None) -> str:
    """ "reference", "compiled" or "cuda" for tensors on `device` ("cpu", "cuda").

    unsupported: why the kernel does not take these tensors, None when it does.
    Raises RuntimeError when cuda was asked for explicitly and cannot be had.
    """
    if torch.compiler.is_exporting():
        return "reference"  # an exported graph runs where these ops are not
    backend, reason = _resolve(op, setting(op), device, unsupported)
    key = (op, device, backend)
    if key not in _told:
        _told.add(key)
        # On a CPU the reference is no choice, so it makes no line.
        level = logging.DEBUG if device == "cpu" and backend == "reference" else logging.INFO
        _log.log(level, "%s on %s: %s (%s)", op, device, backend, reason)
    return backend


@cache
def _compiled(reference: Callable[..., Any]) -> Callable[..., Any]:
    return torch.compile(reference, dynamic=True)


def call(
    backend: str, reference: Callable[..., Any], cuda: Callable[..., Any], *arguments: Any
) -> Any:
    """Runs the picked one; all three take the same arguments."""
    if backend == "cuda":
        return cuda(*arguments)
    # Inside a compiled region the reference is compiled with what surrounds it.
    if backend == "compiled" and not torch.compiler.is_compiling():
        return _compiled(reference)(*arguments)
    return reference(*arguments)
