"""The frozen teacher: evaluation mode, no gradients, half precision where the device is fast at it.

It is replicated on every rank and never a submodule of what the engine wraps, so it is in no
optimizer and in no checkpoint.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from models import from_pretrained
from models.xvlm import XVLM
from train.config import TeacherConfig

__all__ = ["Teacher", "choose_dtype"]

_LOG = logging.getLogger(__name__)
_DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}


def choose_dtype(wanted: str, device: torch.device) -> torch.dtype:
    """Resolve "auto": fp16 on CUDA; on a CPU bf16 where it has matrix units for it, else fp32.

    Raises:
        ValueError: a half precision was asked for by name and this device cannot compute in it.
    """
    if device.type == "cuda":
        return torch.float16 if wanted == "auto" else _DTYPES[wanted]
    if wanted == "auto":
        return torch.bfloat16 if torch.cpu._is_amx_tile_supported() else torch.float32
    if wanted == "fp16" and not torch.ops.mkldnn._is_mkldnn_fp16_supported():
        raise ValueError(
            "teacher.dtype: fp16 is not supported by this CPU; use teacher.dtype=auto, bf16 or fp32"
        )
    return _DTYPES[wanted]


class Teacher:
    """A frozen model and how to run it.

    Attributes:
        model: the model, in `dtype`, in evaluation mode, without gradients.
        backend: "deepspeed" (`deepspeed.init_inference`) or "torch".
    """

    def __init__(self, model: XVLM, dtype: torch.dtype, device: torch.device, backend: str) -> None:
        model.eval().requires_grad_(False)
        self.dtype = dtype
        self.backend = self._choose_backend(backend, device)
        if self.backend == "deepspeed":
            import deepspeed  # after DS_ACCELERATOR has been set

            # No kernel injection: it swaps layer classes of Hugging Face BERT only, drops
            # cross-attention and never returns attention inputs. The engine casts, places and (on
            # CUDA) can capture graphs.
            model = deepspeed.init_inference(model, dtype=dtype).module
        self.model = model.to(device=device, dtype=dtype)
        _LOG.info("teacher: %s, %s, backend %s", model.config.name, dtype, self.backend)

    @staticmethod
    def _choose_backend(backend: str, device: torch.device) -> str:
        if backend != "auto":
            return backend
        return "deepspeed" if device.type == "cuda" else "torch"

    @classmethod
    def load(cls, config: TeacherConfig, device: torch.device) -> Teacher:
        """Raises FileNotFoundError when `teacher.path` holds no model, ValueError when it is not
        given.
        """
        if config.path is None:
            raise ValueError("teacher.path: this stage distils and needs a teacher model folder")
        model = from_pretrained(Path(config.path))
        return cls(model, choose_dtype(config.dtype, device), device, config.backend)

    @contextmanager
    def running(self) -> Iterator[XVLM]:
        """No gradients, no autocast of the student's: the teacher computes in its own dtype.

        `no_grad`, not `inference_mode`: the losses save teacher outputs for the student's backward.
        """
        device_type = next(self.model.parameters()).device.type
        with torch.no_grad(), torch.autocast(device_type, enabled=False):
            yield self.model
