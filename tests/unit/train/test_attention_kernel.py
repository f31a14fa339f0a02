"""Attention distillation through the kernel attention_kd, run under emulation, as training uses it."""

from __future__ import annotations

import contextlib
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from models.attention import Attention
from models.kernels import attention_kd, dispatch
from models.outputs import AttentionTrace
from tests.emulation import emulation
from train.losses import attention
from train.losses.distillation import attention_distance, attention_sum

WIDTH, HEADS = 16, 2


class OnEmulation(torch.autograd.Function):
    """The op as on a device: its CUDA implementations, both ways, on the CPU's emulation."""

    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> Tensor:
        with emulation():
            loss, ctx.statistics = attention_kd.launch(*arguments)
        ctx.arguments = arguments
        return loss

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        with emulation():
            back = attention_kd.launch_backward(gradients[0], ctx.statistics, *ctx.arguments)
        return (*back, *(None,) * 10)


@pytest.fixture
def kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention_kd, "kernel", OnEmulation.apply)
    monkeypatch.setattr(attention, "kernel_backend", lambda student, teacher: "cuda")


def models() -> tuple[Attention, Attention]:
    torch.manual_seed(0)
    return Attention(WIDTH, HEADS, 8), Attention(WIDTH, HEADS, 4).eval().requires_grad_(False)


CASES = ("image", "text", "decoder", "cross", "region")


def inputs(case: str) -> tuple[Tensor, dict[str, Any]]:
    """x, and what else `Attention.forward` gets; in "region" three texts share each image."""
    torch.manual_seed(1)
    x = torch.randn(6, 7, WIDTH)
    if case == "image":
        return x, {}
    if case in ("text", "decoder"):
        padding = torch.arange(7) < torch.tensor([7, 3, 5, 1, 7, 2])[:, None]
        return x, {"key_mask": padding, "causal": case == "decoder"}
    if case == "cross":
        return x, {"context": torch.randn(6, 11, WIDTH)}
    region = torch.rand(2, 11) > 0.6
    return x, {"context": torch.randn(2, 11, WIDTH), "key_mask": region}


def traces(case: str, recompute: bool = False) -> tuple[Tensor, AttentionTrace, AttentionTrace]:
    """An input that takes a gradient, and what student and teacher make of it."""
    student, teacher = models()
    x, more = inputs(case)
    x.requires_grad_()

    def run(x: Tensor) -> tuple[Tensor, Tensor]:
        _, trace = student(x, **more, trace=True)
        return trace.q, trace.k

    with torch.no_grad():
        _, goal = teacher(x.detach(), **more, trace=True)
    _, ours = student(x.detach(), **more, trace=True)
    q, k = checkpoint(run, x, use_reentrant=False) if recompute else run(x)
    return x, replace(ours, q=q, k=k), goal


def gradients(x: Tensor, loss: Tensor) -> tuple[Tensor, Tensor]:
    return loss.detach(), torch.autograd.grad(loss, x)[0]


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("kind", ["probabilities", "kl"])
@pytest.mark.parametrize("case", CASES)
def test_the_kernel_gives_what_chunks_give(
    case: str, kind: Any, recompute: bool, kernels: None
) -> None:
    x, student, teacher = traces(case, recompute)
    found = gradients(x, attention_distance(student, teacher, kind))
    x, student, teacher = traces(case)
    loss = attention.attention_mse if kind == "probabilities" else attention.attention_kl
    expected = gradients(x, loss(student, teacher, chunk=50))
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-7)
    assert expected[1].any()


@pytest.mark.parametrize("teacher_dtype", [torch.float16, torch.bfloat16])
def test_under_autocast_with_a_teacher_of_its_own_type(
    teacher_dtype: torch.dtype, kernels: None
) -> None:
    def run(chunk: int | None) -> tuple[Tensor, Tensor]:
        with torch.autocast("cpu", torch.bfloat16):
            x, student, goal = traces("text")
            assert student.q.dtype == torch.bfloat16
            goal = replace(goal, q=goal.q.to(teacher_dtype), k=goal.k.to(teacher_dtype))
            return gradients(x, attention.attention_mse(student, goal, chunk))

    found, expected = run(None), run(50)
    assert found[0].dtype == torch.float32
    torch.testing.assert_close(found[0], expected[0], rtol=1e-5, atol=1e-7)
    assert (found[1] - expected[1]).norm() < 1e-2 * expected[1].norm()


def test_the_loss_scale_of_fp16_is_in_before_rounding(kernels: None) -> None:
    q, k = torch.randn(1, 1, 40, 8).half().requires_grad_(), torch.randn(1, 1, 300, 8).half()
    goal = AttentionTrace((q + 0.01).detach(), k, 8**-0.5)
    loss = attention.attention_mse(AttentionTrace(q, k, 8**-0.5), goal)
    (scaled,) = torch.autograd.grad(loss * 2.0**16, q)
    wide = q.detach().float().requires_grad_()
    exact = AttentionTrace(wide, k.float(), 8**-0.5)
    goal = replace(goal, q=goal.q.float(), k=goal.k.float())
    (expected,) = torch.autograd.grad(attention.attention_mse(exact, goal, 1000), wide)
    assert (scaled.float() / 2**16 - expected).norm() < 5e-3 * expected.norm()


def test_layers_add_up_and_share_nothing(kernels: None) -> None:
    x, student, teacher = traces("text")
    both = attention_sum({0: student, 1: student}, {0: teacher, 1: teacher}, [(0, 0), (1, 1)])
    one = attention_distance(student, teacher)
    torch.testing.assert_close(both, 2 * one)
    found, expected = (torch.autograd.grad(v, x, retain_graph=True)[0] for v in (both, 2 * one))
    torch.testing.assert_close(found, expected)


def test_compiled_whole_maps(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ESPALIER_KERNELS", "compiled")
    monkeypatch.setattr(dispatch, "_compiled", lambda function: function)  # what is compiled
    x, student, teacher = traces("region")
    found = gradients(x, attention.attention_mse(student, teacher))
    monkeypatch.setenv("ESPALIER_KERNELS", "reference")
    x, student, teacher = traces("region")
    expected = gradients(x, attention.attention_mse(student, teacher))
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-7)


def test_asking_for_the_kernel_without_a_device_is_an_error(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    _, student, teacher = traces("image")
    for setting, refused in (("auto", False), ("auto,attention_kd=cuda", True)):
        monkeypatch.setenv("ESPALIER_KERNELS", setting)
        expectation = pytest.raises(RuntimeError, match="attention_kd") if refused else None
        with expectation or contextlib.nullcontext():
            attention.attention_mse(student, teacher)


def test_heads_that_the_kernel_does_not_take_go_in_chunks() -> None:
    wide = AttentionTrace(torch.randn(1, 1, 4, 80), torch.randn(1, 1, 5, 80), 0.1)
    assert attention.kernel_backend(wide, wide) == "reference"
    assert attention.attention_mse(wide, wide) == 0
