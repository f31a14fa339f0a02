"""Between DeepSpeed and the disk: DeepSpeed says what goes into which file; what it says is copied
to host memory, and written later or at once. And it reads by the restricted unpickler only.

DeepSpeed's own asynchronous engines are no choice in 0.19.8: `fast` files cannot be loaded by the
same configuration, and `decoupled` needs a GPU and commits at the next step.
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from deepspeed.runtime.checkpoint_engine import CheckpointCommitInfo
from deepspeed.runtime.checkpoint_engine.checkpoint_engine import CheckpointEngine
from torch import Tensor

from train.checkpoint import manifest, scan
from train.config import UserError

if TYPE_CHECKING:
    from deepspeed import DeepSpeedEngine

__all__ = ["StagingEngine", "host_copy", "staging_engine", "write_files"]


class StagingEngine(CheckpointEngine):
    """Takes DeepSpeed's files into host memory (`take`), loads them without free unpickling."""

    def __init__(self) -> None:
        super().__init__()
        self.name = "StagingEngine"
        self._taken: dict[Path, Any] = {}

    def create(self, info: CheckpointCommitInfo) -> None:
        self._taken = {}

    def save(self, state_dict: Any, path: str) -> None:
        self._taken[Path(path)] = host_copy(state_dict)

    def load(self, path: str, map_location: Any = None) -> Any:
        return scan.load(path, map_location)

    def commit(self, info: CheckpointCommitInfo) -> bool:
        return True

    def take(self) -> dict[Path, Any]:
        """The files of the last `engine.save_checkpoint`: path -> content in host memory."""
        taken, self._taken = self._taken, {}
        return taken


def staging_engine(engine: DeepSpeedEngine) -> StagingEngine:
    """The engine's reader and writer of files, ours from now on. Raises UserError when the settings
    ask for another.
    """
    from deepspeed.runtime.checkpoint_engine import TorchCheckpointEngine

    current: Any = engine.checkpoint_engine
    if isinstance(current, StagingEngine):
        return current
    if not isinstance(current, TorchCheckpointEngine):
        raise UserError(
            "engine.config: checkpoint.writer: checkpoints are written by this program (set "
            "checkpoint.asynchronous in the run file): leave it out"
        )
    staging: Any = StagingEngine()  # a CheckpointEngine; DeepSpeed's type lists its own ones only
    engine.checkpoint_engine = staging
    return staging


def host_copy(value: Any) -> Any:
    """A copy that training cannot change any more: tensors in (pinned, from a GPU) host memory.

    Tensors that are views of the same memory stay one. Attributes of tensors are dropped, and
    parameters become tensors: no loader needs them.
    """
    memo: dict[Any, Tensor] = {}
    copied = _copy(value, memo)
    if any(tensor.is_pinned() for tensor in memo.values()):
        torch.cuda.synchronize()
    return copied


def _copy(value: Any, memo: dict[Any, Tensor]) -> Any:
    if isinstance(value, Tensor):
        return _copy_tensor(value, memo)
    if isinstance(value, dict):
        copied = copy.copy(value)  # keeps the class and its attributes (a state dict's _metadata)
        for key, item in value.items():
            copied[key] = _copy(item, memo)
        return copied
    if isinstance(value, list):
        return [_copy(item, memo) for item in value]
    if type(value) is tuple:
        return tuple(_copy(item, memo) for item in value)
    return copy.deepcopy(value)


def _copy_tensor(value: Tensor, memo: dict[Any, Tensor]) -> Tensor:
    source = value.detach()
    key = (source.device, source.data_ptr(), source.dtype, source.shape, source.stride())
    if source.numel() > 0 and key in memo:
        return memo[key]
    if source.is_cuda:
        target = torch.empty_like(source, device="cpu", pin_memory=True)
        target.copy_(source, non_blocking=True)
    else:
        target = source.clone()
    memo[key] = target
    return target


def write_files(files: dict[Path, Any], folder: Path) -> dict[str, dict[str, Any]]:
    """Writes and syncs files below `folder`; returns their entries of the manifest.

    Raises OSError naming the file (a full disk, a quota).
    """
    entries = {}
    for path, content in files.items():
        try:
            with manifest.HashingFile(path) as file:
                torch.save(content, cast("Any", file))  # it only needs `write`
                entries[path.relative_to(folder).as_posix()] = file.synced()
        except OSError as error:
            raise OSError(error.errno, error.strerror, str(path)) from error
        except RuntimeError as error:
            # torch's zip writer turns an OSError of `write` into its own.
            cause = error.__context__
            if isinstance(cause, OSError):
                raise OSError(cause.errno, cause.strerror, str(path)) from error
            raise
    manifest.sync_folder(folder)
    return entries
