"""Trimming of two streams: who is gone is neither updated nor read, in every mode."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from models.outputs import Capture
from models.trim_config import TrimmingConfig
from models.trimmers import TokenTrimmer
from models.trimming import default_trimming, dense_macs, expected_macs, see, with_trimming
from models.xvlm import XVLM
from tests.unit.models.test_trimming import Batch, agree, by_mode, decisive, image_of, run
from tests.unit.models.test_trimming_cost import cost_of, passes
from tests.unit.models.test_two_stream import config

MODES = ("gather", "packed")
FORMS = ("vqa", "nlvr2", "retrieval", "pretrain")


def trimmed(form: str = "vqa", seed: int = 0, bias: float = 0.0, **trimming: Any) -> XVLM:
    torch.manual_seed(7)
    values: dict[str, Any] = {"vision": (0, 2), "fusion": (0, 1), "bottleneck": 8, "projection": 4}
    values |= {"guided": form in ("vqa", "nlvr2"), "heads": ("vision", "text")}
    values |= {"text": () if form == "pretrain" else (1, 2, 3)}
    model = with_trimming(XVLM(config(form)), TrimmingConfig(**(values | trimming)))
    return decisive(model, seed, bias).eval()


@pytest.mark.parametrize("form", FORMS)
@settings(max_examples=4, deadline=None)
@given(seed=st.integers(0, 10_000), bias=st.sampled_from([-8.0, 0.0, 1.0, 8.0]))
def test_removal_equals_masking(form, seed, bias):
    model = trimmed(form, seed, bias)
    for rows in (3, 1):
        batch = Batch(model, seed, rows)
        wanted = by_mode(model, "mask", batch)
        for mode in MODES:
            agree(by_mode(model, mode, batch), wanted)


def test_buckets_equal_masking_by_count():
    counts = {"vision_keep": (7, 5), "fusion_keep": (4, 2), "text_keep": (5, 3, 3)}
    for form in ("vqa", "nlvr2", "retrieval"):
        model = trimmed(form, **counts)
        wanted = by_mode(model, "mask", Batch(model), fixed=True)
        agree(by_mode(model, "bucket", Batch(model)), wanted)


@pytest.mark.parametrize("mode", ["off", "mask", *MODES])
@pytest.mark.parametrize("form", ["vqa", "nlvr2"])
def test_text_that_guided_is_not_encoded_again(form, mode):
    model = trimmed(form, 5)
    model.set_trimming(mode)
    batch, asked = Batch(model), Capture.of(range(5), range(4), (2, 3))
    if mode in MODES:
        asked = Capture()
    indices = (batch.first, batch.second) if form == "nlvr2" else (batch.first,)
    with torch.no_grad():
        _, contexts = see(model, batch.images, indices, batch.ids, batch.mask)
        states, seen = zip(*contexts, strict=True)
        text = model.encode_text(batch.ids, batch.mask, asked.below(2))
        whole = model.multimodal(batch.ids, batch.mask, states, seen, asked)
        joined = model.multimodal(batch.ids, batch.mask, states, seen, asked, text)
    pairs = [(joined, whole)]
    assert joined.streams is not None and whole.streams is not None
    pairs += zip(joined.streams, whole.streams, strict=True)
    for ours, theirs in pairs:
        agree([ours.last], [theirs.last])
        assert ours.attention.keys() == theirs.attention.keys()
        assert ours.cross_attention.keys() == theirs.cross_attention.keys()
        assert ours.hidden.keys() == theirs.hidden.keys()
        for index, state in theirs.hidden.items():
            agree([ours.hidden[index]], [state])
    if mode != "off":
        assert joined.trimming is not None and whole.trimming is not None
        for layer, site in whole.trimming.sites.items():
            assert torch.equal(joined.trimming.sites[layer].keep(), site.keep())


@pytest.mark.parametrize("form", FORMS)
def test_fresh_trimmers_change_nothing(form):
    torch.manual_seed(1)
    plain = XVLM(config(form)).eval()
    model = with_trimming(plain)
    batch = Batch(model)
    wanted = run(plain, batch)
    for mode in ("off", "mask", *MODES):
        agree(by_mode(model, mode, batch), wanted)


def test_dropped_tokens_are_gone_for_layers_written_out():
    """Both streams' layers on the kept tokens alone, without any of the trimming code."""
    model = trimmed("retrieval", 5, heads=(), vision=(), guided=False)
    batch = Batch(model)
    stream: Any = model.image_fusion
    dropped = 0
    with torch.no_grad():
        image = model.encode_image(batch.images).last[batch.first]
        model.set_trimming("off")
        text = model.encode_text(batch.ids, batch.mask).last
        model.set_trimming("mask")
        fused = model.fuse(text, batch.mask, image)
        assert fused.trimming is not None and fused.streams is not None
        for row, length in enumerate(batch.mask.sum(1).tolist()):
            x, y = stream.enter_text(text[row : row + 1, :length]), image[row : row + 1]
            y, _ = stream.enter_image([(y, None)], 1)
            here, there = torch.arange(length), torch.arange(y.shape[1])
            for place, beside in enumerate(stream.layers):
                words = fused.trimming.sites[2 + place].keep()[row].bool()
                pixels = fused.trimming.context_sites[2 + place].keep()[row].bool()
                x, here = x[:, words[here]], here[words[here]]
                y, there = y[:, pixels[there]], there[pixels[there]]
                layer = model.text.layers[2 + place]
                x, y = layer(x, None, y, None)[0], beside(y, None, x, None)[0]
            dropped += length - len(here) + image.shape[1] - len(there)
            torch.testing.assert_close(fused.words[row, here], x[0], atol=1e-5, rtol=1e-4)
            torch.testing.assert_close(
                fused.streams[1].last[row, there], y[0], atol=1e-5, rtol=1e-4
            )
            torch.testing.assert_close(fused.last[row], stream.pool(x, y)[0], atol=1e-5, rtol=1e-4)
    assert dropped > 5


def test_each_stream_is_judged_by_its_own_tokens_and_the_others_first():
    model = trimmed("retrieval", heads=(), vision=(), guided=False)
    batch = Batch(model)
    with torch.no_grad():
        image = model.encode_image(batch.images).last[batch.first]
        text = torch.randn(3, 7, 32)
        moved = {"text": text.clone(), "image": image.clone()}
        moved["text"][:, 0] += 1.0
        moved["image"][:, 0] += 1.0
        sites: Any = {
            name: model.fuse(words, batch.mask, pixels).trimming
            for name, words, pixels in (
                ("same", text, image),
                ("text", moved["text"], image),
                ("image", text, moved["image"]),
            )
        }

    def logits(name: str, kind: str) -> torch.Tensor:
        return getattr(sites[name], kind)[2].logits[:, 1:]

    for moved_name, other in (("text", "context_sites"), ("image", "sites")):
        own = "sites" if other == "context_sites" else "context_sites"
        assert not torch.equal(logits(moved_name, other), logits("same", other))
        assert torch.equal(logits(moved_name, own), logits("same", own))


@pytest.mark.parametrize("form", FORMS)
def test_every_trimmer_parameter_has_a_gradient(form):
    model = trimmed(form).train()
    for part in model.modules():
        if isinstance(part, TokenTrimmer) and part.guided:
            part.alpha = torch.nn.Parameter(torch.ones(1))
    torch.stack(
        [value.float().square().mean() for value in run(model, Batch(model))]
    ).sum().backward()
    for name, value in model.named_parameters():
        if "trimmers" in name:
            assert value.grad is not None and bool(value.grad.any()), name


@pytest.mark.parametrize("form", ["vqa", "nlvr2", "retrieval"])
def test_expected_macs_are_those_that_run(form):
    # Two images are one batch, in which rows are padded: without sites they cost what they cost.
    still: Any = {"vision": (), "guided": False, "fusion": (), "text": (1,)}
    for seed in range(3):
        model = trimmed(form, seed, **(still if form == "nlvr2" else {})).requires_grad_(False)
        if form == "nlvr2":
            model = with_trimming(model, TrimmingConfig(text=(1,), bottleneck=8)).eval()
        model.set_trimming("gather")
        found = passes(model, Batch(model, seed, rows=1))
        answers = 3 if form == "vqa" else None
        outputs = {name: found[name][0] for name in ("image", "text", "fused")}
        costs = expected_macs(model.config, **outputs, answer_tokens=answers)
        wanted = {"vision": found["image"][1], "text": found["text"][1]}
        wanted["fusion"] = found["fused"][1]
        if answers:
            wanted["decoder"] = found["decoder"][1]
        assert {part: round(float(rows.sum())) for part, rows in costs.parts.items()} == wanted
        assert float(costs.per_example()) == pytest.approx(sum(wanted.values()))
        assert float(costs.total()) == pytest.approx(sum(wanted.values()))


def test_every_mode_expects_the_same_and_the_dense_part_is_that_of_the_whole_model():
    model = trimmed()
    batch, found = Batch(model), []
    for mode in ("mask", *MODES):
        model.set_trimming(mode)
        with torch.no_grad():
            found.append(cost_of(model, batch))
    for costs in found[1:]:
        for part, rows in costs.parts.items():
            torch.testing.assert_close(rows, found[0].parts[part], rtol=1e-6, atol=0)
    assert 0.2 < float(found[0].share()) < 0.9
    batch.mask[:] = True
    with torch.no_grad():
        whole = cost_of(model, batch)
    dense = dense_macs(model.config, 7, 3)
    assert {part: round(float(macs)) for part, macs in whole.dense.items()} == dense


def test_default_sites_trim_both_streams_in_front_of_every_fusion_layer():
    found = default_trimming(config("vqa"))
    assert (found.vision, found.fusion, found.text) == ((1, 2, 3), (0, 1), (2, 3)) and found.guided
    found = default_trimming(config("retrieval"))
    assert (found.fusion, found.text, found.guided) == ((0, 1), (2, 3), False)
    assert default_trimming(config("pretrain")).text == ()


def test_head_trimmers_of_the_fusion_are_refused():
    model = XVLM(config())
    with pytest.raises(ValueError, match='"fusion" belongs to one-stream fusion'):
        with_trimming(model, TrimmingConfig(heads=("fusion",)))
    batch = Batch(model)
    training = trimmed().train()
    training.set_trimming("gather")
    with pytest.raises(ValueError, match="for inference"):
        image_of(training, batch, batch.first)
