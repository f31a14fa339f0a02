"""Greedy and beam search for the two decoders: answers (form "vqa") and captions ("captioning").

The rules are those of transformers 4.12.5, which the published numbers were made with: a finished
beam scores its summed log-probability over its length to the power of `length_penalty`, where the
length counts the prompt and not the end token; `max_length` and `min_length` count the prompt too.
The installed transformers divides by the generated part only, so its `generate` ranks captions
differently, and it wants a model of its own class; hence this file. Differences from 4.12.5: the
bookkeeping is done in tensors for the whole batch, and the beams of one image share its keys and
values (`Attention` folds them), which are never expanded nor moved.

Shape legend: C contexts (images or questions), K beams, Lp prompt tokens, T tokens in all, V
vocabulary. Beams of one context are consecutive rows: row c * K + k.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from models.bert import DecoderCache
from models.xvlm import XVLM

__all__ = ["Generated", "GenerationSettings", "generate"]

# The score of beams that do not exist yet: at first all beams of a context are equal, and without
# this they would stay so. Finite, as in the published code: sums stay numbers.
_ABSENT = -1e9


@dataclass(frozen=True, kw_only=True)
class GenerationSettings:
    """How to search; the defaults are those of published COCO captions.

    Attributes:
        end_id, pad_id: the token that ends a sequence, and the one behind it.
        beams: 1 is greedy search.
        max_length, min_length: tokens in all, prompt counted; below `min_length` nothing ends.
        length_penalty: exponent of the length that scores are divided by; 0 compares plain sums.
        early_stopping: a context is done as soon as `beams` sequences have ended. Otherwise when no
            open beam, at its present length, could still beat the worst of them.
        repetition_penalty: above 1 lowers the score of tokens that are already there (1909.05858).
    """

    end_id: int
    pad_id: int = 0
    beams: int = 3
    max_length: int = 20
    min_length: int = 5
    length_penalty: float = 1.0
    early_stopping: bool = False
    repetition_penalty: float = 1.0

    def __post_init__(self) -> None:
        if self.beams < 1:
            raise ValueError(f"beams must be at least 1, not {self.beams}")
        if self.min_length > self.max_length:
            raise ValueError(
                f"min_length {self.min_length} is more than max_length {self.max_length}"
            )
        if self.repetition_penalty <= 0:
            raise ValueError(f"repetition_penalty must be above 0, not {self.repetition_penalty}")
        if self.end_id == self.pad_id:
            raise ValueError(f"end_id and pad_id must differ, both are {self.end_id}")


@dataclass(frozen=True)
class Generated:
    """The best sequence of each context.

    Attributes:
        ids: (C, T) int64: prompt, generated tokens, end token unless `max_length` came first, pads.
        lengths: (C,) int64, tokens before the end token (or before the pads, if there is none).
        scores: (C,) float32, summed log-probability (end token counted) over length ** penalty.
    """

    ids: Tensor
    lengths: Tensor
    scores: Tensor


@torch.no_grad()
def generate(
    model: XVLM,
    prompt: Tensor,
    states: Tensor,
    state_mask: Tensor | None = None,
    *,
    settings: GenerationSettings,
    use_cache: bool = True,
) -> Generated:
    """The most likely sequence after each prompt, by greedy or beam search; deterministic.

    Args:
        model: of form "captioning" or "vqa"; its mode (train or eval) is left as it is.
        prompt: (C, Lp) int64 without padding, the start token first: for captions
            "[CLS] a picture of" without its end token, for answers "[CLS]".
        states: (C, Ls, width) what the decoder reads: image states, or those of the question.
        state_mask: (C, Ls) bool, True on visible states.
        use_cache: False computes every token anew in each step; the result is the same.

    Raises:
        ValueError: on a prompt with padding or end tokens, of another batch than the states, or
            as long as `max_length`; on a model of another form.
    """
    _check(prompt, states, settings)
    steps = _Steps(model, states, state_mask, model.new_cache() if use_cache else None)
    search = _greedy if settings.beams == 1 else _beam
    return search(steps, prompt, settings)


def _check(prompt: Tensor, states: Tensor, settings: GenerationSettings) -> None:
    if prompt.ndim != 2 or prompt.shape[0] != states.shape[0] or not prompt.shape[1]:
        raise ValueError(
            f"prompt {tuple(prompt.shape)} and states {tuple(states.shape)}: one prompt of at "
            "least one token is needed for each context"
        )
    if prompt.shape[1] >= settings.max_length:
        raise ValueError(
            f"the prompt has {prompt.shape[1]} tokens, max_length {settings.max_length} counts "
            "them too; raise max_length"
        )
    if ((prompt == settings.pad_id) | (prompt == settings.end_id)).any():
        raise ValueError(
            "the prompt holds padding or end tokens; prompts of one batch need one length, "
            "without the end token"
        )


class _Steps:
    """Scores of the next token, with or without a cache."""

    def __init__(
        self, model: XVLM, states: Tensor, state_mask: Tensor | None, cache: DecoderCache | None
    ) -> None:
        self.model, self.states, self.state_mask, self.cache = model, states, state_mask, cache

    def next_logits(self, ids: Tensor) -> Tensor:
        """All tokens so far (C K, T) -> float32 scores of the next one, (C K, V)."""
        new = ids if self.cache is None else ids[:, self.cache.length :]
        output = self.model.decode(new, None, self.states, self.state_mask, cache=self.cache)
        return output.logits[:, -1].float()

    def reorder(self, rows: Tensor) -> None:
        """Row i continues what was row rows[i]."""
        if self.cache is not None:
            self.cache.reorder(rows)


def _adjusted(scores: Tensor, ids: Tensor, settings: GenerationSettings) -> Tensor:
    """Repetition penalty and least length, in that order; scores (rows, V), ids (rows, T)."""
    if settings.repetition_penalty != 1.0:
        seen = scores.gather(1, ids)
        penalty = settings.repetition_penalty
        seen = torch.where(seen < 0, seen * penalty, seen / penalty)
        scores = scores.scatter(1, ids, seen)
    if ids.shape[1] < settings.min_length:
        scores = scores.clone()
        scores[:, settings.end_id] = -torch.inf
    return scores


def _greedy(steps: _Steps, prompt: Tensor, settings: GenerationSettings) -> Generated:
    """The likeliest token in every step."""
    ids = prompt
    done = torch.zeros(prompt.shape[0], dtype=torch.bool, device=prompt.device)
    total = torch.zeros(prompt.shape[0], device=prompt.device)
    lengths = torch.full_like(prompt[:, 0], prompt.shape[1])
    while ids.shape[1] < settings.max_length and not bool(done.all()):
        logits = steps.next_logits(ids)
        token = _adjusted(logits, ids, settings).argmax(-1)
        gained = logits.log_softmax(-1).gather(1, token[:, None])[:, 0]
        total = total + gained.masked_fill(done, 0.0)
        ids = torch.cat([ids, token.masked_fill(done, settings.pad_id)[:, None]], dim=1)
        done = done | (token == settings.end_id)
        lengths = lengths + (~done).long()
    return Generated(ids, lengths, total / lengths**settings.length_penalty)


class _Finished:
    """The best K ended sequences of every context, best first; scores start at -inf (absent)."""

    def __init__(self, contexts: int, settings: GenerationSettings, like: Tensor) -> None:
        beams = settings.beams
        self.settings = settings
        self.scores = torch.full((contexts, beams), -torch.inf, device=like.device)
        self.lengths = torch.zeros(contexts, beams, dtype=torch.int64, device=like.device)
        shape = (contexts, beams, settings.max_length)
        self.ids = torch.full(shape, settings.pad_id, dtype=torch.int64, device=like.device)
        self.count = torch.zeros(contexts, dtype=torch.int64, device=like.device)

    def add(self, ids: Tensor, sums: Tensor, valid: Tensor) -> None:
        """Offers sequences ids (C, n, T) with summed log-probabilities sums (C, n) where `valid`."""
        length = ids.shape[2]
        scores = sums / length**self.settings.length_penalty
        scores = scores.masked_fill(~valid, -torch.inf)
        padded = ids.new_full((*ids.shape[:2], self.ids.shape[2]), self.settings.pad_id)
        padded[..., :length] = ids
        # Stable: among equals the ones that were there stay.
        scores = torch.cat([self.scores, scores], dim=1)
        order = scores.argsort(dim=1, descending=True, stable=True)[:, : self.settings.beams]
        lengths = torch.cat([self.lengths, torch.full_like(ids[..., 0], length)], dim=1)
        rows = torch.cat([self.ids, padded], dim=1)
        self.scores, self.lengths = scores.gather(1, order), lengths.gather(1, order)
        self.ids = rows.gather(1, order[..., None].expand(-1, -1, rows.shape[2]))
        self.count = (self.count + valid.sum(1)).clamp(max=self.settings.beams)

    def complete(self, best_open: Tensor, length: int) -> Tensor:
        """(C,) bool: no open beam, the best with log-probability best_open (C,), can matter."""
        full = self.count == self.settings.beams
        if self.settings.early_stopping:
            return full
        reachable = best_open / length**self.settings.length_penalty
        return full & (self.scores[:, -1] >= reachable)

    def best(self) -> Generated:
        """The best sequence of each context, its end token written where there is room."""
        ids, lengths = self.ids[:, 0].clone(), self.lengths[:, 0]
        longest = min(int(lengths.max()) + 1, self.settings.max_length)
        open_end = lengths < self.settings.max_length
        place = lengths.clamp(max=self.settings.max_length - 1)[:, None]
        end = torch.where(open_end[:, None], self.settings.end_id, ids.gather(1, place))
        ids.scatter_(1, place, end)
        return Generated(ids[:, :longest], lengths, self.scores[:, 0])


def _beam(steps: _Steps, prompt: Tensor, settings: GenerationSettings) -> Generated:
    """The K likeliest open sequences of each context are extended until none can win."""
    contexts, beams, device = prompt.shape[0], settings.beams, prompt.device
    finished = _Finished(contexts, settings, prompt)
    ids = prompt.repeat_interleave(beams, dim=0)
    sums = torch.full((contexts, beams), _ABSENT, device=device)
    sums[:, 0] = 0.0
    first = beams * torch.arange(contexts, device=device)[:, None]  # first row of each context
    done = torch.zeros(contexts, dtype=torch.bool, device=device)
    while ids.shape[1] < settings.max_length and not bool(done.all()):
        scores = _adjusted(steps.next_logits(ids).log_softmax(-1), ids, settings)
        scores = (scores.unflatten(0, (contexts, beams)) + sums[..., None]).flatten(1)
        # Twice the beams: even if every beam ends here, as many stay open.
        values, index = scores.topk(min(2 * beams, scores.shape[1]), dim=1)
        vocabulary = scores.shape[1] // beams
        origin, token = first + index // vocabulary, index % vocabulary
        ends = token == settings.end_id
        # An ending outside the best K would not have been among the beams, so it does not count.
        counts = ends & (torch.arange(values.shape[1], device=device) < beams) & ~done[:, None]
        finished.add(ids[origin.flatten()].unflatten(0, origin.shape), values, counts)
        done = done | finished.complete(values[:, 0], ids.shape[1])
        stay = ends.long().argsort(dim=1, stable=True)[:, :beams]  # the best K that go on
        sums, rows = values.gather(1, stay), origin.gather(1, stay).flatten()
        chosen = token.gather(1, stay).flatten()
        ids = torch.cat([ids[rows], chosen[:, None]], dim=1)
        steps.reorder(rows)
    # Beams that were cut off by max_length compete as they are.
    finished.add(ids.unflatten(0, (contexts, beams)), sums, ~done[:, None].expand(-1, beams))
    return finished.best()
