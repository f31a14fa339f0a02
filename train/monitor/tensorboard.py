"""TensorBoard event files of a run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from train.monitor.pictures import caption_grid

__all__ = ["TensorBoard"]


class TensorBoard:
    """Writes scalars, histograms, pictures and texts.

    Args:
        folder: made when missing.
        resume_step: what earlier event files say about later steps is hidden from readers.
    """

    def __init__(self, folder: Path, resume_step: int = 0) -> None:
        # Imported here: it costs a second, which ranks without a writer and other verbs need not
        # pay.
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(
            str(folder), purge_step=resume_step + 1, max_queue=10_000, flush_secs=600
        )

    def scalars(self, step: int, values: Mapping[str, float], wall_time: float) -> None:
        """Writes tag -> value."""
        for tag, value in values.items():
            self._writer.add_scalar(tag, value, step, walltime=wall_time)

    def histogram(self, step: int, tag: str, values: Tensor) -> None:
        """Writes the distribution of the finite values; nothing when there are none."""
        flat = values.detach().float().flatten()
        flat = flat[torch.isfinite(flat)].cpu()
        if flat.numel():
            self._writer.add_histogram(tag, flat, step)

    def pictures(self, step: int, tag: str, images: Tensor, captions: Sequence[str]) -> None:
        """Writes the pictures as one grid with captions, and the captions as text."""
        self._writer.add_image(tag, caption_grid(images, captions), step)
        # Four spaces make a code block in TensorBoard's Markdown, so that a caption cannot be
        # markup.
        blocks = ("\n".join(f"    {line}" for line in text.split("\n")) for text in captions)
        self._writer.add_text(tag, "\n\n---\n\n".join(blocks), step)

    def flush(self) -> None:
        """Writes what is queued."""
        self._writer.flush()

    def close(self) -> None:
        """Flushes and closes."""
        self._writer.close()
