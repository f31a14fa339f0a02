"""Accuracy of a model folder on a split, with the language-only baseline beside it."""

from __future__ import annotations

import json
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from models.xvlm import XVLM

__all__ = [
    "blind_scores",
    "evaluate_model",
    "find_split",
    "hidden_answers",
    "questions_of",
    "require_form",
    "table",
    "tokenizer_of",
    "vqa_loader",
]


def find_split(data: Path, task: str, split: str) -> Path:
    """Folder of one split: DATA/TASK/SPLIT, DATA/SPLIT, or DATA itself if it is a split.
    FileNotFoundError.
    """
    for folder in (data / task / split, data / split):
        if (folder / "manifest.json").is_file():
            return folder
    if (data / "manifest.json").is_file() and data.name == split:
        return data
    raise FileNotFoundError(
        f"{data}: no {task}/{split}/manifest.json below it; make it with espalier data, or name "
        "another --split"
    )


def tokenizer_of(model: Path, split: Path) -> Any:
    """The model's own tokenizer, or the data folder's where the model came without one."""
    from data_pipeline.text import load_tokenizer

    for folder in (model, split.parent.parent / "tokenizer"):
        if (folder / "tokenizer.json").is_file():
            return load_tokenizer(folder)
    raise FileNotFoundError(
        f"{model}: no tokenizer.json in it, nor in {split.parent.parent / 'tokenizer'}"
    )


def questions_of(folder: Path, limit: int = 0) -> Iterator[tuple[str, str, dict[str, float]]]:
    """(question, type, answers) of a VQA split, read from its shards without decoding a picture.

    `limit` samples (pictures) in manifest order; 0 reads all.
    """
    from data_pipeline.records import parse_record

    manifest = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
    samples = 0
    for shard in manifest["shards"]:
        with tarfile.open(folder / shard["name"]) as tar:
            for member in tar:
                if not member.name.endswith(".json") or (file := tar.extractfile(member)) is None:
                    continue
                key = member.name.removesuffix(".json")
                record: Any = parse_record("vqa", file.read(), str(folder / shard["name"]), key)
                for question in record.questions:
                    yield question.question, question.kind, question.answers
                samples += 1
                if samples == limit:
                    return


def blind_scores(
    train: Path, test: Path, limit: int = 0, annotators: int | None = None
) -> dict[str, float]:
    """The language-only baseline fitted on split folder `train` and scored on `test`."""
    from data_pipeline.blocksworld.questions import normalise
    from train.evaluation.vqa import BlindBaseline

    # On other data sets these templates only merge colours, shapes and sizes.
    baseline = BlindBaseline(normalise)
    for question, kind, answers in questions_of(train):
        baseline.add(question, kind, answers)
    scores = baseline.score(questions_of(test, limit), annotators)
    return {name: value for name, value in scores.items() if name != "questions"}


def hidden_answers(split: Path | str) -> str:
    """What to say of a VQA split without a single answer."""
    return (
        f"{split}: no question has an answer: this split's answers are hidden (as those of test-dev "
        "and test-std), and accuracy needs them; take a split with answers, such as val, or ask for "
        "the model's answers: espalier predict one, espalier eval --answers-out FILE all of them"
    )


def _training_split(split: Path) -> Path:
    """The train split beside another one. FileNotFoundError."""
    folder = split.parent / "train"
    if not (folder / "manifest.json").is_file():
        raise FileNotFoundError(
            f"{folder}/manifest.json: not there, and the language-only baseline learns from the "
            "training split; make it with espalier data, or leave the baseline out with --no-blind"
        )
    return folder


def evaluate_model(
    folder: Path,
    data: Path,
    split: str = "test",
    *,
    batch: int = 64,
    max_tokens: int = 40,
    limit: int = 0,
    top_k: int = 128,
    published: bool = False,
    annotators: int | None = None,
    blind: bool = True,
    device: str = "cpu",
    answers_out: Path | None = None,
) -> dict[str, float]:
    """VQA accuracy of a model folder, overall and per type, and the blind baseline's.

    Args:
        answers_out: also write every answer there (`server_answers`). Then a split may hide its
            answers, too: the result says the "answered_count" of questions, and has no accuracy.

    Raises:
        FileNotFoundError: no such split, model, tokenizer or answer list; or, with `blind`, no
            training split beside it.
        ValueError: a model of another form, a split whose answers are hidden, or, with
            `answers_out`, a limit or questions without numbers.
    """
    from models import from_pretrained
    from train.evaluation.runner import evaluate
    from train.evaluation.server_answers import AnsweringEvaluator, question_numbers, write_answers
    from train.evaluation.vqa import AnswerList

    where = find_split(data, "vqa", split)
    # Before the work that would be lost.
    hidden = not any(answers for _, _, answers in questions_of(where, limit))
    if hidden and answers_out is None:
        raise ValueError(hidden_answers(where))
    if limit and answers_out is not None:
        raise ValueError("--answers-out is for a whole split, of which --limit takes a part")
    numbers = {} if answers_out is None else question_numbers(where)
    train = _training_split(where) if blind and not hidden else None
    model = from_pretrained(folder, device=device)
    require_form(model, "vqa", folder)
    tokenizer = tokenizer_of(folder, where)
    answers = AnswerList.load(where, tokenizer).to(device)
    task = AnsweringEvaluator(answers, top_k, published, annotators)
    loader = vqa_loader(where, tokenizer, model, batch, max_tokens, limit)
    result = evaluate(model, task, loader, progress=True)
    if answers_out is not None:
        write_answers(answers_out, task.said, numbers)
        result = ({} if hidden else result) | {"answered_count": float(len(numbers))}
    if train is not None:
        result |= blind_scores(train, where, limit, annotators)
    return result


def table(result: dict[str, float]) -> str:
    """The accuracies as lines for people, in percent; blind ones beside."""
    lines = []
    for name in sorted(key for key in result if not key.endswith("_count") and "blind" not in key):
        blind = result.get(f"blind_{name}")
        beside = "" if blind is None else f"   blind {100 * blind:6.2f} %"
        lines.append(f"  {name:28s} {100 * result[name]:6.2f} %{beside}")
    return "\n".join(lines)


def vqa_loader(
    folder: Path, tokenizer: Any, model: XVLM, batch: int, max_tokens: int, limit: int
) -> Any:
    """One pass over a VQA split in the sizes that the model takes; `limit` 0 is all of it."""
    from data_pipeline.loader import build_loader

    vision = model.config.vision
    return build_loader(
        "vqa",
        folder,
        tokenizer=tokenizer,
        batch=batch,
        train=False,
        image_size=vision.image_size,
        patch_size=vision.patch_size,
        max_tokens=max_tokens,
        limit=limit,
    )


def require_form(model: XVLM, form: str, folder: Path) -> None:
    """Raises ValueError, naming the folder, on a model of another form."""
    if model.config.form != form:
        raise ValueError(
            f"{folder}: a model of form {model.config.form!r}, this needs {form!r} "
            "(make one with espalier finetune)"
        )
