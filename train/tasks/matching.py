"""Image-text matching: each pair, its image with another text and its text with another image."""

from __future__ import annotations

import torch
from torch import Tensor

from models.outputs import Capture, EncoderOutput
from models.xvlm import XVLM
from train.losses.gather import RowExchange
from train.losses.vl import HardNegatives
from train.runtime.teacher import Teacher

__all__ = ["Partners", "match"]


class Partners:
    """Where each row's negative image and negative text are, and how to get them: one exchange for
    each, used by student and teacher alike. Collective, see `RowExchange`.

    Args:
        rows: B, of each rank.   local: the negatives are rows of the own rank.
    """

    def __init__(self, negatives: HardNegatives, rows: int, local: bool) -> None:
        self.images = RowExchange(negatives.image_for_text, rows, local)
        self.texts = RowExchange(negatives.text_for_image, rows, local)

    def share_with(self, teacher: Teacher | None) -> None:
        """Both models take rows through the exchanges: a teacher on a stream of its own may begin as
        soon as those are settled. Without one the host does not wait for them here.
        """
        if teacher is not None and teacher.overlaps:
            self.images.settle()
            self.texts.settle()
            teacher.inputs_ready()


def match(
    model: XVLM,
    text: Tensor,
    text_mask: Tensor | None,
    image: Tensor,
    partners: Partners,
    image_mask: Tensor | None = None,
    capture: Capture | None = None,
) -> tuple[EncoderOutput, Tensor]:
    """One fusion pass of 3B rows: B matching pairs, B texts with another image, B images with
    another text; and their matching logits (3B, 2).

    Args:
        text, text_mask: (B, L, D), (B, L) or None.   image, image_mask: (B, P, D), (B, P) or None.
            Masks are those of the passes (`EncoderOutput.mask`), so what trimmers dropped stays so.
    """
    images, texts = partners.images, partners.texts
    if image_mask is not None:
        image_mask = torch.cat([image_mask, images.take(image_mask), image_mask])
    if text_mask is not None:
        text_mask = torch.cat([text_mask, text_mask, texts.take(text_mask)])
    fused = model.fuse(
        torch.cat([text, text, texts.take(text)]),
        text_mask,
        torch.cat([image, images.take(image), image]),
        image_mask,
        capture or Capture(),
    )
    return fused, model.match_logits(fused.last)
