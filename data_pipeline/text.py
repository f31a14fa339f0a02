"""Text: cleaning, tokenisation with fixed padding, masking for MLM. Rules of X-VLM, as published."""

from __future__ import annotations

import copy
import random
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

__all__ = ["IGNORE", "MaskedTokens", "Masking", "TextEncoder", "clean_text", "load_tokenizer"]

IGNORE = -100
_PUNCTUATION = re.compile(r"[,.'!?\"()*#:;~]")
_CACHE_TEXTS = 200_000
_GRAM_SHARE = 0.2
_MASK_SHARE, _RANDOM_SHARE = 0.8, 0.1


def load_tokenizer(folder: Path | str) -> PreTrainedTokenizerFast:
    """The fast tokenizer of a data or model folder (the folder itself, or its `tokenizer/`).

    Raises:
        FileNotFoundError: no tokenizer there.   ValueError: it has no [CLS], [SEP], [PAD] or
            [MASK].
    """
    from transformers import AutoTokenizer

    path = Path(folder)
    if (
        not (path / "tokenizer.json").is_file()
        and (path / "tokenizer" / "tokenizer.json").is_file()
    ):
        path = path / "tokenizer"
    if not (path / "tokenizer.json").is_file():
        raise FileNotFoundError(
            f"{path}: no tokenizer.json; set data.tokenizer to a folder that has one"
        )
    tokenizer = AutoTokenizer.from_pretrained(str(path), use_fast=True, local_files_only=True)
    for name in ("cls_token", "sep_token", "pad_token", "mask_token"):
        if getattr(tokenizer, name) is None:
            raise ValueError(
                f"{path}: the tokenizer has no {name}; it must be a BERT-style tokenizer"
            )
    return tokenizer


def _id(tokenizer: PreTrainedTokenizerFast, role: str) -> int:
    """The id of a special token: "cls", "sep", "pad" or "mask"."""
    number = getattr(tokenizer, f"{role}_token_id")
    if not isinstance(number, int):
        raise ValueError(f"the tokenizer has no {role} token; it must be a BERT-style tokenizer")
    return number


def clean_text(text: str, max_words: int) -> str:
    """Lower case, punctuation, '-' and '/' to spaces, single spaces, at most `max_words` words."""
    text = text.lower().replace("<person>", "person")
    text = _PUNCTUATION.sub(" ", text).replace("-", " ").replace("/", " ")
    return " ".join(text.split()[:max_words])


class TextEncoder:
    """Strings to ids, cleaned by default, with a cache: questions from a grammar repeat all the time.

    Args:
        tokenizer: a fast BERT-style tokenizer.   max_tokens: length after padding, [CLS] and [SEP]
            included.
        max_words: words kept by cleaning.
        clean: False leaves strings as they are (answers, and captions behind their prompt).
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerFast,
        max_tokens: int,
        max_words: int | None = None,
        clean: bool = True,
    ) -> None:
        if max_tokens < 3:
            raise ValueError(f"max_tokens must be at least 3, is {max_tokens}")
        self.max_tokens = max_tokens
        self.max_words = max_words or max_tokens
        self.clean = clean
        self.pad = _id(tokenizer, "pad")
        self.cls = _id(tokenizer, "cls")
        self.sep = _id(tokenizer, "sep")
        # A copy: transformers turns padding and truncation on in its own with every padded call, and
        # they stay on; then ids would hold padding before [SEP], as much as the batch's longest text
        # asks for.
        self._backend = copy.deepcopy(tokenizer.backend_tokenizer)
        self._backend.no_padding()
        self._backend.no_truncation()
        self._cache: dict[str, list[int]] = {}

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        """Ids of each text with [CLS] and [SEP], cut to max_tokens, not padded. Shared: read only."""
        cache = self._cache
        new = list(dict.fromkeys(text for text in texts if text not in cache))
        if new:
            if len(cache) + len(new) > _CACHE_TEXTS:
                cache.clear()
                new = list(dict.fromkeys(texts))
            cleaned = [clean_text(text, self.max_words) for text in new] if self.clean else new
            # The Rust tokenizer directly: transformers' wrapper costs several times as much a call.
            encoded = self._backend.encode_batch_fast(cleaned, add_special_tokens=False)
            for text, encoding in zip(new, encoded, strict=True):
                cache[text] = [self.cls, *encoding.ids[: self.max_tokens - 2], self.sep]
        return [cache[text] for text in texts]

    def pad_rows(self, rows: Sequence[Sequence[int]]) -> tuple[np.ndarray, np.ndarray]:
        """(B, max_tokens) int64 ids and (B, max_tokens) bool mask, True on real tokens."""
        ids = np.full((len(rows), self.max_tokens), self.pad, np.int64)
        mask = np.zeros((len(rows), self.max_tokens), bool)
        for row, tokens in enumerate(rows):
            ids[row, : len(tokens)] = tokens
            mask[row, : len(tokens)] = True
        return ids, mask

    def __call__(self, texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        """Padded ids and mask of the texts."""
        return self.pad_rows(self.encode(texts))

    def __getstate__(self) -> dict:
        return self.__dict__ | {"_cache": {}}


@dataclass(frozen=True, slots=True)
class MaskedTokens:
    """One text after masking. `positions` ascend; `labels` are the original ids there."""

    ids: list[int]
    positions: list[int]
    labels: list[int]


class Masking:
    """BERT masking of whole words and short spans, drawn from the sample's generator.

    n = min(limit, max(1, round(probability * len))) tokens, len including [CLS] and [SEP]. Start
    positions come in random order; one in five starts a span of 2 or 3 tokens; spans grow to whole
    words by '##'; what is over n is cut at random. [CLS] is never masked, [SEP] may be. 80 %
    become [MASK], 10 % a random id, 10 % stay.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerFast, probability: float, limit: int) -> None:
        if not 0 < probability <= 1 or limit < 1:
            raise ValueError(
                "data.mlm_probability must lie in (0, 1] and data.mlm_max be at least 1"
            )
        self.probability = probability
        self.limit = limit
        self.vocabulary = len(tokenizer)
        self.mask = _id(tokenizer, "mask")
        tokens = tokenizer.convert_ids_to_tokens(list(range(self.vocabulary)))
        self.inside = frozenset(n for n, token in enumerate(tokens) if token.startswith("##"))

    def count(self, length: int) -> int:
        """Tokens to mask in a text of `length` ids."""
        return min(self.limit, max(1, round(self.probability * length)), length - 1)

    def _span(self, ids: Sequence[int], start: int, rng: random.Random) -> range:
        end = start + (rng.randint(2, 3) if rng.random() < _GRAM_SHARE else 1)
        end = min(end, len(ids))
        while start > 1 and ids[start] in self.inside:
            start -= 1
        while end < len(ids) and ids[end] in self.inside:
            end += 1
        return range(start, end)

    def _choose(self, ids: Sequence[int], rng: random.Random) -> list[int]:
        wanted = self.count(len(ids))
        starts = list(range(1, len(ids)))
        rng.shuffle(starts)
        chosen: set[int] = set()
        for start in starts:
            if len(chosen) >= wanted:
                break
            if start not in chosen:
                chosen.update(self._span(ids, start, rng))
        if len(chosen) > wanted:
            return sorted(rng.sample(sorted(chosen), wanted))
        return sorted(chosen)

    def __call__(self, ids: Sequence[int], rng: random.Random) -> MaskedTokens:
        """Masks one text ([CLS] first, no padding)."""
        positions = self._choose(ids, rng)
        masked = list(ids)
        for position in positions:
            draw = rng.random()
            if draw < _MASK_SHARE:
                masked[position] = self.mask
            elif draw < _MASK_SHARE + _RANDOM_SHARE:
                masked[position] = rng.randrange(self.vocabulary)
        return MaskedTokens(masked, positions, [ids[position] for position in positions])
