"""Where ZeRO puts elements: compared with flattening, padding and cutting real tensors; what a
damaged or foreign set of shards says.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from train.checkpoint.layout import Slot, concatenated, partitioned, share
from train.checkpoint.manifest import ManifestError
from train.checkpoint.shards import MASTER, Shards

SIZES = st.lists(st.integers(1, 9), min_size=1, max_size=6)


def _parameters(sizes: list[int]) -> dict[str, torch.Tensor]:
    """Elements that are all different, and not zero."""
    ends = torch.tensor(sizes).cumsum(0).tolist()
    return {f"p{e}": torch.arange(1.0 + e - n, 1.0 + e) for n, e in zip(sizes, ends, strict=True)}


def _filled(size: int, slots: list[Slot], parameters: dict[str, torch.Tensor]) -> list[float]:
    flat = torch.zeros(size)
    for slot in slots:
        values = parameters[slot.name][slot.start : slot.start + slot.count]
        flat[slot.at : slot.at + slot.count] = values
    return flat.tolist()


@settings(max_examples=60, deadline=None)
@given(SIZES, st.integers(1, 5), st.integers(1, 4))
def test_concatenated_is_what_cutting_the_padded_whole_gives(
    sizes: list[int], world: int, alignment: int
) -> None:
    parameters = _parameters(sizes)
    paddings = [-n % alignment for n in sizes[:-1]] + [0]
    pairs = zip(parameters.values(), paddings, strict=True)
    flat = torch.cat([torch.cat([p, torch.zeros(padding)]) for p, padding in pairs])
    size = -(-len(flat) // (2 * world)) * 2
    flat = torch.cat([flat, torch.zeros(size * world - len(flat))])
    numels = {name: p.numel() for name, p in parameters.items()}
    for rank, part in enumerate(flat.split(size)):
        assert (
            _filled(size, concatenated(numels, paddings, size, rank), parameters) == part.tolist()
        )


@settings(max_examples=60, deadline=None)
@given(SIZES, st.integers(1, 5))
def test_partitioned_is_what_cutting_each_padded_parameter_gives(
    sizes: list[int], world: int
) -> None:
    parameters = _parameters(sizes)
    numels = {name: p.numel() for name, p in parameters.items()}
    for rank in range(world):
        parts = []
        for values in parameters.values():
            size = share(len(values), world)
            padded = torch.cat([values, torch.zeros(size * world - len(values))])
            parts.append(padded[rank * size : (rank + 1) * size])
        flat = torch.cat(parts)
        assert _filled(len(flat), partitioned(numels, world, rank), parameters) == flat.tolist()


# Shards that do not fit together


def _write(folder: Path, **changes: Any) -> dict[str, Any]:
    """A checkpoint of ZeRO 1 by two ranks: one parameter of three elements, padded to four."""
    model = {
        "module": {"w": torch.tensor([1.0, 2.0, 3.0])}, "buffer_names": [],
        "param_shapes": [{"w": torch.Size([3])}], "global_steps": 5, "global_samples": 10,
        "skipped_steps": 0,
    }  # fmt: skip
    torch.save(model | changes, folder / "mp_rank_00_model_states.pt")
    for rank, flat in enumerate(([1.0, 2.0], [3.0])):
        state = {"exp_avg": torch.ones(2), "exp_avg_sq": torch.ones(2), "step": torch.tensor(5.0)}
        optimizer = {
            "base_optimizer_state": {"state": {0: state}, "param_groups": [{"params": [0]}]},
            "single_partition_of_fp32_groups": [torch.tensor(flat)],
            "group_paddings": [2 - len(flat)], "param_alignment_paddings": [[0]],
            "loss_scaler": None,
        }  # fmt: skip
        path = folder / f"zero_pp_rank_{rank}_mp_rank_00_optim_states.pt"
        torch.save({"optimizer_state_dict": optimizer}, path)
    return {"zero_stage": 1, "world_size": 2}


def test_parts_are_found_across_ranks(tmp_path: Path) -> None:
    shards = Shards(tmp_path, _write(tmp_path), [["w"]])
    assert shards.part(MASTER, "w").tolist() == [1, 2, 3]
    assert shards.part(MASTER, "w", 1, 3).tolist() == [2, 3]
    assert (shards.steps, shards.shapes, shards.frozen) == ({"w": 5.0}, {"w": (3,)}, set())


def test_what_does_not_fit_together_is_refused(tmp_path: Path) -> None:
    values = _write(tmp_path)
    with pytest.raises(ManifestError, match="w: master is not complete"):
        Shards(tmp_path, values | {"world_size": 1}, [["w"]])
    with pytest.raises(ManifestError, match="rank_2_mp_rank_00_optim_states.pt: missing"):
        Shards(tmp_path, values | {"world_size": 3}, [["w"]])
    _write(tmp_path, param_shapes=[{"w": torch.Size([4])}])
    with pytest.raises(ManifestError, match="w: master is not complete"):
        Shards(tmp_path, values, [["w"]])
    _write(tmp_path, global_steps=None)
    with pytest.raises(ManifestError, match="not what ZeRO 1 of DeepSpeed"):
        Shards(tmp_path, values, [["w"]])
