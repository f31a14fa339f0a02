"""Visual question answering with an answer decoder (ALBEF style; EfficientVLM sections 3.3 and 4)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from data_pipeline.batches import VqaBatch
from models.config import ModelConfig
from models.outputs import Capture, EncoderOutput
from models.trimming import see
from models.xvlm import XVLM
from train.config import KdConfig
from train.evaluation.vqa import AnswerList, evaluate_batch
from train.losses import vl
from train.losses.distillation import LayerPairs, logits_kl
from train.runtime.teacher import Teacher
from train.tasks.base import Losses, StepContext, scaled
from train.tasks.kd import Distils, capture, hidden_projections, pass_terms, stack_pairs, upper_part
from train.tasks.scored import Scored

__all__ = ["VqaTask"]

# What the distillation terms of each part are means over; images are as many on every rank.
_ROWS = {"text": "questions", "fusion": "questions", "decoder": "answers"}


@dataclass(frozen=True)
class _Plan:
    """Layer pairs; text and fusion are two stretches of one multimodal pass with weights of their
    own.
    """

    image: LayerPairs
    text: LayerPairs
    fusion: LayerPairs
    question: LayerPairs
    decoder: LayerPairs

    @classmethod
    def between(cls, kd: KdConfig, student: ModelConfig, teacher: ModelConfig) -> _Plan:
        pairs = stack_pairs(kd, student, teacher)
        if pairs.decoder is None:
            raise ValueError(
                "vqa distillation needs a teacher with an answer decoder (form vqa): teacher.path "
                "must name a model fine-tuned for vqa"
            )
        question = pairs.text.then(pairs.fusion)
        return cls(
            image=pairs.vision,
            text=pairs.text,
            fusion=upper_part(question, pairs.text.student_layers),
            question=question,
            decoder=pairs.decoder,
        )


@dataclass
class _Pass:
    image: EncoderOutput
    question: EncoderOutput
    answer: EncoderOutput
    logits: Tensor  # (A, La, V)


class VqaTask(Distils):
    """Language-model loss on weighted answers; accuracy by ranking the answer list.

    Args:
        answers: candidate answers for evaluation; None when the task only trains.
        top_k: candidates kept after the first answer token (published: 128).
        annotators: how an answer is scored, see `vqa_score`.
    """

    name = "vqa"

    def __init__(
        self,
        weights: dict[str, float],
        kd: KdConfig,
        student: ModelConfig,
        teacher: ModelConfig | None,
        answers: AnswerList | None = None,
        top_k: int = 128,
        annotators: int | None = None,
    ) -> None:
        self.weights = weights
        self.kd = kd
        self.plan = None
        if teacher is not None:
            self.plan = _Plan.between(kd, student, teacher)
            self.projections = hidden_projections(student, teacher)
        self.answers = answers
        self.top_k = top_k
        self.annotators = annotators

    def counts(self, batch: VqaBatch) -> dict[str, Tensor]:
        """Questions, answer positions, those of real tokens, and the answers' weight: images have
        several questions, and questions several answers.
        """
        whole = batch.image_index.new_full
        return {
            "questions": whole((), batch.rows),
            "answers": whole((), batch.answer_ids.numel()),
            "answer_tokens": batch.answer_mask[:, 1:].sum(),
            "answer_weight": batch.answer_weight.sum(),
        }

    def _run(self, model: XVLM, batch: VqaBatch, side: str) -> _Pass:
        plan, kd = self.plan, self.kd
        if plan is None:
            captures = (Capture(), Capture(), Capture())
        else:
            captures = (
                capture(plan.image, side, kd),
                capture(plan.question, side, kd, cross_from=plan.text.student_layers),
                capture(plan.decoder, side, kd, cross_from=0),
            )
        ids, mask = batch.question_ids, batch.question_mask
        image, ((states, seen),) = see(
            model, batch.images, (batch.image_index,), ids, mask, *captures[:2]
        )
        question = model.multimodal(ids, mask, states, seen, captures[1], image.guide)
        left = mask if question.mask is None else question.mask
        answer = model.decode(
            batch.answer_ids,
            batch.answer_mask,
            question.last[batch.answer_row],
            left[batch.answer_row],
            captures[2],
        )
        return _Pass(image, question, answer, answer.logits)

    def losses(
        self, student: XVLM, teacher: Teacher | None, batch: VqaBatch, context: StepContext
    ) -> Losses:
        if teacher is not None:
            teacher.inputs_ready()  # it reads the batch alone
        done = self._run(student, batch, "student")
        share = self.shares(batch, context)
        terms, metrics = self._answer(done.logits, batch, share)
        task = 1.0 if teacher is None else self.kd.task_weight
        weights = {"answer": task * self.weights.get("answer", 1.0)}
        if teacher is not None:
            extra, extra_weights = self._distil(teacher, done, batch, share)
            terms |= extra
            weights |= extra_weights
        return Losses(terms, weights, metrics)

    @staticmethod
    def _answer(
        logits: Tensor, batch: VqaBatch, share: dict[str, Tensor]
    ) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """The loss, and what is logged beside it."""
        loss = vl.answer_loss(
            logits, batch.answer_ids, batch.answer_mask, batch.answer_weight, batch.rows
        )
        right = (logits.detach()[:, 0].argmax(-1) == batch.answer_ids[:, 1]).float()
        weight = batch.answer_weight
        accuracy = (right * weight).sum() / weight.sum().clamp(min=1e-6)
        return (
            {"answer": scaled(loss, share["questions"])},
            {"first_token_accuracy": scaled(accuracy, share["answer_weight"])},
        )

    def score(
        self,
        model: XVLM,
        batch: VqaBatch,
        context: StepContext,
        share: dict[str, Tensor],
        like: Scored | None = None,
    ) -> Scored:
        """One pass with its losses, see `Trimmable`."""
        done = self._run(model, batch, "none")
        terms, metrics = self._answer(done.logits, batch, share)
        length = batch.answer_ids.shape[1]
        return Scored(terms, metrics, done.logits, done.image, done.question, answer_tokens=length)

    def imitate(
        self, ours: Scored, theirs: Scored, batch: VqaBatch, share: dict[str, Tensor]
    ) -> dict[str, Tensor]:
        """KL of the answers' next tokens, where there is one."""
        asked = batch.answer_mask[:, 1:]
        target = theirs.output.detach()[:, :-1]
        value = logits_kl(ours.output[:, :-1], target, self.kd.temperature, asked)
        return {"answer": scaled(value, share["answer_tokens"])}

    def _distil(
        self, teacher: Teacher, done: _Pass, batch: VqaBatch, share: dict[str, Tensor]
    ) -> tuple[dict[str, Tensor], dict[str, float]]:
        kd, plan = self.kd, self.plan
        assert plan is not None
        with teacher.running() as model:
            target = self._run(model, batch, "teacher")
        words, answers = self.project("text"), self.project("decoder")
        image = pass_terms(
            kd, done.image, target.image, plan.image, drop_last=True, project=self.project("vision")
        )
        ours, theirs = done.question, target.question
        text = pass_terms(kd, ours, theirs, plan.text, project=words)
        fusion = pass_terms(kd, ours, theirs, plan.fusion, cross=True, project=words)
        decoder = pass_terms(
            kd, done.answer, target.answer, plan.decoder, cross=True, project=answers
        )
        # Positions whose next token is real: padding has no prediction worth imitating.
        answer = logits_kl(
            done.logits[:, :-1], target.logits[:, :-1], kd.temperature, batch.answer_mask[:, 1:]
        )
        terms = {"kd_answer": scaled(answer, share["answer_tokens"])}
        weights = {"kd_answer": kd.kd_weight * kd.logits}
        parts = {
            "image": (image, kd.image, kd.image_hidden),
            "text": (text, kd.text, 1.0),
            "fusion": (fusion, kd.fusion, 1.0),
            "decoder": (decoder, kd.decoder, 1.0),
        }
        for name, (values, weight, hidden_weight) in parts.items():
            for kind, value in values.items():
                rows = _ROWS.get(name)
                terms[f"kd_{name}_{kind}"] = value if rows is None else scaled(value, share[rows])
                factor = hidden_weight if kind == "hidden" else 1.0
                weights[f"kd_{name}_{kind}"] = kd.kd_weight * weight * factor
        return terms, weights

    def evaluate(self, model: XVLM, batch: VqaBatch) -> dict[str, Any]:
        """Accuracy over valid rows, overall and by question type.

        Raises:
            ValueError: the task was built without an answer list.
        """
        if self.answers is None:
            raise ValueError(
                "vqa evaluation ranks an answer list; the data folder has no answers.json"
            )
        return evaluate_batch(model, batch, self.answers, self.top_k, annotators=self.annotators)
