"""Loading checkpoint files without running code that they bring along.

DeepSpeed 0.19 loads with a plain unpickler, which runs whatever a file asks for. Here every file of
a checkpoint goes through torch's restricted unpickler (`weights_only=True`), which knows tensors and
containers, and DeepSpeed's few own classes below; everything else is refused by name.
"""

from __future__ import annotations

import pickle
import zipfile
from pathlib import Path
from typing import Any

import torch

from train.checkpoint.manifest import ManifestError

__all__ = ["allowed_classes", "load", "scan"]


def allowed_classes() -> list[Any]:
    """What DeepSpeed 0.19.8 puts into its files beside tensors and containers (optimizer states of
    ZeRO 1 to 3; seen by listing the pickles' globals), and our loss scaler with an upper end. They
    hold numbers only, and none of them does anything when it is built.
    tests/distributed/test_checkpoints.py compares this list with real files of every stage.
    """
    from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler, LossScaler
    from deepspeed.runtime.zero.config import ZeroStageEnum
    from deepspeed.utils.tensor_fragment import fragment_address

    from train.runtime.loss_scale import CappedLossScaler

    return [CappedLossScaler, DynamicLossScaler, LossScaler, ZeroStageEnum, fragment_address]


def load(path: Path | str, map_location: Any = "cpu", mmap: bool = False) -> Any:
    """`torch.load` by the restricted unpickler with `allowed_classes`.

    Raises ManifestError when the file holds anything else or is no file of torch's.
    """
    try:
        with torch.serialization.safe_globals(allowed_classes()):
            return torch.load(path, map_location=map_location, weights_only=True, mmap=mmap)
    except FileNotFoundError:
        raise ManifestError(f"{path}: missing") from None
    except pickle.UnpicklingError as error:
        reason = next(
            (line.strip() for line in str(error).splitlines() if "Unsupported" in line or
             "GLOBAL" in line), str(error).splitlines()[0],
        )  # fmt: skip
        raise ManifestError(
            f"{path}: refused, it may run code when it is loaded: {reason}"
        ) from None
    except (RuntimeError, ValueError, EOFError, OSError, KeyError, zipfile.BadZipFile) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ManifestError(f"{path}: not a file of torch.save: {reason}") from None


def scan(path: Path) -> None:
    """Raises ManifestError when `load` would refuse the file. Tensors are mapped, not read."""
    load(path, mmap=True)
