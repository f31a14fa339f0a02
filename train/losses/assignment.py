"""Which of two images a text belongs to: the draws of NLVR2's domain stage (X-VLM 2111.08276, as in
ALBEF 2107.07651).

Shape legend: B own rows, G = world * B rows of the global batch, E feature size.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from train.losses.gather import all_gather_no_grad, own_rows, rank_and_world
from train.losses.vl import pick_columns

__all__ = ["FIRST", "NEITHER", "SECOND", "Assignments", "draw_assignments"]

FIRST, SECOND, NEITHER = 0, 1, 2
_TEMPERATURE = 0.07  # published; not the learned one
_NEITHER_SHARE = 1 / 3


class Assignments(NamedTuple):
    """Two images for each own text, and which of them the text is about.

    first, second: (B,) int64, rows of the global batch.   label: (B,) int64, FIRST, SECOND or
        NEITHER.
    """

    first: Tensor
    second: Tensor
    label: Tensor


@torch.no_grad()
def draw_assignments(
    feature: Tensor, groups: Tensor, generator: torch.Generator, local: bool = False
) -> Assignments:
    """Pairs of images by chance: in 2 of 3 rows the own image and a hard negative in random order,
    in the others two different hard negatives.

    Negatives are drawn in proportion to exp(cosine / 0.07) of the images. Numbers are drawn for the
    whole global batch, so the same global batch gets the same pairs on any number of ranks.

    Args:
        feature: (B, E) unit rows, of each row's own image.   groups: (B,) int64; rows of equal value
            show the same image and are no negatives of each other.
        generator: CPU generator keyed by the step, in the same state on all ranks.
        local: draw among the own rank's rows only (the published choice).

    Raises:
        ValueError: fewer than 3 rows to draw from.
    Collective, unless `local`.
    """
    rows, device, (_, world) = feature.shape[0], feature.device, rank_and_world()
    own, everyone, all_groups = own_rows(rows, device), feature, groups
    columns = own  # rows of the global batch that may be drawn
    if not local:
        everyone, all_groups = all_gather_no_grad(feature), all_gather_no_grad(groups)
        columns = torch.arange(world * rows, device=device)
    if len(columns) < 3:
        raise ValueError(
            "two images that a text is not about need a batch of at least 3: raise data.batch"
        )
    drawn = torch.rand(4, world * rows, generator=generator)
    drawn = drawn.to(device, non_blocking=True)[:, own]  # else the host waits for the step
    kind, order, one, two = drawn.unbind()
    barred = columns[None, :] == own[:, None]
    scores = feature.double() @ everyone.double().t() / _TEMPERATURE
    same = groups[:, None] == all_groups[None, :]
    chosen = _draw(scores, one, barred, same)
    negative = columns[chosen]
    barred = barred | (columns[None, :] == negative[:, None])
    same = same | (all_groups[chosen][:, None] == all_groups[None, :])
    other = columns[_draw(scores, two, barred, same)]
    neither, swapped = kind < _NEITHER_SHARE, order < 0.5
    label = torch.where(neither, NEITHER, torch.where(swapped, SECOND, FIRST))
    first = torch.where(neither | swapped, negative, own)
    second = torch.where(neither, other, torch.where(swapped, own, negative))
    return Assignments(first, second, label)


def _draw(scores: Tensor, uniform: Tensor, barred: Tensor, same: Tensor) -> Tensor:
    """(B,) columns in proportion to exp(scores) among those not `barred` and not `same`; where that
    leaves none, among those not barred.
    """
    out = barred | same
    out = torch.where(out.all(dim=1, keepdim=True), barred, out)
    # Softmax over what may be drawn: the own image's similarity of 1 would dwarf all weights.
    return pick_columns(scores.masked_fill(out, -torch.inf).softmax(dim=1), uniform)
