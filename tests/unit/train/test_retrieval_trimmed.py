"""Retrieval with text sites: what a text's own pass dropped is gone where its picture is read, too."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from data_pipeline.blocksworld.vocabulary import write_tokenizer
from data_pipeline.text import load_tokenizer
from models import presets
from models.trimming import default_trimming, with_trimming
from models.xvlm import XVLM
from tests.unit.train import test_retrieval_eval as dense
from tests.unit.train.test_task_pictures import CPU, Board
from tests.unit.train.test_trim import batch_of, context, decisive, task_of, trimmed
from train.evaluation import retrieval
from train.evaluation.predictor import Predictor
from train.evaluation.task_pictures import task_pictures
from train.tasks.trim import costs_of, site_shares

COUNTS: dict[str, Any] = {"vision_keep": (5, 4, 3), "text_keep": (3,)}


def model_of(**changes: Any) -> XVLM:
    return decisive(trimmed("retrieval", **({"text": (1,)} | changes))).eval()


@torch.no_grad()
def test_the_matching_head_reads_what_trimmers_left():
    model = model_of(text=(1, 2))
    batch: Any = batch_of("retrieval", model)
    task = task_of("retrieval", model)
    model.set_trimming("mask")
    done = task.base.score(model, batch, context(), {})
    images, texts = done.extra.images, done.extra.texts
    rows = torch.arange(batch.rows)
    pairs = [*zip(rows, rows, strict=True), *zip(images.take(rows), rows, strict=True)]
    pairs += zip(rows, texts.take(rows), strict=True)
    model.set_trimming("gather")
    dropped = 0
    for (image, text), found in zip(pairs, done.output[0], strict=True):
        ids, mask = batch.text_ids[text[None]], batch.text_mask[text[None]]
        words = model.encode_text(ids, mask)
        dropped += int(mask.sum()) - words.last.shape[1]
        seen = model.encode_image(batch.images[batch.image_index[image[None]]])
        fused = model.fuse(words.last, words.mask, seen.last, seen.mask)
        expected = model.match_logits(fused.last)[0]
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-4)
    assert dropped > 0


@torch.no_grad()
def test_the_cost_is_compared_with_whole_texts():
    model = model_of(text=(1, 2))
    batch: Any = batch_of("retrieval", model)
    task = task_of("retrieval", model)
    model.set_trimming("mask")

    def whole_and_shares() -> tuple[float, dict[str, torch.Tensor]]:
        done = task.base.score(model, batch, context(), {})
        return float(costs_of(model, done).dense["fusion"]), site_shares(done)

    found, shares = whole_and_shares()
    decisive(model, bias=1e4)  # everything stays
    kept, every = whole_and_shares()
    batch.text_mask[:] = True  # as many tokens in each text, whichever are drawn as negatives
    exact, _ = whole_and_shares()
    decisive(model)
    same, _ = whole_and_shares()
    assert same == exact > kept
    assert found == pytest.approx(kept, rel=0.1)
    assert shares["keep/fusion.2"] <= shares["keep/text.1"] < 1 == every["keep/fusion.2"]


@pytest.mark.parametrize("mode", ["mask", "gather", "packed", "bucket"])
@torch.no_grad()
def test_scores_of_a_split_are_those_of_each_pair_alone(mode, monkeypatch):
    monkeypatch.setattr(retrieval, "_ROWS", 3)  # passes that leave texts of unequal lengths
    model = model_of(**COUNTS)
    model.set_trimming(mode)
    batches = dense.split(model, [(2, 1, 3), (1, 2)])
    split, ways = retrieval.rank_split(model, lambda: iter(batches), None, 9)
    scores, _ = ways["text_to_image"]
    _, of_texts = retrieval._shortlist(split.texts, split.images, 9)
    images = [image[None] for batch in batches for image in batch.images]
    model.set_trimming("bucket" if mode == "bucket" else "gather")
    lengths = set()
    for text, places in enumerate(of_texts.tolist()):
        own = split.masks[text]
        words = model.encode_text(split.ids[text, own][None], None)
        lengths.add(words.last.shape[1])
        for place, found in zip(places, scores[text], strict=True):
            seen = model.encode_image(images[place])
            fused = model.fuse(words.last, words.mask, seen.last, seen.mask)
            expected = model.match_logits(fused.last)[0, 1]
            torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-4)
    assert len(lengths) > 1


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("retrieval")
    write_tokenizer(root / "tokenizer")
    tokenizer = load_tokenizer(root / "tokenizer")
    torch.manual_seed(0)
    base = presets.create(
        "blocksworld-micro-student", form="retrieval", text={"vocab_size": len(tokenizer)}
    )
    trimming = default_trimming(base.config, text=(0,), mode="gather")
    model = decisive(with_trimming(base, trimming), bias=-14.0)
    model.save_pretrained(root / "model", tokenizer=tokenizer)
    return root


@torch.no_grad()
def test_one_pair_is_asked_with_what_is_left(folder):
    predictor = Predictor(folder / "model", device="cpu")
    picture = Image.new("RGB", (48, 48), "red")
    found = predictor.match(picture, "a red circle and a blue square")
    model = predictor.model
    ids, _ = predictor._text("a red circle and a blue square")
    words = model.encode_text(ids, None)
    assert words.last.shape[1] < ids.shape[1]
    pixels = torch.tensor([255, 0, 0], dtype=torch.uint8)[None, :, None, None].expand(1, 3, 48, 48)
    seen = model.encode_image(pixels)
    logits = model.match_logits(model.fuse(words.last, words.mask, seen.last, seen.mask).last)
    assert found.probability == pytest.approx(float(logits.softmax(-1)[0, 1]), abs=1e-5)


def test_pictures_are_found_by_what_is_left():
    model, board = model_of(), Board()
    model.set_trimming("gather")
    batch = dense.split(model, [(2, 1, 1)])[0]
    task_pictures("retrieval", board, 3, model, [batch], CPU, None, count=3)  # type: ignore[arg-type]
    images, captions = board.shown["retrieval/held_out"]
    assert len(images) == len(captions) == 3
