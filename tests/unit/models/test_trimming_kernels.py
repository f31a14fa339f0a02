"""Trimmed passes by the kernels of packing and of head masks, emulated, against plain torch."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor

from models.kernels import dispatch, head_mask, pack_tokens
from models.packing import Packing
from tests.unit.models.kernels.test_dispatch import kernels_everywhere
from tests.unit.models.test_trimming import Batch, agree, by_mode, run_seeded, trimmed

Launches = dict[str, int]


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch) -> Launches:
    """How often each kernel ran."""
    found: Launches = {}

    def counted(name: str, launch: Callable[..., object]) -> Callable[..., object]:
        def run(*arguments: object) -> object:
            found[name] = found.get(name, 0) + 1
            return launch(*arguments)

        return run

    parts = {"head_mask": head_mask, "pack_tokens": pack_tokens}
    for name, module in parts.items():
        monkeypatch.setattr(module, "launch", counted(name, module.launch))
    unpack = counted("unpack_tokens", pack_tokens.launch_unpack)
    monkeypatch.setattr(pack_tokens, "launch_unpack", unpack)
    return found


@pytest.fixture
def asked() -> Iterator[Callable[[str], None]]:
    yield dispatch.configure
    dispatch.configure("auto")


@pytest.mark.parametrize("repack", [None, (1,)])
def test_packed_passes_are_the_same_by_kernels(monkeypatch, launches, repack):
    model = trimmed("vqa", 2, repack=repack)
    batch = Batch(model)
    wanted = by_mode(model, "packed", batch)
    with kernels_everywhere(monkeypatch):
        found = by_mode(model, "packed", batch)
    agree(found, wanted)
    agree(found, by_mode(model, "mask", batch))
    # One packing for each site that moves tokens: three of the blocks, or one; two of the fusion.
    assert launches["pack_tokens"] >= (5 if repack is None else 3)
    assert launches["unpack_tokens"] > 0 and launches["head_mask"] > 0


def test_training_with_head_trimmers_is_the_same_by_kernels(monkeypatch, launches):
    """Factors of heads with their gradient."""

    def gradients() -> list[Tensor]:
        model.zero_grad()
        torch.stack([value.square().mean() for value in run_seeded(model)]).sum().backward()
        return [p.grad for p in model.parameters() if p.grad is not None]

    model = trimmed("vqa", 2).train()
    plain = gradients()
    assert not launches
    with kernels_everywhere(monkeypatch):
        found = gradients()
    # Four blocks; the text's two layers, for the guide as well; two of fusion with two attentions.
    assert launches == {"head_mask": 4 + 2 + 2 + 4}
    for one, other in zip(found, plain, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a device")
@pytest.mark.parametrize(("op", "mode"), [("pack_tokens", "packed"), ("head_mask", "mask")])
def test_a_kernel_that_was_asked_for_and_cannot_run_is_an_error(asked, op, mode):
    model = trimmed()
    batch = Batch(model)
    asked(f"auto,{op}=cuda")
    by_mode(model, "off", batch)
    with pytest.raises(RuntimeError, match=f"kernel {op} was asked for"):
        by_mode(model, mode, batch)


def test_a_packing_there_and_back():
    """Every shape that passes carry, against a loop."""
    kept = torch.rand(3, 6, generator=torch.Generator().manual_seed(1)) < 0.5
    kept[1] = False
    packing = Packing.of(kept.sum(1))
    assert packing.starts.tolist() == [0, *kept.sum(1).cumsum(0).tolist()]
    assert (packing.batch, packing.longest) == (3, int(kept.sum(1).max()))
    assert torch.equal(packing.rows, kept.nonzero()[:, 0])
    for rest in ((), (4,), (2, 3)):
        values = torch.randint(1, 99, (len(packing.rows), *rest))
        for packed in (values, values.float().to(torch.bfloat16), values > 50):
            grid = packing.grid(packed)
            for row in range(3):
                begin, end = packing.starts[row : row + 2].tolist()
                assert torch.equal(grid[row, : end - begin], packed[begin:end])
                assert not grid[row, end - begin :].any()
            assert torch.equal(packing.flat(grid), packed)
