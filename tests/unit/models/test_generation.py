"""Search against three oracles: a literal loop, all sequences there are, and transformers.

The loop below is the published search (transformers 4.12.5) one beam at a time, on uncached single
sequences; the search under test works on tensors, with a cache and shared keys.
"""

from __future__ import annotations

from itertools import product
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from models import presets
from models.checkpoints import xvlm as published
from models.generation import Generated, GenerationSettings, generate
from models.initialise import task_form_from_pretrained
from models.xvlm import XVLM

PAD, START, END = 0, 1, 2
TINY = {"width": 8, "head_dim": 4}


def captioner(vocabulary: int, seed: int = 0, form: str = "captioning", **text) -> XVLM:
    """A tiny model with decided opinions: fresh weights alone make all tokens equally likely."""
    torch.manual_seed(seed)
    text = {"vocab_size": vocabulary, "max_positions": 16, **TINY} | text
    vision = {"image_size": 16, **TINY}
    name = "blocksworld-micro-student"
    model = presets.create(name, form="pretrain", text=text, vision=vision).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.5 * torch.randn_like(parameter))
    return model if form == "pretrain" else task_form_from_pretrained(model, form).eval()


def images(model: XVLM, count: int, seed: int = 0) -> torch.Tensor:
    torch.manual_seed(seed)
    size = model.config.vision.image_size
    with torch.no_grad():
        return model.encode_image(torch.randn(count, 3, size, size)).last


@torch.no_grad()
def log_probabilities(model: XVLM, ids: list[int], states: torch.Tensor) -> torch.Tensor:
    """(V,) float32 of the token after `ids`, from one uncached pass."""
    return model.decode(torch.tensor([ids]), None, states, None).logits[0, -1].log_softmax(-1)


def adjusted(scores: torch.Tensor, ids: list[int], rules: GenerationSettings) -> torch.Tensor:
    scores = scores.clone()
    for token in set(ids):
        factor = rules.repetition_penalty
        scores[token] = scores[token] * (factor if scores[token] < 0 else 1 / factor)
    if len(ids) < rules.min_length:
        scores[rules.end_id] = -torch.inf
    return scores


def looped_beam(
    model: XVLM, prompt: list[int], states: torch.Tensor, rules: GenerationSettings
) -> tuple[list[int], float]:
    """The published search for one image: its best sequence (no end token) and score."""
    open_beams, ended, done = [(0.0, prompt)], [], False
    open_beams += [(-1e9, prompt)] * (rules.beams - 1)
    while len(open_beams[0][1]) < rules.max_length and not done:
        options = []
        for place, (total, ids) in enumerate(open_beams):
            scores = adjusted(log_probabilities(model, ids, states), ids, rules)
            values = (scores + total).tolist()
            options += [(value, place, token) for token, value in enumerate(values)]
        options = sorted(options, key=lambda option: -option[0])[: 2 * rules.beams]
        following = []
        length = len(open_beams[0][1])
        for rank, (value, place, token) in enumerate(options):
            ids = open_beams[place][1]
            if token == rules.end_id:
                if rank < rules.beams:
                    ended.append((value / length**rules.length_penalty, ids))
                    ended = sorted(ended, key=lambda pair: -pair[0])[: rules.beams]
            elif len(following) < rules.beams:
                following.append((value, [*ids, token]))
        open_beams = following
        if len(ended) == rules.beams:
            reachable = options[0][0] / length**rules.length_penalty
            done = rules.early_stopping or ended[-1][0] >= reachable
    if not done:
        ended += [(total / len(ids) ** rules.length_penalty, ids) for total, ids in open_beams]
    score, ids = max(ended, key=lambda pair: pair[0])
    return ids, score


def unpadded(found: Generated, row: int) -> list[int]:
    """The sequence without end token and pads, after checking that those stand where they must."""
    ids, length = found.ids[row].tolist(), int(found.lengths[row])
    rest = ids[length:]
    assert rest in ([], [END, *[PAD] * (len(rest) - 1)])
    return ids[:length]


@settings(max_examples=25, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    beams=st.integers(2, 5),
    lengths=st.tuples(st.integers(0, 7), st.integers(0, 3)),
    length_penalty=st.sampled_from([0.0, 1.0, 2.0]),
    early_stopping=st.booleans(),
    repetition_penalty=st.sampled_from([1.0, 1.3]),
    cache=st.booleans(),
)
def test_beam_search_is_the_published_loop(seed, beams, lengths, cache, **rest):
    model = captioner(vocabulary=7, seed=seed)
    least, more = lengths
    rules = GenerationSettings(
        end_id=END, beams=beams, min_length=least, max_length=max(3, least) + more, **rest
    )
    states = images(model, 3, seed)
    prompts = torch.tensor([[START, 3], [START, 4], [START, 3]])
    found = generate(model, prompts, states, settings=rules, use_cache=cache)
    for row in range(3):
        expected, score = looped_beam(model, prompts[row].tolist(), states[row : row + 1], rules)
        assert unpadded(found, row) == expected
        assert found.scores[row].item() == pytest.approx(score, rel=1e-4)


@pytest.mark.parametrize(
    ("early_stopping", "length_penalty"), [(True, 3.0), (False, 1.0), (False, 2.0), (False, 4.0)]
)
def test_a_context_that_is_done_waits_unchanged_for_the_others(early_stopping, length_penalty):
    rules = GenerationSettings(
        end_id=END,
        beams=2,
        min_length=0,
        max_length=11,
        length_penalty=length_penalty,
        early_stopping=early_stopping,
    )
    lengths = set()
    for seed in range(12):
        model = captioner(vocabulary=6, seed=seed)
        states = images(model, 6, seed)
        found = generate(model, torch.full((6, 1), START), states, settings=rules)
        for row in range(6):
            expected, _ = looped_beam(model, [START], states[row : row + 1], rules)
            assert unpadded(found, row) == expected
            lengths.add(len(expected))
    assert {1, 11} <= lengths


@pytest.mark.parametrize("length_penalty", [0.0, 1.0, 3.0])
@pytest.mark.parametrize("form", ["captioning", "vqa"])
def test_with_enough_beams_it_finds_the_best_of_all_sequences(length_penalty, form):
    """Vocabulary 4, at most 3 new tokens: 1 + 3 + 9 endings and 27 sequences that are cut off."""
    model = captioner(4, form=form)
    rules = GenerationSettings(
        end_id=END, beams=40, min_length=0, max_length=4, length_penalty=length_penalty
    )
    states = images(model, 2)
    found = generate(model, torch.full((2, 1), START), states, settings=rules)
    for row in range(2):
        scores = {}
        for length in range(4):
            for tokens in product([0, 1, 3], repeat=length):
                ids = [START, *tokens]
                path = [*ids, END] if length < 3 else ids
                total = sum(
                    log_probabilities(model, path[:i], states[row : row + 1])[path[i]].item()
                    for i in range(1, len(path))
                )
                scores[tuple(ids)] = total / len(ids) ** length_penalty
        best = max(scores, key=lambda ids: scores[ids])
        assert tuple(unpadded(found, row)) == best
        assert found.scores[row].item() == pytest.approx(scores[best], rel=1e-4)


@pytest.mark.parametrize("beams", [1, 3])
def test_transformers_agrees_where_its_rules_are_the_same(beams):
    """Greedy search, and beam search whose scores are not divided by a length."""
    from transformers import BertConfig, BertLMHeadModel

    source = captioner(11, form="pretrain", text_layers=0, heads=(2,), cross_heads=(2,), ffn=(32,))
    assert not source.config.text.text_layers
    config = BertConfig(
        vocab_size=11,
        hidden_size=8,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=32,
        max_position_embeddings=16,
        is_decoder=True,
        add_cross_attention=True,
        pad_token_id=PAD,
    )
    theirs: Any = BertLMHeadModel(config).eval()
    state = published.to_published(source.state_dict())
    names = {key.removeprefix("text_encoder."): value for key, value in state.items()}
    wanted = theirs.state_dict()
    theirs.load_state_dict({key: names[key] for key in wanted if key in names}, strict=False)
    assert len(wanted.keys() - names.keys()) == 0
    model = task_form_from_pretrained(source, "captioning").eval()
    states, prompts = images(model, 4), torch.tensor([[START, 5]] * 4)
    rules = GenerationSettings(
        end_id=END, beams=beams, min_length=4, max_length=9, length_penalty=0.0
    )
    for ours_cached in (True, False):
        ours = generate(model, prompts, states, settings=rules, use_cache=ours_cached)
        found = theirs.generate(
            input_ids=prompts,
            attention_mask=torch.ones_like(prompts),
            encoder_hidden_states=states,
            num_beams=beams,
            min_length=4,
            max_length=9,
            eos_token_id=END,
            pad_token_id=PAD,
            do_sample=False,
            use_cache=False,  # its cache cannot hold a cross-attention outside its own models
            **({"length_penalty": 0.0} if beams > 1 else {}),
        )
        assert torch.equal(ours.ids, found)
    assert len({tuple(row) for row in ours.ids.tolist()}) > 1  # the images matter


@pytest.mark.parametrize("form", ["captioning", "vqa"])
@pytest.mark.parametrize("beams", [1, 4])
def test_the_cache_changes_nothing(form, beams):
    model = captioner(30, form=form)
    states = images(model, 3)
    mask = torch.ones(states.shape[:2], dtype=torch.bool)
    mask[1, 2:] = False
    prompts = torch.tensor([[START, 4, 5], [START, 6, 7], [START, 4, 4]])
    rules = GenerationSettings(end_id=END, beams=beams, min_length=6, max_length=14)
    first, second = (
        generate(model, prompts, states, mask, settings=rules, use_cache=cache)
        for cache in (True, False)
    )
    assert torch.equal(first.ids, second.ids)
    torch.testing.assert_close(first.scores, second.scores)
    masked = generate(model, prompts[1:2], states[1:2, :2], settings=rules)
    assert unpadded(first, 1) == unpadded(masked, 0)


def test_greedy_takes_the_likeliest_token_each_time():
    model = captioner(9, seed=3)
    states = images(model, 4)
    rules = GenerationSettings(
        end_id=END, beams=1, min_length=4, max_length=8, repetition_penalty=1.5
    )
    found = generate(model, torch.full((4, 1), START), states, settings=rules)
    for row in range(4):
        ids, total = [START], 0.0
        while len(ids) < 8:
            output = model.decode(torch.tensor([ids]), None, states[row : row + 1], None)
            logits = output.logits[0, -1].detach()
            token = int(adjusted(logits, ids, rules).argmax())
            total += logits.log_softmax(-1)[token].item()
            if token == END:
                break
            ids.append(token)
        assert unpadded(found, row) == ids
        assert found.scores[row].item() == pytest.approx(total / len(ids), rel=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("form", ["captioning", "vqa"])
def test_a_cached_decoder_gives_the_logits_of_a_whole_pass(form):
    model = captioner(20, form=form)
    states, ids = images(model, 2), torch.randint(3, 20, (6, 7))
    states_mask = torch.rand(states.shape[:2]) > 0.3
    states_mask[:, 0] = True
    key_mask = torch.ones(6, 7, dtype=torch.bool)
    key_mask[::2, 1] = False
    whole = model.decode(ids, key_mask, states, states_mask).logits
    expanded = states.repeat_interleave(3, 0), states_mask.repeat_interleave(3, 0)
    torch.testing.assert_close(whole, model.decode(ids, key_mask, *expanded).logits)
    cache, parts, start = model.new_cache(), [], 0
    for stop in (3, 4, 7):  # several tokens at once, one, several after others
        mask = key_mask[:, :stop]
        parts.append(model.decode(ids[:, start:stop], mask, states, states_mask, cache=cache))
        start = stop
    torch.testing.assert_close(torch.cat([part.logits for part in parts], dim=1), whole)
    assert cache.length == 7 and cache[0].own.length == 7
    held = [layer.cross.length for layer in cache.layers if layer.cross.length]
    assert held and all(length == states.shape[1] for length in held)


def test_bad_requests_say_what_to_change():
    model = captioner(9)
    states, rules = images(model, 2), GenerationSettings(end_id=END, max_length=6)
    for prompt, message in (
        (torch.full((3, 1), START), "one prompt"),
        (torch.full((2, 6), START), "max_length 6 counts"),
        (torch.tensor([[START, PAD], [START, 4]]), "padding or end tokens"),
    ):
        with pytest.raises(ValueError, match=message):
            generate(model, prompt, states, settings=rules)
    with pytest.raises(ValueError, match="one prompt|evenly"):
        model.decode(torch.full((3, 1), START), None, states, None)
    wrongs: tuple[tuple[dict[str, Any], str], ...] = (
        ({"beams": 0}, "at least 1"),
        ({"min_length": 9}, "more than max_length"),
        ({"repetition_penalty": 0.0}, "above 0"),
        ({"pad_id": END}, "must differ"),
    )
    for wrong, message in wrongs:
        with pytest.raises(ValueError, match=message):
            GenerationSettings(**{"end_id": END, "max_length": 6, "min_length": 0, **wrong})
    with pytest.raises(ValueError, match="form 'retrieval'"):
        other = captioner(9, form="retrieval")
        other.decode(torch.full((2, 1), START), None, states, None)
