"""The image pass of a task, whether its trimmers want to know the text or not."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from models.outputs import Capture, EncoderOutput
from models.xvlm import XVLM

__all__ = ["see"]

Context = tuple[Tensor, Tensor | None]


def see(
    model: XVLM,
    images: Tensor,
    indices: Sequence[Tensor],
    ids: Tensor,
    mask: Tensor | None,
    capture: Capture | None = None,
    text_capture: Capture | None = None,
) -> tuple[EncoderOutput, list[Context]]:
    """Encodes images for the texts that ask about them.

    Guided trimmers compare patches with the text, so the text layers run first and every text gets
    its own copy of its image; else each image is encoded once, whatever the number of its texts.

    Args:
        images: (N, 3, S, S).
        indices: for each image that a text reads (two in NLVR2), (B,) int64, which of the N it is.
        ids, mask: the texts, (B, L) each, as for `XVLM.encode_text`.
        text_capture: that of the `XVLM.multimodal` pass that follows, where it takes `guide`.

    Returns:
        The image pass, and for each of `indices` the states (B, P, D) and mask (B, P) or None, for
        `XVLM.multimodal`, `fuse` and `decode`. The image pass has the text pass that guided it, if
        one did, as `guide`: give it to `multimodal(..., text=image.guide)`, and the text layers do
        not run twice.
    """
    capture = Capture() if capture is None else capture
    if not model.guided:
        output = model.encode_image(images, capture)
        output.read = tuple(indices)
        return output, [output.context(index) for index in indices]
    wanted = Capture() if text_capture is None else text_capture
    text = model.encode_text(ids, mask, wanted.below(model.config.text.text_layers))
    guide = text.last[:, 0]
    output = model.encode_image(
        images,
        capture,
        image_index=torch.cat(list(indices)),
        guide=torch.cat([guide] * len(indices)),
    )
    output.guide = text
    rows = len(guide)
    masks = [None] * len(indices) if output.mask is None else list(output.mask.split(rows))
    return output, list(zip(output.last.split(rows), masks, strict=True))
