"""Scores picture by picture, for intervals: what each test picture adds to each metric of a task.

Questions, statements, captions and expressions about one picture are not independent of each other,
so the picture (for NLVR2 the pair) is the unit that a bootstrap draws (`evaluation.paired`).
"""

from __future__ import annotations

import json
import math
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from train.evaluation.caption_metrics import cider_each, words
from train.evaluation.grounding import ENOUGH
from train.evaluation.retrieval import hits, rank_split
from train.evaluation.vqa import BlindBaseline, rank_answers, vqa_score

if TYPE_CHECKING:
    from data_pipeline.records import Record
    from models.xvlm import XVLM
    from train.evaluation.captioning import CaptionWriter
    from train.evaluation.vqa import AnswerList

__all__ = ["HEADLINE", "Items", "blind_items", "model_items"]

_WAYS = ("image_to_text", "text_to_image")
_AT = (1, 5, 10)
# Metrics whose mean is a task's score.
HEADLINE: dict[str, tuple[str, ...]] = {
    "vqa": ("accuracy",),
    "nlvr2": ("accuracy",),
    "retrieval": tuple(f"{way}_r{n}" for way in _WAYS for n in _AT),
    "captioning": ("cider",),
    "grounding": ("accuracy",),
}


@dataclass(frozen=True)
class Items:
    """Sums and counts of each metric over each picture.

    Attributes:
        units: U pictures.   sums, counts: metric -> (U,) float64.
    """

    units: tuple[str, ...]
    sums: dict[str, np.ndarray]
    counts: dict[str, np.ndarray]

    @property
    def items(self) -> int:
        """Test items of the metric that has most."""
        return int(max(count.sum() for count in self.counts.values()))

    def means(self, weights: np.ndarray | None = None) -> dict[str, np.ndarray]:
        """Metric -> its mean; with `weights` (R, U), how often each picture was drawn, R of them."""
        drawn = np.ones(len(self.units)) if weights is None else weights
        return {
            name: drawn @ total / (drawn @ self.counts[name]) for name, total in self.sums.items()
        }

    def score(self, headline: Sequence[str], weights: np.ndarray | None = None) -> np.ndarray:
        """The mean of the named metrics' means: a number, or (R,)."""
        means = self.means(weights)
        return np.mean([means[name] for name in headline], axis=0)

    def save(self, path: Path) -> None:
        """Writes an .npz without pickles."""
        arrays: dict[str, Any] = {f"sum:{name}": value for name, value in self.sums.items()}
        arrays |= {f"count:{name}": value for name, value in self.counts.items()}
        with path.open("wb") as file:
            np.savez_compressed(file, units=np.array(self.units), **arrays)

    @classmethod
    def load(cls, path: Path) -> Items:
        """Reads `save`'s file. Raises FileNotFoundError, or ValueError on another file."""
        with np.load(path, allow_pickle=False) as found:
            if "units" not in found:
                raise ValueError(f"{path}: not a file of per-picture scores (no 'units')")
            parts: dict[str, dict[str, np.ndarray]] = {"sum": {}, "count": {}}
            for name in found.files:
                kind, _, metric = name.partition(":")
                if metric:
                    parts[kind][metric] = found[name]
            return cls(tuple(found["units"].tolist()), parts["sum"], parts["count"])


class _Tally:
    """Adds up scores by metric and picture."""

    def __init__(self) -> None:
        self._found: dict[str, dict[str, list[float]]] = defaultdict(dict)

    def add(self, metric: str, unit: str, score: float) -> None:
        pair = self._found[metric].setdefault(unit, [0.0, 0.0])
        pair[0] += score
        pair[1] += 1.0

    def items(self) -> Items:
        if not self._found:
            raise ValueError("nothing to score: the test split is empty, or its answers are hidden")
        units = tuple(sorted({unit for units in self._found.values() for unit in units}))
        tables = {
            metric: np.array([found.get(unit, (0.0, 0.0)) for unit in units])
            for metric, found in self._found.items()
        }
        return Items(
            units,
            {metric: table[:, 0] for metric, table in tables.items()},
            {metric: table[:, 1] for metric, table in tables.items()},
        )


# -- models ----------------------------------------------------------------------------------------


def model_items(
    model: XVLM,
    task: str,
    batches: Iterator[Any],
    *,
    answers: AnswerList | None = None,
    writer: CaptionWriter | None = None,
    top_k: int = 128,
    gallery: int = 1000,
) -> Items:
    """Scores of a model in evaluation mode on a split, on one process.

    Args:
        batches: of the task, every text, on the model's device.
        answers: the list that VQA ranks.   writer: how captions are written.
        top_k: answers kept after the first token; candidates that retrieval ranks again.
        gallery: pictures (with all their texts) among which retrieval searches, a multiple of the
            batch; a smaller last gallery is left out. 1,000 as in COCO's 1K protocol.

    Raises:
        ValueError: unknown task, or `answers` or `writer` is missing.
    """
    needed = {"vqa": answers, "captioning": writer}
    if task not in HEADLINE or (task in needed and needed[task] is None):
        raise ValueError(f"{task}: unknown task, or no answer list (vqa) or writer (captioning)")
    tally = _Tally()
    with torch.inference_mode():
        if task == "retrieval":
            _retrieval(model, batches, tally, top_k, gallery)
        elif task == "captioning":
            assert writer is not None
            _captions(model, batches, tally, writer)
        else:
            for batch in batches:
                _ROWS[task](model, batch, tally, answers, top_k)
    return tally.items()


def _vqa(model: XVLM, batch: Any, tally: _Tally, answers: Any, top_k: int) -> None:
    chosen = rank_answers(model, batch, answers, top_k).tolist()
    for row in batch.valid.nonzero().flatten().tolist():
        if not batch.answers[row]:  # hidden
            continue
        score = vqa_score(answers.strings[chosen[row]], batch.answers[row])
        tally.add("accuracy", batch.keys[row], score)
        tally.add(f"accuracy/{batch.question_types[row]}", batch.keys[row], score)


def _nlvr2(model: XVLM, batch: Any, tally: _Tally, *_: Any) -> None:
    images = model.encode_image(batch.images).last
    both = images[batch.image_index], images[batch.second_index]
    text = model.multimodal(batch.text_ids, batch.text_mask, both)
    right = model.truth_logits(text.last).argmax(-1) == batch.label
    _add_rows("accuracy", right, batch, tally)


def _grounding(model: XVLM, batch: Any, tally: _Tally, *_: Any) -> None:
    from train.evaluation.pretrain import box_iou

    images = model.encode_image(batch.images).last[batch.image_index]
    text = model.multimodal(batch.text_ids, batch.text_mask, images)
    iou = box_iou(model.predict_box(text.last).float(), batch.boxes)
    _add_rows("accuracy", iou >= ENOUGH, batch, tally)
    _add_rows("iou", iou, batch, tally)


_ROWS: dict[str, Callable[..., None]] = {"vqa": _vqa, "nlvr2": _nlvr2, "grounding": _grounding}


def _add_rows(metric: str, scores: Tensor, batch: Any, tally: _Tally) -> None:
    for key, score, valid in zip(
        batch.keys, scores.double().tolist(), batch.valid.tolist(), strict=True
    ):
        if valid:
            tally.add(metric, key, score)


def _retrieval(
    model: XVLM, batches: Iterator[Any], tally: _Tally, top_k: int, gallery: int
) -> None:
    first = next(batches, None)
    if first is None:
        return
    size = len(first.image_ids)
    if gallery % size:
        raise ValueError(f"a gallery of {gallery} pictures is no multiple of batches of {size}")
    waiting = [first]
    while True:
        waiting += islice(batches, gallery // size - len(waiting))
        if sum(int(batch.image_valid.sum()) for batch in waiting) < gallery:
            return
        kept = tuple(waiting)
        split, ways = rank_split(model, lambda kept=kept: iter(kept), None, top_k)
        queries = {"image_to_text": split.image_groups, "text_to_image": split.text_groups}
        for way, ranked in ways.items():
            for n, hit in hits(*ranked).items():
                for group, score in zip(queries[way].tolist(), hit.double().tolist(), strict=True):
                    tally.add(f"{way}_r{n}", str(group), score)
        waiting = []


def _captions(model: XVLM, batches: Iterator[Any], tally: _Tally, writer: CaptionWriter) -> None:
    keys, said, known = [], [], []
    for batch in batches:
        written = writer(model, batch)
        for row in batch.valid.nonzero().flatten().tolist():
            keys.append(batch.keys[row])
            said.append(words(written[row]))
            known.append([words(text) for text in batch.references[int(batch.image_index[row])]])
    for key, score in zip(keys, cider_each(said, known), strict=True):
        tally.add("cider", key, score)


# -- without pictures ------------------------------------------------------------------------------


def records(folder: Path, task: str, limit: int = 0) -> Iterator[tuple[str, Record]]:
    """(key, record) of a split in manifest order, without decoding a picture; `limit` 0 is all."""
    import tarfile

    from data_pipeline.records import parse_record

    manifest, seen = json.loads((folder / "manifest.json").read_text(encoding="utf-8")), 0
    for shard in manifest["shards"]:
        with tarfile.open(folder / shard["name"]) as tar:
            for member in tar:
                if not member.name.endswith(".json") or (file := tar.extractfile(member)) is None:
                    continue
                key = member.name.removesuffix(".json").removesuffix(".")
                yield key, parse_record(task, file.read(), str(folder / shard["name"]), key)
                seen += 1
                if seen == limit:
                    return


def blind_items(task: str, train: Path, test: Path, limit: int = 0, gallery: int = 1000) -> Items:
    """What can be scored without looking at a test picture.

    vqa, nlvr2: the most frequent training answer to the same words, template, type.
    captioning: the most frequent training caption.   grounding: the mean training box.
    retrieval: chance.
    """
    tally = _Tally()
    tested = records(test, task, limit)
    if task in ("vqa", "nlvr2"):
        _blind_answers(task, records(train, task), tested, tally)
    elif task == "captioning":
        _blind_caption(records(train, task), tested, tally)
    elif task == "grounding":
        _blind_box(records(train, task), tested, tally)
    elif task == "retrieval":
        _chance(tested, tally, gallery)
    else:
        raise ValueError(f"{task}: unknown task")
    return tally.items()


def _asked(task: str, record: Any) -> list[tuple[str, str, dict[str, float]]]:
    """(text, type, answers) of everything that is asked about a picture."""
    if task == "vqa":
        return [(q.question, q.kind, q.answers) for q in record.questions]
    return [(s.sentence, "", {str(s.label): 1.0}) for s in record.statements]


def _blind_answers(task: str, train: Iterator[Any], test: Iterator[Any], tally: _Tally) -> None:
    from data_pipeline.blocksworld.questions import normalise

    baseline = BlindBaseline(normalise)
    for _, record in train:
        for asked in _asked(task, record):
            baseline.add(*asked)
    for key, record in test:
        for text, kind, answers in _asked(task, record):
            if not answers:  # hidden
                continue
            tally.add("accuracy", key, vqa_score(baseline.predict(text, kind), answers))


def _blind_caption(train: Iterator[Any], test: Iterator[Any], tally: _Tally) -> None:
    counted = Counter(text for _, record in train for text in record.captions)
    best = words(min(counted, key=lambda text: (-counted[text], text)))
    known = [(key, [words(text) for text in record.captions]) for key, record in test]
    scores = cider_each([best] * len(known), [texts for _, texts in known])
    for (key, _), score in zip(known, scores, strict=True):
        tally.add("cider", key, score)


def _unit_box(record: Any, box: Sequence[float]) -> list[float]:
    """Normalised (cx, cy, w, h) of (x, y, w, h) in pixels."""
    x, y, wide, high = box
    return [
        (x + wide / 2) / record.width, (y + high / 2) / record.height,
        wide / record.width, high / record.height,
    ]  # fmt: skip


def _blind_box(train: Iterator[Any], test: Iterator[Any], tally: _Tally) -> None:
    from train.evaluation.pretrain import box_iou

    boxes = [_unit_box(r, e.box) for _, r in train for e in r.expressions]
    guess = torch.tensor(boxes, dtype=torch.float64).mean(0)[None]
    for key, record in test:
        true = torch.tensor([_unit_box(record, e.box) for e in record.expressions]).double()
        for iou in box_iou(guess.expand(len(true), 4), true).tolist():
            tally.add("accuracy", key, float(iou >= ENOUGH))


def _chance(test: Iterator[Any], tally: _Tally, gallery: int) -> None:
    while len(part := list(islice(test, gallery))) == gallery:
        texts = sum(len(record.captions) for _, record in part)
        for key, record in part:
            own = len(record.captions)
            for n in _AT:
                missed = math.comb(texts - own, n) / math.comb(texts, n)
                tally.add(f"image_to_text_r{n}", key, 1 - missed)
                for _ in range(own):
                    tally.add(f"text_to_image_r{n}", key, n / gallery)
