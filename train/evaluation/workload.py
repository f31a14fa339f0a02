"""What `espalier bench` times: one task done with synthetic inputs, whole and part by part.

Parts are those of the model: vision, text, fusion and decoder, with the heads that read them. Where
two pictures belong to a text, vision is both. A caption's text and fusion layers are its decoder.
Time does not depend on the values of pictures and tokens, with one exception: captions end when the
model says so; here all of them have their full length, so that models do the same work.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from models.config import HEADS, PAIRED
from models.generation import GenerationSettings, generate
from train.evaluation.vqa import AnswerList, rank_states

if TYPE_CHECKING:
    from models.xvlm import XVLM

__all__ = ["PARTS", "PROMPT_TOKENS", "WHOLE", "Workload", "calls_of"]

WHOLE = "whole"
PARTS = ("vision", "text", "fusion", "decoder")
PROMPT_TOKENS = 4  # [CLS] a picture of
Call = Callable[[], object]


@dataclass(frozen=True)
class Workload:
    """What one row is.

    Attributes:
        text_tokens: of a question, caption, statement or expression.
        answers: of the synthetic list, of which `top_k` are compared in full (VQA).
        beams, caption_tokens: of a caption, tokens in all.
    """

    text_tokens: int = 16
    answers: int = 128
    top_k: int = 128
    beams: int = 3
    caption_tokens: int = 20

    def answer_list(self, vocabulary: int, device: torch.device | str = "cpu") -> AnswerList:
        """Answers of one token each between two marks."""
        rows = [[0, index % vocabulary, 1 % vocabulary] for index in range(self.answers)]
        ids = torch.tensor(rows, device=device)
        strings = tuple(map(str, range(self.answers)))
        return AnswerList(strings, ids, torch.ones_like(ids, dtype=torch.bool))


def calls_of(model: XVLM, batch: int, work: Workload, device: torch.device) -> dict[str, Call]:
    """WHOLE and the parts that the model's form has: name -> a call that does it once.

    Every call ends with a value on the host, so that a queue on an accelerator is not mistaken for
    an answer. Run them in eval and inference mode.

    Raises:
        ValueError: the model reads fewer tokens than asked for.
    """
    inputs = _Inputs(model, batch, work, device)
    made = (
        _captioning(model, inputs) if model.config.form == "captioning" else _paired(model, inputs)
    )

    def ended(call: Callable[[], Tensor]) -> Call:
        return lambda: call().flatten()[:1].tolist()

    return {name: ended(call) for name, call in made.items()}


class _Inputs:
    """Random pictures and texts, and what the encoders make of them, which parts start from."""

    def __init__(self, model: XVLM, batch: int, work: Workload, device: torch.device) -> None:
        config = model.config
        needed = work.caption_tokens if config.form == "captioning" else work.text_tokens
        if needed > config.text.max_positions:
            raise ValueError(
                f"{config.name} reads {config.text.max_positions} tokens at most, not {needed}: "
                "lower --text-tokens or --max-length"
            )
        random = torch.Generator().manual_seed(0)
        side, self.work = config.vision.image_size, work
        number = 2 if config.form in PAIRED else 1
        shape = (number * batch, 3, side, side)
        self.images = torch.randint(0, 256, shape, generator=random, dtype=torch.uint8).to(device)
        # Tokens 0 and 1 may be special to somebody; the first one is [CLS] in spirit.
        tokens = torch.randint(
            2, config.text.vocab_size, (batch, work.text_tokens), generator=random
        )
        self.ids = tokens.to(device)
        self.mask = torch.ones_like(self.ids, dtype=torch.bool)
        self.prompt = self.ids[:, :1].expand(-1, PROMPT_TOKENS).contiguous()
        self.answers = work.answer_list(config.text.vocab_size, device)
        self.number = number


def _paired(model: XVLM, inputs: _Inputs) -> dict[str, Callable[[], Tensor]]:
    """Forms with text layers, fusion layers and heads or an answer decoder."""
    heads = HEADS[model.config.form]
    ids, mask, work = inputs.ids, inputs.mask, inputs.work
    results = {
        "itm_head": model.match_logits,
        "bbox_head": model.predict_box,
        "cls_head": model.truth_logits,
        "ta_head": model.assignment_logits,
    }
    # Pre-training has two heads on the fused text; retrieval is what its model does unchanged.
    result = next((results[name] for name in heads if name in results), None)

    def vision() -> Tensor:
        states = model.encode_image(inputs.images).last
        if "image_projection" in heads:
            model.image_feature(states)
        return states

    def text() -> Tensor:
        states = model.encode_text(ids, mask).last
        if "text_projection" in heads:
            model.text_feature(states)
        return states

    def fusion(words: Tensor, pictures: Tensor) -> Tensor:
        images = pictures.chunk(2) if inputs.number == 2 else pictures
        fused = model.fuse(words, mask, images).last
        return fused if result is None else result(fused)

    def decoder(states: Tensor) -> Tensor:
        # Two streams hand over pooled tokens, all of which are there.
        seen = mask if model.image_fusion is None else mask.new_ones(states.shape[:2])
        return rank_states(model, states, seen, inputs.answers, work.top_k)

    with torch.inference_mode():
        words, pictures = text(), vision()
        fused = fusion(words, pictures)
    parts: dict[str, Callable[[], Tensor]] = {
        "vision": vision,
        "text": text,
        "fusion": lambda: fusion(words, pictures),
    }
    if "decoder" not in heads:
        return {WHOLE: lambda: fusion(text(), vision()), **parts}
    whole = {WHOLE: lambda: decoder(fusion(text(), vision()))}
    return {**whole, **parts, "decoder": lambda: decoder(fused)}


def _captioning(model: XVLM, inputs: _Inputs) -> dict[str, Callable[[], Tensor]]:
    """The text encoder is the decoder; every caption is written to its full length."""
    work = inputs.work
    settings = GenerationSettings(
        end_id=1, pad_id=0, beams=work.beams, max_length=work.caption_tokens,
        min_length=work.caption_tokens,
    )  # fmt: skip

    def vision() -> Tensor:
        return model.encode_image(inputs.images).last

    def decoder(states: Tensor) -> Tensor:
        return generate(model, inputs.prompt, states, settings=settings).ids

    with torch.inference_mode():
        states = vision()
    return {WHOLE: lambda: decoder(vision()), "vision": vision, "decoder": lambda: decoder(states)}
