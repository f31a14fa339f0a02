"""The answer list of a VQA run: where it is looked for, and which runs cannot do without."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from data_pipeline.sources import is_remote
from train.config import RunConfig
from train.evaluation.accuracy import hidden_answers
from train.evaluation.vqa import AnswerList
from train.runtime.distributed import all_reduce_flag

__all__ = ["answers_file", "check_answers", "check_held_out", "load_answers"]


def _places(config: RunConfig) -> list[Path]:
    """Beside every split that is a folder here (DIR/vqa/answers.json): training data first."""
    train = config.data.train
    splits = [train] if isinstance(train, str) else [source.path for source in train]
    splits += [] if config.data.val is None else [config.data.val]
    beside = [Path(split).parent / "answers.json" for split in splits if not is_remote(split)]
    return list(dict.fromkeys(beside))


def answers_file(config: RunConfig) -> Path | None:
    """The file with the candidate answers; None where there is none."""
    return next((path for path in _places(config) if path.is_file()), None)


def load_answers(config: RunConfig, tokenizer: Any) -> AnswerList | None:
    """The candidate answers, if the data have any."""
    path = answers_file(config)
    return None if path is None else AnswerList.load(path, tokenizer)


def check_answers(config: RunConfig, answers: AnswerList | None) -> None:
    """Raises ValueError where a VQA run is to be evaluated and has no answer list: it would train to
    its first validation, or to its end, and fail there.
    """
    # Trimming evaluates at its end, whether there are held-out inputs or not.
    evaluated = config.data.val is not None or config.stage == "trim"
    if config.task != "vqa" or answers is not None or not evaluated:
        return
    looked = ", ".join(map(str, _places(config))) or "no place: no split is a local folder"
    leave = "" if config.stage == "trim" else ", or validate nothing with data.val=null"
    raise ValueError(
        f"data.val: task vqa is evaluated by ranking an answer list, and none was found (looked at "
        f"{looked}): put answers.json, a JSON list of strings, beside a local split{leave}"
    )


def check_held_out(config: RunConfig, held_out: Iterable[Any]) -> None:
    """Raises ValueError where no held-out question of a VQA run has an answer. Collective.

    Args:
        held_out: loader of `data.val`; what is read is its first batch, where that has an answer.
    """
    if config.task != "vqa":
        return
    known = any(
        answers and valid
        for batch in held_out
        for answers, valid in zip(batch.answers, batch.valid.tolist(), strict=True)
    )
    if not all_reduce_flag(known):  # a rank's own share may be padding alone
        raise ValueError(f"data.val: {hidden_answers(config.data.val or '')}")
