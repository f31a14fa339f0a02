"""Loading a checkpoint that another number of ranks or another ZeRO stage has written.

Each rank picks its own elements out of the mapped files (shards.py), makes of them the state that a
checkpoint of this run's layout would have held, and DeepSpeed's optimizer loads that as it loads its
own. Nothing is converted on disk, and nothing is written before all ranks have all they need.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor

from train.checkpoint import manifest
from train.checkpoint.layout import Slot, concatenated, partitioned, whole
from train.checkpoint.manifest import ManifestError
from train.checkpoint.peers import Peers
from train.checkpoint.shards import MASTER, MOMENTS, Shards
from train.config import UserError

if TYPE_CHECKING:
    from deepspeed import DeepSpeedEngine

__all__ = ["layout_of", "load"]

_LOG = logging.getLogger(__name__)
# What a group's state says beside its moments; everything else is how the optimizer computes.
_SETTINGS = ("lr", "weight_decay", "betas", "eps", "name", "lr_multiplier")


@dataclass
class _Entry:
    """One entry of this rank's optimizer state: a flat tensor of `size` elements."""

    group: int
    size: int
    slots: list[Slot]


def layout_of(engine: DeepSpeedEngine) -> str:
    """Hash of what DeepSpeed's own loader needs to be as it was: stage, ranks, optimizer, and the
    order and places of all parameters. The same on every rank. Any number of ranks at ZeRO 0.
    """
    stage, tables = engine.zero_optimization_stage(), _tables(engine)
    world = dist.get_world_size() if stage and dist.is_initialized() else 1
    order = [list(table.items()) for table in tables]
    return manifest.hash_of([stage, world, type(_base(engine)).__name__, order, _paddings(engine)])


def load(engine: DeepSpeedEngine, folder: Path, values: Mapping[str, Any], peers: Peers) -> None:
    """Puts weights, buffers, optimizer state and counters of a verified checkpoint into the engine.
    Collective.

    Args:
        values: its manifest.
    Raises UserError on every rank, before anything is loaded, when it does not fit this model.
    """
    started = time.perf_counter()
    said = (
        f"{folder.name} was written by {values['world_size']} rank(s) at ZeRO "
        f"{values['zero_stage']}, this run has {peers.world} at ZeRO "
        f"{engine.zero_optimization_stage()}"
    )
    if peers.rank == 0:
        _LOG.info("%s: its parts are put together anew", said)
    shards, state, problem = None, None, None
    try:
        _refuse_unknown(engine, values)
        shards = Shards(folder, values, _group_names(engine))
        _check_model(engine, shards)
        state = _optimizer_state(engine, shards)
    except (UserError, ManifestError) as error:
        problem = str(error)
    problem = next((found for found in peers.gather(problem) if found is not None), None)
    if problem is not None or shards is None or state is None:
        raise UserError(
            f"{problem} ({said}); resume with {values['world_size']} rank(s) at ZeRO "
            f"{values['zero_stage']}"
        )
    _put(engine, shards, state)
    if peers.rank == 0:
        _LOG.info("%s: loaded in %.1f s", folder.name, time.perf_counter() - started)


def _refuse_unknown(engine: Any, values: Mapping[str, Any]) -> None:
    nvme = any(name.startswith("offloaded_tensors/") for name in values["files"])
    if nvme or engine.zero_nvme_offload_optimizer():
        raise UserError("optimizer states on NVMe keep their layout")
    if getattr(engine.optimizer, "elastic_checkpoint", False):
        raise UserError("zero_optimization.elastic_checkpoint is on: turn it off")


# This run's layout


def _base(engine: Any) -> Any:
    """The optimizer that does the arithmetic."""
    return engine.optimizer if engine.zero_optimization_stage() == 0 else engine.optimizer.optimizer


def _groups(engine: Any) -> list[list[Any]]:
    """Parameters of each optimizer group, in the order in which they were given."""
    optimizer = engine.optimizer
    stage = engine.zero_optimization_stage()
    if stage == 0:
        return [group["params"] for group in optimizer.param_groups]
    if stage < 3:
        return optimizer.bit16_groups
    groups: list[list[Any]] = [[] for _ in optimizer.param_groups]
    for index, members in enumerate(optimizer.fp16_groups):
        groups[optimizer.sub_group_to_group_id[index]] += members
    return groups


def _group_names(engine: Any) -> list[list[str]]:
    return [[engine.param_names[member] for member in group] for group in _groups(engine)]


def _shape(parameter: Any) -> tuple[int, ...]:
    return tuple(getattr(parameter, "ds_shape", parameter.shape))


def _table(engine: Any, members: Any) -> dict[str, int]:
    return {engine.param_names[member]: math.prod(_shape(member)) for member in members}


def _tables(engine: Any) -> list[dict[str, int]]:
    """name -> elements of each entry of the optimizer's state; ZeRO 0 has one for each parameter."""
    optimizer = engine.optimizer
    stage = engine.zero_optimization_stage()
    if stage == 0:
        return [_table(engine, [member]) for group in _groups(engine) for member in group]
    members = optimizer.fp16_groups if stage == 3 else optimizer.round_robin_bit16_groups
    return [_table(engine, group) for group in members]


def _paddings(engine: Any) -> list[list[int]]:
    return getattr(engine.optimizer, "round_robin_bit16_padding", [])


def _entries(engine: Any) -> list[_Entry]:
    """Raises UserError when this is not the layout of the DeepSpeed that we know."""
    optimizer = engine.optimizer
    stage, tables = engine.zero_optimization_stage(), _tables(engine)
    if stage == 0:
        group_of = [index for index, group in enumerate(_groups(engine)) for _ in group]
        pairs = [next(iter(table.items())) for table in tables]
        return [
            _Entry(group, numel, [whole(name, numel)])
            for group, (name, numel) in zip(group_of, pairs, strict=True)
        ]
    rank, world = dist.get_rank(), dist.get_world_size()
    entries = []
    for index, table in enumerate(tables):
        if stage == 3:
            size = optimizer.fp32_partitioned_groups_flat[index].numel()
            group, slots = optimizer.sub_group_to_group_id[index], partitioned(table, world, rank)
        else:
            size = optimizer.single_partition_of_fp32_groups[index].numel()
            group, slots = index, concatenated(table, _paddings(engine)[index], size, rank)
        if slots and slots[-1].at + slots[-1].count > size:
            raise UserError("this DeepSpeed lays parameters out in another way than 0.19")
        entries.append(_Entry(group, size, slots))
    return entries


# What is put there


def _check_model(engine: Any, shards: Shards) -> None:
    """The checkpoint has what this model has: names, shapes, groups."""
    shapes = {name: _shape(parameter) for parameter, name in engine.param_names.items()}
    buffers = dict(engine.module.named_buffers())
    persistent = engine.module.state_dict().keys()
    known = persistent & buffers.keys()
    wrong = [
        f"{name} is {shards.shapes.get(name, 'not there')}, in this model {shape}"
        for name, shape in shapes.items()
        if shards.shapes.get(name) != shape
    ]
    wrong += [f"{name} is not in this model" for name in shards.shapes.keys() - persistent]
    wrong += [f"buffer {name} is on one side only" for name in shards.buffers.keys() ^ known]
    trainable = {name for group in _group_names(engine) for name in group}
    wrong += [f"{name} is frozen on one side only" for name in trainable & shards.frozen]
    wrong += [f"{n} is frozen on one side only" for n in shapes.keys() - trainable - shards.frozen]
    ours = [group.get("name") for group in _base(engine).param_groups]
    theirs = [group.get("name") for group in shards.groups]
    if ours != theirs:
        wrong.append(f"optimizer groups are {theirs}, in this run {ours}")
    if wrong:
        more = f" and {len(wrong) - 5} more" if len(wrong) > 5 else ""
        raise UserError(f"{shards.folder} is of another model: {'; '.join(wrong[:5])}{more}")


def _flat(entry: _Entry, shards: Shards, key: str) -> Tensor:
    """(size,) fp32 of this rank, zeros where there is padding."""
    flat = torch.zeros(entry.size)
    for slot in entry.slots:
        values = shards.part(key, slot.name, slot.start, slot.start + slot.count)
        flat[slot.at : slot.at + slot.count] = values
    return flat


def _optimizer_state(engine: Any, shards: Shards) -> dict[str, Any]:
    """The state dict that the engine's optimizer loads."""
    base, entries = _base(engine), _entries(engine)
    tables = [[slot.name for slot in entry.slots] for entry in entries]
    if engine.zero_optimization_stage():
        tables = [list(table) for table in _tables(engine)]
    moments = {}
    for index, (entry, names) in enumerate(zip(entries, tables, strict=True)):
        steps = {shards.steps[name] for name in names if name in shards.steps}
        if len(steps) > 1:
            raise UserError(
                f"{shards.folder}: parameters of one group are at steps {sorted(steps)}"
            )
        if steps:
            moments[index] = {key: _moment(entry, shards, key) for key in MOMENTS}
            moments[index]["step"] = _step(base, steps.pop())
    inner = _packed(engine, base, entries)
    for group, saved in zip(inner["param_groups"], shards.groups, strict=True):
        group |= {key: saved[key] for key in _SETTINGS if key in saved}
    inner["state"] = moments
    stage = engine.zero_optimization_stage()
    if stage == 0:
        return inner
    flats = [_flat(entry, shards, MASTER) for entry in entries]
    outer = engine.optimizer.state_dict()
    if shards.scaler is not None:
        outer |= {"loss_scaler": shards.scaler, "overflow": False}
    if stage == 3:
        return outer | {"optimizer_state_dict": inner, "fp32_flat_groups": flats}
    return outer | {"base_optimizer_state": inner, "single_partition_of_fp32_groups": flats}


def _moment(entry: _Entry, shards: Shards, key: str) -> Tensor:
    """Zeros for a parameter that has not moved yet while others of its group have."""
    kept = [slot for slot in entry.slots if slot.name in shards.steps]
    return _flat(_Entry(entry.group, entry.size, kept), shards, key)


def _step(base: Any, step: float) -> Any:
    """torch's AdamW counts with a tensor, DeepSpeed's Adam with a number."""
    return torch.tensor(step) if isinstance(base, torch.optim.AdamW) else int(step)


def _packed(engine: Any, base: Any, entries: list[_Entry]) -> dict[str, Any]:
    """The optimizer's own state dict without moments, its parameters numbered. ZeRO 3 takes them out
    of the groups between two steps, where torch cannot number those that have moments already.
    """
    moments, base.state = base.state, type(base.state)(dict)
    try:
        packed = base.state_dict()
    finally:
        base.state = moments
    groups = [dict(group) for group in packed["param_groups"]]
    for number, group in enumerate(groups):
        group["params"] = [i for i, entry in enumerate(entries) if entry.group == number]
    return {"state": {}, "param_groups": groups}


@torch.no_grad()
def _put(engine: Any, shards: Shards, state: dict[str, Any]) -> None:
    """As `engine.load_checkpoint` does it: the weights, the counters, the optimizer."""
    optimizer = engine.optimizer
    stage = engine.zero_optimization_stage()
    rank, world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    if stage == 3:
        optimizer.checkpoint_event_prologue()  # partitions all parameters
    for name, buffer in engine.module.named_buffers():
        if name in shards.buffers:
            buffer.copy_(shards.buffers[name])
    for parameter, name in engine.param_names.items():
        shape = _shape(parameter)
        if stage < 3:
            parameter.data.copy_(shards.part(MASTER, name).view(shape))
        elif name in shards.frozen:
            for slot in partitioned({name: math.prod(shape)}, world, rank):
                values = shards.part(MASTER, name, slot.start, slot.start + slot.count)
                parameter.ds_tensor.data[: slot.count].copy_(values)
    engine.global_steps = shards.counters["global_steps"]
    engine.global_samples = shards.counters["global_samples"]
    engine.skipped_steps = shards.counters["skipped_steps"]
    if stage == 0:
        optimizer.load_state_dict(state)
        return
    optimizer.load_state_dict([state] * world, load_from_fp32_weights=True)
    if stage == 3:
        optimizer.checkpoint_event_epilogue()  # gathers those that stay whole
