"""Visual question answering: ranking a list of answers, scoring, and the language-only baseline.

Shape legend: N images, B questions, L question tokens, A answers in the list, La answer tokens, K
candidates kept.
"""

from __future__ import annotations

import json
import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from models.trimming import see

if TYPE_CHECKING:
    from data_pipeline.batches import VqaBatch
    from models.xvlm import XVLM

__all__ = [
    "AnswerList",
    "BlindBaseline",
    "VqaEvaluator",
    "evaluate_batch",
    "normalise",
    "rank_answers",
    "rank_states",
    "score_batch",
    "vqa_score",
]

# Logits of one decoder call are (rows, La, vocabulary); above this many elements the rows go in
# several calls.
_MAX_LOGITS = 1 << 28


@dataclass(frozen=True)
class AnswerList:
    """The candidates an answer is chosen from.

    Attributes:
        strings: A answers.
        ids, mask: (A, La) int64 / bool: [CLS] answer tokens [SEP], padded.
    """

    strings: tuple[str, ...]
    ids: Tensor
    mask: Tensor

    def __len__(self) -> int:
        return len(self.strings)

    @classmethod
    def of(cls, strings: Iterable[str], tokenizer: Any) -> AnswerList:
        """Tokenise `strings` with a transformers tokenizer. Raises ValueError on an empty list or
        answer.
        """
        kept = tuple(strings)
        if not kept:
            raise ValueError("the answer list is empty")
        encoded = tokenizer(list(kept), padding=True, return_tensors="pt")
        mask = encoded["attention_mask"].bool()
        if int(mask.sum(1).min()) < 3:
            empty = kept[int(mask.sum(1).argmin())]
            raise ValueError(f"answer {empty!r} has no tokens; remove it from the answer list")
        return cls(kept, encoded["input_ids"].long(), mask)

    @classmethod
    def load(cls, source: Path | str, tokenizer: Any) -> AnswerList:
        """From a JSON list of strings, or from a folder at or above whose level `answers.json`
        lies.

        Raises FileNotFoundError where there is none, ValueError where it is not a list of strings.
        """
        path = _find_answers(Path(source))
        values = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(values, list) or not all(isinstance(value, str) for value in values):
            raise ValueError(f"{path}: expected a JSON list of strings")
        try:
            return cls.of(values, tokenizer)
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from error

    def to(self, device: torch.device | str) -> AnswerList:
        """The same list with its tensors on `device`."""
        return replace(self, ids=self.ids.to(device), mask=self.mask.to(device))


def _find_answers(source: Path) -> Path:
    if source.is_file():
        return source
    places = [source, source / "vqa", source.parent]
    for place in places:
        if (place / "answers.json").is_file():
            return place / "answers.json"
    looked = ", ".join(str(place / "answers.json") for place in places)
    raise FileNotFoundError(
        f"no answer list: looked for {looked}; give the data folder or the JSON file itself"
    )


def _sequence_log_likelihood(
    model: XVLM, ids: Tensor, mask: Tensor, states: Tensor, seen: Tensor
) -> Tensor:
    """(R,) log p of tokens 1.. of each of R rows; each of C question states (C, L, D) serves R / C."""
    inputs, targets = ids[:, :-1], ids[:, 1:]
    wanted = mask[:, 1:]
    logits = model.decode(inputs, mask[:, :-1], states, seen).logits
    # cross_entropy reduces inside one kernel; a gathered log_softmax would hold a second (R, La, V)
    # tensor.
    loss = torch.nn.functional.cross_entropy(
        logits.float().flatten(0, 1), targets.flatten(), reduction="none"
    )
    return -(loss.view(targets.shape) * wanted).sum(1)


def rank_answers(
    model: XVLM, batch: VqaBatch, answers: AnswerList, top_k: int = 128, published: bool = False
) -> Tensor:
    """(B,) int64 index into `answers` of the most likely answer of each question, see `rank_states`.

    Images are encoded once each, whatever the number of questions.
    """
    ids, mask = batch.question_ids, batch.question_mask
    image, ((states, seen),) = see(model, batch.images, (batch.image_index,), ids, mask)
    asked = model.multimodal(ids, mask, states, seen, text=image.guide)
    left = mask if asked.mask is None else asked.mask
    return rank_states(model, asked.last, left, answers, top_k, published)


def rank_states(
    model: XVLM,
    states: Tensor,
    mask: Tensor,
    answers: AnswerList,
    top_k: int = 128,
    published: bool = False,
) -> Tensor:
    """(B,) int64 index into `answers`, for questions after fusion: states (B, L, D), mask (B, L).

    The first token's probability selects `top_k` candidates, their whole sequences are then
    compared (EfficientVLM's VQA evaluation, after ALBEF). `published` adds log p(first token) a
    second time to each candidate, as the reference does. The candidates of a question share its
    keys and values.
    """
    rows, keep = states.shape[0], min(top_k, len(answers))
    start = answers.ids[:1, :1].expand(rows, 1)
    first = model.decode(start, None, states, mask).logits
    first_log_p = first[:, 0].float().log_softmax(-1)[:, answers.ids[:, 1]]
    scores, chosen = first_log_p.topk(keep, dim=1)

    candidates = chosen.flatten()
    length = int(answers.mask[candidates].sum(1).max())
    ids, seen = answers.ids[candidates, :length], answers.mask[candidates, :length]
    questions = max(1, _MAX_LOGITS // (length * first.shape[-1] * keep))  # in one call
    parts = []
    for begin in range(0, rows, questions):
        asked, span = (
            slice(begin, begin + questions),
            slice(begin * keep, (begin + questions) * keep),
        )
        parts.append(
            _sequence_log_likelihood(model, ids[span], seen[span], states[asked], mask[asked])
        )
    likelihood = torch.cat(parts).view(rows, keep)
    if published:
        likelihood = likelihood + scores
    return chosen.gather(1, likelihood.argmax(1, keepdim=True)).squeeze(1)


def normalise(text: str) -> str:
    """Lower case, no punctuation, single spaces: how questions and answers are compared."""
    return " ".join(re.sub(r"[^\w\s]", " ", text.lower()).split())


def vqa_score(
    prediction: str, answers: Mapping[str, float], annotators: int | None = None
) -> float:
    """Score of one prediction in 0..1.

    Args:
        answers: answer -> share of annotators.
        annotators: None: the weight of the matching answer. A number (10 for VQA 2.0): min(matches
            / 3, 1).
    """
    wanted = normalise(prediction)
    weight = sum(share for answer, share in answers.items() if normalise(answer) == wanted)
    if annotators is None:
        return min(weight, 1.0)
    return min(weight * annotators / 3.0, 1.0)


def evaluate_batch(
    model: XVLM,
    batch: VqaBatch,
    answers: AnswerList,
    top_k: int = 128,
    published: bool = False,
    annotators: int | None = None,
) -> dict[str, tuple[Tensor, Tensor]]:
    """Sums over the valid rows: "accuracy" and "accuracy/TYPE" -> (sum, count) as float64 scalars.

    A question whose answers are hidden is not counted.
    """
    chosen = rank_answers(model, batch, answers, top_k, published).tolist()
    return score_batch([answers.strings[place] for place in chosen], batch, annotators)


def score_batch(
    predictions: Sequence[str], batch: VqaBatch, annotators: int | None = None
) -> dict[str, tuple[Tensor, Tensor]]:
    """What `evaluate_batch` says of B predictions."""
    sums: dict[str, list[float]] = defaultdict(lambda: [0.0, 0.0])
    for row, valid in enumerate(batch.valid.tolist()):
        if not valid or not batch.answers[row]:
            continue
        score = vqa_score(predictions[row], batch.answers[row], annotators)
        kind = batch.question_types[row]
        for name in ("accuracy", f"accuracy/{kind}") if kind else ("accuracy",):
            sums[name][0] += score
            sums[name][1] += 1.0
    sums["accuracy"]  # a batch of padding still reports its zero
    return {
        name: (torch.tensor(total, dtype=torch.float64), torch.tensor(count, dtype=torch.float64))
        for name, (total, count) in sums.items()
    }


@dataclass(frozen=True)
class VqaEvaluator:
    """What `train.evaluation.runner.evaluate` needs of a task, without a training task around it."""

    answers: AnswerList
    top_k: int = 128
    published: bool = False
    annotators: int | None = None

    def evaluate(self, model: XVLM, batch: VqaBatch) -> dict[str, tuple[Tensor, Tensor]]:
        """See `evaluate_batch`."""
        return evaluate_batch(
            model, batch, self.answers, self.top_k, self.published, self.annotators
        )


_ENOUGH = 20.0  # training questions with the same words from which their majority is trusted


@dataclass
class BlindBaseline:
    """The majority answer of each question, learned from the training split without any picture.

    The guess is the most frequent training answer to the same words where they are frequent enough,
    else to the same template, else to the same type, else of all (as the data set's builder counts
    it). An accuracy means little without this number beside it.

    Attributes:
        template: question -> its template; None treats each wording as its own.
    """

    template: Callable[[str], str] | None = None
    tables: dict[tuple[str, str], dict[str, float]] = field(default_factory=dict)

    def _levels(self, question: str, kind: str) -> tuple[tuple[str, str], ...]:
        words = normalise(question)
        template = words if self.template is None else self.template(question)
        return ("words", words), ("template", template), ("type", kind), ("all", "")

    def add(self, question: str, kind: str, answers: Mapping[str, float]) -> None:
        """Count one training question."""
        for level in self._levels(question, kind):
            table = self.tables.setdefault(level, defaultdict(float))
            for answer, weight in answers.items():
                table[answer] += weight

    def predict(self, question: str, kind: str) -> str:
        """The most frequent answer; ties go to the alphabetically first.

        Raises ValueError before any `add`.
        """
        for level in self._levels(question, kind):
            table = self.tables.get(level)
            if table and (level[0] != "words" or sum(table.values()) >= _ENOUGH):
                return min(table, key=lambda answer: (-table[answer], answer))
        raise ValueError("the blind baseline has seen no training question")

    def score(
        self,
        questions: Iterable[tuple[str, str, Mapping[str, float]]],
        annotators: int | None = None,
    ) -> dict[str, float]:
        """Accuracy over (question, type, answers): "blind_accuracy", "blind_accuracy/TYPE" and
        "questions". Those without answers are not counted.

        Raises ValueError where none is left.
        """
        sums: dict[str, list[float]] = defaultdict(lambda: [0.0, 0.0])
        for question, kind, answers in questions:
            if not answers:
                continue
            got = vqa_score(self.predict(question, kind), answers, annotators)
            for name in (
                ("blind_accuracy", f"blind_accuracy/{kind}") if kind else ("blind_accuracy",)
            ):
                sums[name][0] += got
                sums[name][1] += 1.0
        if not sums:
            raise ValueError(
                "no questions to score the blind baseline on: there are none, or their answers are "
                "hidden"
            )
        result = {name: total / count for name, (total, count) in sums.items()}
        return result | {"questions": sums["blind_accuracy"][1]}
