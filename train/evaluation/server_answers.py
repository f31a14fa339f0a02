"""A model's answers as the file that VQA's evaluation server takes (EvalAI): a JSON list of
{"question_id": int, "answer": str} with every question of a split.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from data_pipeline.files import write_atomically
from train.evaluation.vqa import VqaEvaluator, rank_answers, score_batch

if TYPE_CHECKING:
    from torch import Tensor

    from data_pipeline.batches import VqaBatch
    from data_pipeline.records import Record
    from models.xvlm import XVLM

__all__ = ["AnsweringEvaluator", "question_numbers", "write_answers"]


@dataclass(frozen=True)
class AnsweringEvaluator(VqaEvaluator):
    """Scores as `VqaEvaluator` does, and keeps what was answered.

    Attributes:
        said: question_id of the records -> answer.
    """

    said: dict[str, str] = field(default_factory=dict)

    def evaluate(self, model: XVLM, batch: VqaBatch) -> dict[str, tuple[Tensor, Tensor]]:
        """See `evaluate_batch`."""
        chosen = rank_answers(model, batch, self.answers, self.top_k, self.published).tolist()
        answers = [self.answers.strings[place] for place in chosen]
        for name, answer, valid in zip(
            batch.question_names, answers, batch.valid.tolist(), strict=True
        ):
            if valid:  # padding repeats a question
                self.said[name] = answer
        return score_batch(answers, batch, self.annotators)


def question_numbers(split: Path) -> dict[str, int]:
    """question_id of every record of a VQA split -> the server's number for it.

    Raises:
        ValueError: an id that is no number, or comes twice: no server knows these questions.
    """
    from train.evaluation.items import records

    numbers: dict[str, int] = {}
    known: set[int] = set()
    for key, record in records(split, "vqa"):
        for name in _names(record):
            if not (name.isascii() and name.isdecimal()):
                raise ValueError(
                    f"{split}: sample '{key}': question_id {name!r} is no number, and the server's "
                    "are; build the split from the published files (espalier data build vqa), or "
                    "leave out --answers-out"
                )
            if int(name) in known:
                raise ValueError(
                    f"{split}: sample '{key}': question_id {name} comes twice; build the split "
                    "again (espalier data build vqa)"
                )
            known.add(int(name))
            numbers[name] = int(name)
    return numbers


def _names(record: Record) -> list[str]:
    from data_pipeline.records import VqaRecord

    assert isinstance(record, VqaRecord)
    return [question.question_id for question in record.questions]


def write_answers(path: Path, said: dict[str, str], numbers: dict[str, int]) -> None:
    """Writes the file, in the order of the numbers, whole or not at all.

    Args:
        said: of `AnsweringEvaluator`.   numbers: of `question_numbers`.

    Raises:
        ValueError: not every question was answered, or others were: the data changed meanwhile.
    """
    if said.keys() != numbers.keys():
        raise ValueError(
            f"{path}: {len(numbers)} questions, {len(said.keys() & numbers.keys())} of them answered: "
            "the split changed during the evaluation; run it again"
        )
    ordered = sorted(said, key=numbers.__getitem__)
    content = [{"question_id": numbers[name], "answer": said[name]} for name in ordered]
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, [json.dumps(content).encode(), b"\n"])
