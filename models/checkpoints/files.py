"""Reads foreign weight files: safetensors, torch files without running code, and sharded folders.

Also the config.json that Hugging Face puts beside them, as far as it says what weights do not.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

__all__ = ["foreign_config", "read_weights", "weight_file"]

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
        state = _read_shards(path)
    elif path.suffix == ".safetensors":
        state = _read_safetensors(path)
    else:
        state = _read_torch(path)
    if all(key.startswith(_DATA_PARALLEL) for key in state):
        state = {key.removeprefix(_DATA_PARALLEL): value for key, value in state.items()}
    return state


def _read_safetensors(path: Path) -> dict[str, Tensor]:
    try:
        return load_file(path)
    except SafetensorError as error:
        raise ValueError(f"{path}: not a readable weight file: {error}") from error


def _read_torch(path: Path) -> dict[str, Tensor]:
    try:
        values = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # damaged files raise whatever the unpickler stumbles over
        raise ValueError(f"{path}: not a readable weight file: {_reason(error)}") from error
    for wrapper in _WRAPPERS:
        if isinstance(values, dict) and isinstance(values.get(wrapper), dict):
            values = values[wrapper]
    if not isinstance(values, dict) or not any(isinstance(v, Tensor) for v in values.values()):
        raise ValueError(f"{path}: holds no state dict of tensors")
    return {str(key): value for key, value in values.items() if isinstance(value, Tensor)}


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
        read: Callable[[Path], dict[str, Tensor]] = (
            _read_safetensors if name.endswith(".safetensors") else _read_torch
        )
        found = read(shard)
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
