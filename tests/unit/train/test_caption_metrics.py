"""BLEU and CIDEr against hand-computed values and against pycocoevalcap."""

from __future__ import annotations

import math
import random
import shutil
from importlib import import_module

import pytest

from train.evaluation import caption_metrics
from train.evaluation.caption_metrics import bleu, caption_scores, cider, java_scores, words

WORDS = ["a", "red", "blue", "cat", "dog", "on", "the", "mat", "sits"]


def sentences(seed: int, images: int = 30) -> tuple[list[list[str]], list[list[list[str]]]]:
    """Captions and references that share some n-grams; some captions are short, one is empty."""
    rng = random.Random(seed)

    def sentence() -> list[str]:
        return [rng.choice(WORDS) for _ in range(rng.randint(3, 12))]

    references = [[sentence() for _ in range(rng.randint(1, 5))] for _ in range(images)]
    candidates = []
    for known in references:
        said = list(rng.choice(known))
        for _ in range(rng.randint(0, 4)):
            said[rng.randrange(len(said))] = rng.choice(WORDS)
        candidates.append(said[: rng.randint(1, len(said))])
    candidates[0] = []
    return candidates, references


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("A dog's ball, isn't it?", "a dog 's ball is n't it"),
        ("Two men - one in a T-shirt - can't stop.", "two men one in a t-shirt ca n't stop"),
        ('They\'re "here"...', "they 're here"),
        ("a 3.5 ft. sign; (red & white)", "a 3.5 ft sign red & white"),
        ("", ""),
    ],
)
def test_words(text, expected):
    assert " ".join(words(text)) == expected


def test_bleu_of_a_hand_computed_pair():
    """Candidate of 4 words: 4/4, 2/3 and 1/2 of the n-grams up to 3, one word shorter than the closest
    reference.
    """
    said = [["a", "b", "c", "a"]]
    known = [[["a", "b", "c", "d", "a"], ["x", "a", "b", "c", "y", "z", "w"]]]
    # unigrams a a b c: all; bigrams ab bc ca: two of three; trigrams abc bca: one of two
    expected = (1 * 2 / 3 * 1 / 2) ** (1 / 3) * math.exp(1 - 5 / 4)
    assert bleu(said, known, 3) == pytest.approx(expected, rel=1e-12)
    assert bleu(said, known, 4) == 0.0
    assert bleu(known[0][:1], known) == pytest.approx(1.0)


def test_bleu_clips_repeated_words_and_takes_the_shorter_of_two_close_lengths():
    said = [["the", "the", "the"]]
    known = [[["the", "cat"], ["the", "cat", "sat", "on"]]]  # both lengths are one away from 3
    assert bleu(said, known, 1) == pytest.approx(1 / 3)  # no penalty: 3 > 2


def test_cider_of_a_hand_computed_corpus():
    """Two images with disjoint words: every n-gram has rarity log 2, so cosines are counts."""
    known = [[["a", "b", "c", "d", "e"]], [["v", "w", "x", "y", "z"]]]
    assert cider([["a", "b", "c", "d", "e"], ["v", "w", "x", "y", "z"]], known) == pytest.approx(
        10.0
    )
    # Of "a b c": 3/5 of the unigrams (cosine 3 / sqrt(15)), 2 of 4, 1 of 3, none; two words short.
    parts = [3 / math.sqrt(15), 2 / math.sqrt(8), 1 / math.sqrt(3), 0.0]
    first = 10 * sum(parts) / 4 * math.exp(-4 / 72)
    assert cider([["a", "b", "c"], ["v", "w", "x", "y", "z"]], known) == pytest.approx(
        (first + 10) / 2
    )
    # A word of all images says nothing.
    common = [[["a", "b"]], [["a", "c"]]]
    assert cider([["a"], ["a"]], common) == 0.0


def test_repeating_a_word_does_not_pay():
    known = [[["a", "b", "c", "d"]], [["w", "x", "y", "z"]]]
    once = cider([["a", "b", "c", "d"], []], known)
    often = cider([["a", "a", "a", "a"], []], known)
    assert often < 0.3 * once


def test_bad_corpora_are_refused():
    with pytest.raises(ValueError, match="one caption for each image"):
        bleu([["a"]], [])
    with pytest.raises(ValueError, match="without reference"):
        cider([["a"]], [[]])


@pytest.mark.parametrize("seed", range(4))
def test_scores_are_those_of_pycocoevalcap(seed):
    pytest.importorskip("pycocoevalcap", reason="extra 'captions' is not installed")
    said, known = sentences(seed)
    # Not through pycocoevalcap.eval, which needs pycocotools and Java.
    theirs_bleu = import_module("pycocoevalcap.bleu.bleu_scorer").BleuScorer(n=4)
    theirs_cider = import_module("pycocoevalcap.cider.cider_scorer").CiderScorer()
    for one, many in zip(said, known, strict=True):
        pair = " ".join(one), [" ".join(text) for text in many]
        theirs_bleu += pair
        theirs_cider += pair
    expected, _ = theirs_bleu.compute_score(option="closest")
    for order in range(1, 5):
        assert bleu(said, known, order) == pytest.approx(expected[order - 1], rel=1e-6, abs=1e-9)
    assert cider(said, known) == pytest.approx(theirs_cider.compute_score()[0], rel=1e-9)


def test_scores_of_strings():
    found = caption_scores(["A red cat.", "the dog"], [["a red cat"], ["a blue dog sits"]])
    assert set(found) == {"bleu4", "cider"} and found["cider"] > 1


def test_java_scores_say_what_is_missing(monkeypatch):
    monkeypatch.setattr(caption_metrics.shutil, "which", lambda name: None)
    with pytest.raises(ValueError, match="install a Java runtime"):
        java_scores(["a"], [["a"]])
    monkeypatch.setattr(caption_metrics.shutil, "which", lambda name: "/usr/bin/java")

    def missing(name: str):
        raise ImportError(f"No module named {name!r}")

    monkeypatch.setattr(caption_metrics, "import_module", missing)
    with pytest.raises(ValueError, match=r"pip install 'espalier\[captions\]'"):
        java_scores(["a"], [["a"]])


@pytest.mark.slow
def test_meteor_and_the_official_tokenizer(tmp_path):
    pytest.importorskip("pycocoevalcap", reason="extra 'captions' is not installed")
    if shutil.which("java") is None:
        pytest.skip("no Java runtime")
    said = ["A red cat sits on the mat.", "two dogs", "isn't it a well-known man's T-shirt?"]
    known = [
        ["a red cat sits on the mat", "The cat, red, is on a mat"],
        ["a dog is running in the field"],
        ["it isn't the man's well-known T-shirt", "a shirt; a man"],
    ]
    found = java_scores(said, known)
    assert set(found) == {"meteor", "bleu4", "cider"} and 0.2 < found["meteor"] < 0.9
    own = caption_scores(said, known)
    assert own == pytest.approx({name: found[name] for name in own}, rel=1e-6)


def test_spice_is_refused_before_it_would_download(monkeypatch, tmp_path):
    pytest.importorskip("pycocoevalcap", reason="extra 'captions' is not installed")
    monkeypatch.setattr(caption_metrics.shutil, "which", lambda name: "/usr/bin/java")
    models = import_module("pycocoevalcap.spice.get_stanford_models")
    monkeypatch.setattr(models, "SPICEDIR", str(tmp_path))
    with pytest.raises(ValueError, match=r"Stanford CoreNLP .*leave --spice out"):
        java_scores(["a"], [["a"]], spice=True)
