"""Image-text retrieval over a whole split: a shortlist by cosine, ranked again by the matching head.

The protocol of COCO and Flickr30k as published (ALBEF 2107.07651, X-VLM 2111.08276): every image has
several captions and any of them is a hit; the `k_test` nearest texts of each image, and images of
each text, are ordered by the matching logit alone. What was not shortlisted is not found.

The score of a pair is the same in both directions, so each pair is scored once. A rank scores the
pairs of its own images, whose states it computes in a second pass over the data instead of keeping
them (9 GB for COCO's 5,000 images at 384 pixels). Shape legend: G images and T texts of all ranks,
E features, L tokens, P image tokens, D width, k candidates.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed
import torch.nn.functional as F
from torch import Tensor

if TYPE_CHECKING:
    from data_pipeline.task_batches import RetrievalBatch
    from models.outputs import EncoderOutput
    from models.xvlm import XVLM

__all__ = ["RankedSplit", "evaluate_retrieval", "hits", "rank_split", "recalls"]

_RECALLS = (1, 5, 10)
_BLOCK = 1 << 26  # similarities in memory at a time
_ROWS = 512  # texts in one pass of the model
Batches = Callable[[], Iterator["RetrievalBatch"]]


def hits(scores: Tensor, relevant: Tensor) -> dict[int, Tensor]:
    """(Q,) bool for 1, 5 and 10: is a relevant candidate among that many best?

    A candidate that scores the same as the best relevant one counts as better: a model that scores
    everything alike has not found anything.

    Args:
        scores, relevant: (Q, k) float / bool, the candidates of each query.
    """
    best = scores.masked_fill(~relevant, -torch.inf).amax(1, keepdim=True)
    ahead = ((scores >= best) & ~relevant).sum(1)
    found = relevant.any(1)
    return {n: found & (ahead < n) for n in _RECALLS}


def recalls(scores: Tensor, relevant: Tensor) -> dict[int, float]:
    """Recall at 1, 5 and 10: the share of queries that `hits` counts."""
    return {n: float(hit.double().mean()) for n, hit in hits(scores, relevant).items()}


@dataclass
class _Found:
    """Rows of one rank, and then of all: images and texts in the order of ranks, on the CPU."""

    images: list[Tensor] = field(default_factory=list)  # (n, E)
    image_groups: list[int] = field(default_factory=list)
    texts: list[Tensor] = field(default_factory=list)  # (n, E)
    text_groups: list[Tensor] = field(default_factory=list)
    ids: list[Tensor] = field(default_factory=list)  # (n, L)
    masks: list[Tensor] = field(default_factory=list)

    def add(self, model: XVLM, batch: RetrievalBatch) -> None:
        keep, rows = batch.image_valid, batch.valid
        self.images.append(_image_features(model, batch)[keep].cpu())
        text = model.text_feature(model.encode_text(batch.text_ids, batch.text_mask).last)
        self.texts.append(text.float()[rows].cpu())
        self.text_groups.append(batch.groups[rows].cpu())
        self.ids.append(batch.text_ids[rows].cpu())
        self.masks.append(batch.text_mask[rows].cpu())
        # All texts of an image have its group, and every image has a text.
        groups = torch.zeros(len(keep), dtype=torch.int64, device=keep.device)
        self.image_groups += groups.index_put((batch.image_index,), batch.groups)[keep].tolist()


def _image_features(model: XVLM, batch: RetrievalBatch) -> Tensor:
    return model.image_feature(model.encode_image(batch.images).last).float()


@dataclass(frozen=True)
class RankedSplit:
    """Everything that all ranks know.

    Attributes:
        first, own: where this rank's images begin among the G, and how many they are.
    """

    images: Tensor
    image_groups: Tensor
    texts: Tensor
    text_groups: Tensor
    ids: Tensor
    masks: Tensor
    first: int
    own: int

    @classmethod
    def gathered(cls, mine: _Found, dist: Any, device: torch.device) -> RankedSplit:
        world, rank = (1, 0) if dist is None else (dist.world_size, dist.rank)
        parts: list[Any] = [mine]
        if world > 1:
            parts = [None] * world
            torch.distributed.all_gather_object(parts, mine)

        def joined(name: str) -> Tensor:
            return torch.cat([part for found in parts for part in getattr(found, name)]).to(device)

        sizes = [len(found.image_groups) for found in parts]
        groups = torch.tensor([group for found in parts for group in found.image_groups])
        return cls(
            joined("images"), groups.to(device), joined("texts"), joined("text_groups"),
            joined("ids"), joined("masks"), sum(sizes[:rank]), sizes[rank],
        )  # fmt: skip


def _shortlist(queries: Tensor, gallery: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Similarities and numbers, (Q, k) each, of the nearest entries of the gallery."""
    keep = min(count, len(gallery))
    step = max(1, _BLOCK // len(gallery))
    blocks = [
        (queries[start : start + step] @ gallery.T).topk(keep, dim=1)
        for start in range(0, len(queries), step)
    ]
    return torch.cat([b.values for b in blocks]), torch.cat([b.indices for b in blocks])


class _Matcher:
    """The matching logit of every pair that a shortlist holds, for this rank's images."""

    def __init__(self, split: RankedSplit, of_images: Tensor, of_texts: Tensor) -> None:
        self.split, self.total = split, len(split.texts)
        device = of_images.device
        images = torch.arange(len(split.images), device=device)[:, None].expand_as(of_images)
        texts = torch.arange(self.total, device=device)[:, None].expand_as(of_texts)
        pairs = torch.cat([
            (images * self.total + of_images).flatten(), (of_texts * self.total + texts).flatten()
        ]).unique()  # fmt: skip
        owner = pairs // self.total
        # Sorted: the pairs of an image are neighbours.
        self.pairs = pairs[(owner >= split.first) & (owner < split.first + split.own)]
        self.scores = torch.full(self.pairs.shape, -torch.inf, device=device)

    def run(self, model: XVLM, batches: Batches) -> None:
        texts = self._texts(model)
        begins = torch.arange(self.split.own + 1, device=self.pairs.device) + self.split.first
        places = torch.searchsorted(self.pairs, begins * self.total).tolist()
        number = 0
        for batch in batches():
            images = model.encode_image(batch.images)
            for row in batch.image_valid.nonzero().flatten():
                span = slice(places[number], places[number + 1])
                self.scores[span] = self._match(model, images.context(row[None]), texts, span)
                number += 1

    def _texts(self, model: XVLM) -> tuple[Tensor, Tensor]:
        """States (T, L, D) and masks (T, L) of what is left of each text, L of the longest: texts are
        needed with hundreds of images each.
        """
        ids, masks = self.split.ids, self.split.masks
        longest = int(masks.sum(1).max())
        parts = [
            model.encode_text(ids[at : at + _ROWS, :longest], masks[at : at + _ROWS, :longest])
            for at in range(0, self.total, _ROWS)
        ]
        return _one_length(parts)

    def _match(
        self,
        model: XVLM,
        image: tuple[Tensor, Tensor | None],
        texts: tuple[Tensor, Tensor],
        span: slice,
    ) -> Tensor:
        states, masks = texts
        wanted = self.pairs[span] % self.total
        scores = []
        for at in range(0, len(wanted), _ROWS):
            rows = wanted[at : at + _ROWS]
            fused = model.fuse(states[rows], masks[rows], *image)  # one image for all rows
            scores.append(model.match_logits(fused.last)[:, 1].float())
        return torch.cat(scores) if scores else self.scores[span]

    def of(self, images: Tensor, texts: Tensor) -> Tensor:
        """Scores of pairs; -inf for those of other ranks' images."""
        wanted = images * self.total + texts
        if not len(self.pairs):
            return torch.full(wanted.shape, -torch.inf, device=wanted.device)
        place = torch.searchsorted(self.pairs, wanted).clamp(max=len(self.pairs) - 1)
        return torch.where(self.pairs[place] == wanted, self.scores[place], -torch.inf)


def _one_length(parts: Sequence[EncoderOutput]) -> tuple[Tensor, Tensor]:
    """States (T, L, D) and masks (T, L) of all rows; trimmers leave batches of unequal lengths."""
    longest = max(part.last.shape[1] for part in parts)
    states, masks = [], []
    for part in parts:
        mask = part.mask
        if mask is None:
            mask = torch.ones(part.last.shape[:2], dtype=torch.bool, device=part.last.device)
        more = longest - part.last.shape[1]
        states.append(F.pad(part.last, (0, 0, 0, more)))
        masks.append(F.pad(mask.float(), (0, more)) > 0)
    return torch.cat(states), torch.cat(masks)


def evaluate_retrieval(
    model: XVLM, batches: Batches, dist: Any = None, k_test: int = 128
) -> dict[str, float]:
    """Recall at 1, 5 and 10 in both directions over the whole split.

    Args:
        batches: starts a pass over this rank's part of the split; it is called twice.
        k_test: candidates that are ranked again (published: 256 for COCO, 128 for Flickr30k); 0
            ranks by cosine alone.

    Returns:
        "image_to_text_r1", ..., "text_to_image_r10", "r_mean" (of the six), and the numbers of
        "images" and "texts".

    Raises:
        ValueError: negative k_test.
    Collective.
    """
    split, ways = rank_split(model, batches, dist, k_test)
    found = {way: recalls(*ranked) for way, ranked in ways.items()}
    result = {f"{way}_r{n}": value for way, shares in found.items() for n, value in shares.items()}
    mean = sum(result.values()) / len(result)
    counts = {"images": float(len(split.images)), "texts": float(len(split.texts))}
    return result | {"r_mean": mean} | counts


def rank_split(
    model: XVLM, batches: Batches, dist: Any = None, k_test: int = 128
) -> tuple[RankedSplit, dict[str, tuple[Tensor, Tensor]]]:
    """What `evaluate_retrieval` counts: the split, and by direction ("image_to_text",
    "text_to_image") scores and relevance (Q, k) of each query's candidates. Collective.
    """
    if k_test < 0:
        raise ValueError(f"k_test {k_test}: must not be negative (eval.top_k)")
    mine = _Found()
    for batch in batches():
        mine.add(model, batch)
    device = next(model.parameters()).device
    split = RankedSplit.gathered(mine, dist, device)
    keep = k_test or max(_RECALLS)
    image_scores, of_images = _shortlist(split.images, split.texts, keep)
    text_scores, of_texts = _shortlist(split.texts, split.images, keep)
    if k_test:
        matcher = _Matcher(split, of_images, of_texts)
        matcher.run(model, batches)
        images = torch.arange(len(split.images), device=device)[:, None]
        texts = torch.arange(len(split.texts), device=device)[:, None]
        image_scores, text_scores = matcher.of(images, of_images), matcher.of(of_texts, texts)
        if dist is not None and dist.world_size > 1:
            for scores in (image_scores, text_scores):
                torch.distributed.all_reduce(scores, torch.distributed.ReduceOp.MAX)
    return split, {
        "image_to_text": (
            image_scores,
            split.text_groups[of_images] == split.image_groups[:, None],
        ),
        "text_to_image": (
            text_scores,
            split.image_groups[of_texts] == split.text_groups[:, None],
        ),
    }
