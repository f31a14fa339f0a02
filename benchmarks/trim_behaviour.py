"""Does a trimmed model behave as adaptive trimming should? Three questions, on blocksworld.

Overlap: for one picture, do two questions about different things keep other patches than two
wordings of one question? Shuffled: does accuracy fall when the trimmers are told another sample's
text? Crowd: do pictures with few things cost less than crowded ones?
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor
from trim_models import Asked, respond, together

from data_pipeline.blocksworld.questions import questions
from data_pipeline.blocksworld.render import render
from data_pipeline.blocksworld.scenes import Scene, draw_scene
from data_pipeline.text import TextEncoder
from models.trimming import expected_macs, see
from train.evaluation.vqa import vqa_score

if TYPE_CHECKING:
    from models.xvlm import XVLM

Asks = list[dict[str, str]]  # as of data_pipeline.blocksworld.questions
_SEED = 991  # of the probes; their scenes are of the test split, whatever the seed
_ROWS = 64
_WORDINGS = ("what colour is the {shape}", "which colour has the {shape}")  # of questions.py


@dataclass(frozen=True)
class Probe:
    """A picture, a question about one of its things in two wordings, and one about another thing."""

    scene: Scene
    question: str
    reworded: str
    other: str


def probes(count: int, seed: int = _SEED) -> list[Probe]:
    """Pictures of the test split in which two things are the only ones of their shape."""
    found: list[Probe] = []
    index = 0
    while len(found) < count:
        scene, _ = draw_scene(seed, "test", index)
        index += 1
        shapes = [thing.shape for thing in scene.things]
        single = [shape for shape in shapes if shapes.count(shape) == 1]
        if len(single) >= 2:
            one, other = _WORDINGS
            said = one.format(shape=single[0]), other.format(shape=single[0])
            found.append(Probe(scene, *said, one.format(shape=single[1])))
    return found


def picture(scene: Scene, size: int) -> Tensor:
    """(1, 3, size, size) uint8."""
    return torch.from_numpy(render(scene, size)).permute(2, 0, 1)[None]


def rows_of(
    scenes: Sequence[Scene], texts: Sequence[str], size: int, encoder: TextEncoder
) -> list[Asked]:
    """One row for each picture and its text."""
    rows = []
    for scene, text in zip(scenes, texts, strict=True):
        ids = torch.tensor([encoder.encode([text])[0]])
        rows.append(Asked(picture(scene, size), ids, torch.ones_like(ids, dtype=torch.bool)))
    return rows


@torch.inference_mode()
def kept_patches(model: XVLM, rows: Sequence[Asked]) -> Tensor:
    """(rows, patches) bool: what is left behind the last site of the vision encoder."""
    prefix, found = model.config.vision.prefix_tokens, []
    for begin in range(0, len(rows), _ROWS):
        part = together(rows[begin : begin + _ROWS])
        index = torch.arange(len(part.ids))
        image, _ = see(model, part.images, (index,), part.ids, part.mask)
        assert image.trimming is not None
        last = image.trimming.sites[max(image.trimming.sites)]
        found.append(last.keep()[:, prefix:] > 0)
    return torch.cat(found)


def intersection_over_union(one: Tensor, other: Tensor) -> np.ndarray:
    """(R, P) bool each -> (R,): shared patches over those of either."""
    both, either = (one & other).sum(1), (one | other).sum(1)
    return (both / either.clamp(min=1)).double().numpy()


def overlap(model: XVLM, encoder: TextEncoder, found: Sequence[Probe]) -> dict[str, Any]:
    """Mean overlap of kept patches of two wordings, of two things, and their paired difference."""
    size, scenes = model.config.vision.image_size, [probe.scene for probe in found]
    kept = [
        kept_patches(model, rows_of(scenes, texts, size, encoder))
        for texts in (
            [probe.question for probe in found],
            [probe.reworded for probe in found],
            [probe.other for probe in found],
        )
    ]
    same = intersection_over_union(kept[0], kept[1])
    different = intersection_over_union(kept[0], kept[2])
    return {
        "pictures": len(found),
        "two_wordings": float(same.mean()),
        "two_things": float(different.mean()),
        "difference": mean_interval(same - different),
    }


def mean_interval(values: np.ndarray, draws: int = 2000) -> dict[str, float]:
    """Mean with its bootstrap 95 % interval."""
    generator = np.random.default_rng(0)
    means = [values[generator.integers(0, len(values), len(values))].mean() for _ in range(draws)]
    low, high = np.quantile(means, (0.025, 0.975))
    return {"mean": float(values.mean()), "low": float(low), "high": float(high)}


@torch.inference_mode()
def shuffled(model: XVLM, batches: Any, answers: Any, top_k: int) -> dict[str, Any]:
    """Accuracy when trimmers are told the row's own text, and that of another picture's row."""
    own, other, units = [], [], []
    for batch in batches:
        rows = batch.valid.nonzero().flatten()
        index = batch.image_index[rows]
        asked = Asked(batch.images[index], batch.question_ids[rows], batch.question_mask[rows])
        # Half the rows further is another picture: texts of one lie together.
        order = torch.arange(len(rows)).roll(len(rows) // 2)
        for scores, told in ((own, None), (other, order)):
            chosen = respond(model, asked, answers, top_k, told).tolist()
            scores += [
                vqa_score(answers.strings[best], batch.answers[row])
                for best, row in zip(chosen, rows.tolist(), strict=True)
            ]
        units += [batch.keys[row] for row in rows.tolist()]
    fell = np.array(own) - np.array(other)
    _, place = np.unique(units, return_inverse=True)
    count = np.bincount(place)
    # Of each picture; pictures have nearly as many questions each.
    difference = mean_interval(np.bincount(place, weights=fell) / count)
    return {
        "questions": len(own), "own_text": float(np.mean(own)),
        "other_text": float(np.mean(other)), "difference": difference,
    }  # fmt: skip


@torch.inference_mode()
def crowd(
    model: XVLM, encoder: TextEncoder, count: int, ask: Callable[[Scene], Asks] = questions
) -> dict[str, Any]:
    """Cost of the questions about `count` pictures by the number of things that are in them, and by
    type of question; with the correlation of cost and number, for all questions and for each type.
    """
    scenes = [draw_scene(_SEED, "test", index)[0] for index in range(count)]
    rows = [(scene, asked) for scene in scenes for asked in ask(scene)]
    texts = [asked["question"] for _, asked in rows]
    inputs = rows_of([s for s, _ in rows], texts, model.config.vision.image_size, encoder)
    costs: list[float] = []
    for begin in range(0, len(rows), _ROWS):
        part = together(inputs[begin : begin + _ROWS])
        index = torch.arange(len(part.ids))
        image, ((states, seen),) = see(model, part.images, (index,), part.ids, part.mask)
        fused = model.multimodal(part.ids, part.mask, states, seen, text=image.guide)
        costs += expected_macs(model.config, image=image, fused=fused).per_example().tolist()
    things = np.array([len(scene.things) for scene, _ in rows])
    kinds = np.array([asked["type"] for _, asked in rows])
    spent = np.array(costs) / 1e6
    return {
        "pictures": count, "questions": len(rows),
        "mmacs_by_things": _means(spent, things), "mmacs_by_type": _means(spent, kinds),
        "correlation": _correlation(things, spent),
        "correlation_by_type": {
            str(kind): _correlation(things[kinds == kind], spent[kinds == kind])
            for kind in np.unique(kinds)
        },
    }  # fmt: skip


def _means(values: np.ndarray, groups: np.ndarray) -> dict[str, float]:
    return {str(group): float(values[groups == group].mean()) for group in np.unique(groups)}


def _correlation(one: np.ndarray, other: np.ndarray) -> float:
    return float(np.corrcoef(one, other)[0, 1]) if one.std() and other.std() else 0.0
