"""The namespace "espalier" of torch operators, and how an operator gets into it.

How to add an op (ffn_act_mask is the example to follow):

1. reference: a plain torch function in models/kernels/reference*.py. It is the specification:
   differentiable, any dtype, double included. Its backward in closed form stands beside it.
2. csrc/NAME.cuh holds the kernels, csrc/NAME.cu the launchers: `extern "C" int espalier_NAME(...)`
   with pointers, int64_t and double only, `void* stream` last (csrc/common.cuh). Everything that
   differs between nvcc and g++ is a macro of csrc/port.cuh: the tests run both files on a CPU.
   Read and write tensors through `load` and `store`, which the emulation checks.
3. models/kernels/NAME.py: a CUDA implementation that allocates the outputs and calls
   `library.current().launch("espalier_NAME", ...)`; `define` for the op and for its backward op
   (reference on the CPU key, that function on the CUDA key, a fake for shapes);
   `differentiable` to join the two; and the public function, which goes through
   `dispatch.pick("NAME", ...)` to the reference, the compiled reference, or torch.ops.espalier.NAME.
4. tests/unit/models/kernels/test_NAME.py: gradcheck of the reference, the launchers under emulation
   (tests/emulation) against float64, `torch.library.opcheck`; tests/gpu/test_kernels.py: parity on
   a device; benchmarks/kernels.py: a case; docs/kernels.md: a paragraph.

Ops are opaque to torch.compile: they end fusion with their neighbours. Put them between products.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.library import Library, register_autograd, register_fake

__all__ = ["NAMESPACE", "define", "differentiable", "once_differentiable"]

NAMESPACE = "espalier"
# Kept alive: the registrations go when it does.
_LIBRARY = Library(NAMESPACE, "DEF")


def define(
    schema: str,
    *,
    cpu: Callable[..., Any],
    cuda: Callable[..., Any],
    fake: Callable[..., Any],
) -> str:
    """Defines `espalier::NAME` of a functional schema "NAME(Tensor x, ...) -> ..."; returns NAME.

    cpu, cuda: implementations; outputs must not alias inputs.
    fake: the same signature, returns empty tensors of the right shape, dtype and device.
    """
    name = schema.partition("(")[0].strip()
    _LIBRARY.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    _LIBRARY.impl(name, cpu, "CPU")
    _LIBRARY.impl(name, cuda, "CUDA")
    register_fake(f"{NAMESPACE}::{name}", fake, lib=_LIBRARY)
    return name


def differentiable(
    name: str, backward: Callable[..., Any], setup_context: Callable[..., None]
) -> None:
    """Gives an op its gradient: backward(ctx, *gradients), setup_context(ctx, inputs, output), with
    these names. The backward calls an op of its own, so that torch.compile sees through it."""
    register_autograd(f"{NAMESPACE}::{name}", backward, setup_context=setup_context, lib=_LIBRARY)


def once_differentiable(name: str) -> None:
    """For backward ops: a second derivative is refused with a message instead of being wrong."""

    def refuse(ctx: Any, *gradients: Any) -> Any:
        raise RuntimeError(
            f"{NAMESPACE}::{name} has no derivative; for second derivatives take the reference: "
            "ESPALIER_KERNELS=reference"
        )

    differentiable(name, refuse, lambda ctx, inputs, output: None)
