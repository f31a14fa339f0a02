"""Retrieval: ITC and ITM on captioned images (X-VLM 2111.08276), and KD (EfficientVLM 2210.07795).

Captions of one image are positives of each other in ITC and never negatives in ITM. The negatives
are drawn once and scored by both models; the released code drew them twice.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from data_pipeline.task_batches import RetrievalBatch
from models.config import ModelConfig
from models.outputs import EncoderOutput
from models.xvlm import XVLM
from train.config import KdConfig
from train.evaluation.retrieval import evaluate_retrieval
from train.losses import vl
from train.losses.distillation import contrastive_kl, logits_kl
from train.runtime.teacher import Teacher
from train.tasks.base import Losses, StepContext
from train.tasks.kd import (
    Distils,
    StackPairs,
    capture,
    hidden_projections,
    pass_terms,
    rows,
    stack_pairs,
)
from train.tasks.matching import Partners, match
from train.tasks.multimodal import Part, part_terms
from train.tasks.scored import Scored

__all__ = ["RetrievalTask"]


@dataclass
class _Pass:
    image: EncoderOutput
    image_states: Tensor  # (B, P, D), the image of each row
    image_mask: Tensor | None  # (B, P), what may be read of it
    text: EncoderOutput
    fused: EncoderOutput | None = None  # 3B rows, see `matching.match`
    logits: Tensor | None = None  # (3B, 2)


class RetrievalTask(Distils):
    """ITC over the global batch and ITM with hard negatives; recall over the whole split.

    Args:
        global_negatives: hard negatives come from all ranks' rows.
        published_itc: see `vl.contrastive_loss`.
        k_test: candidates that evaluation ranks again by the matching head.
    """

    name = "retrieval"

    def __init__(
        self,
        weights: dict[str, float],
        kd: KdConfig,
        student: ModelConfig,
        teacher: ModelConfig | None,
        global_negatives: bool = True,
        published_itc: bool = False,
        k_test: int = 128,
    ) -> None:
        self.weights = weights
        self.kd = kd
        self.plan: StackPairs | None = None
        if teacher is not None:
            self.plan = stack_pairs(kd, student, teacher)
            self.projections = hidden_projections(student, teacher)
        self.global_negatives = global_negatives
        self.published_itc = published_itc
        self.k_test = k_test

    def _encode(self, model: XVLM, batch: RetrievalBatch, side: str) -> _Pass:
        plan, kd = self.plan, self.kd
        pairs = (None, None) if plan is None else (plan.vision, plan.text)
        image = model.encode_image(batch.images, capture(pairs[0], side, kd))
        text = model.encode_text(batch.text_ids, batch.text_mask, capture(pairs[1], side, kd))
        return _Pass(image, *image.context(batch.image_index), text)

    def _match(self, model: XVLM, done: _Pass, partners: Partners, side: str) -> None:
        wanted = capture(None if self.plan is None else self.plan.fusion, side, self.kd, 0)
        done.fused, done.logits = match(
            model,
            done.text.last,
            done.text.mask,
            done.image_states,
            partners,
            done.image_mask,
            wanted,
        )

    def score(
        self,
        model: XVLM,
        batch: RetrievalBatch,
        context: StepContext,
        share: dict[str, Tensor],
        like: Scored | None = None,
    ) -> Scored:
        """One pass with its losses, see `Trimmable`; negatives as in the pass before."""
        done = self._encode(model, batch, "none")
        itc, similarity = self._contrast(model, done, batch)
        partners = self._partners(similarity, batch, context) if like is None else like.extra
        self._match(model, done, partners, "none")
        assert done.logits is not None and done.fused is not None
        labels = vl.matching_labels(batch.rows, done.logits.device)
        return Scored(
            {"itc": itc, "itm": vl.matching_loss(done.logits, labels)},
            {"itm_accuracy": (done.logits.argmax(-1) == labels).float().mean()},
            (done.logits, similarity),
            done.image,
            done.fused,
            done.text,
            extra=partners,
        )

    def imitate(
        self, ours: Scored, theirs: Scored, batch: RetrievalBatch, share: dict[str, Tensor]
    ) -> dict[str, Tensor]:
        """KL of the matching head, and of the similarities over the global batch."""
        (logits, similarity), (target, likeness) = ours.output, theirs.output
        return {
            "itm": logits_kl(logits, target.detach(), self.kd.temperature),
            "itc": contrastive_kl(similarity, likeness.detach(), self.kd.temperature),
        }

    def _contrast(
        self, model: XVLM, done: _Pass, batch: RetrievalBatch
    ) -> tuple[Tensor, vl.Similarities]:
        return vl.contrastive_loss(
            model.image_feature(done.image_states),
            model.text_feature(done.text.last),
            model.temperature(),
            self.published_itc,
            groups=batch.groups,
        )

    def _partners(
        self, similarity: vl.Similarities, batch: RetrievalBatch, context: StepContext
    ) -> Partners:
        local, same = not self.global_negatives, vl.same_pairs(batch.groups)
        negatives = vl.hard_negatives(similarity, context.generator, same=same, local=local)
        return Partners(negatives, batch.rows, local)

    def losses(
        self, student: XVLM, teacher: Teacher | None, batch: RetrievalBatch, context: StepContext
    ) -> Losses:
        done = self._encode(student, batch, "student")
        itc, similarity = self._contrast(student, done, batch)
        partners = self._partners(similarity, batch, context)
        partners.share_with(teacher)
        self._match(student, done, partners, "student")
        assert done.logits is not None
        labels = vl.matching_labels(batch.rows, done.logits.device)
        terms = {"itc": itc, "itm": vl.matching_loss(done.logits, labels)}
        task = 1.0 if teacher is None else self.kd.task_weight
        weights = {name: task * self.weights.get(name, 1.0) for name in terms}
        if teacher is not None:
            extra, extra_weights = self._distil(teacher, done, batch, partners, similarity)
            terms |= extra
            weights |= extra_weights
        metrics = {
            "itm_accuracy": (done.logits.argmax(-1) == labels).float().mean(),
            "temperature": student.temperature().detach().mean(),
        }
        return Losses(terms, weights, metrics)

    def _distil(
        self,
        teacher: Teacher,
        done: _Pass,
        batch: RetrievalBatch,
        partners: Partners,
        similarity: vl.Similarities,
    ) -> tuple[dict[str, Tensor], dict[str, float]]:
        kd, plan, count = self.kd, self.plan, batch.rows
        assert plan is not None and done.fused is not None and done.logits is not None
        with teacher.running() as model:
            target = self._encode(model, batch, "teacher")
            self._match(model, target, partners, "teacher")
            theirs = None
            if kd.contrastive:  # it costs a gather
                image = model.image_feature(target.image_states)
                text = model.text_feature(target.text.last)
                theirs = vl.similarities(image, text, model.temperature())
        assert target.fused is not None and target.logits is not None
        words, pixels = self.project("text"), self.project("vision")
        # Matching pairs and negatives are two passes of the published loss: two means, one weight.
        halves = [
            pass_terms(
                kd, rows(done.fused, *cut), rows(target.fused, *cut), plan.fusion,
                cross=True, project=words,
            )
            for cut in ((0, count), (count, 3 * count))
        ]  # fmt: skip
        fusion = {kind: torch.stack([half[kind] for half in halves]).sum() for kind in halves[0]}
        image = pass_terms(
            kd, done.image, target.image, plan.vision, drop_last=True, project=pixels
        )
        text = pass_terms(kd, done.text, target.text, plan.text, project=words)
        terms, weights = part_terms(
            kd,
            {
                "image": Part(image, kd.image, kd.image_hidden),
                "text": Part(text, kd.text),
                "fusion": Part(fusion, kd.fusion),
            },
        )
        terms["kd_itm"] = logits_kl(done.logits, target.logits, kd.temperature)
        weights["kd_itm"] = kd.kd_weight * kd.logits
        if theirs is not None:
            terms["kd_itc"] = contrastive_kl(similarity, theirs, kd.temperature)
            weights["kd_itc"] = kd.kd_weight * kd.contrastive
        return terms, weights

    def evaluate_split(
        self, model: XVLM, batches: Callable[[], Iterator[RetrievalBatch]], dist: Any = None
    ) -> dict[str, float]:
        """Recall at 1, 5 and 10 both ways, see `evaluate_retrieval`."""
        return evaluate_retrieval(model, batches, dist, self.k_test)
