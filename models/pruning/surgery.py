"""Cuts gated heads and FFN units out of a model: same class, smaller per-layer widths in its
config.

Shape legend: H heads, d head size, F feed-forward units, D width.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

import torch
from torch import Tensor

from models.attention import Attention
from models.config import ModelConfig
from models.layers import FeedForward
from models.xvlm import XVLM

__all__ = ["prune", "pruned_config", "sparsity_report", "widths", "with_widths"]

Part = Attention | FeedForward


def _places(config: ModelConfig) -> dict[str, tuple[str, str, int]]:
    """Slot name -> (section, field, index) of its width in the configuration."""
    places = {}
    for layer in range(config.vision.layers):
        places[f"vision.{layer}.heads"] = ("vision", "heads", layer)
        places[f"vision.{layer}.ffn"] = ("vision", "ffn", layer)
    first = config.text.text_layers
    for layer in range(first):
        places[f"text.{layer}.heads"] = ("text", "heads", layer)
        places[f"text.{layer}.ffn"] = ("text", "ffn", layer)
    for layer in range(config.text.fusion_layers):
        places[f"fusion.{layer}.self_heads"] = ("text", "heads", first + layer)
        places[f"fusion.{layer}.cross_heads"] = ("text", "cross_heads", layer)
        places[f"fusion.{layer}.ffn"] = ("text", "ffn", first + layer)
    for layer in range(len(config.image_fusion.ffn) if config.image_fusion else 0):
        places[f"image_fusion.{layer}.self_heads"] = ("image_fusion", "heads", layer)
        places[f"image_fusion.{layer}.cross_heads"] = ("image_fusion", "cross_heads", layer)
        places[f"image_fusion.{layer}.ffn"] = ("image_fusion", "ffn", layer)
    for layer in range(config.decoder.layers if config.decoder else 0):
        places[f"decoder.{layer}.self_heads"] = ("decoder", "heads", layer)
        places[f"decoder.{layer}.cross_heads"] = ("decoder", "cross_heads", layer)
        places[f"decoder.{layer}.ffn"] = ("decoder", "ffn", layer)
    return places


def widths(config: ModelConfig) -> dict[str, int]:
    """Slot name -> heads or FFN units of that layer."""
    return {
        name: getattr(getattr(config, section), field)[index]
        for name, (section, field, index) in _places(config).items()
    }


def with_widths(
    config: ModelConfig, changes: Mapping[str, int], pairs: Mapping[int, int] | None = None
) -> ModelConfig:
    """The configuration with other widths in the named slots.

    Args:
        pairs: pair of fusion layers -> heads of its shared key and value projection (NLVR2).

    Raises:
        ValueError: an unknown slot.
    """
    values, places = config.to_dict(), _places(config)
    for name, width in changes.items():
        if name not in places:
            raise ValueError(f"no gate slot {name!r} in model {config.name!r}")
        section, field, index = places[name]
        row = list(values[section][field])
        row[index] = width
        values[section][field] = tuple(row)
    if pairs:
        shared = list(values["text"]["pair_heads"])
        for pair, heads in pairs.items():
            shared[pair] = heads
        values["text"]["pair_heads"] = tuple(shared)
    return ModelConfig.from_dict(values, where=f"pruned {config.name}")


def _parts(model: XVLM) -> dict[str, tuple[str, Part]]:
    """Slot name -> (module path, the sub-layer that holds the slot)."""
    owners = {
        id(module.gate): (path, module)
        for path, module in model.named_modules()
        if isinstance(module, Attention | FeedForward)
    }
    return {name: owners[id(slot)] for name, slot in model.gate_slots().items()}


def _checked(name: str, z: Tensor, units: int) -> Tensor:
    """(units,) fp32 gate values on the CPU. Raises ValueError when they cannot be this slot's."""
    z = z.detach().reshape(-1).float().cpu()
    if z.shape[0] != units:
        raise ValueError(f"gates of {name}: {z.shape[0]} values for {units} units")
    if not bool(((z >= 0) & (z <= 1)).all()):
        raise ValueError(f"gates of {name}: values must lie in [0, 1]")
    return z


def _cut(state: dict[str, Tensor], key: str, dim: int, keep: Tensor, scale: Tensor | None) -> None:
    """Keeps entries `keep` along `dim` of state[key], times `scale` (one factor an entry); in
    place."""
    tensor = state[key].index_select(dim, keep.to(state[key].device))
    if scale is not None:
        shape = [-1 if axis == dim else 1 for axis in range(tensor.ndim)]
        factor = scale.to(tensor.device).view(shape)
        tensor = (tensor.float() * factor).to(tensor.dtype)
    state[key] = tensor


def _drop(state: dict[str, Tensor], prefix: str, names: Collection[str]) -> None:
    for name in names:
        del state[f"{prefix}.{name}"]


def _cut_attention(state: dict[str, Tensor], prefix: str, head_dim: int, z: Tensor) -> None:
    """z (H,): rows of q, k, v and columns of out; a soft gate goes into the columns of out."""
    kept = z.nonzero().flatten()
    inputs = [f"{x}.{y}" for x in "qkv" for y in ("weight", "bias")]
    inputs = [name for name in inputs if f"{prefix}.{name}" in state]  # some have no biases
    if not len(kept):  # the output bias remains
        _drop(state, prefix, [*inputs, "out.weight"])
        return
    entries = _entries(kept, head_dim)
    for name in inputs:
        _cut(state, f"{prefix}.{name}", 0, entries, None)
    _cut(state, f"{prefix}.out.weight", 1, entries, _soft(z[kept].repeat_interleave(head_dim)))


def _cut_pair(
    state: dict[str, Tensor], paths: tuple[str, str], parts: tuple[Attention, Attention],
    gates: tuple[Tensor, Tensor],
) -> tuple[int, tuple[list[int], list[int]]]:  # fmt: skip
    """Cross-attentions that share one key and value projection (NLVR2). Returns how many heads that
    has left, and the heads of each reader that are left, in their new order.

    The shared heads that remain are ordered as those of the first reader only, of both, of the
    second only, so that each reader still takes one end of them.
    """
    shared, head_dim = parts[0].shared_heads or 0, parts[0].head_dim
    first, second = _shared_kept(gates, shared)
    order = [*sorted(first - second), *sorted(first & second), *sorted(second - first)]
    mine = (
        order[: len(first)],
        [head - shared + parts[1].heads for head in order[len(order) - len(second) :]],
    )
    for path, heads, z in zip(paths, mine, gates, strict=True):
        inputs = [name for name in ("q.weight", "q.bias") if f"{path}.{name}" in state]
        if not heads:
            _drop(state, path, [*inputs, *(["out.weight"] if inputs else [])])
            continue
        entries = _entries(torch.tensor(heads), head_dim)
        for name in inputs:
            _cut(state, f"{path}.{name}", 0, entries, None)
        scale = _soft(z[heads].repeat_interleave(head_dim))
        _cut(state, f"{path}.out.weight", 1, entries, scale)
    keys = [f"{x}.{y}" for x in "kv" for y in ("weight", "bias")]
    for name in [name for name in keys if f"{paths[0]}.{name}" in state]:
        if order:
            _cut(state, f"{paths[0]}.{name}", 0, _entries(torch.tensor(order), head_dim), None)
        else:
            del state[f"{paths[0]}.{name}"]
    return len(order), mine


def _shared_kept(gates: tuple[Tensor, Tensor], shared: int) -> tuple[set[int], set[int]]:
    """Which of a pair's shared heads each of its two readers keeps: the first reader's heads are
    the first shared ones, the second's the last."""
    first, second = ({int(head) for head in z.nonzero().flatten()} for z in gates)
    return first, {head + shared - gates[1].shape[0] for head in second}


def pruned_config(config: ModelConfig, gates: Mapping[str, Tensor]) -> ModelConfig:
    """The configuration that `prune` gives a model of this one, without any weights.

    Raises:
        ValueError: on an unknown slot.
    """
    units = widths(config)
    pairs = {}
    for pair, shared in enumerate(config.text.pair_heads or ()):
        names = [f"fusion.{2 * pair + turn}.cross_heads" for turn in (0, 1)]
        one, other = (gates.get(name, torch.ones(units[name])).cpu() for name in names)
        first, second = _shared_kept((one, other), shared)
        pairs[pair] = len(first | second)
    return with_widths(config, {name: int((z != 0).sum()) for name, z in gates.items()}, pairs)


def _entries(heads: Tensor, head_dim: int) -> Tensor:
    """Rows of a projection that belong to `heads`, in their order."""
    return (heads[:, None] * head_dim + torch.arange(head_dim)).flatten()


def _cut_ffn(state: dict[str, Tensor], prefix: str, gate_first: bool, z: Tensor) -> None:
    """z (F,): rows of fc1 and columns of fc2.

    A soft gate goes where it acts: before the activation into fc1, after it into fc2. A closed gate
    before the activation leaves f(0) = 0 behind, so the unit can go either way.
    """
    kept = z.nonzero().flatten()
    if not len(kept):
        _drop(state, prefix, ["fc1.weight", "fc1.bias", "fc2.weight"])
        return
    soft = _soft(z[kept])
    before, after = (soft, None) if gate_first else (None, soft)
    _cut(state, f"{prefix}.fc1.weight", 0, kept, before)
    _cut(state, f"{prefix}.fc1.bias", 0, kept, before)
    _cut(state, f"{prefix}.fc2.weight", 1, kept, after)


def _cut_head_trimmer(
    state: dict[str, Tensor], config: ModelConfig, name: str, kept: Tensor
) -> None:
    """The outputs for heads `kept` of slot `name`, in their order, if it has a head trimmer; without a
    choice left the trimmer goes. Closed heads were no candidates before (`Trimmers.choose_heads`).
    """
    section, kind, layer = _places(config)[name]
    layer += config.text.text_layers if kind == "cross_heads" else 0
    prefix = f"{section}.trimmers.{kind}.{layer}"
    parts = [key.removeprefix(f"{prefix}.") for key in state if key.startswith(f"{prefix}.")]
    if len(kept) <= 1:
        _drop(state, prefix, parts)
    elif parts:
        for part in ("weight", "bias"):
            _cut(state, f"{prefix}.fc2.{part}", 0, kept, None)


def _soft(z: Tensor) -> Tensor | None:
    """None when every gate is exactly 1: then weights are copied bit for bit."""
    return None if bool((z == 1).all()) else z


@torch.no_grad()
def prune(model: XVLM, gates: Mapping[str, Tensor]) -> XVLM:
    """A slim copy of `model` that computes what the model computes under `gates`.

    Args:
        gates: slot name -> (units,) values in [0, 1]; 0 removes the unit, values between are
            folded into the weights. Slots left out keep all their units.

    Returns:
        A model of the same class, device, dtype, mode and trimming mode, without gate values in its
        slots. The parameters are copies. A layer may lose all heads or units: its output bias
        remains. Trimmers stay; those of heads choose among the heads that are left.

    Raises:
        ValueError: on an unknown slot, a wrong number of gates, or values outside [0, 1].
    """
    parts = _parts(model)
    unknown = [name for name in gates if name not in parts]
    if unknown:
        raise ValueError(f"no gate slot {unknown[0]!r} in model {model.config.name!r}")
    state = {key: value.detach().clone() for key, value in model.state_dict().items()}
    checked = {
        name: _checked(name, values, parts[name][1].gate.units) for name, values in gates.items()
    }
    changes = {name: int((z != 0).sum()) for name, z in checked.items()}
    pairs = _cut_pairs(model.config, parts, checked, state)
    for name, z in checked.items():
        path, part = parts[name]
        if not part.gate.units:
            continue
        if isinstance(part, Attention):
            if part.shared_heads is not None:
                continue  # cut above, with its partner
            _cut_head_trimmer(state, model.config, name, z.nonzero().flatten())
            _cut_attention(state, path, part.head_dim, z)
        else:
            _cut_ffn(state, path, part.gate_first, z)
    with torch.device("meta"):  # no weights are drawn: the global random state stays as it is
        slim = XVLM(with_widths(model.config, changes, pairs))
    slim.load_state_dict(state, assign=True)
    for was, now in ((model.vision, slim.vision), (model.text, slim.text)):
        if was.trimmers is not None and now.trimmers is not None:
            now.trimmers.take_mode(was.trimmers)
    return slim.train(model.training)


def _cut_pairs(
    config: ModelConfig,
    parts: Mapping[str, tuple[str, Part]],
    gates: Mapping[str, Tensor],
    state: dict[str, Tensor],
) -> dict[int, int]:
    """Cuts the cross-attentions of pairs of fusion layers; the heads left in each shared
    projection.
    """
    left = {}
    for pair in range(len(config.text.pair_heads or ())):
        names = [f"fusion.{2 * pair + turn}.cross_heads" for turn in (0, 1)]
        if not any(name in gates for name in names):
            continue
        (path, one), (other_path, other) = (parts[name] for name in names)
        assert isinstance(one, Attention) and isinstance(other, Attention)
        z = tuple(
            gates.get(name, torch.ones(part.heads))
            for name, part in zip(names, (one, other), strict=True)
        )
        left[pair], kept = _cut_pair(state, (path, other_path), (one, other), (z[0], z[1]))
        for name, heads in zip(names, kept, strict=True):
            _cut_head_trimmer(state, config, name, torch.tensor(heads, dtype=torch.int64))
    return left


def _share(kept: int, total: int) -> dict[str, Any]:
    return {"kept": kept, "total": total, "sparsity": 1.0 - kept / total if total else 0.0}


def _pair_surplus(model: XVLM) -> dict[str, int]:
    """Slot -> parameters that `parameters_per_unit` misses: it counts half a shared key and value
    row for each reader, but a row with one reader left is still whole.
    """
    surplus = {}
    for pair, shared in enumerate(model.config.text.pair_heads or ()):
        names = [f"fusion.{2 * pair + turn}.cross_heads" for turn in (0, 1)]
        parts = _parts(model)
        (_, one), (_, other) = (parts[name] for name in names)
        assert isinstance(one, Attention)
        row = one.head_dim * 2 * (one.key_width + one.qkv_bias)
        surplus[names[0]] = row * shared - row // 2 * (one.gate.units + other.gate.units)
    return surplus


def sparsity_report(
    before: XVLM, after: XVLM, modalities: Collection[str] | None = None
) -> dict[str, Any]:
    """Exact counts of what pruning kept; JSON-able.

    Args:
        modalities: which count as prunable (None: all); the ones a run pruned, for its sparsity.

    Returns:
        parameters: {"before", "after"}, all parameters of the models, each counted once.
        prunable: {"kept", "total", "sparsity"} in parameters; modalities: the same for each.
        layers: one entry a slot: slot, modality, layer, kind (heads, self_heads, cross_heads, ffn),
            kept and total units, parameters_kept and parameters_total.

    Raises:
        ValueError: when the models differ in depth, or `after` is wider than `before`.
    """
    was, now = widths(before.config), widths(after.config)
    if was.keys() != now.keys() or any(now[name] > was[name] for name in was):
        raise ValueError(
            f"model {after.config.name!r} is not a pruned form of {before.config.name!r}"
        )
    layers = []
    surplus = _pair_surplus(before), _pair_surplus(after)
    for name, cost in before.parameters_per_unit().items():
        modality, layer, kind = name.split(".")
        entry = {"slot": name, "modality": modality, "layer": int(layer), "kind": kind}
        entry |= {"kept": now[name], "total": was[name]}
        entry |= {
            "parameters_kept": now[name] * cost + surplus[1].get(name, 0),
            "parameters_total": was[name] * cost + surplus[0].get(name, 0),
        }
        layers.append(entry)

    def counted(names: Collection[str]) -> dict[str, Any]:
        chosen = [entry for entry in layers if entry["modality"] in names]
        kept = sum(entry["parameters_kept"] for entry in chosen)
        return _share(kept, sum(entry["parameters_total"] for entry in chosen))

    present = list(dict.fromkeys(entry["modality"] for entry in layers))
    sizes = [sum(weight.numel() for weight in model.parameters()) for model in (before, after)]
    return {
        "parameters": {"before": sizes[0], "after": sizes[1]},
        "prunable": counted(present if modalities is None else modalities),
        "modalities": {name: counted([name]) for name in present},
        "layers": layers,
    }
