"""The task forms: pairs of fusion layers for two images, the caption decoder, sizes, precision."""

from __future__ import annotations

from typing import Any, get_args

import pytest
import torch

from models import presets
from models.attention import Attention
from models.config import HEADS, Form
from models.initialise import task_form_from_pretrained
from models.layers import BertLayer
from models.outputs import Capture
from models.xvlm import XVLM

FORMS = get_args(Form)
MICRO = "blocksworld-micro-teacher"


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def inputs(model: XVLM, rows: int = 3):
    size, vocabulary = model.config.vision.image_size, model.config.text.vocab_size
    images = torch.randint(0, 256, (2 * rows, 3, size, size), dtype=torch.uint8)
    mask = torch.ones(rows, 8, dtype=torch.bool)
    mask[0, 6:] = False
    return images, torch.randint(1, vocabulary, (rows, 8)), mask


def outputs(model: XVLM) -> dict[str, torch.Tensor]:
    """One value from every head that the model's form has."""
    images, ids, mask = inputs(model)
    first, second = model.encode_image(images).last.chunk(2)
    form = model.config.form
    if form == "vqa":
        states = model.multimodal(ids, mask, first).last
        return {"decoder": model.decode(ids, mask, states, mask).logits}
    if form == "captioning":
        return {"lm_head": model.decode(ids, mask, first, None).logits}
    both = first if model.config.text.pair_heads is None else (first, second)
    text = model.encode_text(ids, mask).last
    fused = model.fuse(text, mask, both).last
    values = {}
    for head in HEADS[form]:
        values[head] = {
            "image_projection": lambda: model.image_feature(first),
            "text_projection": lambda: model.text_feature(text),
            "contrastive": lambda: model.temperature(),
            "itm_head": lambda: model.match_logits(fused),
            "bbox_head": lambda: model.predict_box(fused),
            "mlm_head": lambda: model.mlm_logits(fused, torch.tensor([[1, 2]] * 3)),
            "cls_head": lambda: model.truth_logits(fused),
            "ta_head": lambda: model.assignment_logits(fused),
        }[head]()
    return values


@pytest.mark.parametrize("form", FORMS)
def test_a_form_has_its_parts_and_every_parameter_a_gradient(form):
    model = presets.create(MICRO, form=form)
    assert [name for name, _ in model.named_children()] == ["vision", "text", *HEADS[form]]
    values = outputs(model)
    assert list(values) == list(HEADS[form])
    torch.stack([value.float().square().mean() for value in values.values()]).sum().backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all(), name
    model.zero_grad()
    model.touch(HEADS[form]).backward()
    touched = {name.split(".")[0] for name, p in model.named_parameters() if p.grad is not None}
    assert touched - {"text"} == set(HEADS[form])
    assert not any(p.grad is not None and p.grad.any() for p in model.parameters())


def test_heads_of_other_forms_are_named_in_the_error():
    model = presets.create(MICRO, form="grounding")
    for call in (model.image_feature, model.match_logits, model.truth_logits):
        with pytest.raises(ValueError, match="form 'grounding' has no .*; it has bbox_head"):
            call(torch.zeros(1, 1, 32))
    with pytest.raises(ValueError, match="no part 'itm_head'"):
        model.touch(["itm_head"])


@pytest.mark.parametrize("form", FORMS)
def test_tied_weights_and_gates_of_every_form(form):
    model = presets.create(MICRO, form=form)
    tied = {"mlm_head", "lm_head"} & set(HEADS[form])
    expected = [(getattr(model, name), model.text.embeddings.word.weight) for name in tied]
    if model.decoder is not None:
        expected = [(model.decoder.head, model.decoder.embeddings.word.weight)]
    assert model.external_parameters() == expected
    slots, costs = model.gate_slots(), model.parameters_per_unit()
    assert slots.keys() == costs.keys()
    fusion = {name.split(".")[1] for name in slots if name.startswith("fusion.")}
    assert len(fusion) == (4 if form.startswith("nlvr2") else 2)
    leaves = {}
    for name, slot in slots.items():
        leaves[name] = slot.z = torch.full((slot.units,), 0.7, requires_grad=True)
    terms = [value.float().square().mean() for value in outputs(model).values()]
    torch.stack(terms).sum().backward()
    for name, leaf in leaves.items():
        assert leaf.grad is not None and leaf.grad.any(), name


# --- two images ---------------------------------------------------------------------------------


@torch.no_grad()
def test_pairs_are_single_layers_that_take_turns():
    """Against a plain stack of twice the fusion layers with equal keys in the two of a pair."""
    model = presets.create(MICRO, form="nlvr2").eval()
    config = model.config
    plain = presets.create(
        MICRO,
        text={"heads": config.text.heads, "cross_heads": (1,) * 4, "ffn": config.text.ffn},
    ).eval()
    state = {key: value for key, value in model.text.state_dict().items()}
    for pair in range(2):
        for name in ("k.weight", "k.bias", "v.weight", "v.bias"):
            owner, reader = (f"layers.{2 + 2 * pair + s}.cross_attention.{name}" for s in (0, 1))
            assert reader not in state
            state[reader] = state[owner]
    plain.text.load_state_dict(state)
    images, ids, mask = inputs(model)
    both = model.encode_image(images).last.chunk(2)
    seen = (None, torch.rand(both[1].shape[:2]) > 0.3)
    states = expected = plain.encode_text(ids, mask).last
    hidden = [states]
    for index, layer in enumerate(plain.text.layers[2:]):
        expected, *_ = layer(expected, mask, both[index % 2], seen[index % 2])
        hidden.append(expected)
    output = model.fuse(states, mask, both, seen, Capture.of(range(5), [], range(4)))
    torch.testing.assert_close(output.last, expected)
    for index, value in enumerate(hidden):
        torch.testing.assert_close(output.hidden[index], value)
    second = plain.text.get_submodule("layers.3.cross_attention")
    assert isinstance(second, Attention)
    keys = second.keys_values(both[1])[0]
    torch.testing.assert_close(output.cross_attention[1].k, keys)
    whole = model.multimodal(ids, mask, both, seen)
    torch.testing.assert_close(whole.last, expected)
    swapped = model.fuse(states, mask, both[::-1])
    assert not torch.allclose(swapped.last, model.fuse(states, mask, both).last)


def test_one_image_where_two_are_read_is_an_error():
    model = presets.create(MICRO, form="nlvr2")
    images, ids, mask = inputs(model)
    states = model.encode_image(images).last
    with pytest.raises(ValueError, match=r"reads 2 image\(s\)"):
        model.multimodal(ids, mask, states[:3])
    other = presets.create(MICRO)
    with pytest.raises(ValueError, match=r"reads 1 image\(s\)"):
        other.multimodal(ids, mask, states.chunk(2))


def test_shared_keys_are_registered_once_and_counted_once():
    model = presets.create(MICRO, form="nlvr2")
    owner, reader = (
        model.text.get_submodule(f"layers.{index}.cross_attention") for index in (2, 3)
    )
    assert isinstance(owner, Attention) and isinstance(reader, Attention)
    assert {name for name, _ in reader.named_children()} == {"gate", "q", "out"}
    assert len(dict(model.named_parameters(remove_duplicate=False))) == len(
        {id(parameter) for parameter in model.parameters()}
    )
    both = sum(p.numel() for part in (owner, reader) for p in part.parameters())
    costs, units = model.parameters_per_unit(), owner.heads
    counted = units * (costs["fusion.0.cross_heads"] + costs["fusion.1.cross_heads"])
    assert counted == both - 2 * model.config.text.width  # the output biases stay
    assert model.config.text.pair_heads == (1, 1)


@torch.no_grad()
def test_a_pair_may_keep_different_heads():
    """Shared heads a, b, c: the first layer reads a and b, the second b and c."""
    kwargs: dict[str, Any] = {"key_width": 6, "shared_heads": 3}
    owner = Attention(8, 2, 4, **kwargs)
    reader = Attention(8, 2, 4, owner=False, **kwargs)
    x, context = torch.randn(2, 5, 8), torch.randn(2, 7, 6)
    memory = owner.keys_values(context, reader)
    for part, heads in ((owner, slice(0, 8)), (reader, slice(4, 12))):
        plain = Attention(8, 2, 4, key_width=6)
        state = part.state_dict()
        for name in ("k.weight", "k.bias", "v.weight", "v.bias"):
            state[name] = owner.state_dict()[name][heads]
        plain.load_state_dict(state)
        given = {"memory": memory} if part is reader else {}
        torch.testing.assert_close(part(x, context, **given)[0], plain(x, context)[0])
    with pytest.raises(ValueError, match="needs `memory`"):
        reader(x, context)
    empty = Attention(8, 0, 4, **kwargs)
    assert empty.keys_values(context)[0].shape == (2, 3, 7, 4)
    assert torch.equal(empty(x, context)[0], empty.out(x))


# --- contexts that several rows share --------------------------------------------------------------


@torch.no_grad()
def test_rows_that_share_an_image_equal_rows_with_copies_of_it():
    model = presets.create(MICRO).eval()
    images, ids, mask = inputs(model, rows=6)
    few = model.encode_image(images[:2]).last
    seen = torch.rand(2, 37) > 0.3
    capture = Capture.of([], [], [0])
    text = model.encode_text(ids, mask).last
    shared = model.fuse(text, mask, few, seen, capture)
    copied = few.repeat_interleave(3, 0), seen.repeat_interleave(3, 0)
    apart = model.fuse(text, mask, *copied, capture)
    torch.testing.assert_close(shared.last, apart.last)
    for name in ("q", "k", "key_mask"):
        traces = (getattr(o.cross_attention[0], name) for o in (shared, apart))
        torch.testing.assert_close(*traces)
    with pytest.raises(ValueError, match="6 rows cannot share 4 contexts"):
        model.fuse(text, mask, model.encode_image(images[:4]).last)


# --- captioning ---------------------------------------------------------------------------------


@torch.no_grad()
def test_the_caption_decoder_is_the_text_encoder_read_causally():
    model = presets.create(MICRO, form="captioning").eval()
    images, ids, _ = inputs(model)
    states = model.encode_image(images[:3]).last
    output = model.decode(ids, None, states, None, Capture.of(range(5), range(4), [2, 3]))
    assert all(trace.causal for trace in output.attention.values())
    assert not any(trace.causal for trace in output.cross_attention.values())
    x, lower = model.text.embeddings(ids), torch.ones(8, 8).tril().bool()
    for layer in model.text.layers:  # each query by itself, with only the keys it may see
        assert isinstance(layer, BertLayer)
        rows = [
            layer(x[:, : t + 1], lower[t : t + 1, : t + 1].expand(3, -1), states)[0][:, -1]
            for t in range(8)
        ]
        x = torch.stack(rows, dim=1)
    torch.testing.assert_close(output.last, x)
    logits = model.lm_head(x, word_weight=model.text.embeddings.word.weight)
    torch.testing.assert_close(output.logits, logits)


# --- sizes and precision -----------------------------------------------------------------------


@torch.no_grad()
@pytest.mark.parametrize(("pixels", "tokens"), [(384, 577), (480, 901)])
def test_fusion_reads_the_tokens_of_larger_images(pixels, tokens):
    narrow = {"width": 16, "head_dim": 8, "heads": (2, 2), "ffn": (32, 32)}
    model = presets.create(
        "blocksworld-micro-student",
        vision={**narrow, "image_size": 224, "patch_size": 16},
        text={**narrow, "cross_heads": (2,)},
    )
    for form in ("retrieval", "vqa", "nlvr2", "captioning", "grounding"):
        config = model.config.as_form(form, image_size=pixels)
        larger = task_form_from_pretrained(model, form, config=config).eval()
        assert larger.vision.embeddings.position.shape == (tokens, 16)
        images, ids, mask = inputs(larger, rows=2)
        states = larger.encode_image(images).last
        assert states.shape == (4, tokens, 16)
        seen = torch.ones(2, tokens, dtype=torch.bool)
        for value in outputs(larger).values():
            assert value.isfinite().all()
        if form == "grounding":  # the last token is read, and a mask hides it
            far = states[:2].clone()
            far[:, -1] += 3
            fused = larger.multimodal(ids, mask, states[:2], seen).last
            assert not torch.allclose(larger.multimodal(ids, mask, far, seen).last, fused)
            seen[:, -1] = False
            hidden = [larger.multimodal(ids, mask, x, seen).last for x in (states[:2], far)]
            torch.testing.assert_close(*hidden)


@torch.no_grad()
@pytest.mark.parametrize("form", FORMS)
def test_half_precision_stays_close_to_float32(form):
    """Stated bounds, of the largest value: float16 1 %, bfloat16 10 %, bfloat16 autocast 5 %."""
    model = presets.create(MICRO, form=form).eval()
    exact = run(model, torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        mixed = run(model, torch.float32)
    cases = (
        (run(model, torch.float16), 0.01),
        (run(model, torch.bfloat16), 0.10),
        (mixed, 0.05),
    )
    for other, bound in cases:
        for name, value in exact.items():
            error = (other[name].float() - value).abs().max() / value.abs().max()
            assert 0 <= error < bound, (name, error)


def run(model: XVLM, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    copy = XVLM(model.config).eval()
    copy.load_state_dict(model.state_dict())
    torch.manual_seed(1)
    return outputs(copy.to(dtype))


@torch.no_grad()
@pytest.mark.parametrize("masked", [False, True])
def test_products_beyond_the_range_of_float16_do_not_overflow(masked):
    """q k^T is 1e5 on the diagonal, past float16's 65504; divided by sqrt(64) it is in range."""
    part = Attention(64, 1, 64)
    for linear in (part.q, part.k):
        torch.nn.init.eye_(linear.weight)
        torch.nn.init.zeros_(linear.bias)
    signs = torch.ones(1, 1)
    for _ in range(6):  # rows of +1 and -1, at right angles to each other
        signs = torch.cat([torch.cat([signs, signs], 1), torch.cat([signs, -signs], 1)])
    x = 40.0 * signs[None, :5]
    assert (x @ x.mT).max() > 65504 and ((x / 8) @ x.mT).max() < 65504
    mask = torch.tensor([[True] * 4 + [False]]) if masked else None
    exact = part(x, key_mask=mask)[0]
    half = part.half()(x.half(), key_mask=mask)[0]
    assert half.isfinite().all()
    torch.testing.assert_close(half.float(), exact, atol=0.05, rtol=0.01)


def test_the_published_guard_changes_no_bit():
    """q / sqrt(d) before the product or after it: the same where sqrt(d) is a power of two."""
    q, k = torch.randn(50, 64).half(), torch.randn(50, 64).half()
    before = (q / 8).float() @ k.float().T
    assert torch.equal(before, (q.float() @ k.float().T) / 8)
    assert not torch.equal((q / 7).float() @ k.float().T, (q.float() @ k.float().T) / 7)
