"""The WordPiece vocabulary of the grammar: special tokens, then every word it can say, sorted.

It depends on the grammar alone, never on a seed, so models and data folders always agree.
"""

from __future__ import annotations

import json
import string
from pathlib import Path

from data_pipeline.blocksworld.language import (
    CAPTION_TEMPLATES,
    PLURAL,
    RELATIONS,
    STATEMENT_TEMPLATES,
)
from data_pipeline.blocksworld.questions import ANSWERS, QUESTION_TEMPLATES
from data_pipeline.blocksworld.scenes import COLOURS, MAX_THINGS, SHAPES, SIZES

__all__ = ["SPECIAL", "vocabulary", "write_tokenizer"]

SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
_EXTRA = ("a", "and", "the", "more", "fewer", "larger", "smaller", "colour", "shape")


def _template_words(template: str) -> set[str]:
    fields = [text for text, *_ in string.Formatter().parse(template)]
    return {word for text in fields for word in text.split()}


def vocabulary() -> list[str]:
    """All tokens; a token's id is its place."""
    words = set(_EXTRA) | set(COLOURS) | set(SHAPES) | set(SIZES) | set(ANSWERS)
    words |= set(PLURAL) | set(PLURAL.values())
    words |= {word for relation in RELATIONS for word in relation.split()}
    words |= {str(n) for n in range(2 * MAX_THINGS + 2)}  # statements count over two pictures
    for template in (*CAPTION_TEMPLATES, *STATEMENT_TEMPLATES, *QUESTION_TEMPLATES):
        words |= _template_words(template)
    return [*SPECIAL, *sorted(words)]


def write_tokenizer(folder: Path) -> None:
    """Write tokenizer.json, vocab.txt and tokenizer_config.json for transformers' AutoTokenizer."""
    from tokenizers import Tokenizer, decoders, normalizers, pre_tokenizers, processors
    from tokenizers.models import WordPiece

    tokens = vocabulary()
    tokenizer = Tokenizer(
        WordPiece({token: place for place, token in enumerate(tokens)}, unk_token="[UNK]")
    )
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=[("[CLS]", 2), ("[SEP]", 3)],
    )
    tokenizer.decoder = decoders.WordPiece(prefix="##")
    tokenizer.add_special_tokens(list(SPECIAL))
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "vocab.txt").write_text("\n".join(tokens) + "\n", encoding="utf-8")
    names = ("pad_token", "unk_token", "cls_token", "sep_token", "mask_token")
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "do_lower_case": True,
        "model_max_length": 512,
        **dict(zip(names, SPECIAL, strict=True)),
    }
    text = json.dumps(config, indent=2) + "\n"
    (folder / "tokenizer_config.json").write_text(text, encoding="utf-8")
