"""Pruning a model with trimmers: the slim model trims as the masked one does."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from models.pruning.surgery import prune
from models.xvlm import XVLM
from tests.unit.models.test_trimming import Batch, agree, by_mode, run, trimmed

FOUR: dict[str, Any] = {  # heads a layer
    "vision.heads": (4,) * 4,
    "vision.head_dim": 8,
    "text.heads": (4,) * 4,
    "text.cross_heads": (4,) * 2,
    "text.head_dim": 8,
}


def gates_of(model: XVLM, left: int | None, soft: bool, seed: int) -> dict[str, Tensor]:
    """`left` heads of each layer, or any number of them; half of the FFN units."""
    generator = torch.Generator().manual_seed(seed)
    gates = {}
    for name, slot in model.gate_slots().items():
        z = (torch.rand(slot.units, generator=generator) > 0.5).float()
        if name.endswith("heads") and left is not None:
            z = torch.zeros(slot.units)
            z[torch.randperm(slot.units, generator=generator)[:left]] = 1.0
        gates[name] = z * (0.5 + 0.5 * torch.rand(slot.units, generator=generator)) if soft else z
    return gates


def hold(model: XVLM, gates: dict[str, Tensor]) -> None:
    for name, slot in model.gate_slots().items():
        slot.hold(gates[name])


@pytest.mark.parametrize("left", [None, 3, 2, 1, 0])
@pytest.mark.parametrize("form", ["vqa", "nlvr2", "retrieval"])
def test_slim_trims_as_masked(form, left):
    for seed in range(2):
        model = trimmed(form, seed, changes=FOUR)
        gates = gates_of(model, left, left == 3, seed)
        slim = prune(model, gates)
        hold(model, gates)
        for rows in (3, 1):
            batch = Batch(model, seed, rows)
            wanted = by_mode(model, "mask", batch)
            for mode in ("mask", "gather", "packed"):
                agree(by_mode(slim, mode, batch), wanted)
            agree(by_mode(model, "gather", batch), wanted)


def test_heads_of_a_pair_are_reordered_with_their_trimmers():
    """Gates of one reader move the other's heads too: the shared projection has an order."""
    model = trimmed("nlvr2", 4, changes=FOUR)
    gates = {"fusion.1.cross_heads": torch.tensor([0.0, 1, 0, 1])}
    slim = prune(model, gates)
    wanted = by_mode(slim, "mask", Batch(model))
    model.gate_slots()["fusion.1.cross_heads"].hold(gates["fusion.1.cross_heads"])
    agree(by_mode(model, "mask", Batch(model)), wanted)
    key = "text.trimmers.cross_heads.2.fc2.bias"
    assert slim.state_dict()[key].shape == model.state_dict()[key].shape


def test_trimmers_keep_what_is_left_of_them():
    model = trimmed("vqa", 1, changes=FOUR)
    gates = gates_of(model, None, False, 3)
    gates["fusion.1.cross_heads"] = torch.tensor([0.0, 1, 0, 1])
    gates["text.0.heads"] = torch.tensor([0.0, 0, 1, 0])
    gates["vision.2.heads"] = torch.zeros(4)
    slim = prune(model, gates)
    before, after = model.state_dict(), slim.state_dict()
    key = "text.trimmers.cross_heads.3"
    assert torch.equal(after[f"{key}.fc2.weight"], before[f"{key}.fc2.weight"][[1, 3]])
    assert torch.equal(after[f"{key}.fc2.bias"], before[f"{key}.fc2.bias"][[1, 3]])
    gone = [name for name in before if name not in after]
    for prefix in ("text.trimmers.heads.0.", "vision.trimmers.heads.2."):
        assert {name for name in before if name.startswith(prefix)} <= set(gone)
    assert not any("tokens" in name or "context" in name for name in gone)
    for name in after:
        if "trimmers" in name and "fc2" not in name:
            assert torch.equal(after[name], before[name])


def test_the_trimming_mode_stays():
    model = trimmed("vqa", 1)
    model.set_trimming("packed", tau=0.5)
    slim = prune(model, {})
    for part in (slim.vision, slim.text):
        assert part.trimmers is not None
        assert (part.trimmers.mode, part.trimmers.fixed, part.trimmers.tau) == (
            "packed",
            False,
            0.5,
        )
    with torch.no_grad():
        agree(run(slim, Batch(model)), run(model, Batch(model)))


def test_closed_heads_are_no_candidates():
    """The best head is closed: then the best of the others is the one that stays."""
    model = trimmed("retrieval", 1, changes=FOUR)
    trimmer = model.vision.trimmers.heads["1"]  # type: ignore[union-attr]
    with torch.no_grad():
        trimmer.fc2.weight.zero_()  # type: ignore[union-attr]
        trimmer.fc2.bias.copy_(torch.tensor([5.0, -2.0, -1.0, -3.0]))  # type: ignore[union-attr]
    model.set_trimming("mask")
    for z, wanted in ((None, [1.0, 0, 0, 0]), (torch.tensor([0.0, 1, 0.1, 1]), [0.0, 0, 1, 0])):
        model.gate_slots()["vision.1.heads"].hold(z)
        with torch.no_grad():
            record = model.encode_image(Batch(model).images).trimming
        assert record is not None and record.heads[1].tolist() == [wanted] * 4
