"""On a GPU: attention_kd, head_mask and pack_tokens against float64, repeated, in graphs, in memory."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from models.kernels import attention_kd, head_mask, library, pack_tokens
from models.outputs import AttentionTrace
from tests.unit.models.kernels import test_attention_kd as kd
from tests.unit.models.kernels import test_head_mask as heads
from tests.unit.models.kernels import test_pack_tokens as packs
from train.losses.attention import attention_mse, kernel_backend

pytestmark = pytest.mark.gpu
DEVICE = "cuda"


@pytest.fixture(autouse=True, scope="module")
def _kernels() -> None:
    if library.unavailable():
        pytest.skip(f"kernels: {library.unavailable()}")


def moved(values: tuple[Any, ...]) -> tuple[Any, ...]:
    return tuple(v.to(DEVICE) if isinstance(v, Tensor) else v for v in values)


def on_device(case: kd.Case) -> list[Tensor]:
    """loss, dq, dk of the op, for an incoming gradient of 3."""
    q, k, *rest = moved(case.arguments)
    q, k = q.requires_grad_(), k.requires_grad_()
    loss = attention_kd.kernel(q, k, *rest)
    return [loss.detach(), *torch.autograd.grad(loss * 3, (q, k))]


def check(case: kd.Case) -> None:
    bound = kd.TOLERANCE[case.q.dtype]
    for a, b, most in zip(on_device(case), kd.truth(case), (1e-4, bound, bound), strict=True):
        assert kd.error(a.cpu(), b) <= 2 * most


@pytest.mark.parametrize("teacher", kd.TOLERANCE, ids=str)
@pytest.mark.parametrize("dtype", kd.TOLERANCE, ids=str)
@pytest.mark.parametrize("kind", kd.KINDS)
def test_attention_kd(kind: str, dtype: torch.dtype, teacher: torch.dtype) -> None:
    for shape, depths in (
        ((2, 3, 70, 97), (64, 64)),
        ((1, 2, 577, 577), (32, 64)),
        ((2, 1, 40, 577), (64, 32)),
        ((1, 1, 65, 33), (40, 24)),
        ((1, 1, 20, 37), (33, 7)),
    ):
        check(kd.make(kind, dtype, shape, depths, teacher))


@pytest.mark.parametrize("kind", kd.KINDS)
@pytest.mark.parametrize("which", ["all", "none", "padding", "region"])
def test_masks_weights_and_causal(which: str, kind: str) -> None:
    mask = kd.masks(which, 97)
    case = kd.make(kind, torch.bfloat16, (2, 2, 70, 97))
    case = replace(case, mask=mask, teacher_mask=mask, weight=torch.rand(2, 2))
    check(case)
    check(replace(case, causal=True, teacher_causal=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", ["projected", "packed", "misaligned", "odd rows", "depth"])
def test_layouts(kind: str, dtype: torch.dtype) -> None:
    case = kd.make("probabilities", dtype, (2, 2, 70, 97), (32, 32))
    plain = moved(case.arguments)
    with torch.no_grad():
        expected = attention_kd.launch(*plain)[0]
        other = tuple(kd.layouts(x, kind) for x in plain[:4])
        assert torch.equal(attention_kd.launch(*other, *plain[4:])[0], expected)


@pytest.mark.parametrize("dtype", heads.TOLERANCE, ids=str)
@pytest.mark.parametrize("flat", [False, True])
@pytest.mark.parametrize("per_row", [False, True])
def test_head_mask(per_row: bool, flat: bool, dtype: torch.dtype) -> None:
    for shape in (*heads.SHAPES, (8, 12, 577, 64)):
        gradient, context, mask = heads.make(shape, dtype, per_row, flat)
        on_gpu = moved((gradient, context, mask))
        found = (head_mask.launch(*on_gpu[1:]), *head_mask.launch_backward(*on_gpu))
        bounds = (heads.TOLERANCE[dtype],) * 2 + (heads.SUMS,)
        expected = heads.truth(gradient, context, mask)
        for a, b, most in zip(found, expected, bounds, strict=True):
            assert heads.error(a.cpu(), b) <= most


def test_pack_tokens() -> None:
    for sizes in ((3, 197, 768), (2, 65, 5), (64, 577, 64), (4, 1, 3)):
        for share in (0.0, 0.6, 1.0):
            x, keep = packs.make(*sizes, share)
            found = pack_tokens.pack_tokens(x.to(DEVICE), keep.to(DEVICE))
            for a, b in zip(found, packs.expected_pack(x, keep), strict=True):
                assert torch.equal(a.cpu(), b)
            back = pack_tokens.unpack_tokens(found[0], keep.to(DEVICE))
            assert torch.equal(back.cpu(), x * keep[..., None])


def calls() -> dict[str, Callable[[], list[Tensor]]]:
    case = kd.make("probabilities", torch.bfloat16, (4, 4, 577, 577), teacher_dtype=torch.float16)
    gradient, context, mask = moved(heads.make((8, 12, 577, 64), torch.bfloat16, False, False))
    x, keep = moved(packs.make(8, 577, 64))
    return {
        "attention_kd": lambda: on_device(case),
        "head_mask": lambda: [*head_mask.launch_backward(gradient, context, mask)],
        "pack_tokens": lambda: [*pack_tokens.pack_tokens(x, keep)],
    }


@pytest.mark.parametrize("name", ["attention_kd", "head_mask", "pack_tokens"])
def test_ten_runs_give_the_same_bits(name: str) -> None:
    call = calls()[name]
    first = call()
    for _ in range(9):
        assert all(torch.equal(a, b) for a, b in zip(call(), first, strict=True))


def test_graphs_replay_and_nothing_waits() -> None:
    arguments = moved(kd.make("kl", torch.bfloat16, (2, 2, 200, 200)).arguments)
    upstream = torch.tensor(2.0, device=DEVICE)

    def step() -> tuple[Tensor, ...]:
        loss, statistics = attention_kd.launch(*arguments)
        return loss, *attention_kd.launch_backward(upstream, statistics, *arguments)

    step()  # loaded
    torch.cuda.set_sync_debug_mode("error")
    try:
        expected = step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = step()
    graph.replay()
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_the_loss_takes_the_kernel_and_memory_grows_with_tokens_not_maps() -> None:
    shape = (8, 12, 901, 64)
    q, k = (torch.randn(shape, device=DEVICE).bfloat16().requires_grad_() for _ in range(2))
    teacher_q, teacher_k = (torch.randn(shape, device=DEVICE).half() for _ in range(2))
    goal = AttentionTrace(teacher_q, teacher_k, 0.125)
    student = AttentionTrace(q, k, 0.125)
    assert kernel_backend(student, goal) == "cuda"
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    with torch.autocast("cuda", torch.bfloat16):
        loss = attention_mse(student, goal)
    loss.backward()
    one_map = 2 * 8 * 12 * 901 * 901
    assert torch.cuda.max_memory_allocated() - before < one_map
    expected = attention_mse(student, goal, chunk=1 << 24)
    torch.testing.assert_close(loss.detach(), expected.detach(), rtol=1e-4, atol=0)
