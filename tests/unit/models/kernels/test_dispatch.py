"""Which implementation is picked, what is said of it, and what a layer does with it."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from torch.library import _scoped_library as scoped_library

from models.gate_slot import GateSlot
from models.gated_linear import Entries, GatedLinear
from models.gates import GateBank
from models.kernels import (
    dispatch,
    ffn_act_mask,
    fold,
    hard_concrete,
    head_mask,
    library,
    pack_tokens,
)
from tests.emulation import emulation


@pytest.fixture(autouse=True)
def _fresh(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.delenv(dispatch.ENVIRONMENT, raising=False)
    dispatch.configure("auto")
    yield
    dispatch.configure("auto")


def pretend(monkeypatch: pytest.MonkeyPatch, reason: str | None) -> None:
    monkeypatch.setattr(library, "unavailable", lambda: reason)
    dispatch.configure("auto")


def test_settings() -> None:
    parsed = dispatch.parse("reference, ffn_act_mask=cuda,")
    assert parsed["ffn_act_mask"] == "cuda" and parsed["hard_concrete"] == "reference"
    assert set(dispatch.parse("").values()) == {"auto"}
    with pytest.raises(ValueError, match="no backend"):
        dispatch.parse("fast")
    with pytest.raises(ValueError, match="no op 'ffn'"):
        dispatch.parse("ffn=cuda")


def test_auto_is_never_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    pretend(monkeypatch, None)
    assert dispatch.pick("ffn_act_mask", "cuda") == "cuda"
    assert dispatch.pick("ffn_act_mask", "cpu") == "reference"
    assert dispatch.pick("ffn_act_mask", "cuda", "the kernel takes no float64") == "reference"
    pretend(monkeypatch, "no nvcc here")
    assert dispatch.pick("ffn_act_mask", "cuda") == "reference"


@pytest.mark.parametrize(
    "device, unsupported, missing, said",
    [
        ("cpu", None, None, "tensors are on cpu"),
        ("cuda", "the kernel takes no float64", None, "float64"),
        ("cuda", None, "no nvcc here", "no nvcc here"),
    ],
)
def test_explicit_cuda_that_cannot_be_is_an_error(
    monkeypatch: pytest.MonkeyPatch,
    device: str,
    unsupported: str | None,
    missing: str | None,
    said: str,
) -> None:
    pretend(monkeypatch, missing)
    dispatch.configure("auto,ffn_act_mask=cuda")
    with pytest.raises(RuntimeError, match=said):
        dispatch.pick("ffn_act_mask", device, unsupported)
    assert dispatch.pick("hard_concrete", "cpu") == "reference"


def test_a_rank_goes_without_when_another_has_to(monkeypatch: pytest.MonkeyPatch) -> None:
    pretend(monkeypatch, None)
    assert dispatch.missing("cuda") is None and dispatch.pick("hard_concrete", "cuda") == "cuda"
    dispatch.refuse("another rank has no kernels")
    assert dispatch.pick("hard_concrete", "cuda") == "reference"
    assert dispatch.missing("cuda") == "another rank has no kernels"
    dispatch.configure("cuda")
    assert dispatch.missing("cuda") is None
    dispatch.refuse("another rank has no kernels")
    with pytest.raises(RuntimeError, match="another rank"):
        dispatch.pick("hard_concrete", "cuda")
    dispatch.configure("reference")
    assert dispatch.missing("cuda") == "no kernel is asked for"


def test_environment_comes_before_the_run_file(monkeypatch: pytest.MonkeyPatch) -> None:
    pretend(monkeypatch, None)
    dispatch.configure("cuda")
    monkeypatch.setenv(dispatch.ENVIRONMENT, "reference")
    assert dispatch.pick("ffn_act_mask", "cuda") == "reference"
    monkeypatch.setenv(dispatch.ENVIRONMENT, "nonsense")
    with pytest.raises(ValueError, match="nonsense"):
        dispatch.pick("ffn_act_mask", "cuda")


def test_says_once_what_it_picked_and_why(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    pretend(monkeypatch, "no nvcc here")
    with caplog.at_level(logging.INFO):
        for _ in range(3):
            dispatch.pick("fold_cast", "cuda")
            dispatch.pick("fold_cast", "cpu")
    assert [r.message for r in caplog.records] == ["fold_cast on cuda: reference (no nvcc here)"]


def test_the_compiled_reference_is_the_reference() -> None:
    dispatch.configure("compiled")
    x, bias, mask = torch.randn(3, 8, requires_grad=True), torch.randn(8), torch.rand(8)
    found = ffn_act_mask.ffn_act_mask(x, bias, mask, "gelu", True)
    dispatch.configure("reference")
    plain = ffn_act_mask.ffn_act_mask(x, bias, mask, "gelu", True)
    torch.testing.assert_close(found, plain)
    ours, theirs = (torch.autograd.grad(y.sum(), x)[0] for y in (found, plain))
    torch.testing.assert_close(ours, theirs)


def test_the_choice_is_made_while_compiling_without_a_graph_break() -> None:
    @torch.compile(fullgraph=True, backend="aot_eager")
    def run(x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        return ffn_act_mask.ffn_act_mask(x, None, mask, "quick_gelu", False) + 1

    x, mask = torch.randn(3, 8), torch.rand(8)
    expected = ffn_act_mask.ffn_act_mask(x, None, mask, "quick_gelu", False) + 1
    torch.testing.assert_close(run(x, mask), expected)


@contextmanager
def kernels_everywhere(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Every choice is cuda, and the CPU key of the ops is the launchers, under emulation."""
    with monkeypatch.context() as patch, scoped_library("espalier", "IMPL") as implementations:
        patch.setattr(dispatch, "pick", lambda *_: "cuda")
        for name, function in {
            "ffn_act_mask": ffn_act_mask.launch,
            "ffn_act_mask_backward": ffn_act_mask.launch_backward,
            "compact": fold.launch,
            "compact_backward": fold.launch_backward,
            "hard_concrete": hard_concrete.launch,
            "hard_concrete_backward": hard_concrete.launch_backward,
            "head_mask": head_mask.launch,
            "head_mask_backward": head_mask.launch_backward,
            "pack_tokens": pack_tokens.launch,
            "unpack_tokens": pack_tokens.launch_unpack,
        }.items():
            implementations.impl(name, function, "CPU", allow_override=True)
        with emulation():
            yield


GATES = {
    "rows, first, folded": ("rows", True, True),
    "rows, first, on activations": ("rows", True, False),
    "rows, last, on activations": ("rows", False, False),
    "columns, folded": ("columns", True, True),
    "columns, on activations": ("columns", True, False),
}


@pytest.mark.parametrize("kind", GATES)
@pytest.mark.parametrize("compact", [False, True])
@pytest.mark.parametrize("activation", [None, "gelu"])
def test_a_layer_is_the_same_by_kernels(
    monkeypatch: pytest.MonkeyPatch, kind: str, compact: bool, activation: str | None
) -> None:
    """Values and every gradient of a gated layer: plain torch against the emulated kernels."""
    side, first, folded = GATES[kind]
    torch.manual_seed(0)
    layer = GatedLinear(12, 20)
    size = 20 if side == "rows" else 12
    kept = torch.tensor([0, 1, 3, 4, 7, 8, 11, 2]) if compact else None
    z = torch.rand(size if kept is None else 8)
    z[::3] = 0.0
    z.requires_grad_()
    x = torch.randn(5, 8 if compact and side == "columns" else 12, requires_grad=True)

    def run() -> list[torch.Tensor]:
        entries = {side: Entries(kept, z, folded)}
        y = layer(x, **entries, activation=activation, gate_first=first)
        return [y, *torch.autograd.grad(y.square().sum(), (x, z, layer.weight, layer.bias))]

    plain = run()
    with kernels_everywhere(monkeypatch):
        found = run()
    for a, b in zip(found, plain, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


def test_a_bank_draws_by_the_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its own noise, the same for the same key, new for the next, with the gradient."""
    bank = GateBank({"vision.0.ffn": GateSlot(3000)}, {"vision.0.ffn": 2.0})
    with kernels_everywhere(monkeypatch):
        generator = torch.Generator().manual_seed(5)
        first, second = bank.sample(generator), bank.sample(generator)
        again = bank.sample(torch.Generator().manual_seed(5))
        (gradient,) = torch.autograd.grad(first.sum(), bank.log_alpha)
    assert torch.equal(first, again) and not torch.equal(first, second)
    share = float((first == 0).double().mean())
    closed = 1 - float(bank.probabilities_open().detach().mean())
    assert share == pytest.approx(closed, abs=0.04)
    assert bool((gradient > 0).any()) and not gradient[(first == 0) | (first == 1)].any()


def test_the_bank_keeps_its_sequence_on_a_cpu() -> None:
    bank = GateBank({"vision.0.ffn": GateSlot(30)}, {"vision.0.ffn": 2.0})
    u = torch.rand(30, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    u = u * (1 - 2e-6) + 1e-6
    s = torch.sigmoid((torch.logit(u).float() + bank.log_alpha) / (2 / 3)) * 1.2 - 0.1
    found = bank.sample(torch.Generator().manual_seed(5))
    torch.testing.assert_close(found, s.clamp(0, 1), rtol=0, atol=1e-6)
