"""Task losses of vision-language training: ITC, ITM, MLM, boxes, answers. Pure functions, float32
inside (float64 stays).

Shape legend: B own rows, G = world * B rows of the global batch, E feature size, M masked slots, V
vocabulary, A answers, La answer tokens.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from train.losses.attention import widen
from train.losses.gather import (
    all_gather_no_grad,
    all_gather_with_grad,
    own_rows,
    rank_and_world,
    scale_gradient,
)

__all__ = [
    "HardNegatives",
    "Similarities",
    "answer_loss",
    "box_losses",
    "contrastive_loss",
    "generalized_iou",
    "hard_negatives",
    "matching_labels",
    "matching_loss",
    "mlm_loss",
    "negative_weights",
    "pick_columns",
    "same_pairs",
    "similarities",
]

# Keeps every other row possible as a negative, however unlikely (published value).
_FLOOR = 1e-5
_LEAST_SIDE = 1 / 256  # of a predicted box, in GIoU: see `box_losses`


class Similarities(NamedTuple):
    """Scaled cosine similarities of the own rows against the global batch.

    image_to_text: (B, G), own images against all texts.   text_to_image: (B, G), own texts against
        all images.
    """

    image_to_text: Tensor
    text_to_image: Tensor

    def detach(self) -> Similarities:
        """The same values without gradients."""
        return Similarities(self.image_to_text.detach(), self.text_to_image.detach())


class HardNegatives(NamedTuple):
    """Indices into the global batch: (B,) image for each own text, (B,) text for each own image."""

    image_for_text: Tensor
    text_for_image: Tensor


def _targets_loss(logits: Tensor, own: Tensor, groups: tuple[Tensor, Tensor] | None) -> Tensor:
    if groups is None:
        return F.cross_entropy(logits, own)
    mine, everyone = groups
    equal = (mine[:, None] == everyone[None, :]).to(logits.dtype)
    return F.cross_entropy(logits, equal / equal.sum(dim=1, keepdim=True))


def similarities(
    image_feature: Tensor, text_feature: Tensor, temperature: Tensor | float
) -> Similarities:
    """Cosine similarities over the temperature, own rows against the global batch.

    Args:
        image_feature, text_feature: (B, E), L2-normalised; the same B on every rank.
        temperature: scalar or one-element tensor.
    """
    image, text = widen(image_feature), widen(text_feature)
    if isinstance(temperature, Tensor):
        temperature = widen(temperature).reshape(())
    with torch.autocast(image.device.type, enabled=False):
        return Similarities(
            image @ all_gather_with_grad(text).t() / temperature,
            text @ all_gather_with_grad(image).t() / temperature,
        )


def contrastive_loss(
    image_feature: Tensor,
    text_feature: Tensor,
    temperature: Tensor | float,
    published_scaling: bool = False,
    groups: Tensor | None = None,
) -> tuple[Tensor, Similarities]:
    """Symmetric cross entropy over the global batch (ITC).

    Every rank computes the share of its own rows, l_r = (mean_b CE(I_b . T) + mean_b CE(T_b . I)) /
    2 over its B images and texts, so that the global loss is L = mean_r l_r. Why the averaged
    gradient is exact: the gather's backward sums over ranks, so rank s receives d(sum_r l_r)/dx_s =
    world * dL/dx_s for its own rows x_s; data-parallel averaging then gives (1/world) * sum_s world
    * dL/dx_s * dx_s/dw = dL/dw. The temperature, which is not gathered, gets dl_r/dt on each rank,
    whose mean is dL/dt. So no factor is needed at any world size, and each rank forms 2 * B * G
    similarities, not G * G.

    Args:
        image_feature, text_feature: (B, E), L2-normalised; the same B on every rank.
        temperature: scalar or one-element tensor; similarities are divided by it.
        published_scaling: feature gradients 1/world of the true ones, while the temperature keeps
            its full one: what the released code gets from a gather whose backward drops the other
            ranks' terms. Holds for whatever else is made of the returned similarities.
        groups: (B,) int64; rows with an equal value are positives of each other with equal weight
            (retrieval fine-tuning, where captions share an image). None: only the own pair.

    Returns:
        this rank's share (its mean over ranks is the global loss), and the similarities for
        `hard_negatives`.
    """
    image, text = image_feature, text_feature
    if published_scaling:
        _, world = rank_and_world()
        image, text = scale_gradient(image, 1.0 / world), scale_gradient(text, 1.0 / world)
    scaled = similarities(image, text, temperature)
    own = own_rows(image.shape[0], image.device)
    pair = None if groups is None else (groups, all_gather_no_grad(groups))
    loss = (
        _targets_loss(scaled.image_to_text, own, pair)
        + _targets_loss(scaled.text_to_image, own, pair)
    ) / 2
    return loss, scaled


def same_pairs(groups: Tensor) -> Tensor:
    """(B, G) bool: own and global rows of equal `groups` (B,) int64, for `hard_negatives`."""
    return groups[:, None] == all_gather_no_grad(groups)[None, :]


def negative_weights(similarity: Tensor, own_index: Tensor, same: Tensor | None = None) -> Tensor:
    """(B, G) sampling weights: softmax + 1e-5, zero for the own pair and equal pairs (`same`)."""
    weights = similarity.detach().double().softmax(dim=1) + _FLOOR
    weights = weights.scatter(1, own_index[:, None], 0.0)
    return weights if same is None else weights.masked_fill(same, 0.0)


def pick_columns(weights: Tensor, uniform: Tensor) -> Tensor:
    """(B,) column of each row of `weights` (B, G), in proportion to it; `uniform` (B,) in [0, 1)."""
    edges = weights.cumsum(dim=1)
    point = uniform.to(edges)[:, None] * edges[:, -1:]
    # right=True: the first edge ABOVE the point, so a column of weight zero is never chosen.
    column = torch.searchsorted(edges, point, right=True).squeeze(1)
    return column.clamp(max=weights.shape[1] - 1)


def _draw(similarity: Tensor, uniform: Tensor, own_index: Tensor, same: Tensor | None) -> Tensor:
    """(B,) column for each row, in proportion to its weight, from the cumulative sum."""
    weights = negative_weights(similarity, own_index, same)
    if same is not None:
        # A row whose every partner is an equal pair still needs a negative: any row but its own.
        others = torch.ones_like(weights).scatter(1, own_index[:, None], 0.0)
        weights = torch.where(weights.sum(dim=1, keepdim=True) > 0, weights, others)
    return pick_columns(weights, uniform)


@torch.no_grad()
def hard_negatives(
    similarities: Similarities,
    generator: torch.Generator,
    own_index: Tensor | None = None,
    same: Tensor | None = None,
    local: bool = False,
) -> HardNegatives:
    """One hard negative image per own text and one hard negative text per own image (ITM).

    Draw once per step and give the result to teacher and student alike. The random numbers are
    drawn for the whole global batch and cut to the own rows, so that ranks draw independently of
    each other from one shared generator, and the same global batch gets the same negatives on any
    number of ranks.

    Args:
        similarities: (B, G) each, from `contrastive_loss`.
        generator: CPU generator keyed by the step, in the same state on all ranks.
        own_index: (B,) int64, the own rows in the global batch; default `own_rows(B)`.
        same: (B, G) bool, pairs that are not negatives (see `same_pairs`).
        local: draw among the own rank's rows only (the published choice).

    Raises:
        ValueError: there is no second row to draw from.
    """
    rows, columns = similarities.image_to_text.shape
    device = similarities.image_to_text.device
    if own_index is None:
        own_index = own_rows(rows, device)
    if (rows if local else columns) < 2:
        raise ValueError(
            "hard negatives need at least 2 rows to draw from: raise data.batch to 2 or more"
        )
    drawn = torch.rand(2, columns, generator=generator)
    uniform = drawn.to(device, non_blocking=True)[:, own_index]  # else the host waits for the step
    to_text, to_image = similarities
    chosen_own = own_index
    if local:
        to_text, to_image = to_text[:, own_index], to_image[:, own_index]
        same = None if same is None else same[:, own_index]
        chosen_own = torch.arange(rows, device=device)
    image_for_text = _draw(to_image, uniform[0], chosen_own, same)
    text_for_image = _draw(to_text, uniform[1], chosen_own, same)
    if local:
        return HardNegatives(own_index[image_for_text], own_index[text_for_image])
    return HardNegatives(image_for_text, text_for_image)


def matching_labels(rows: int, device: torch.device | str = "cpu") -> Tensor:
    """(3 * rows,) int64: `rows` matching pairs (class 1), then 2 * rows negatives (class 0)."""
    return (torch.arange(3 * rows, device=device) < rows).long()


def matching_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Cross entropy of image-text matching. logits (3B, 2), labels (3B,) int64, class 1 = match."""
    return F.cross_entropy(widen(logits), labels)


def mlm_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Mean cross entropy over used slots, 0 without any. (B, M, V) and (B, M); -100 is unused."""
    total = F.cross_entropy(
        widen(logits).flatten(0, -2), labels.flatten(), ignore_index=-100, reduction="sum"
    )
    # Not the library's mean: without any label that one is 0 / 0.
    return total / (labels != -100).sum().clamp(min=1)


def _corners(boxes: Tensor) -> Tensor:
    """(cx, cy, w, h) -> (x0, y0, x1, y1)."""
    centre, half = boxes[..., :2], boxes[..., 2:] / 2
    return torch.cat([centre - half, centre + half], dim=-1)


def generalized_iou(a: Tensor, b: Tensor) -> Tensor:
    """GIoU row by row of (..., 4) corners (x0, y0, x1, y1) -> (...); finite for boxes of size 0."""
    tiny = 1e-12
    area_a = (a[..., 2:] - a[..., :2]).prod(dim=-1)
    area_b = (b[..., 2:] - b[..., :2]).prod(dim=-1)
    inner = (
        (torch.minimum(a[..., 2:], b[..., 2:]) - torch.maximum(a[..., :2], b[..., :2]))
        .clamp(min=0)
        .prod(dim=-1)
    )
    hull = (
        (torch.maximum(a[..., 2:], b[..., 2:]) - torch.minimum(a[..., :2], b[..., :2]))
        .clamp(min=0)
        .prod(dim=-1)
    )
    union = area_a + area_b - inner
    return inner / union.clamp(min=tiny) - (hull - union) / hull.clamp(min=tiny)


def box_losses(pred: Tensor, target: Tensor, is_region: Tensor) -> tuple[Tensor, Tensor]:
    """L1 (summed over coordinates) and 1 - GIoU, each averaged over the region rows.

    A row with a box of negative size (only a broken target can have one) adds nothing to GIoU,
    instead of switching the term off for the whole batch. GIoU sees predicted sides of at least
    1/256: its slope grows as one over the side, and a box that has shrunk to nothing would overflow
    half precision; L1 draws it back. Without region rows both are an exact 0 that still depends on
    `pred`.

    Args:
        pred, target: (B, 4) normalised (cx, cy, w, h).   is_region: (B,) bool.
    """
    pred = widen(pred)
    target = target.to(pred)
    count = is_region.sum().clamp(min=1)
    l1 = (pred - target).abs().sum(dim=1)
    whole = is_region & (pred[:, 2:] >= 0).all(dim=1) & (target[:, 2:] >= 0).all(dim=1)
    # Rows that do not count are computed on a harmless box: where() alone would let a NaN gradient
    # through.
    harmless = pred.new_tensor([0.5, 0.5, 1.0, 1.0])
    seen = torch.cat([pred[:, :2], pred[:, 2:].clamp(min=_LEAST_SIDE)], dim=1)
    giou = generalized_iou(
        _corners(torch.where(whole[:, None], seen, harmless)),
        _corners(torch.where(whole[:, None], target, harmless)),
    )
    zero = l1.new_zeros(())
    return torch.where(is_region, l1, zero).sum() / count, torch.where(
        whole, 1 - giou, zero
    ).sum() / count


def answer_loss(
    logits: Tensor,
    answer_ids: Tensor,
    answer_mask: Tensor,
    answer_weight: Tensor,
    questions: int,
    smoothing: float = 0.0,
) -> Tensor:
    """Weighted language-model loss of answers: sum_a weight_a * sum_t CE / questions.

    Args:
        logits: (A, La, V); position t predicts token t + 1.
        answer_ids, answer_mask: (A, La) int64 / bool, [CLS] answer tokens [SEP] padding.
        answer_weight: (A,), share of annotators.
        questions: number of question rows in the batch (not of answers).
        smoothing: eps of label smoothing as published: 1 - eps on the token, eps / V on each OTHER
            class (the total is below 1, unlike the library's definition).

    Raises:
        ValueError: `questions` is not positive.
    """
    if questions < 1:
        raise ValueError(f"answer_loss needs at least one question row, got questions={questions}")
    log_p = widen(logits[:, :-1]).log_softmax(dim=-1)
    token = log_p.gather(-1, answer_ids[:, 1:, None]).squeeze(-1)
    loss = -token
    if smoothing:
        share = smoothing / logits.shape[-1]
        loss = -(1 - smoothing) * token - share * (log_p.sum(dim=-1) - token)
    per_answer = torch.where(answer_mask[:, 1:], loss, loss.new_zeros(())).sum(dim=1)
    return (answer_weight.to(per_answer) * per_answer).sum() / questions
