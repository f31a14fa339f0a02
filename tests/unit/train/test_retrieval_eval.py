"""Retrieval over a split against a dense, naive evaluation."""

from __future__ import annotations

from collections.abc import Sequence
from types import SimpleNamespace

import pytest
import torch

from data_pipeline.task_batches import RetrievalBatch
from models import presets
from models.xvlm import XVLM
from train.evaluation.retrieval import evaluate_retrieval, recalls
from train.evaluation.runner import evaluate
from train.tasks.retrieval import RetrievalTask

VOCABULARY, TOKENS = 40, 7


@pytest.fixture(scope="module")
def model() -> XVLM:
    torch.manual_seed(0)
    made = presets.create(
        "blocksworld-micro-student", form="retrieval", text={"vocab_size": VOCABULARY}
    )
    return made.eval()


def split(model: XVLM, sizes: Sequence[Sequence[int]], seed: int = 0) -> list[RetrievalBatch]:
    """Batches of images with so many captions each; a negative number is an image that fills up."""
    generator, side, batches, name = (
        torch.Generator().manual_seed(seed), model.config.vision.image_size, [], 0,
    )  # fmt: skip
    for captions in sizes:
        owners = [n for n, count in enumerate(captions) for _ in range(abs(count))]
        rows, names = len(owners), tuple(f"i{name + n}" for n in range(len(captions)))
        groups = torch.tensor([100 + name + n for n in owners])
        lengths = torch.randint(3, TOKENS + 1, (rows,), generator=generator)
        batches.append(
            RetrievalBatch(
                images=torch.randint(
                    0, 256, (len(captions), 3, side, side), dtype=torch.uint8, generator=generator
                ),
                image_index=torch.tensor(owners),
                valid=torch.tensor([captions[n] > 0 for n in owners]),
                keys=("k",) * rows,
                text_ids=torch.randint(5, VOCABULARY, (rows, TOKENS), generator=generator),
                text_mask=torch.arange(TOKENS)[None] < lengths[:, None],
                groups=groups,
                captions=("",) * rows,
                image_ids=names,
            )
        )
        name += len(captions)
    return batches


def naive(model: XVLM, batches: list[RetrievalBatch], k_test: int) -> dict[str, float]:
    """Every image with every text, one by one; what is not on the shortlist scores -100."""
    images, texts, owner = [], [], []
    for batch in batches:
        kept = {}
        for n in range(len(batch.image_ids)):
            rows = (batch.image_index == n).nonzero().flatten().tolist()
            if bool(batch.valid[rows[0]]):
                kept[n] = len(images)
                images.append(batch.images[n : n + 1])
            for row in rows:
                if bool(batch.valid[row]):
                    texts.append((batch.text_ids[row : row + 1], batch.text_mask[row : row + 1]))
                    owner.append(kept[n])
    states = [model.encode_image(image).last for image in images]
    said = [model.encode_text(*text).last for text in texts]
    features = torch.cat([model.image_feature(state) for state in states])
    similar = features @ torch.cat([model.text_feature(text) for text in said]).T
    match = torch.full_like(similar, -100.0)
    for i, state in enumerate(states):
        for t, text in enumerate(said):
            match[i, t] = model.match_logits(model.fuse(text, texts[t][1], state).last)[0, 1]

    def best(scores: torch.Tensor, near: torch.Tensor) -> list[int]:
        if not k_test:
            return near.argsort(descending=True).tolist()
        final = torch.full_like(scores, -100.0)
        chosen = near.topk(min(k_test, len(near))).indices
        final[chosen] = scores[chosen]
        return final.argsort(descending=True).tolist()

    result = {}
    to_text = [best(match[i], similar[i]) for i in range(len(images))]
    to_image = [best(match[:, t], similar[:, t]) for t in range(len(texts))]
    for n in (1, 5, 10):
        hits = [any(owner[t] == i for t in order[:n]) for i, order in enumerate(to_text)]
        result[f"image_to_text_r{n}"] = sum(hits) / len(hits)
        hits = [owner[t] in order[:n] for t, order in enumerate(to_image)]
        result[f"text_to_image_r{n}"] = sum(hits) / len(hits)
    return result


@pytest.mark.parametrize("k_test", [0, 11, 1000])
@torch.no_grad()
def test_recalls_are_those_of_scoring_every_pair(model, k_test):
    batches = split(model, [(2, 1, 3), (1, 2, 2), (5, 1, 1), (2, 2, -1)])
    found = evaluate_retrieval(model, lambda: iter(batches), None, k_test)
    assert (found["images"], found["texts"]) == (11, 22)
    expected = naive(model, batches, k_test)
    assert {name: found[name] for name in expected} == pytest.approx(expected)
    assert found["r_mean"] == pytest.approx(sum(expected.values()) / 6)
    assert 0 < found["r_mean"] < 1


@torch.no_grad()
def test_an_image_that_comes_twice_is_a_hit_both_times(model):
    once = split(model, [(1, 1), (1, 1)])
    twin = once[1].groups.clone()
    twin[0] = once[0].groups[0]
    from dataclasses import replace

    batches = [once[0], replace(once[1], groups=twin)]
    apart = evaluate_retrieval(model, lambda: iter(once), None, 0)
    together = evaluate_retrieval(model, lambda: iter(batches), None, 0)
    assert together["text_to_image_r1"] >= apart["text_to_image_r1"]
    assert together["image_to_text_r5"] == 1.0


@torch.no_grad()
def test_two_ranks_find_what_one_finds(model, monkeypatch):
    """Each rank scores the pairs of its own images; the collectives are played by hand."""
    sizes = [(2, 1, 3), (1, 2, 2), (2, 1, 4), (3, 1, -1)]
    batches = split(model, sizes)
    whole = evaluate_retrieval(model, lambda: iter(batches), None, 9)

    waiting: dict[str, list] = {"objects": [], "scores": []}

    def run(rank: int) -> dict[str, float]:
        calls = iter(range(10))

        def gather(parts: list, mine: object) -> None:
            if len(waiting["objects"]) <= rank:
                waiting["objects"].append(mine)
            parts[:] = waiting["objects"] if len(waiting["objects"]) == 2 else [mine, mine]

        def reduce(scores: torch.Tensor, op: object) -> None:
            call = next(calls)
            waiting["scores"].append((rank, call, scores.clone()))
            others = [s for r, c, s in waiting["scores"] if c == call and s.shape == scores.shape]
            scores.copy_(torch.stack(others).amax(0))

        monkeypatch.setattr(torch.distributed, "all_gather_object", gather)
        monkeypatch.setattr(torch.distributed, "all_reduce", reduce)
        dist = SimpleNamespace(rank=rank, world_size=2)
        own = batches[rank::2]
        return evaluate_retrieval(model, lambda: iter(own), dist, 9)

    run(0)  # what rank 0 has to say
    run(1)
    waiting["scores"].clear()
    run(0)
    found = run(1)  # now both ranks' objects and scores are there
    assert found == pytest.approx(whole)


def test_recall_of_hand_made_scores():
    scores = torch.tensor([[0.9, 0.5, 0.1], [0.9, 0.5, 0.1], [0.5, 0.5, 0.1], [0.9, 0.5, 0.1]])
    relevant = torch.tensor([[1, 0, 0], [0, 0, 1], [1, 0, 0], [0, 0, 0]], dtype=torch.bool)
    # found first; found third; tied with a wrong one; not on the shortlist
    assert recalls(scores, relevant) == {1: 0.25, 5: 0.75, 10: 0.75}


def test_a_model_that_scores_everything_alike_finds_nothing_at_once():
    relevant = torch.eye(20, dtype=torch.bool)
    assert recalls(torch.zeros(20, 20), relevant) == {1: 0.0, 5: 0.0, 10: 0.0}


def test_the_runner_gives_the_task_the_whole_split(model):
    from train.config import KdConfig

    batches = split(model, [(1, 2), (2, 1)])
    model.train()
    task = RetrievalTask({}, KdConfig(), model.config, None, k_test=4)
    found = evaluate(model, task, batches)
    assert model.training and found["texts"] == 6
    model.eval()
    with pytest.raises(ValueError, match="eval.top_k"):
        evaluate_retrieval(model, lambda: iter(batches), None, -1)
