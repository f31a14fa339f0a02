"""Cleaning, padding and masking against their published rules."""

from __future__ import annotations

import pickle
import random

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from data_pipeline.text import Masking, TextEncoder, clean_text, load_tokenizer

relaxed = settings(
    max_examples=120, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


@pytest.mark.parametrize(
    ("text", "clean"),
    [
        ("What's THAT?", "what s that"),
        ("a red-blue/green  thing.", "a red blue green thing"),
        ('<person> says "hi" (twice); #1: ok~*!', "person says hi twice 1 ok"),
        ("  ", ""),
        ("a b c d", "a b c"),
    ],
)
def test_clean_text(text, clean):
    assert clean_text(text, 3 if text == "a b c d" else 40) == clean


def test_encoding_equals_transformers(tokenizer):
    encoder = TextEncoder(tokenizer, 8)
    texts = ["what colour is the circle", "playing unbreakable", "", "a red thing " * 9, "playing"]
    ids, mask = encoder(texts)
    assert ids.shape == mask.shape == (5, 8) and ids.dtype == np.int64 and mask.dtype == bool
    for row, text in enumerate(texts):
        inner = tokenizer.convert_tokens_to_ids(tokenizer.tokenize(clean_text(text, 8)))[:6]
        full = [tokenizer.cls_token_id, *inner, tokenizer.sep_token_id]
        assert ids[row, : len(full)].tolist() == full
        assert (
            mask[row].sum() == len(full) and (ids[row][~mask[row]] == tokenizer.pad_token_id).all()
        )


def test_padding_that_others_turned_on_does_not_matter(tokenizer):
    """A padded call of transformers leaves padding on in the tokenizer that all share."""
    texts = ["red", "what colour is the circle"]
    encoder, early = TextEncoder(tokenizer, 8), TextEncoder(tokenizer, 8)
    expected = early.encode(texts)
    tokenizer(texts, padding="longest", truncation=True, max_length=3)
    assert tokenizer.backend_tokenizer.padding is not None
    assert encoder.encode(texts) == expected
    assert TextEncoder(tokenizer, 8).encode(texts) == expected


def test_cache_gives_the_same_and_does_not_travel(tokenizer):
    encoder = TextEncoder(tokenizer, 8)
    first = encoder.encode(["a red circle", "how many"])
    assert encoder.encode(["how many", "a red circle"]) == first[::-1]
    copy = pickle.loads(pickle.dumps(encoder))
    assert copy._cache == {} and copy.encode(["a red circle"]) == first[:1]


def test_a_full_cache_is_emptied(tokenizer, monkeypatch):
    monkeypatch.setattr("data_pipeline.text._CACHE_TEXTS", 3)
    encoder = TextEncoder(tokenizer, 8)
    encoder.encode(["a", "red", "blue"])
    assert encoder.encode(["a", "green"]) == TextEncoder(tokenizer, 8).encode(["a", "green"])


def texts(tokenizer):
    return st.lists(st.integers(5, len(tokenizer) - 1), min_size=0, max_size=38).map(
        lambda inner: [tokenizer.cls_token_id, *inner, tokenizer.sep_token_id]
    )


@relaxed
@given(data=st.data(), probability=st.floats(0.05, 1.0), limit=st.integers(1, 12))
def test_masking_rules(tokenizer, data, probability, limit):
    ids = data.draw(texts(tokenizer))
    masking = Masking(tokenizer, probability, limit)
    seed = data.draw(st.integers(0, 1000))
    masked = masking(ids, random.Random(seed))
    assert masked == masking(ids, random.Random(seed))
    wanted = min(limit, max(1, round(probability * len(ids))), len(ids) - 1)
    assert len(masked.positions) == wanted
    assert masked.positions == sorted(set(masked.positions))
    assert 0 not in masked.positions and max(masked.positions) < len(ids)
    assert masked.labels == [ids[position] for position in masked.positions]
    untouched = set(range(len(ids))) - set(masked.positions)
    assert all(masked.ids[position] == ids[position] for position in untouched)
    assert all(0 <= token < len(tokenizer) for token in masked.ids)


def test_words_are_masked_whole(tokenizer):
    """With room to spare, a piece is never masked without its word (only overflow may cut)."""
    words = [["play", "##ing"], ["un", "##break", "##able"], ["red"], ["circle"], ["a"]]
    masking = Masking(tokenizer, 1e-9, 8)
    masking.count = lambda length: 1  # type: ignore[method-assign]
    ids = [tokenizer.cls_token_id]
    owner = [0]
    for number, word in enumerate(words, 1):
        ids += tokenizer.convert_tokens_to_ids(word)
        owner += [number] * len(word)
    spans = set()
    for start in range(1, len(ids)):
        for seed in range(30):
            span = list(masking._span(ids, start, random.Random(seed)))
            spans.add(len(span))
            for position in span:
                assert {n for n, o in enumerate(owner) if o == owner[position]} <= set(span)
            assert start in span
    assert len(spans) > 2


def test_shares_of_mask_random_and_kept(tokenizer):
    masking = Masking(tokenizer, 0.25, 8)
    ids = [tokenizer.cls_token_id, *[7, 8, 9, 10, 11, 12] * 5, tokenizer.sep_token_id]
    masked = kept = total = last = 0
    for seed in range(2000):
        result = masking(ids, random.Random(seed))
        total += len(result.positions)
        now = [result.ids[position] for position in result.positions]
        masked += now.count(tokenizer.mask_token_id)
        kept += sum(a == b for a, b in zip(now, result.labels, strict=True))
        last += len(ids) - 1 in result.positions
    assert abs(masked / total - 0.8) < 0.02
    assert abs(kept / total - 0.1) < 0.02
    assert last > 200  # [SEP] may be masked


def test_bad_settings(tokenizer, tmp_path):
    with pytest.raises(ValueError, match="mlm_probability"):
        Masking(tokenizer, 0.0, 8)
    with pytest.raises(ValueError, match="max_tokens"):
        TextEncoder(tokenizer, 2)
    with pytest.raises(FileNotFoundError, match="data.tokenizer"):
        load_tokenizer(tmp_path)
