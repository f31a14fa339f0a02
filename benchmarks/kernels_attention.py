"""Cases of benchmarks/kernels.py for the ops on attention and tokens.

attention_kd at batch 64, 12 heads of 64, in bf16 with a teacher in fp16, as training runs it:
    eager      whole maps of both models in fp32, plain autograd
    released   the same with the published no-op torch.where on both maps
    chunked    tiles of the maps in plain torch, gradients taken in the forward (train/losses)
    compiled   eager under torch.compile
Time is both ways; peak_bytes is what a call takes beyond its inputs.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from models.kernels import pack_tokens, reference_attention
from models.outputs import AttentionTrace
from train.losses.attention import attention_mse

if TYPE_CHECKING:
    from benchmarks.kernels import Case, Inputs

# Rows, heads, tokens, head size: the ViT at 224, 384 and 480 pixels.
SHAPES = {
    f"vit{size}": (64, 12, tokens, 64) for size, tokens in ((224, 197), (384, 577), (480, 901))
}
SMALL = {"small": (2, 2, 40, 16)}
CHUNK = 1 << 25

MakeCase = Callable[..., "Case"]


def kd_case(case: MakeCase, shape: tuple[int, int, int, int], device: str) -> Case:
    """Self-attention of student and teacher, all tokens visible."""
    rows, heads, tokens, depth = shape
    scale = depth**-0.5

    def projected(dtype: torch.dtype) -> Tensor:
        """(B, H, N, d) as a linear layer leaves it."""
        return torch.randn(rows, tokens, heads, depth, device=device).to(dtype).transpose(1, 2)

    def make() -> Inputs:
        ours = (projected(torch.bfloat16).requires_grad_() for _ in range(2))
        return *ours, projected(torch.float16), projected(torch.float16)

    def rest(kind: str = "probabilities") -> tuple[object, ...]:
        return None, None, None, scale, scale, False, False, kind

    def eager(q: Tensor, k: Tensor, teacher_q: Tensor, teacher_k: Tensor) -> Tensor:
        return reference_attention.attention_kd(q, k, teacher_q, teacher_k, *rest())  # type: ignore[arg-type]

    def released(q: Tensor, k: Tensor, teacher_q: Tensor, teacher_k: Tensor) -> Tensor:
        maps = (q @ k.mT * scale, teacher_q @ teacher_k.mT * scale)
        ours, theirs = (m.float().softmax(dim=-1) for m in maps)
        ours, theirs = (torch.where(p <= -1e2, torch.zeros_like(p), p) for p in (ours, theirs))
        return tokens * F.mse_loss(ours, theirs)

    def chunked(q: Tensor, k: Tensor, teacher_q: Tensor, teacher_k: Tensor) -> Tensor:
        student, teacher = (
            AttentionTrace(a, b, scale) for a, b in ((q, k), (teacher_q, teacher_k))
        )
        return attention_mse(student, teacher, chunk=CHUNK)

    def kernel(q: Tensor, k: Tensor, teacher_q: Tensor, teacher_k: Tensor) -> Tensor:
        return torch.ops.espalier.attention_kd(q, k, teacher_q, teacher_k, *rest())[0]

    variants = {"eager": eager, "released": released, "chunked": chunked}
    variants |= {"compiled": torch.compile(eager), "kernel": kernel}
    inputs = 8 * rows * heads * tokens * depth
    # released rounds the scores to the models' types
    traffic = (inputs, inputs + inputs // 2)
    return case(make, variants, traffic, check=0.05, uncompared={"released"})


def head_case(case: MakeCase, shape: tuple[int, int, int, int], device: str) -> Case:
    """A mask of each row on the context, in bf16."""
    rows, heads, tokens, depth = shape

    def make() -> Inputs:
        context = torch.randn(rows, tokens, heads * depth, device=device).bfloat16()
        mask = torch.rand(rows, heads, device=device)
        return context.requires_grad_(), mask.requires_grad_()

    eager = reference_attention.head_mask
    kernel = torch.ops.espalier.head_mask
    variants = {"eager": eager, "compiled": torch.compile(eager), "kernel": kernel}
    size = 2 * rows * heads * tokens * depth
    return case(make, variants, (2 * size, 3 * size))


def pack_case(case: MakeCase, shape: tuple[int, int, int, int], device: str) -> Case:
    """60 % of the tokens kept; `indexed` is x[keep], for which the host waits."""
    rows, heads, tokens, depth = shape

    def make() -> Inputs:
        x = torch.randn(rows, tokens, heads * depth, device=device).bfloat16()
        return x.requires_grad_(), torch.rand(rows, tokens, device=device) < 0.6

    def eager(x: Tensor, keep: Tensor) -> Tensor:
        return reference_attention.pack_tokens(x, keep)[0]

    def indexed(x: Tensor, keep: Tensor) -> Tensor:
        return F.pad(x[keep], (0, 0, 0, keep.numel() - int(keep.sum())))

    def kernel(x: Tensor, keep: Tensor) -> Tensor:
        return pack_tokens.pack_tokens(x, keep)[0]

    size = 2 * rows * heads * tokens * depth
    traffic = int(1.6 * size)  # kept tokens are read, and the whole of the other side is written
    return case(make, {"eager": eager, "indexed": indexed, "kernel": kernel}, (traffic, traffic))


def attention_cases(case: MakeCase, device: str, small: bool) -> dict[str, Callable[[], Case]]:
    """Makers of these cases by name; `case` is `benchmarks.kernels.Case`."""
    made: dict[str, Callable[[], Case]] = {}
    for name, shape in (SMALL if small else SHAPES).items():
        made[f"attention_kd_{name}"] = lambda s=shape: kd_case(case, s, device)
        made[f"head_mask_{name}"] = lambda s=shape: head_case(case, s, device)
        made[f"pack_tokens_{name}"] = lambda s=shape: pack_case(case, s, device)
    return made
