"""Trimmed passes: removal at batch 1, in batches, in buckets and packed equals the masked form."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from torch import Tensor

from models import packing, presets
from models.config import ModelConfig
from models.generation import GenerationSettings, generate
from models.outputs import Capture, EncoderOutput, TrimSite
from models.trim_config import TrimmingConfig
from models.trimmers import HeadTrimmer, TokenTrimmer
from models.trimming import default_trimming, expected_macs, see, with_trimming
from models.xvlm import XVLM

CLOSE = {"atol": 1e-5, "rtol": 1e-4}
MODES = ("gather", "packed")
EVERYWHERE: dict[str, Any] = {
    "vision": (0, 1, 3),
    "fusion": (0, 1),
    "heads": ("vision", "text", "fusion"),
    "bottleneck": 8,
    "projection": 4,
}


def config(form: str = "vqa", **overrides: Any) -> ModelConfig:
    """Four blocks, two text and two fusion layers, of two heads each; nothing random."""
    plain = presets.config("blocksworld-micro-teacher")
    text = {"heads": (2,) * 4, "cross_heads": (2,) * 2, "head_dim": 16}
    vision = {"heads": (2,) * plain.vision.layers, "head_dim": 16, "image_size": 24}
    values = {"vision": vision, "text": text} | overrides
    return presets.config("blocksworld-micro-teacher", **values).as_form(form)


def decisive(model: XVLM, seed: int = 0, bias: float = 0.0) -> XVLM:
    """Trimmers that drop about half of everything, for reasons of the states."""
    generator = torch.Generator().manual_seed(seed)
    for part in model.modules():
        if isinstance(part, TokenTrimmer | HeadTrimmer):
            with torch.no_grad():
                part.fc2.weight.normal_(0.0, 2.0, generator=generator)
                part.fc2.bias.fill_(bias)
                if isinstance(part, TokenTrimmer) and part.guided:
                    part.alpha.fill_(1.0)
    return model


def trimmed(
    form: str = "vqa", seed: int = 0, bias: float = 0.0, changes: Any = None, **trimming: Any
) -> XVLM:
    torch.manual_seed(7)
    base = config(form, **(changes or {}))
    values = EVERYWHERE | {"text": () if form in ("captioning", "pretrain") else (1, 2, 3)}
    values |= {"guided": form in ("vqa", "nlvr2", "captioning")}
    model = with_trimming(XVLM(base), TrimmingConfig(**(values | trimming)))
    return decisive(model, seed, bias).eval()


class Batch:
    """Three texts, one padded, of two images (NLVR2: four)."""

    def __init__(self, model: XVLM, seed: int = 0, rows: int = 3) -> None:
        generator = torch.Generator().manual_seed(100 + seed)
        size = model.config.vision.image_size
        self.images = torch.randn(4, 3, size, size, generator=generator)
        self.ids = torch.randint(1, 200, (rows, 7), generator=generator)
        self.mask = torch.ones(rows, 7, dtype=torch.bool)
        if rows > 1:
            self.mask[1, 4:] = False
        self.first = torch.tensor([0, 1, 1])[:rows]
        self.second = torch.tensor([2, 3, 0])[:rows]
        self.answers = torch.randint(1, 200, (2 * rows, 3), generator=generator)
        self.region = torch.rand(rows, model.config.vision.output_tokens, generator=generator) > 0.4
        self.region[:, 0] = True


def image_of(model: XVLM, batch: Batch, index: Tensor) -> EncoderOutput:
    if not model.guided:
        return model.encode_image(batch.images)
    guide = model.encode_text(batch.ids, batch.mask).last[:, 0]
    guide = guide.repeat(len(index) // len(guide), 1)
    return model.encode_image(batch.images, guide=guide, image_index=index)


def run(model: XVLM, batch: Batch) -> list[Tensor]:
    """What the heads of the form make of a batch: values that do not depend on how tokens lie."""
    form, rows = model.config.form, len(batch.ids)
    if form == "nlvr2":
        index = torch.cat([batch.first, batch.second])
        states, seen = image_of(model, batch, index).context(index)
        masks = (None, None) if seen is None else seen.split(rows)
        fused = model.multimodal(batch.ids, batch.mask, states.split(rows), masks)
        return [model.truth_logits(fused.last)]
    if form == "pretrain":
        seen = model.encode_image(batch.images, region_mask=batch.region, image_index=batch.first)
        text = model.encode_text(batch.ids, batch.mask)
        fused = model.fuse(text.last, text.mask, seen.rows.last, seen.rows.mask)
        whole = model.fuse(
            text.last,
            text.mask,
            seen.full[batch.first],
            None if seen.full_mask is None else seen.full_mask[batch.first],
        )
        return [model.predict_box(fused.last), model.match_logits(whole.last)]
    image = image_of(model, batch, batch.first)
    states, seen = image.context(batch.first)
    if form == "captioning":
        return [model.decode(batch.ids, None, states, seen).logits]
    if form == "retrieval":
        text = model.encode_text(batch.ids, batch.mask)
        features = model.image_feature(image.last), model.text_feature(text.last)
        one, one_seen = states[:1], None if seen is None else seen[:1]
        fused = model.fuse(text.last, text.mask, one, one_seen)  # one image for all texts
        return [*features, model.match_logits(fused.last)]
    fused = model.multimodal(batch.ids, batch.mask, states, seen)
    return [fused.last[:, 0], model.decode(batch.answers, None, fused.last, fused.mask).logits]


def by_mode(model: XVLM, mode: str, batch: Batch, **options: Any) -> list[Tensor]:
    model.set_trimming(mode, **options)
    with torch.no_grad():
        return run(model, batch)


def agree(found: list[Tensor], wanted: list[Tensor]) -> None:
    for one, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(one, other, **CLOSE)


FORMS = ("vqa", "nlvr2", "captioning", "retrieval", "pretrain")
NO_CLASS = {"vision.class_token": False, "vision.heads": (2,) * 4, "vision.head_dim": 16}
SHAPES: dict[str, dict[str, Any]] = {
    "plain": {},
    "one head and none": {
        "vision.heads": (1, 2, 0, 2),
        "vision.head_dim": 16,
        "text.heads": (2, 1, 0, 2),
        "text.cross_heads": (1, 2),
        "text.head_dim": 16,
    },
    "registers and mean": {"vision.register_tokens": 2, "vision.pooling": "mean"},
    "no class token": {**NO_CLASS, "vision.pooling": "map", "vision.pool_ffn": 40},
}


# --- equal in every mode --------------------------------------------------------------------------


@pytest.mark.parametrize("form", FORMS)
@settings(max_examples=4, deadline=None, phases=(Phase.generate,))  # a failure is small already
@given(seed=st.integers(0, 10_000), bias=st.sampled_from([-8.0, -1.0, 0.0, 1.0, 8.0]))
def test_removal_equals_masking(form, seed, bias):
    model = trimmed(form, seed, bias)
    for rows in (3, 1):
        batch = Batch(model, seed, rows)
        wanted = by_mode(model, "mask", batch)
        for mode in MODES:
            agree(by_mode(model, mode, batch), wanted)


@pytest.mark.parametrize("shape", list(SHAPES)[1:])
@pytest.mark.parametrize("form", ["vqa", "pretrain"])
def test_removal_equals_masking_in_other_backbones(form, shape):
    model = trimmed(form, 3, changes=SHAPES[shape])
    wanted = by_mode(model, "mask", Batch(model))
    full = by_mode(model, "off", Batch(model))
    assert not torch.allclose(wanted[0], full[0], atol=1e-3)  # something was trimmed
    for mode in MODES:
        agree(by_mode(model, mode, Batch(model)), wanted)


def test_all_but_the_first_token_may_go():
    model = trimmed(bias=-1e4, min_tokens=0, heads=())
    batch = Batch(model)
    wanted = by_mode(model, "mask", batch)
    for mode in MODES:
        agree(by_mode(model, mode, batch), wanted)
    model.set_trimming("gather")
    assert image_of(model, batch, batch.first).last.shape[1] == 1
    kept = trimmed(bias=-1e4)
    kept.set_trimming("gather")
    assert image_of(kept, batch, batch.first).last.shape[1] == 2


def test_buckets_equal_masking_by_count():
    counts = {"vision_keep": (7, 5, 4), "fusion_keep": (4, 2), "text_keep": (5, 3, 3)}
    for form in ("vqa", "nlvr2", "pretrain", "retrieval"):
        counts["text_keep"] = None if form == "pretrain" else (5, 3, 3)
        model = trimmed(form, **counts)
        wanted = by_mode(model, "mask", Batch(model), fixed=True)
        agree(by_mode(model, "bucket", Batch(model)), wanted)
    model = trimmed(vision_keep=(9, 9, 9), fusion_keep=(9, 9), text_keep=(7, 7, 7), heads=())
    agree(by_mode(model, "bucket", Batch(model)), by_mode(model, "off", Batch(model)))


@pytest.mark.parametrize("repack", [(), (1,), (3,)])
def test_packing_at_few_sites_equals_masking(repack):
    model = trimmed(repack=repack)
    batch = Batch(model)
    agree(by_mode(model, "packed", batch), by_mode(model, "mask", batch))


def test_the_form_with_gradients_equals_the_one_without():
    """Fused attention with one more channel, against a mask before the softmax."""
    model = trimmed()
    batch = Batch(model)
    without = by_mode(model, "mask", batch)
    model.set_trimming("mask")
    agree([value.detach() for value in run(model, batch)], without)


def test_dropped_tokens_are_gone_for_an_encoder_written_out():
    """Blocks on the kept tokens alone, without any of the trimming code."""
    model = trimmed("retrieval", 5, heads=(), fusion=(), text=())
    images = Batch(model).images
    model.set_trimming("mask")
    with torch.no_grad():
        output = model.encode_image(images)
        assert output.trimming is not None and output.mask is not None
        vision, sites = model.vision, output.trimming.sites
        for row in range(len(images)):
            x, there = vision.embeddings(images[row : row + 1]), torch.arange(10)
            for layer, block in enumerate(vision.blocks):
                if layer in sites:
                    stays = sites[layer].keep()[row].bool()
                    x, there = x[:, stays[there]], there[stays[there]]
                x = block(x)[0]
            left = output.mask[row].bool()
            assert left.nonzero().flatten().tolist() == there.tolist()
            torch.testing.assert_close(output.last[row, left], vision.norm(x)[0], **CLOSE)


@pytest.mark.parametrize("beams", [1, 3])
@pytest.mark.parametrize("mode", ["mask", *MODES])
def test_captions_with_a_cache_equal_those_without(mode, beams):
    """Decisions are made with the prompt and stay; beams share their image."""
    model = trimmed("captioning", 2, vision=(), guided=False)
    batch = Batch(model)
    model.set_trimming(mode)
    with torch.no_grad():
        states, seen = image_of(model, batch, batch.first).context(batch.first)
    prompt = batch.ids[:, :3].clamp(min=5)
    search = GenerationSettings(end_id=3, beams=beams, max_length=9)
    found = [
        generate(model, prompt, states, seen, settings=search, use_cache=use)
        for use in (True, False)
    ]
    assert torch.equal(found[0].ids, found[1].ids)
    torch.testing.assert_close(found[0].scores, found[1].scores, **CLOSE)


@pytest.mark.parametrize("mode", ["mask", *MODES])
def test_captions_that_share_an_image_trim_it_once(mode):
    """The first token of a causal stack is the same for all of them, so they keep the same."""
    model = trimmed("captioning", 2, vision=(), guided=False)
    batch, twice = Batch(model), torch.tensor([0, 0, 1, 1, 2, 2])
    ids = torch.cat([batch.ids[:, :1][twice], torch.randint(1, 200, (6, 4))], dim=1)
    model.set_trimming(mode)
    with torch.no_grad():
        states = model.encode_image(batch.images[:3]).last
        shared = model.decode(ids, None, states, None)
        apart = model.decode(ids, None, states[twice], None)
    torch.testing.assert_close(shared.logits, apart.logits, **CLOSE)
    assert shared.trimming is not None and apart.trimming is not None
    for layer, site in shared.trimming.context_sites.items():
        assert torch.equal(site.keep()[twice], apart.trimming.context_sites[layer].keep())


def test_gates_and_trimmed_heads_multiply():
    """Gates that are 0, in slots that leave closed heads out, beside heads chosen for each input."""
    model = trimmed("retrieval", 4)
    closed = torch.tensor([0.0, 0.7])
    for name, slot in model.gate_slots().items():
        if name.endswith("heads"):
            slot.hold(closed.clone())
    wanted = by_mode(model, "mask", Batch(model, rows=1))
    for mode in MODES:
        agree(by_mode(model, mode, Batch(model, rows=1)), wanted)
    for name, slot in model.gate_slots().items():
        if name.endswith("heads"):
            slot.hold(closed.clone(), True, torch.tensor([1]))
    agree(by_mode(model, "mask", Batch(model, rows=1)), wanted)


def test_packed_rows_in_one_kernel_equal_padded_ones(monkeypatch):
    """The arguments of torch's varlen kernel, with a loop over rows in its place."""

    def rows(q, k, v, starts_q, starts_k, longest_q, longest_k, scale):
        assert longest_q == int(starts_q.diff().max()) and longest_k == int(starts_k.diff().max())
        parts = []
        spans = zip(starts_q, starts_q[1:], starts_k, starts_k[1:], strict=False)
        for begin, end, low, high in spans:
            heads = (x.transpose(0, 1)[None] for x in (q[begin:end], k[low:high], v[low:high]))
            mixed = torch.nn.functional.scaled_dot_product_attention(*heads, scale=scale)
            parts.append(mixed[0].transpose(0, 1))
        return torch.cat(parts)

    model = trimmed(repack=(1,))
    batch = Batch(model)
    wanted = by_mode(model, "packed", batch)
    monkeypatch.setattr(packing, "varlen_attn", rows)
    monkeypatch.setattr(packing, "_varlen_fits", lambda q, k: True)
    agree(by_mode(model, "packed", batch), wanted)


def test_buckets_compile_to_one_graph():
    mode = "bucket"
    torch._dynamo.reset()
    counts = {"vision_keep": (7, 5, 4), "fusion_keep": (4, 2), "text_keep": (5, 3, 3)}
    model = trimmed(**counts)
    wanted = by_mode(model, mode, Batch(model))
    model.compile_encoders(backend="eager", fullgraph=True)
    agree(by_mode(model, mode, Batch(model)), wanted)
    torch._dynamo.reset()


# --- decisions ------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", FORMS)
def test_fresh_trimmers_change_nothing(form):
    torch.manual_seed(1)
    plain = XVLM(config(form)).eval()
    model = with_trimming(plain, TrimmingConfig(**EVERYWHERE))
    batch = Batch(model)
    wanted = by_mode(with_trimming(plain), "off", batch)
    for mode in ("off", "mask", *MODES):
        for one, other in zip(by_mode(model, mode, batch), wanted, strict=True):
            torch.testing.assert_close(one, other, atol=1e-6, rtol=1e-6)


def test_a_model_made_with_trimmers_keeps_everything():
    """The stack's own fresh weights do not overwrite the trimmers'."""
    model = XVLM(trimmed().config).eval()
    batch = Batch(model)
    agree(by_mode(model, "mask", batch), by_mode(model, "off", batch))


def test_tokens_never_come_back_and_the_first_stays():
    model = trimmed("retrieval", 1, text=(0, 1, 3))
    batch = Batch(model)
    for mode in ("mask", *MODES):
        model.set_trimming(mode)
        with torch.no_grad():
            image = model.encode_image(batch.images)
            text = model.encode_text(batch.ids, batch.mask)
        for output in (image, text):
            assert output.trimming is not None
            keeps = [site.keep() for site in output.trimming.sites.values()]
            assert len(keeps) > 1
            for before, after in zip(keeps, keeps[1:], strict=False):
                assert bool((after <= before).all())
                assert bool((after[:, 0] == 1).all())
            assert bool((keeps[-1].sum(1) >= 2).all())
        assert text.trimming is not None
        for site in text.trimming.sites.values():
            assert not bool(site.keep()[~batch.mask].any())
            assert not bool(site.spread(site.movable.float())[~batch.mask].any())


def test_every_mode_records_the_same_decisions():
    model = trimmed()
    batch = Batch(model)
    found: dict[str, list[TrimSite]] = {}
    for mode in ("mask", *MODES):
        model.set_trimming(mode)
        with torch.no_grad():
            record = image_of(model, batch, batch.first).trimming
        assert record is not None
        found[mode] = list(record.sites.values())
        assert [int(site.before.sum()) for site in found[mode]] == [
            int(site.before.sum()) for site in found["mask"]
        ]
    for mode in MODES:
        for one, other in zip(found[mode], found["mask"], strict=True):
            assert torch.equal(one.keep(), other.keep())


def test_evaluation_is_deterministic_and_training_is_not():
    model = trimmed(bias=0.0)
    batch = Batch(model)
    agree(by_mode(model, "mask", batch), by_mode(model, "mask", batch))
    model.train()
    model.set_trimming("mask")
    first, second = run(model, batch)[1], run(model, batch)[1]
    assert not torch.equal(first, second)


def test_the_guide_matters_only_with_the_cross_modal_term():
    model = trimmed()
    batch = Batch(model)
    guide = torch.randn(2, 32)
    with torch.no_grad():
        keep = [
            model.encode_image(batch.images[:1], guide=row[None]).trimming.sites[3].logits  # type: ignore[union-attr]
            for row in guide
        ]
    assert not torch.allclose(keep[0], keep[1])
    with pytest.raises(ValueError, match="guide"):
        model.encode_image(batch.images)
    model.set_trimming("off")
    assert not model.guided
    index = torch.tensor([1, 0, 1])
    whole = model.encode_image(batch.images[:2])
    rows = model.encode_image(batch.images[:2], guide=torch.randn(3, 32), image_index=index)
    torch.testing.assert_close(rows.last, whole.last[index])


def text_once(model: XVLM, batch: Batch, again: bool, asked: Capture) -> EncoderOutput:
    """A guided pass that continues its guide, or encodes the text a second time."""
    pairs = model.config.form == "nlvr2"
    indices = (batch.first, batch.second) if pairs else (batch.first,)
    image, contexts = see(model, batch.images, indices, batch.ids, batch.mask, None, asked)
    assert (image.guide is not None) == model.guided
    guide = None if again else image.guide
    if guide is None and not again:
        guide = model.encode_text(batch.ids, batch.mask, asked.below(2))
    states, seen = zip(*contexts, strict=True) if pairs else contexts[0]
    return model.multimodal(batch.ids, batch.mask, states, seen, asked, guide)


@pytest.mark.parametrize("mode", ["off", "mask", *MODES, "bucket"])
@pytest.mark.parametrize("form", ["vqa", "nlvr2"])
def test_text_that_guided_is_not_encoded_again(form, mode):
    counts = {"vision_keep": (7, 5, 4), "fusion_keep": (4, 2), "text_keep": (5, 3, 3)}
    model = trimmed(form, 5, **counts)
    batch, asked = Batch(model), Capture()
    if mode in ("off", "mask"):
        asked = Capture.of(range(5), (1, 3), (2, 3))
    model.set_trimming(mode)
    ran: list[int] = []
    for layer in (0, 2):
        model.text.layers[layer].register_forward_hook(lambda *_, n=layer: ran.append(n))
    with torch.no_grad():
        joined = text_once(model, batch, False, asked)
        assert ran == [0, 2]
        whole = text_once(model, batch, True, asked)
    torch.testing.assert_close(joined.last, whole.last, **CLOSE)
    assert (joined.mask is None) == (whole.mask is None)
    for name in ("hidden", "attention", "cross_attention"):
        assert getattr(joined, name).keys() == getattr(whole, name).keys()
    for index, state in whole.hidden.items():
        torch.testing.assert_close(joined.hidden[index], state, **CLOSE)
    if mode == "off":
        return
    ours, theirs = joined.trimming, whole.trimming
    assert ours is not None and theirs is not None
    for name in ("sites", "context_sites"):
        found, wanted = getattr(ours, name), getattr(theirs, name)
        assert found.keys() == wanted.keys()
        for layer, site in wanted.items():
            assert torch.equal(found[layer].keep(), site.keep())
            assert found[layer].tokens == site.tokens
    for name in ("heads", "cross_heads", "tokens", "context_tokens"):
        torch.testing.assert_close(getattr(ours, name), getattr(theirs, name))


def test_costs_of_a_text_that_guided_are_counted_once():
    model = trimmed()
    batch = Batch(model)
    ids, mask = batch.ids, batch.mask
    with torch.no_grad():
        image, (context,) = see(model, batch.images, (batch.first,), ids, mask)
        once = model.multimodal(ids, mask, *context, text=image.guide)
        twice = model.multimodal(ids, mask, *context)
    costs = [
        expected_macs(model.config, text=text, fused=fused).parts["text"]
        for text, fused in ((None, once), (image.guide, once), (image.guide, twice))
    ]
    torch.testing.assert_close(costs[1], costs[0])
    torch.testing.assert_close(costs[2], 2 * costs[0])


def test_text_that_recorded_too_little_is_refused():
    model = trimmed()
    batch = Batch(model)
    image, (context,) = see(model, batch.images, (batch.first,), batch.ids, batch.mask)
    with pytest.raises(ValueError, match=r"no attention of \[1\]"):
        asked = Capture.of(attention=(1, 2))
        model.multimodal(batch.ids, batch.mask, *context, asked, image.guide)


# --- training -------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["vqa", "nlvr2", "captioning", "retrieval", "pretrain"])
def test_every_trimmer_parameter_has_a_gradient(form):
    model = trimmed(form).train()
    for part in model.modules():
        if isinstance(part, TokenTrimmer):
            part.alpha = torch.nn.Parameter(torch.ones(1)) if part.guided else None
    batch = Batch(model)
    torch.stack([value.float().square().mean() for value in run(model, batch)]).sum().backward()
    for name, value in model.named_parameters():
        if "trimmers" in name:
            assert value.grad is not None, name
            assert bool(value.grad.any()), name


def test_the_gradient_of_a_keep_weight_is_that_of_the_written_out_softmax():
    from models.packing import weighted_attention

    torch.manual_seed(3)
    q, k, v = (torch.randn(2, 2, 5, 16, dtype=torch.float64, requires_grad=True) for _ in "qkv")
    weight = torch.tensor([[1.0, 0, 1, 1, 0], [1, 1, 0, 0, 0.5]], dtype=torch.float64)
    weight.requires_grad_()
    share = (q @ k.transpose(-1, -2) / 4).exp() * weight[:, None, None, :]
    wanted = share / share.sum(-1, keepdim=True) @ v
    found = weighted_attention(q, k, v, weight, 0.25)
    torch.testing.assert_close(found, wanted)
    probe = torch.randn_like(found)
    inputs = (q, k, v, weight)
    for one, other in zip(
        torch.autograd.grad(found, inputs, probe, retain_graph=True),
        torch.autograd.grad(wanted, inputs, probe),
        strict=True,
    ):
        torch.testing.assert_close(one, other)


def test_activation_checkpointing_changes_no_gradient():
    gradients = []
    for recompute in (False, True):
        model = trimmed().train()
        model.set_activation_checkpointing(recompute)
        torch.manual_seed(5)
        run(model, Batch(model))[1].square().mean().backward()
        gradients.append({n: p.grad for n, p in model.named_parameters() if p.grad is not None})
    assert gradients[0].keys() == gradients[1].keys()
    for name, value in gradients[0].items():
        torch.testing.assert_close(value, gradients[1][name], msg=name)


def test_training_never_moves_tokens():
    model = trimmed().train()
    for mode in MODES:
        model.set_trimming(mode)
        with pytest.raises(ValueError, match="for inference"):
            run(model, Batch(model))


def test_no_parameter_is_read_outside_its_module():
    """As ZeRO-3 needs: outside their owner's forward parameters are empty."""
    model = trimmed().train()
    plain = run_seeded(model)
    external = {id(value) for _, value in model.external_parameters()}
    for module in model.modules():
        own = [p for p in module.parameters(recurse=False) if id(p) not in external]
        if own:
            hide_outside(module, own)
    agree([v.detach() for v in run_seeded(model)], [v.detach() for v in plain])


def run_seeded(model: XVLM) -> list[Tensor]:
    torch.manual_seed(11)
    return run(model, Batch(model))


def hide_outside(module: torch.nn.Module, own: list[torch.nn.Parameter]) -> None:
    held = [value.data for value in own]

    def show(*_: Any) -> None:
        for value, data in zip(own, held, strict=True):
            value.data = data

    def hide(*_: Any) -> None:
        for value in own:
            value.data = value.data.new_empty(0)

    hide()
    module.register_forward_pre_hook(show)
    module.register_forward_hook(hide)


# --- files, settings ------------------------------------------------------------------------------


def test_a_saved_model_comes_back_in_its_mode(tmp_path):
    model = trimmed(mode="packed")
    batch = Batch(model)
    model.save_pretrained(tmp_path)
    again = XVLM.from_pretrained(tmp_path)
    assert again.config == model.config
    assert again.vision.trimmers is not None and again.vision.trimmers.mode == "packed"
    with torch.no_grad():
        agree(run(again, batch), run(model, batch))
    assert ModelConfig.from_dict(replace(model.config, trimming=None).to_dict()).trimming is None


def test_default_sites():
    vqa, pairs = config("vqa"), config("nlvr2")
    assert default_trimming(vqa).vision == (1, 2, 3) and default_trimming(vqa).guided
    assert default_trimming(pairs).fusion == (0, 1)
    found = default_trimming(config("retrieval"))
    assert (found.guided, found.fusion) == (False, ())


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"vision": (4,)}, "names layer 4"),
        ({"text": (1,)}, "every text token"),
        ({"vision": (2, 1)}, "rising order"),
        ({"vision": (1, 2), "vision_keep": (3,)}, "1 counts for 2 sites"),
        ({"vision": (1, 2), "vision_keep": (3, 4)}, "never increase"),
        ({"vision": (1,), "init_logit": 1.0}, "trimming.init_logit 1.0 is not above 1"),
        ({"vision": (1,), "vision_keep": (400,)}, "has 9 patches"),
        ({"vision": (1,), "mode": "bucket"}, "needs trimming.vision_keep"),
        ({"guided": True}, "set vision"),
        ({"vision": (1,), "repack": (2,)}, "must be sites"),
        ({"surprise": 1}, "surprise"),
    ],
)
def test_settings_that_cannot_be(values, message):
    with pytest.raises(ValueError, match=message):
        ModelConfig.from_dict(config("captioning").to_dict() | {"trimming": values})


def test_modes_that_cannot_be():
    model = trimmed()
    with pytest.raises(ValueError, match="needs trimming.vision_keep"):
        model.set_trimming("bucket")
    with pytest.raises(ValueError, match="modes are"):
        model.set_trimming("fast")
    with pytest.raises(ValueError, match="no trimmers"):
        XVLM(config()).set_trimming("mask")
    with pytest.raises(ValueError, match="belong to form"):
        model.config.as_form("retrieval")
