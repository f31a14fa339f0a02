"""Pre-training: ITC + ITM + MLM (+ boxes on region batches), and what a teacher adds to them.

EfficientVLM (2210.07795) section 3; X-VLM (2111.08276) section 3. The published code drew hard
negatives for teacher and student separately; here they are drawn once, from the global batch, and
both models score them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from data_pipeline.batches import PretrainBatch
from models.config import ModelConfig
from models.outputs import Capture, EncoderOutput
from models.xvlm import XVLM
from train.config import KdConfig
from train.losses import vl
from train.losses.distillation import LayerPairs, contrastive_kl, logits_kl
from train.runtime.teacher import Teacher
from train.tasks.base import Losses, StepContext, scaled
from train.tasks.kd import Distils, capture, hidden_projections, pass_terms, rows, stack_pairs
from train.tasks.matching import Partners, match

__all__ = ["PretrainTask"]


@dataclass(frozen=True)
class _Plan:
    """Layer pairs of the kinds of pass, for one student and one teacher."""

    image: LayerPairs
    text: LayerPairs
    fusion: LayerPairs
    multimodal: LayerPairs

    @classmethod
    def between(cls, kd: KdConfig, student: ModelConfig, teacher: ModelConfig) -> _Plan:
        pairs = stack_pairs(kd, student, teacher)
        return cls(
            image=pairs.vision,
            text=pairs.text,
            fusion=pairs.fusion,
            multimodal=pairs.text.then(pairs.fusion),
        )


@dataclass
class _Pass:
    """Everything one model computed on a batch."""

    image: EncoderOutput
    image_states: Tensor  # (B, P, D): region rows on a region batch
    image_mask: Tensor | None  # (B, P)
    full_states: Tensor | None  # (N, P, D), region batches only
    text: EncoderOutput
    matched: EncoderOutput | None = (
        None  # 3B rows: B positives, B x negative image, B x negative text
    )
    match_logits: Tensor | None = None
    mlm: EncoderOutput | None = None
    mlm_logits: Tensor | None = None


class PretrainTask(Distils):
    """ITC, ITM, MLM and box losses; with a teacher also the KD terms of section 3.2.

    Gradients averaged over ranks are those of one process with the whole batch: ITC and its KD by
    the gather's backward, ITM by the exchange's, MLM and boxes by shares of the step's counts, and
    every other mean is over as many rows on each rank. Under accumulation MLM, boxes and the KD of
    all passes but the matching one equal the unaccumulated step's, too; ITC, ITM (and their KD) are
    of a micro-batch by definition, since a micro-batch's rows are the candidates.
    """

    name = "pretrain"

    def __init__(
        self,
        weights: dict[str, float],
        kd: KdConfig,
        student: ModelConfig,
        teacher: ModelConfig | None,
        global_negatives: bool = True,
        published_itc: bool = False,
    ) -> None:
        self.weights = weights
        self.kd = kd
        self.plan = None
        if teacher is not None:
            self.plan = _Plan.between(kd, student, teacher)
            self.projections = hidden_projections(student, teacher)
        self.global_negatives = global_negatives
        self.published_itc = published_itc

    def counts(self, batch: PretrainBatch) -> dict[str, Tensor]:
        """Masked slots, and on region batches region rows; rows and images are as many everywhere."""
        found = {"mlm": (batch.mlm_labels != -100).sum()}
        if batch.is_region is not None:
            found["boxes"] = batch.is_region.sum()
        return found

    # -- one model's passes
    # ------------------------------------------------------------------------------

    def _capture(self, side: str, kind: str) -> Capture:
        if self.plan is None:
            return Capture()
        cross_from = {
            "fusion": 0,
            "multimodal": self.plan.text.student_layers,
        }.get(kind)
        return capture(getattr(self.plan, kind), side, self.kd, cross_from)

    def _encode(self, model: XVLM, batch: PretrainBatch, side: str) -> _Pass:
        capture = self._capture(side, "image")
        text = model.encode_text(batch.text_ids, batch.text_mask, self._capture(side, "text"))
        if batch.region_mask is None:
            image = model.encode_image(batch.images, capture)
            return _Pass(image, image.last, None, None, text)
        region = model.encode_image(
            batch.images, capture, region_mask=batch.region_mask, image_index=batch.image_index
        )
        return _Pass(region.rows, region.rows.last, batch.region_mask, region.full, text)

    def _match(
        self, model: XVLM, done: _Pass, batch: PretrainBatch, partners: Partners, side: str
    ) -> None:
        wanted = self._capture(side, "fusion")
        done.matched, done.match_logits = match(
            model,
            done.text.last,
            batch.text_mask,
            done.image_states,
            partners,
            done.image_mask,
            wanted,
        )

    def _mlm(self, model: XVLM, done: _Pass, batch: PretrainBatch, side: str) -> None:
        done.mlm = model.multimodal(
            batch.mlm_ids,
            batch.text_mask,
            done.image_states,
            done.image_mask,
            self._capture(side, "multimodal"),
        )
        done.mlm_logits = model.mlm_logits(done.mlm.words, batch.mlm_positions)

    # -- losses
    # ------------------------------------------------------------------------------------------

    def losses(
        self, student: XVLM, teacher: Teacher | None, batch: PretrainBatch, context: StepContext
    ) -> Losses:
        share = self.shares(batch, context)
        done = self._encode(student, batch, "student")
        itc, similarity = vl.contrastive_loss(
            student.image_feature(done.image_states),
            student.text_feature(done.text.last),
            student.temperature(),
            self.published_itc,
        )
        local = not self.global_negatives
        negatives = vl.hard_negatives(similarity, context.generator, local=local)
        partners = Partners(negatives, batch.rows, local)
        partners.share_with(teacher)
        # Before the matching pass: the device has work while the host waits for the drawn indices.
        self._mlm(student, done, batch, "student")
        self._match(student, done, batch, partners, "student")
        assert done.match_logits is not None and done.mlm_logits is not None
        labels = vl.matching_labels(batch.rows, done.match_logits.device)
        terms = {
            "itc": itc,
            "itm": vl.matching_loss(done.match_logits, labels),
            "mlm": scaled(vl.mlm_loss(done.mlm_logits, batch.mlm_labels), share["mlm"]),
        }
        touch = None
        if done.full_states is None:
            touch = student.touch(
                {"bbox_head"}
            )  # no region rows: ZeRO-3 would repeat the last gradient
        else:
            terms |= self._boxes(student, done, batch, share["boxes"])
        task = 1.0 if teacher is None else self.kd.task_weight
        weights = {name: task * self.weights.get(name, 1.0) for name in terms}
        if teacher is not None:
            extra, extra_weights = self._distil(teacher, done, batch, partners, similarity)
            terms |= extra
            weights |= extra_weights
        metrics = {
            "itm_accuracy": (done.match_logits.argmax(-1) == labels).float().mean(),
            "mlm_accuracy": scaled(
                _masked_accuracy(done.mlm_logits, batch.mlm_labels), share["mlm"]
            ),
            "temperature": student.temperature().detach().mean(),
        }
        return Losses(terms, weights, metrics, touch)

    @staticmethod
    def _boxes(
        student: XVLM, done: _Pass, batch: PretrainBatch, share: Tensor
    ) -> dict[str, Tensor]:
        """Boxes are predicted from the whole image and the unmasked text (X-VLM, section 3.2)."""
        assert (
            done.full_states is not None and batch.boxes is not None and batch.is_region is not None
        )
        fused = student.fuse(
            done.text.last, batch.text_mask, done.full_states[batch.image_index], None
        )
        l1, giou = vl.box_losses(student.predict_box(fused.last), batch.boxes, batch.is_region)
        return {"box_l1": scaled(l1, share), "box_giou": scaled(giou, share)}

    def _distil(
        self,
        teacher: Teacher,
        done: _Pass,
        batch: PretrainBatch,
        partners: Partners,
        similarity: vl.Similarities,
    ) -> tuple[dict[str, Tensor], dict[str, float]]:
        kd, plan, count = self.kd, self.plan, batch.rows
        assert plan is not None and done.matched is not None and done.mlm is not None
        with teacher.running() as model:
            target = self._encode(model, batch, "teacher")
            self._match(model, target, batch, partners, "teacher")
            self._mlm(model, target, batch, "teacher")
            theirs = self._teacher_similarities(model, target)
        assert target.matched is not None and target.mlm is not None
        words, pixels = self.project("text"), self.project("vision")
        fusion = [
            pass_terms(
                kd,
                rows(done.matched, *cut),
                rows(target.matched, *cut),
                plan.fusion,
                cross=True,
                project=words,
            )  # fmt: skip
            for cut in ((0, count), (count, 3 * count))
        ]
        # The whole MLM pass counts as fusion, its text layers too (they see masked text here).
        fusion.append(
            pass_terms(kd, done.mlm, target.mlm, plan.multimodal, cross=True, project=words)
        )
        image = pass_terms(kd, done.image, target.image, plan.image, drop_last=True, project=pixels)
        text = pass_terms(kd, done.text, target.text, plan.text, project=words)
        terms, weights = {}, {}

        def add(name: str, value: Tensor, weight: float) -> None:
            terms[f"kd_{name}"], weights[f"kd_{name}"] = value, kd.kd_weight * weight

        assert done.match_logits is not None and target.match_logits is not None
        assert done.mlm_logits is not None and target.mlm_logits is not None
        add("itm", logits_kl(done.match_logits, target.match_logits, kd.temperature), kd.logits)
        add("mlm", logits_kl(done.mlm_logits, target.mlm_logits, kd.temperature), kd.logits)
        if theirs is not None:
            add("itc", contrastive_kl(similarity, theirs, kd.temperature), kd.contrastive)
        for kind, value in image.items():
            add(f"image_{kind}", value, kd.image * (kd.image_hidden if kind == "hidden" else 1.0))
        for kind, value in text.items():
            add(f"text_{kind}", value, kd.text)
        for kind in fusion[0]:
            add(f"fusion_{kind}", torch.stack([part[kind] for part in fusion]).sum(), kd.fusion)
        return terms, weights

    def _teacher_similarities(self, model: XVLM, done: _Pass) -> vl.Similarities | None:
        """None where no loss reads them: they cost a gather."""
        if self.kd.contrastive == 0:
            return None
        return vl.similarities(
            model.image_feature(done.image_states),
            model.text_feature(done.text.last),
            model.temperature(),
        )

    # -- evaluation
    # --------------------------------------------------------------------------------------

    def evaluate(self, model: XVLM, batch: PretrainBatch) -> dict[str, Any]:
        """In-batch retrieval at 1 both ways, ITM accuracy against the next pair, MLM accuracy."""
        done = self._encode(model, batch, "none")
        valid, count = batch.valid, batch.rows
        similarity = model.image_feature(done.image_states) @ model.text_feature(done.text.last).T
        similarity = similarity.masked_fill(~(valid[:, None] & valid[None, :]), float("-inf"))
        own = torch.arange(count, device=valid.device)
        other = torch.roll(own, 1)
        fused = model.fuse(
            torch.cat([done.text.last, done.text.last]),
            torch.cat([batch.text_mask, batch.text_mask]),
            torch.cat([done.image_states, done.image_states[other]]),
            None,
        )
        predicted = model.match_logits(fused.last).argmax(-1)
        self._mlm(model, done, batch, "none")
        assert done.mlm_logits is not None
        slots = (batch.mlm_labels != -100) & valid[:, None]
        hits = (done.mlm_logits.argmax(-1) == batch.mlm_labels) & slots
        total = valid.sum()

        def share(right: Tensor) -> tuple[Tensor, Tensor]:
            return (right & valid).sum(), total

        return {
            "image_to_text_r1": share(similarity.argmax(1) == own),
            "text_to_image_r1": share(similarity.argmax(0) == own),
            "itm_positive": share(predicted[:count] == 1),
            "itm_negative": share(predicted[count:] == 0),
            "mlm_accuracy": (hits.sum(), slots.sum()),
        }


def _masked_accuracy(logits: Tensor, labels: Tensor) -> Tensor:
    slots = labels != -100
    return ((logits.argmax(-1) == labels) & slots).sum() / slots.sum().clamp(min=1)
