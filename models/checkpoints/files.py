"""Reads foreign weight files: safetensors, torch files without running code, and sharded folders.

Also the config.json that Hugging Face puts beside them, as far as it says what weights do not.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor

__all__ = ["Weights", "foreign_config", "read_checkpoint", "read_weights", "weight_file"]

_FOLDER_NAMES = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
    "open_clip_model.safetensors",
    "open_clip_pytorch_model.bin",
)
_WRAPPERS = ("model", "state_dict")
_DATA_PARALLEL = "module."


@dataclass(frozen=True)
class Weights:
    """What a weight file holds.

    Attributes:
        state: tensors on the CPU.   config: the "config" entry stored beside them, {} without one.
    """

    state: dict[str, Tensor]
    config: dict[str, Any] = field(default_factory=dict)


def weight_file(path: str | Path) -> Path:
    """The weight file that a path means: itself, or the one in a downloaded model folder.

    Raises:
        FileNotFoundError: when there is none.
    """
    path = Path(path)
    if path.is_dir():
        for name in _FOLDER_NAMES:
            if (path / name).is_file():
                return path / name
        raise FileNotFoundError(f"{path}: holds none of {', '.join(_FOLDER_NAMES)}")
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such weight file")
    return path


def read_weights(path: str | Path) -> dict[str, Tensor]:
    """The state dict of a weight file, see `read_checkpoint`."""
    return read_checkpoint(path).state


def read_checkpoint(path: str | Path) -> Weights:
    """A state dict on the CPU, read without running any code that the file may hold.

    Args:
        path: .safetensors, an index of shards (.index.json), a torch file, or a folder with one of
            them. A dict with a "model" or "state_dict" entry is unwrapped, a "module." in front of
            every key is dropped, and entries that are not tensors are left out.

    Raises:
        FileNotFoundError: when there is no such file, or a shard is missing.
        ValueError: when it cannot be read as weights, or would run code.
    """
    path = weight_file(path)
    if path.name.endswith(".index.json"):
        read = Weights(_read_shards(path))
    elif path.suffix == ".safetensors":
        read = _read_safetensors(path)
    else:
        read = _read_torch(path)
    if not all(key.startswith(_DATA_PARALLEL) for key in read.state):
        return read
    plain = {key.removeprefix(_DATA_PARALLEL): value for key, value in read.state.items()}
    return Weights(plain, read.config)


def _read_safetensors(path: Path) -> Weights:
    try:
        with safe_open(path, "pt") as file:
            config = json.loads((file.metadata() or {}).get("config", "{}"))
        return Weights(load_file(path), config if isinstance(config, dict) else {})
    except (SafetensorError, ValueError) as error:  # damaged, or metadata that is not JSON
        raise ValueError(f"{path}: not a readable weight file: {error}") from error


def _read_torch(path: Path) -> Weights:
    config: dict[str, Any] = {}
    try:
        values = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # damaged files raise whatever the unpickler stumbles over
        raise ValueError(f"{path}: not a readable weight file: {_reason(error)}") from error
    for wrapper in _WRAPPERS:
        if isinstance(values, dict) and isinstance(values.get(wrapper), dict):
            config = values["config"] if isinstance(values.get("config"), dict) else config
            values = values[wrapper]
    if not isinstance(values, dict) or not any(isinstance(v, Tensor) for v in values.values()):
        raise ValueError(f"{path}: holds no state dict of tensors")
    state = {str(key): value for key, value in values.items() if isinstance(value, Tensor)}
    return Weights(state, config)


def _reason(error: Exception) -> str:
    """What went wrong, in one line."""
    text = str(error)
    foreign = re.search(r"GLOBAL ([\w.]+)", text)
    if foreign:
        return (
            f"refused, because it holds more than tensors and plain values ({foreign[1]}), and "
            "reading that would run code from the file; where it was made, save the state dict "
            "alone, best as .safetensors"
        )
    if "TorchScript" in text:
        return (
            "a TorchScript program, not weights; where you trust it, save "
            "torch.jit.load(FILE).state_dict() as .safetensors"
        )
    first = text.strip().splitlines()[0] if text.strip() else type(error).__name__
    return f"{first} (damaged or cut short?)"


def _read_shards(index: Path) -> dict[str, Tensor]:
    places = _read_json(index).get("weight_map")
    if not isinstance(places, dict) or not places:
        raise ValueError(f"{index}: weight_map is missing; not an index of weight shards")
    wanted: dict[str, set[str]] = {}
    for key, name in places.items():
        if not isinstance(name, str) or Path(name).name != name:
            raise ValueError(f"{index}: {key}: {name!r} is not a file of the same folder")
        wanted.setdefault(name, set()).add(key)
    state: dict[str, Tensor] = {}
    for name, keys in sorted(wanted.items()):
        shard = index.parent / name
        if not shard.is_file():
            raise FileNotFoundError(f"{shard}: missing; {index.name} names it")
        read: Callable[[Path], Weights] = (
            _read_safetensors if name.endswith(".safetensors") else _read_torch
        )
        found = read(shard).state
        if keys - found.keys():
            gone = min(keys - found.keys())
            raise ValueError(f"{shard}: {gone} is missing; {index.name} says it is there")
        state |= {key: found[key] for key in keys}
    return state


def _read_json(path: Path) -> dict[str, Any]:
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:  # not JSON, or not UTF-8
        raise ValueError(f"{path}: not a readable JSON file: {error}") from error
    if not isinstance(values, dict):
        raise ValueError(f"{path}: expected a JSON object")
    return values


def foreign_config(file: Path) -> tuple[Path, dict[str, Any]] | None:
    """The config.json beside a weight file, where Hugging Face or timm wrote it; None without one.

    Raises:
        ValueError: on a file that is not a JSON object.
    """
    path = file.parent / "config.json"
    if not path.is_file():
        return None
    values = _read_json(path)
    written_by_others = "model_type" in values or "architecture" in values
    return (path, values) if written_by_others else None
