"""What `espalier bench` times: one task done with synthetic inputs, whole and part by part.

Parts are those of the model: vision, text, fusion and decoder, with the heads that read them. Where
two pictures belong to a text, vision is both. A caption's text and fusion layers are its decoder.
Time does not depend on the values of pictures and tokens, with two exceptions. Captions end when the
model says so; here all of them have their full length, so that models do the same work. Trimmers keep
what a picture and a text need; on random ones `bench` has each site keep its calibrated count.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from models.config import HEADS, PAIRED
from models.generation import GenerationSettings, generate
from train.evaluation.vqa import AnswerList, rank_states

if TYPE_CHECKING:
    from models.config import ModelConfig
    from models.outputs import EncoderOutput
    from models.xvlm import XVLM

__all__ = ["PARTS", "PROMPT_TOKENS", "WHOLE", "Inputs", "Workload", "calls_of"]

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


def calls_of(
    model: XVLM, batch: int, work: Workload, device: torch.device, inputs: Inputs | None = None
) -> dict[str, Call]:
    """WHOLE and the parts that the model's form has: name -> a call that does it once.

    Every call ends with a value on the host, so that a queue on an accelerator is not mistaken for
    an answer. Run them in eval and inference mode. Trimmers run in the mode that the model is in;
    parts start from what the parts before them make in that mode now.

    Args:
        inputs: what to work on; None: `batch` random rows.

    Raises:
        ValueError: the model reads fewer tokens than asked for.
    """
    if inputs is None:
        inputs = Inputs.random(model.config, batch, work, device)
    captions = model.config.form == "captioning"
    made = (_captioning if captions else _paired)(model, inputs, work)

    def ended(call: Callable[[], Tensor]) -> Call:
        return lambda: call().flatten()[:1].tolist()

    return {name: ended(call) for name, call in made.items()}


@dataclass(frozen=True)
class Inputs:
    """Rows to work on, each with pictures of its own.

    Attributes:
        images: (B, 3, S, S) uint8; of two pictures a text (2 B, ...), all left ones first.
        ids, mask: (B, L) int64 and bool.   prompt: (B, Lp) int64, how captions begin.
        answers: the list that is ranked.
    """

    images: Tensor
    ids: Tensor
    mask: Tensor
    prompt: Tensor
    answers: AnswerList

    @classmethod
    def random(
        cls, config: ModelConfig, batch: int, work: Workload, device: torch.device
    ) -> Inputs:
        """Raises ValueError when the model reads fewer tokens than asked for."""
        needed = work.caption_tokens if config.form == "captioning" else work.text_tokens
        if needed > config.text.max_positions:
            raise ValueError(
                f"{config.name} reads {config.text.max_positions} tokens at most, not {needed}: "
                "lower --text-tokens or --max-length"
            )
        random = torch.Generator().manual_seed(0)
        side = config.vision.image_size
        number = 2 if config.form in PAIRED else 1
        shape = (number * batch, 3, side, side)
        images = torch.randint(0, 256, shape, generator=random, dtype=torch.uint8)
        # Tokens 0 and 1 may be special to somebody; the first one is [CLS] in spirit.
        ids = torch.randint(2, config.text.vocab_size, (batch, work.text_tokens), generator=random)
        ids = ids.to(device)
        return cls(
            images.to(device),
            ids,
            torch.ones_like(ids, dtype=torch.bool),
            ids[:, :1].expand(-1, PROMPT_TOKENS).contiguous(),
            work.answer_list(config.text.vocab_size, device),
        )

    @classmethod
    def of_batch(
        cls, found: Any, rows: Sequence[int], config: ModelConfig, work: Workload,
        device: torch.device,
    ) -> Inputs:  # fmt: skip
        """Some rows of a loader's batch, without the padding that none of them needs."""
        asked = hasattr(found, "question_ids")
        ids, mask = (
            (found.question_ids, found.question_mask)
            if asked
            else (found.text_ids, found.text_mask)
        )
        chosen = torch.tensor(list(rows))
        length = int(mask[chosen].sum(1).max())
        places = [found.image_index[chosen]]
        if config.form in PAIRED:
            places.append(found.second_index[chosen])
        prompt = found.prompt if config.form == "captioning" else ids[:, :PROMPT_TOKENS]
        return cls(
            found.images[torch.cat(places)].to(device),
            ids[chosen, :length].to(device),
            mask[chosen, :length].to(device),
            prompt[chosen].to(device),
            work.answer_list(config.text.vocab_size, device),
        )

    @property
    def number(self) -> int:
        """Pictures of a row."""
        return len(self.images) // len(self.ids)


def _paired(model: XVLM, inputs: Inputs, work: Workload) -> dict[str, Callable[[], Tensor]]:
    """Forms with text layers, fusion layers and heads or an answer decoder."""
    heads = HEADS[model.config.form]
    ids, mask = inputs.ids, inputs.mask
    results = {
        "itm_head": model.match_logits,
        "bbox_head": model.predict_box,
        "cls_head": model.truth_logits,
        "ta_head": model.assignment_logits,
    }
    # Pre-training has two heads on the fused text; retrieval is what its model does unchanged.
    result = next((results[name] for name in heads if name in results), None)

    def text() -> EncoderOutput:
        output = model.encode_text(ids, mask)
        if "text_projection" in heads:
            model.text_feature(output.last)
        return output

    def vision(words: EncoderOutput) -> EncoderOutput:
        guide = words.last[:, 0].repeat(inputs.number, 1) if model.guided else None
        output = model.encode_image(inputs.images, guide=guide)
        if "image_projection" in heads:
            model.image_feature(output.last)
        return output

    def fusion(words: EncoderOutput, pictures: EncoderOutput) -> EncoderOutput:
        seen = mask if words.mask is None else words.mask
        if inputs.number == 1:
            return model.fuse(words.last, seen, pictures.last, pictures.mask)
        masks = (None, None) if pictures.mask is None else pictures.mask.chunk(2)
        return model.fuse(words.last, seen, pictures.last.chunk(2), masks)

    def judged(fused: EncoderOutput) -> Tensor:
        return fused.last if result is None else result(fused.last)

    def decoder(fused: EncoderOutput) -> Tensor:
        # Two streams hand over pooled tokens, all of which are there.
        full = mask if model.image_fusion is None else mask.new_ones(fused.last.shape[:2])
        seen = full if fused.mask is None else fused.mask
        return rank_states(model, fused.last, seen, inputs.answers, work.top_k)

    def whole() -> EncoderOutput:
        words = text()
        return fusion(words, vision(words))

    with torch.inference_mode():
        words = text()
        pictures = vision(words)
        fused = fusion(words, pictures)
    parts: dict[str, Callable[[], Tensor]] = {
        "vision": lambda: vision(words).last,
        "text": lambda: text().last,
        "fusion": lambda: judged(fusion(words, pictures)),
    }
    if "decoder" not in heads:
        return {WHOLE: lambda: judged(whole()), **parts}
    return {WHOLE: lambda: decoder(whole()), **parts, "decoder": lambda: decoder(fused)}


def _captioning(model: XVLM, inputs: Inputs, work: Workload) -> dict[str, Callable[[], Tensor]]:
    """The text encoder is the decoder; every caption is written to its full length."""
    settings = GenerationSettings(
        end_id=1, pad_id=0, beams=work.beams, max_length=work.caption_tokens,
        min_length=work.caption_tokens,
    )  # fmt: skip

    def vision() -> EncoderOutput:
        guide = model.encode_text(inputs.prompt, None).last[:, 0] if model.guided else None
        return model.encode_image(inputs.images, guide=guide)

    def decoder(states: EncoderOutput) -> Tensor:
        return generate(model, inputs.prompt, states.last, states.mask, settings=settings).ids

    with torch.inference_mode():
        states = vision()
    return {
        WHOLE: lambda: decoder(vision()),
        "vision": lambda: vision().last,
        "decoder": lambda: decoder(states),
    }
