"""DeepSpeed's dynamic loss scale with an upper end. Imports DeepSpeed: import it late."""

from __future__ import annotations

from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler

__all__ = ["CappedLossScaler", "bound_loss_scale"]


class CappedLossScaler(DynamicLossScaler):
    """Never above `max_scale` (published: [1, 1024]). Checkpoints pickle it: it stays importable."""

    max_scale: float = float("inf")

    def update_scale(self, overflow: bool) -> None:
        super().update_scale(overflow)
        self.cur_scale = min(self.cur_scale, self.max_scale)


def bound_loss_scale(optimizer: object, max_scale: float) -> None:
    """Bounds the loss scale of an fp16 ZeRO optimizer; 0 sets no upper bound.

    At the lower end DeepSpeed raises a bare Exception; a run ends after so many skipped steps in a
    row instead (`StepGuard`), which says what to do.
    """
    scaler = getattr(optimizer, "loss_scaler", None)
    if not isinstance(scaler, DynamicLossScaler):
        return  # a static scale, as a file in ds_configs/ may ask for
    scaler.raise_error_at_min_scale = False
    if max_scale:
        scaler.__class__ = CappedLossScaler
        scaler.max_scale = max_scale  # type: ignore[attr-defined]
        scaler.cur_scale = min(scaler.cur_scale, max_scale)
