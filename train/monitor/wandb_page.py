"""Weights & Biases beside TensorBoard, for runs that name a project (log.wandb)."""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from train.config import UserError
from train.monitor.pictures import caption_grid

__all__ = ["WandB", "require_wandb"]


def require_wandb(project: str | None) -> None:
    """Raises UserError where a project is named and the package is missing."""
    if project is not None and importlib.util.find_spec("wandb") is None:
        raise UserError(
            f"log.wandb: {project}: the package wandb is not installed; install it "
            "(pip install wandb), or leave log.wandb out"
        )


class WandB:
    """Scalars and pictures of a run, under the run directory's name.

    A resumed run goes on in its old page. Account and server are wandb's own settings
    (WANDB_API_KEY, WANDB_MODE=offline); nothing of them is read or kept here.
    """

    def __init__(self, project: str, directory: Path, config: Mapping[str, Any]) -> None:
        require_wandb(project)
        self._wandb: Any = importlib.import_module("wandb")
        identity = hashlib.blake2b(str(directory.resolve()).encode(), digest_size=8).hexdigest()
        self._run = self._wandb.init(
            project=project,
            name=directory.resolve().name,
            id=identity,
            resume="allow",
            dir=str(directory),
            config=dict(config),
        )
        # Steps come as a value: wandb drops what it takes for the past, as after a resume.
        self._run.define_metric("step")
        self._run.define_metric("*", step_metric="step")

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """Writes tag -> value."""
        finite = {tag: value for tag, value in values.items() if math.isfinite(value)}
        self._run.log({"step": step, **finite})

    def pictures(self, step: int, tag: str, images: Tensor, captions: Sequence[str]) -> None:
        """Writes the same grid as TensorBoard."""
        self.image(step, tag, caption_grid(images, captions))

    def image(self, step: int, tag: str, image: Tensor) -> None:
        """Writes one picture (3, H, W) uint8."""
        pixels = image.permute(1, 2, 0).cpu().numpy()
        self._run.log({"step": step, tag: self._wandb.Image(pixels)})

    def summary(self, metrics: Mapping[str, float]) -> None:
        """The final metrics of the run."""
        self._run.summary.update(dict(metrics))

    def close(self) -> None:
        """Ends the page's run."""
        self._run.finish()
