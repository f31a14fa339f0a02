"""TensorBoard event files of a run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from train.monitor.pictures import caption_grid

__all__ = ["TensorBoard"]


def _cell(value: Any) -> str:
    """Text that cannot be markup or end a cell of TensorBoard's Markdown."""
    safe = str(value).replace("`", "'").replace("|", "\\|").replace("\n", " ")
    return f"`{safe}`" if safe else " "


class TensorBoard:
    """Writes scalars, histograms, pictures, texts and settings.

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
        self.image(step, tag, caption_grid(images, captions))
        # Four spaces make a code block in TensorBoard's Markdown, so that a caption cannot be
        # markup.
        blocks = ("\n".join(f"    {line}" for line in text.split("\n")) for text in captions)
        self._writer.add_text(tag, "\n\n---\n\n".join(blocks), step)

    def image(self, step: int, tag: str, image: Tensor) -> None:
        """Writes one picture (3, H, W) uint8."""
        self._writer.add_image(tag, image, step)

    def table(self, step: int, tag: str, rows: Mapping[str, Any]) -> None:
        """Writes names and values as a text table."""
        lines = [f"| {_cell(name)} | {_cell(value)} |" for name, value in rows.items()]
        self._writer.add_text(tag, "\n".join(["| key | value |", "|---|---|", *lines]), step)

    def hparams(self, step: int, values: Mapping[str, Any], metrics: Mapping[str, float]) -> None:
        """Writes the run's settings beside its final metrics, for the HPARAMS page.

        Into this run's own event file: SummaryWriter.add_hparams would start a run below it.
        """
        from torch.utils.tensorboard.summary import hparams

        plain = {
            # torch takes a bool for the number 1
            name: value
            if isinstance(value, int | float) and not isinstance(value, bool)
            else str(value)
            for name, value in values.items()
        }
        assert self._writer.file_writer is not None
        for summary in hparams(plain, dict(metrics)):
            self._writer.file_writer.add_summary(summary)
        for tag, value in metrics.items():
            self._writer.add_scalar(tag, value, step)

    def flush(self) -> None:
        """Writes what is queued."""
        self._writer.flush()

    def close(self) -> None:
        """Flushes and closes."""
        self._writer.close()
