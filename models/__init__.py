"""Vision-language models: one implementation for teacher, student and pruned model.

from models import from_pretrained, presets
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from models import presets
    from models.xvlm import XVLM

__all__ = ["from_pretrained", "presets"]


def from_pretrained(path: Any, dtype: Any = None, device: Any = "cpu") -> XVLM:
    """Loads a model folder (teacher, student or pruned) in eval mode; float32 unless `dtype` says.

    Raises:
        FileNotFoundError: naming the missing file.
        ValueError: naming missing, unexpected or misshapen keys.
    """
    import torch  # `import models` itself stays cheap

    from models.xvlm import XVLM

    return XVLM.from_pretrained(path, dtype=dtype or torch.float32, device=device)


def __getattr__(name: str) -> Any:
    """Imports `models.presets` on first use."""
    if name == "presets":
        return import_module("models.presets")
    raise AttributeError(f"module 'models' has no attribute {name!r}")
