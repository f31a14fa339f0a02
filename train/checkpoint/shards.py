"""A checkpoint's parameters and their optimizer state by name, whatever ZeRO stage and number of
ranks wrote it.

The files are mapped, not read: a rank that needs a third of the moments reads a third. They go
through the restricted unpickler (scan.py), after their hashes were compared.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from train.checkpoint import scan
from train.checkpoint.layout import Slot, concatenated, partitioned, whole
from train.checkpoint.manifest import ManifestError

__all__ = ["MASTER", "MOMENTS", "Shards"]

MASTER = "master"  # weights as the optimizer has them: fp32
MOMENTS = ("exp_avg", "exp_avg_sq")
_FROZEN = "frozen"


class Shards:
    """What the files of `folder` say.

    Args:
        values: the manifest of `folder`, which is verified.
        names: trainable parameters of each optimizer group, in order. Only ZeRO 0 needs them, whose
            files number its states.

    Attributes:
        shapes: of all parameters, by name.
        frozen: those that no optimizer owns.
        steps: name -> optimizer steps; empty before the first.
        groups: settings of each optimizer group (lr, weight_decay, name, ...).
        buffers: persistent buffers by name.
        counters: global_steps, global_samples, skipped_steps.
        scaler: DeepSpeed's loss scaler, None at ZeRO 0.
    Raises ManifestError when something is missing or does not fit together.
    """

    def __init__(
        self, folder: Path, values: Mapping[str, Any], names: Sequence[Sequence[str]]
    ) -> None:
        self.folder = folder
        self.stage, self.world = int(values["zero_stage"]), int(values["world_size"])
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.frozen: set[str] = set()
        self.steps: dict[str, float] = {}
        self.groups: list[dict[str, Any]] = []
        self.scaler: Any = None
        self._pieces: dict[tuple[str, str], list[tuple[int, Tensor]]] = {}
        try:
            model = self._model(0)
            saved = set(model["buffer_names"])
            self.buffers: dict[str, Tensor] = {name: model["module"][name] for name in saved}
            keys = ("global_steps", "global_samples", "skipped_steps")
            self.counters: dict[str, int] = {key: int(model[key]) for key in keys}
            if self.stage == 0:
                self._read_whole(model, names)
            else:
                self._read_shares(model)
            self._read_frozen(model)
        except (KeyError, IndexError, TypeError, AttributeError) as error:
            raise ManifestError(
                f"{folder}: not what ZeRO {self.stage} of DeepSpeed 0.19 writes "
                f"({type(error).__name__}: {error})"
            ) from None
        self._check_complete()

    def part(self, key: str, name: str, start: int = 0, stop: int | None = None) -> Tensor:
        """Elements [start, stop) of a parameter's `MASTER` or of one of its `MOMENTS`: (n,)."""
        key = _FROZEN if key == MASTER and name in self.frozen else key
        stop = math.prod(self.shapes[name]) if stop is None else stop
        pieces = self._pieces[key, name]
        found = torch.empty(stop - start, dtype=pieces[0][1].dtype)
        for first, values in pieces:
            low, high = max(start, first), min(stop, first + len(values))
            if low < high:
                found[low - start : high - start] = values[low - first : high - first]
        return found

    def _model(self, rank: int) -> dict[str, Any]:
        prefix = f"zero_pp_rank_{rank}_" if self.stage == 3 else ""
        return scan.load(self.folder / f"{prefix}mp_rank_00_model_states.pt", mmap=True)

    def _add(self, key: str, flat: Tensor, slots: Iterable[Slot]) -> None:
        for slot in slots:
            piece = slot.start, flat[slot.at : slot.at + slot.count]
            self._pieces.setdefault((key, slot.name), []).append(piece)

    def _add_state(self, state: Mapping[str, Any], slots: list[Slot]) -> None:
        """One entry of the optimizer's state: a flat tensor for each moment, and the step."""
        if not state:
            return
        for key in MOMENTS:
            self._add(key, state[key].reshape(-1), slots)
        for slot in slots:
            step = float(state["step"])
            if self.steps.setdefault(slot.name, step) != step:
                raise ManifestError(f"{self.folder}: {slot.name}: ranks at different steps")

    def _read_whole(self, model: dict[str, Any], names: Sequence[Sequence[str]]) -> None:
        optimizer = model["optimizer"]
        self.groups = [_settings(group) for group in optimizer["param_groups"]]
        counts = [len(group["params"]) for group in optimizer["param_groups"]]
        if counts != [len(group) for group in names]:
            raise ManifestError(
                f"{self.folder}: optimizer groups of {counts} parameters, this model has "
                f"{[len(group) for group in names]}"
            )
        for group, listed in zip(optimizer["param_groups"], names, strict=True):
            for index, name in zip(group["params"], listed, strict=True):
                values = model["module"][name]
                self.shapes[name] = tuple(values.shape)
                slot = whole(name, values.numel())
                self._add(MASTER, values.reshape(-1), [slot])
                self._add_state(optimizer["state"].get(index, {}), [slot])

    def _read_shares(self, model: dict[str, Any]) -> None:
        tables = model["param_shapes"]  # of groups; ZeRO 3: of sub-groups
        for table in tables:
            self.shapes |= {name: tuple(shape) for name, shape in table.items()}
        keys = ("base_optimizer_state", "single_partition_of_fp32_groups")
        if self.stage == 3:
            keys = ("optimizer_state_dict", "fp32_flat_groups")
        for rank in range(self.world):
            path = self.folder / f"zero_pp_rank_{rank}_mp_rank_00_optim_states.pt"
            optimizer = scan.load(path, mmap=True)["optimizer_state_dict"]
            base, flats = (optimizer[key] for key in keys)
            if not isinstance(base, dict):
                raise ManifestError(f"{path}: written with zero_optimization.elastic_checkpoint")
            if len(flats) != len(tables):
                raise ManifestError(f"{path}: {len(flats)} groups of weights, not {len(tables)}")
            for index, flat in enumerate(flats):
                slots = self._slots(optimizer, index, tables[index], len(flat), rank)
                self._add(MASTER, flat, slots)
                self._add_state(base["state"].get(index, {}), slots)
            self.groups = [_settings(group) for group in base["param_groups"]]
            self.scaler = optimizer["loss_scaler"]

    def _slots(
        self, optimizer: dict[str, Any], index: int, table: Mapping[str, Any], size: int, rank: int
    ) -> list[Slot]:
        numels = {name: math.prod(shape) for name, shape in table.items()}
        if self.stage == 3:
            return partitioned(numels, self.world, rank)
        # Padding at the end of a partition is not written.
        size += optimizer["group_paddings"][index]
        return concatenated(numels, optimizer["param_alignment_paddings"][index], size, rank)

    def _read_frozen(self, model: dict[str, Any]) -> None:
        """Parameters that no optimizer owns. Up to ZeRO 2 they stand among the weights, with ZeRO 3
        every rank has a share of each.
        """
        if self.stage < 3:
            for name in model["module"].keys() - self.buffers.keys() - self.shapes.keys():
                values = model["module"][name]
                self.shapes[name] = tuple(values.shape)
                self._add(_FROZEN, values.reshape(-1), [whole(name, values.numel())])
                self.frozen.add(name)
            return
        shapes = {name: tuple(shape) for name, shape in model["frozen_param_shapes"].items()}
        for rank in range(self.world if shapes else 0):
            shares = self._model(rank)["frozen_param_fragments"]
            for name, shape in shapes.items():
                slots = partitioned({name: math.prod(shape)}, self.world, rank)
                self._add(_FROZEN, shares[name].reshape(-1), slots)
        self.shapes |= shapes
        self.frozen |= shapes.keys()

    def _check_complete(self) -> None:
        """Every element of everything is there once, and nothing else."""
        for name, shape in self.shapes.items():
            keys = [_FROZEN] if name in self.frozen else [MASTER]
            keys += MOMENTS if name in self.steps else ()
            for key in keys:
                end = 0
                for first, values in sorted(self._pieces.get((key, name), []), key=_first):
                    end = end + len(values) if first == end else -1
                if end != math.prod(shape):
                    raise ManifestError(f"{self.folder}: {name}: {key} is not complete")


def _first(piece: tuple[int, Tensor]) -> int:
    return piece[0]


def _settings(group: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in group.items() if key != "params"}
