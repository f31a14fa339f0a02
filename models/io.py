"""Model folders: config.json, model.safetensors, and the tokenizer's files passed through.

Knows nothing of the model class, so that the class may use it.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from models.config import ModelConfig

__all__ = ["CONFIG", "WEIGHTS", "check_state", "read_model", "save_model"]

CONFIG, WEIGHTS = "config.json", "model.safetensors"
_LISTED = 5


def save_model(
    config: ModelConfig,
    state: Mapping[str, Tensor],
    folder: Path,
    tokenizer: Any = None,
    dtype: torch.dtype | None = None,
) -> None:
    """Writes a model folder; an existing one is replaced file by file, the weights atomically.

    Args:
        tokenizer: a transformers tokenizer, or a folder whose files are copied; None writes none.
        dtype: on disk (torch.float16 halves the file); None keeps the tensors' own.
    """
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {
        key: value.detach().to(device="cpu", dtype=dtype or value.dtype).contiguous()
        for key, value in state.items()
    }
    partial = folder / f".{WEIGHTS}.partial"
    save_file(tensors, partial, metadata={"format": "pt"})
    os.replace(partial, folder / WEIGHTS)
    config.save(folder / CONFIG)
    if tokenizer is None:
        return
    if isinstance(tokenizer, str | os.PathLike):
        _copy_tokenizer(Path(tokenizer), folder)
    else:
        tokenizer.save_pretrained(str(folder))


def _copy_tokenizer(source: Path, folder: Path) -> None:
    if not source.is_dir():
        raise FileNotFoundError(f"{source}: no such tokenizer folder")
    for file in sorted(source.iterdir()):
        if file.is_file() and file.name not in (CONFIG, WEIGHTS):
            shutil.copyfile(file, folder / file.name)


def read_model(folder: Path) -> tuple[ModelConfig, dict[str, Tensor]]:
    """The configuration and weights of a model folder.

    Raises:
        FileNotFoundError: naming the missing file.
        ValueError: on a configuration or weight file that cannot be read.
    """
    for name in (CONFIG, WEIGHTS):
        if not (folder / name).is_file():
            raise FileNotFoundError(
                f"{folder / name}: not found; a model folder holds {CONFIG} and {WEIGHTS}"
            )
    config = ModelConfig.load(folder / CONFIG)
    try:
        return config, load_file(folder / WEIGHTS)
    except SafetensorError as error:
        raise ValueError(f"{folder / WEIGHTS}: not a readable safetensors file: {error}") from error


def _shorten(keys: list[str]) -> str:
    rest = len(keys) - _LISTED
    return ", ".join(keys[:_LISTED]) + (f" and {rest} more" if rest > 0 else "")


def check_state(expected: Mapping[str, Tensor], found: Mapping[str, Tensor], where: str) -> None:
    """Compares keys and shapes.

    Raises:
        ValueError: naming `where` and the keys that are missing, unexpected or misshapen.
    """
    missing = sorted(expected.keys() - found.keys())
    unexpected = sorted(found.keys() - expected.keys())
    shapes = [
        f"{key} has shape {tuple(found[key].shape)}, the configuration says {tuple(value.shape)}"
        for key, value in expected.items()
        if key in found and found[key].shape != value.shape
    ]
    problems = [
        f"{kind} {_shorten(keys)}"
        for kind, keys in (("missing", missing), ("unexpected", unexpected), ("wrong:", shapes))
        if keys
    ]
    if problems:
        raise ValueError(f"{where} does not fit its {CONFIG}: {'; '.join(problems)}")
