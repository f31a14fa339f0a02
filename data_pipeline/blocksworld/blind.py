"""The language-only baseline: what the words of a question alone give away."""

from __future__ import annotations

from collections import Counter

from data_pipeline.blocksworld.questions import TYPES, normalise

__all__ = ["Tally", "blind_accuracy"]

Tally = Counter[tuple[str, str, str]]  # (type, question, answer)

_ENOUGH = 20  # training questions with the same words from which the baseline trusts them


def blind_accuracy(train: Tally, test: Tally) -> dict[str, float]:
    """Share of test questions answered from the words alone: {"overall", type: ...}.

    The guess is the most frequent training answer to the same words where they are frequent enough,
    else to the same template, else to the same type.
    """
    tables: dict[tuple[int, str], Counter[str]] = {}

    def levels(kind: str, question: str) -> tuple[tuple[int, str], ...]:
        return (0, question), (1, normalise(question)), (2, kind)

    for (kind, question, answer), times in train.items():
        for level in levels(kind, question):
            tables.setdefault(level, Counter())[answer] += times
    # Ties go to the smallest answer, so that the order of counting does not matter.
    guesses = {
        level: min(table, key=lambda answer: (-table[answer], answer))
        for level, table in tables.items()
        if level[0] > 0 or table.total() >= _ENOUGH
    }
    asked: Counter[str] = Counter()
    right: Counter[str] = Counter()
    for (kind, question, answer), times in test.items():
        guess = next((guesses[level] for level in levels(kind, question) if level in guesses), "")
        for name in ("overall", kind):
            asked[name] += times
            right[name] += times * (guess == answer)
    return {name: right[name] / asked[name] for name in ("overall", *TYPES) if asked[name]}
