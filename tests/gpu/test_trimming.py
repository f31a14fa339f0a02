"""On a GPU: trimmed passes by the kernels of packing and of head masks, against plain torch."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from models.kernels import dispatch, library
from models.kernels import head_mask as heads
from models.kernels import pack_tokens as packs
from models.kernels import reference_attention as reference
from models.xvlm import XVLM
from tests.unit.models.kernels import test_head_mask as head_cases
from tests.unit.models.kernels import test_pack_tokens as pack_cases
from tests.unit.models.test_trimming import Batch, agree, by_mode, run, trimmed

pytestmark = pytest.mark.gpu
DEVICE = "cuda"
OURS = "auto,head_mask=cuda,pack_tokens=cuda"


@pytest.fixture(autouse=True, scope="module")
def _kernels() -> None:
    if library.unavailable():
        pytest.skip(f"kernels: {library.unavailable()}")


@pytest.fixture(autouse=True)
def _auto() -> Iterator[None]:
    yield
    dispatch.configure("auto")


def on_device(form: str, seed: int, dtype: torch.dtype = torch.float32) -> tuple[XVLM, Batch]:
    model = trimmed(form, seed)
    batch = Batch(model, seed)
    for name, value in vars(batch).items():
        setattr(batch, name, value.to(DEVICE))
    batch.images = batch.images.to(dtype)
    return model.to(DEVICE, dtype), batch


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("form", ["vqa", "nlvr2", "retrieval"])
@pytest.mark.parametrize("mode", ["mask", "packed"])
def test_passes_are_the_same_by_kernels(form: str, mode: str, dtype: torch.dtype) -> None:
    """To the bit: both move the same elements and round the same products."""
    model, batch = on_device(form, 2, dtype)
    dispatch.configure("reference")
    wanted = by_mode(model, mode, batch)
    dispatch.configure(OURS)
    for one, other in zip(by_mode(model, mode, batch), wanted, strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("form", ["vqa", "nlvr2", "captioning", "retrieval", "pretrain"])
def test_removal_equals_masking(form: str) -> None:
    model, batch = on_device(form, 3)
    dispatch.configure(OURS)
    wanted = by_mode(model, "mask", batch)
    for mode in ("gather", "packed"):
        agree(by_mode(model, mode, batch), wanted)


def test_gradients_of_head_trimmers() -> None:
    def gradients(setting: str) -> list[Tensor]:
        dispatch.configure(setting)
        model.zero_grad()
        torch.manual_seed(0)
        torch.stack([value.square().mean() for value in run(model, batch)]).sum().backward()
        return [p.grad for p in model.parameters() if p.grad is not None]

    model, batch = on_device("vqa", 2)
    model.train()
    for one, other in zip(gradients(OURS), gradients("reference"), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.int64, torch.bool], ids=str)
@pytest.mark.parametrize("shape", [(128, 577, 768), (1, 1, 1), (3, 130, 5), (2, 0, 8)])
def test_tokens_are_packed_as_the_reference_packs_them(shape: tuple[int, ...], dtype) -> None:
    x, keep = pack_cases.make(*shape)
    x, keep = (x * 50).to(dtype).to(DEVICE), keep.to(DEVICE)
    for count in (None, int(keep.sum()), keep.numel() // 3):
        found = packs.launch(x, keep, count)
        for one, other in zip(found, reference.pack_tokens(x, keep, count), strict=True):
            assert torch.equal(one, other)
        back = packs.launch_unpack(found[0], keep)
        assert torch.equal(back, reference.unpack_tokens(found[0], keep))


@pytest.mark.parametrize("dtype", head_cases.TOLERANCE, ids=str)
@pytest.mark.parametrize("per_row", [False, True])
def test_heads_are_masked_as_the_reference_masks_them(per_row: bool, dtype: torch.dtype) -> None:
    for shape in [*head_cases.SHAPES, (128, 12, 577, 64)]:
        cases = head_cases.make(shape, dtype, per_row, False)
        gradient, context, mask = (x.to(DEVICE) for x in cases)
        mask = mask.round()  # as trimmers make them; values between are rounded by one of the two
        assert torch.equal(heads.launch(context, mask), reference.head_mask(context, mask))
        found = heads.launch_backward(gradient, context, mask)
        again = heads.launch_backward(gradient, context, mask)
        wanted = reference.head_mask_backward(gradient, context, mask)
        assert torch.equal(found[0], wanted[0])
        torch.testing.assert_close(found[1], wanted[1], rtol=1e-4, atol=1e-2)
        assert all(torch.equal(a, b) for a, b in zip(found, again, strict=True))
