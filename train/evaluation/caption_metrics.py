"""BLEU and CIDEr-D of captions in plain Python, and METEOR and SPICE through pycocoevalcap.

The published numbers come from pycocoevalcap, whose tokenizer, METEOR and SPICE are Java programs.
BLEU and CIDEr here are its definitions (BLEU: Papineni et al. 2002 with the closest reference
length; CIDEr-D: Vedantam et al., 1411.5726), behind a tokenizer that splits words as the Penn
Treebank does and leaves punctuation out. All scores are fractions: 1.0 is the 100 of the tables.
"""

from __future__ import annotations

import math
import re
import shutil
import subprocess
from collections import Counter
from collections.abc import Mapping, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

__all__ = ["bleu", "caption_scores", "cider", "cider_each", "java_scores", "need_java", "words"]

Words = Sequence[str]
_ORDER = 4
_SIGMA = 6.0
_CONTRACTIONS = re.compile(r"(?<=\w)('(?:s|m|d|ll|re|ve)|n't)\b", re.IGNORECASE)
_TOKEN = re.compile(r"n't|'(?:s|m|d|ll|re|ve)\b|[\w]+(?:[-/.&'][\w]+)*|[%$#@&+=*]", re.IGNORECASE)


def words(text: str) -> list[str]:
    """Lower-case tokens without punctuation: "A dog's ball, isn't it?" -> a dog 's ball is n't it.

    As pycocoevalcap's PTBTokenizer on the captions that people and models write; numbers, hyphenated
    words and abbreviations stay whole.
    """
    return _TOKEN.findall(_CONTRACTIONS.sub(r" \1", text.lower()))


def _grams(tokens: Words, order: int) -> Counter[tuple[str, ...]]:
    return Counter(zip(*(tokens[start:] for start in range(order)), strict=False))


def _same_number(candidates: Sequence[Words], references: Sequence[Sequence[Words]]) -> None:
    if len(candidates) != len(references) or not candidates:
        raise ValueError(
            f"{len(candidates)} captions and references of {len(references)} images: one caption for "
            "each image is needed"
        )
    if not all(references):
        raise ValueError("an image without reference captions cannot be scored")


def bleu(
    candidates: Sequence[Words], references: Sequence[Sequence[Words]], order: int = _ORDER
) -> float:
    """Corpus BLEU with n-grams up to `order`, without smoothing.

    Args:
        candidates: tokens of one caption per image.   references: several for each image.

    Raises:
        ValueError: not as many candidates as images, or an image without references.
    """
    _same_number(candidates, references)
    hits, tried = [0] * order, [0] * order
    length = wanted = 0
    for said, known in zip(candidates, references, strict=True):
        length += len(said)
        # The closest reference length; among equally close ones the shorter.
        wanted += min((abs(len(one) - len(said)), len(one)) for one in known)[1]
        for n in range(1, order + 1):
            most: Counter[tuple[str, ...]] = Counter()
            for one in known:
                most |= _grams(one, n)
            own = _grams(said, n)
            hits[n - 1] += (own & most).total()
            tried[n - 1] += own.total()
    if not all(hits):
        return 0.0
    precision = math.exp(sum(map(math.log, hits)) / order - sum(map(math.log, tried)) / order)
    return precision * math.exp(min(0.0, 1 - wanted / length))


_Vector = list[dict[tuple[str, ...], float]]


def _vector(tokens: Words, rarity: Mapping[tuple[str, ...], float], unseen: float) -> _Vector:
    """For each order, n-gram -> count times rarity."""
    return [
        {gram: count * rarity.get(gram, unseen) for gram, count in _grams(tokens, n).items()}
        for n in range(1, _ORDER + 1)
    ]


def _norm(weights: Mapping[tuple[str, ...], float]) -> float:
    return math.sqrt(sum(value * value for value in weights.values()))


def _similarity(said: _Vector, known: _Vector, difference: int) -> float:
    """Mean over orders of the clipped cosine, times a penalty for the difference of lengths."""
    total = 0.0
    for ours, theirs in zip(said, known, strict=True):
        both = sum(min(value, theirs[g]) * theirs[g] for g, value in ours.items() if g in theirs)
        scale = _norm(ours) * _norm(theirs)
        total += both / scale if scale else 0.0
    return total / _ORDER * math.exp(-(difference**2) / (2 * _SIGMA**2))


def cider_each(candidates: Sequence[Words], references: Sequence[Sequence[Words]]) -> list[float]:
    """CIDEr-D of each image; rarities are those of all these references, so it takes many.

    Raises:
        ValueError: as `bleu`.
    """
    _same_number(candidates, references)
    images: Counter[tuple[str, ...]] = Counter()
    for known in references:
        images.update({gram for one in known for n in range(_ORDER) for gram in _grams(one, n + 1)})
    unseen = math.log(len(references))
    rarity = {gram: unseen - math.log(count) for gram, count in images.items()}
    found = []
    for said, known in zip(candidates, references, strict=True):
        own = _vector(said, rarity, unseen)
        total = sum(
            # pycocoevalcap takes the number of bigrams for the length.
            _similarity(own, _vector(one, rarity, unseen), _bigrams(said) - _bigrams(one))
            for one in known
        )
        found.append(10.0 * total / len(known))
    return found


def cider(candidates: Sequence[Words], references: Sequence[Sequence[Words]]) -> float:
    """The mean of `cider_each`. Raises ValueError as `bleu`."""
    found = cider_each(candidates, references)
    return sum(found) / len(found)


def _bigrams(tokens: Words) -> int:
    return max(0, len(tokens) - 1)


def caption_scores(
    captions: Sequence[str], references: Sequence[Sequence[str]]
) -> dict[str, float]:
    """ "bleu4" and "cider" of one caption per image against its references."""
    said = [words(text) for text in captions]
    known = [[words(text) for text in texts] for texts in references]
    return {"bleu4": bleu(said, known), "cider": cider(said, known)}


def need_java(spice: bool = False) -> None:
    """Raises ValueError, saying what to install, unless METEOR (and SPICE) can run here.

    METEOR and the tokenizer come with pycocoevalcap. SPICE needs Stanford CoreNLP, which
    pycocoevalcap would download from a web server, unverified, in the middle of an evaluation: that
    is left to the user.
    """
    if shutil.which("java") is None:
        raise ValueError("METEOR and SPICE are Java programs: install a Java runtime (java)")
    _coco("tokenizer.ptbtokenizer", "PTBTokenizer")
    if not spice:
        return
    found = import_module("pycocoevalcap.spice.get_stanford_models")
    folder = Path(found.SPICEDIR, found.SPICELIB)
    missing = [
        name for name in (f"{found.JAR}.jar", f"{found.JAR}-models.jar")
        if not (folder / name).is_file()
    ]  # fmt: skip
    if missing:
        raise ValueError(
            f"SPICE needs {' and '.join(missing)} of Stanford CoreNLP in {folder}: get them with "
            f"python {found.__file__}, or leave --spice out"
        )


def java_scores(
    captions: Sequence[str], references: Sequence[Sequence[str]], spice: bool = False
) -> dict[str, float]:
    """ "meteor", "bleu4", "cider" and, if wanted, "spice" by pycocoevalcap, its tokenizer included.

    Raises:
        ValueError: something is missing (see `need_java`), or SPICE fails.
    """
    need_java(spice)
    tokenizer = _coco("tokenizer.ptbtokenizer", "PTBTokenizer")()
    known = tokenizer.tokenize(
        {n: [{"caption": text} for text in texts] for n, texts in enumerate(references)}
    )
    said = tokenizer.tokenize({n: [{"caption": text}] for n, text in enumerate(captions)})
    scores = {}
    for name in ("Meteor", "Cider", *(("Spice",) if spice else ())):
        scorer = _coco(f"{name.lower()}.{name.lower()}", name)()
        try:
            scores[name.lower()] = float(scorer.compute_score(known, said)[0])
        except (subprocess.CalledProcessError, BrokenPipeError) as error:
            raise ValueError(
                f"{name.upper()} did not run ({error}); is this Java too new?"
            ) from None
    bleus = _coco("bleu.bleu", "Bleu")(_ORDER).compute_score(known, said, verbose=0)[0]
    return scores | {"bleu4": float(bleus[-1])}


def _coco(module: str, name: str) -> Any:
    """A class of pycocoevalcap, which is an extra."""
    try:
        return getattr(import_module(f"pycocoevalcap.{module}"), name)
    except ImportError as error:
        raise ValueError(
            f"METEOR and SPICE need pycocoevalcap ({error}): pip install 'espalier[captions]'"
        ) from None
