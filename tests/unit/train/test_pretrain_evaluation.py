"""Held-out metrics of pre-training against loops over rows, on one rank and on several."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from data_pipeline.batches import PretrainBatch
from models import presets
from models.xvlm import XVLM
from tests.distributed.spawn import run_ranks
from train.evaluation.pictures import pretrain_pictures
from train.evaluation.pretrain import (
    PairMetrics,
    box_iou,
    evaluate_pretraining,
    predict_boxes,
    retrieval_ranks,
)
from train.monitor import Monitor
from train.runtime.teacher import Teacher

HERE: Any = SimpleNamespace(rank=0, world_size=1, device=torch.device("cpu"))


def model() -> XVLM:
    torch.manual_seed(0)
    return XVLM(presets.config("blocksworld-student", form="pretrain")).eval()


def batch(rows: int, valid: list[bool], seed: int = 0, region: bool = False) -> PretrainBatch:
    """Noise; `valid` of the rows, and of a region batch the last row is of a whole picture."""
    generator = torch.Generator().manual_seed(seed)
    config = presets.config("blocksworld-student", form="pretrain")
    ids = torch.randint(5, config.text.vocab_size, (rows, 7), generator=generator)
    labels = torch.full((rows, 3), -100)
    labels[:, 0] = ids[:, 2]
    labels[0, 1] = ids[0, 4]
    side = config.vision.image_size
    shape = (rows, 3, side, side)
    regions: dict[str, Tensor] = {}
    if region:
        regions = {
            "region_mask": torch.ones(rows, config.vision.output_tokens, dtype=torch.bool),
            "boxes": torch.rand(rows, 4, generator=generator) * 0.5 + 0.2,
            "is_region": torch.arange(rows) < rows - 1,
        }
    return PretrainBatch(
        images=torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator),
        image_index=torch.arange(rows),
        valid=torch.tensor(valid),
        keys=tuple(map(str, range(rows))),
        text_ids=ids,
        text_mask=torch.arange(7)[None] < torch.randint(5, 8, (rows, 1), generator=generator),
        mlm_ids=ids.roll(1, 1),
        mlm_positions=torch.tensor([[2, 4, 0]]).expand(rows, -1),
        mlm_labels=labels,
        **regions,
    )


BATCHES = [batch(4, [True] * 4, 1), batch(4, [True, True, False, True], 2)]
REGIONS = [batch(3, [True, False, True], 3, region=True)]


# --- ranks ------------------------------------------------------------------------------------------


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 7), st.integers(0, 5), st.integers(0, 2**31))
def test_ranks_are_those_of_a_loop(own: int, before: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    # Few values, so that there are ties.
    gallery = torch.randint(-1, 2, (own + before + 2, 3), generator=generator).float()
    queries = torch.randint(-1, 2, (own, 3), generator=generator).float()
    expected = []
    for i, query in enumerate(queries):
        similar = [float(query @ entry) for entry in gallery]
        mine = similar[before + i]
        expected.append(sum(s >= mine for n, s in enumerate(similar) if n != before + i))
    assert retrieval_ranks(queries, gallery, before).tolist() == expected


def test_ranks_in_blocks_are_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    features = torch.randn(11, 4, generator=torch.Generator().manual_seed(0))
    others = torch.randn(11, 4, generator=torch.Generator().manual_seed(1))
    whole = retrieval_ranks(features, others)
    monkeypatch.setattr("train.evaluation.pretrain._BLOCK", 25)
    assert torch.equal(retrieval_ranks(features, others), whole)
    assert retrieval_ranks(features[:0], others).shape == (0,)


def test_a_model_that_sees_no_difference_finds_nothing() -> None:
    same = torch.ones(5, 3)
    assert retrieval_ranks(same, same).tolist() == [4] * 5


def test_iou_by_hand() -> None:
    unit = torch.tensor([[0.5, 0.5, 1.0, 1.0]])
    cases = [
        ([0.5, 0.5, 1.0, 1.0], 1.0),
        ([0.25, 0.5, 0.5, 1.0], 0.5),
        ([1.0, 0.5, 1.0, 1.0], 1 / 3),
        ([3.0, 3.0, 1.0, 1.0], 0.0),
        ([0.5, 0.5, 0.0, 0.0], 0.0),
    ]
    for box, expected in cases:
        assert box_iou(torch.tensor([box]), unit).item() == pytest.approx(expected)
    nothing = torch.zeros(1, 4)
    assert box_iou(nothing, nothing).item() == 0.0


# --- metrics ----------------------------------------------------------------------------------------


@torch.no_grad()
def naive(found: XVLM, batches: list[PretrainBatch]) -> dict[str, float]:
    """Row by row, without padding in any call."""
    images, texts, positive, negative, words = [], [], [], [], []
    for part in batches:
        rows = [n for n in range(part.rows) if part.valid[n]]
        for place, n in enumerate(rows):
            own = found.encode_image(part.images[n : n + 1]).last
            following = rows[(place + 1) % len(rows)]
            other = found.encode_image(part.images[following : following + 1]).last
            mask = part.text_mask[n : n + 1]
            text = found.encode_text(part.text_ids[n : n + 1], mask).last
            images.append(found.image_feature(own)[0])
            texts.append(found.text_feature(text)[0])
            positive.append(found.match_logits(found.fuse(text, mask, own).last).argmax() == 1)
            negative.append(found.match_logits(found.fuse(text, mask, other).last).argmax() == 0)
            states = found.multimodal(part.mlm_ids[n : n + 1], mask, own).last
            said = found.mlm_logits(states, part.mlm_positions[n : n + 1]).argmax(-1)[0]
            labels = part.mlm_labels[n]
            words += [bool(a == b) for a, b in zip(said, labels, strict=True) if b != -100]

    def first(queries: list[Tensor], gallery: list[Tensor]) -> float:
        return sum(
            max(range(len(gallery)), key=lambda n: float(query @ gallery[n])) == i
            for i, query in enumerate(queries)
        ) / len(queries)

    both = [*positive, *negative]
    return {
        "image_to_text_r1": first(images, texts),
        "text_to_image_r1": first(texts, images),
        "itm_positive": sum(map(float, positive)) / len(positive),
        "itm_negative": sum(map(float, negative)) / len(negative),
        "itm_accuracy": sum(map(float, both)) / len(both),
        "mlm_accuracy": sum(words) / len(words),
        "retrieval_count": float(len(images)),
        "mlm_accuracy_count": float(len(words)),
    }


def test_metrics_are_those_of_a_loop_over_rows() -> None:
    student = model()
    found = evaluate_pretraining(student, BATCHES, REGIONS)
    expected = naive(student, BATCHES)
    assert {name: found[name] for name in expected} == pytest.approx(expected)
    assert found["retrieval_count"] == 7 and found["itm_accuracy_count"] == 14
    assert REGIONS[0].boxes is not None
    with torch.no_grad():
        overlaps = box_iou(predict_boxes(student, REGIONS[0]), REGIONS[0].boxes)
    assert found["box_iou"] == pytest.approx(overlaps[0].item()), "a copy and a whole picture"
    assert found["box_iou_count"] == 1


def test_without_regions_there_is_no_iou() -> None:
    assert "box_iou" not in evaluate_pretraining(model(), BATCHES[:1], None)


def test_a_lonely_row_has_no_negative() -> None:
    sums = PairMetrics().evaluate(model(), batch(2, [True, False], 4))
    assert sums["itm_negative"][1] == 0 and sums["itm_accuracy"][1] == 1


def spread(world: int) -> dict[str, float]:
    """Each rank has its share of the batches, the last one nothing but padding."""
    rank = torch.distributed.get_rank()
    everything = [*BATCHES, batch(4, [False] * 4, 9)]
    dist = SimpleNamespace(rank=rank, world_size=world, device=torch.device("cpu"))
    return evaluate_pretraining(model(), everything[rank::world], REGIONS, dist)


@pytest.mark.world_size(3)
def test_three_ranks_measure_what_one_does() -> None:
    alone = evaluate_pretraining(model(), BATCHES, REGIONS)
    ranks = run_ranks(spread, 3, 3)
    for found in ranks:
        assert found.keys() == alone.keys()
        for name, value in found.items():
            factor = 3 if name == "box_iou_count" else 1  # all three read the same regions
            assert value == pytest.approx(factor * alone[name]), name


# --- pictures ---------------------------------------------------------------------------------------


class Words:
    """A tokenizer whose words are their numbers."""

    all_special_tokens = ("w5",)

    def convert_ids_to_tokens(self, ids: list[int]) -> list[str]:
        return [f"w{n}" for n in ids]

    def decode(self, ids: list[int], skip_special_tokens: bool) -> str:
        assert skip_special_tokens
        return " ".join(self.convert_ids_to_tokens(ids))


class Seen(Monitor):
    def __init__(self) -> None:
        self.shown: dict[str, tuple[Tensor, list[str]]] = {}

    def pictures(self, step: int, tag: str, images: Tensor, captions: Sequence[str]) -> None:
        assert step == 3 and len(images) == len(captions) and images.dtype == torch.uint8
        self.shown[tag] = (images, list(captions))


class Beside(Teacher):
    """A teacher that counts how often it ran."""

    runs = 0

    def __init__(self) -> None:
        self.model = model()

    def running(self) -> Any:
        from contextlib import nullcontext

        self.runs += 1
        return nullcontext(self.model)


def test_every_kind_of_picture_is_shown() -> None:
    seen, teacher, student = Seen(), Beside(), model().train()
    some = replace(BATCHES[1], valid=torch.tensor([True, False, True, True]))
    pretrain_pictures(seen, 3, student, [some], REGIONS, Words(), HERE, teacher, count=2)
    assert student.training and teacher.runs == 1
    assert list(seen.shown) == [
        "pretrain/words", "pretrain/retrieval", "pretrain/attention", "pretrain/regions",
    ]  # fmt: skip
    images, captions = seen.shown["pretrain/words"]
    assert torch.equal(images, some.images[[0, 2]]), "padding is not shown"
    assert "of 2 masked words right" in captions[0] and "of 1 masked words right" in captions[1]
    images, captions = seen.shown["pretrain/retrieval"]
    assert images.shape[3] == 3 * images.shape[2]
    assert all("of 3" in caption for caption in captions)
    images, captions = seen.shown["pretrain/attention"]
    assert images.shape[3] == 3 * images.shape[2], "picture, student and teacher"
    assert all(caption.count("[w") == 1 for caption in captions)
    images, captions = seen.shown["pretrain/regions"]
    assert len(images) == 1, "one row is a copy, one a whole picture"


def test_without_teacher_and_regions_there_are_fewer() -> None:
    seen = Seen()
    pretrain_pictures(seen, 3, model(), BATCHES, None, Words(), HERE, None, count=1)
    assert "pretrain/regions" not in seen.shown
    images, captions = seen.shown["pretrain/attention"]
    assert images.shape[3] == 2 * images.shape[2] and captions[0].endswith("picture, student")
