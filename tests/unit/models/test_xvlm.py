"""XVLM as a whole: forms, heads, gates, dtypes, and what engines ask of it."""

from __future__ import annotations

import pytest
import torch

from models import presets
from models.attention import Attention
from models.gate_slot import GateSlot
from models.outputs import Capture
from models.xvlm import XVLM

HEADS = {"itm_head", "bbox_head", "mlm_head", "image_projection", "text_projection", "temperature"}


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def inputs(rows: int = 3):
    images = torch.randint(0, 256, (rows, 3, 48, 48), dtype=torch.uint8)
    mask = torch.ones(rows, 8, dtype=torch.bool)
    mask[0, 6:] = False
    return images, torch.randint(1, 256, (rows, 8)), mask


def everything(model: XVLM) -> dict[str, torch.Tensor]:
    """One value from every method of the model's form."""
    images, ids, mask = inputs()
    image = model.encode_image(images).last
    if model.decoder is not None:
        states = model.multimodal(ids, mask, image).last
        return {"decode": model.decode(ids, mask, states, mask).logits}
    text = model.encode_text(ids, mask).last
    fused = model.fuse(text, mask, image).last
    return {
        "itc": model.image_feature(image) @ model.text_feature(text).T / model.temperature(),
        "itm": model.match_logits(fused),
        "box": model.predict_box(fused),
        "mlm": model.mlm_logits(fused, torch.tensor([[1, 2]] * 3)),
    }


@pytest.mark.parametrize("form", ["pretrain", "vqa"])
def test_every_parameter_gets_a_gradient_and_has_a_shape(form):
    model = presets.create("blocksworld-micro-teacher", form=form)
    torch.stack(
        [value.float().square().mean() for value in everything(model).values()]
    ).sum().backward()
    for name, parameter in model.named_parameters():
        assert parameter.ndim > 0 and parameter.is_contiguous(), name
        assert parameter.grad is not None and parameter.grad.isfinite().all(), name


@pytest.mark.parametrize("form", ["pretrain", "vqa"])
def test_half_and_autocast_stay_close_to_float32(form):
    model = presets.create("blocksworld-micro-teacher", form=form).eval()
    exact = seeded_run(model)
    with torch.autocast("cpu", torch.bfloat16):
        mixed = seeded_run(model)
    brain, half = seeded_run(copy_of(model).bfloat16()), seeded_run(copy_of(model).half())
    for name, value in exact.items():
        for other, tolerance in ((mixed, 0.1), (brain, 0.2), (half, 0.02)):
            assert other[name].isfinite().all()
            assert (other[name].float() - value).abs().max() < tolerance * value.abs().max(), name


def copy_of(model: XVLM) -> XVLM:
    copy = XVLM(model.config)
    copy.load_state_dict(model.state_dict())
    return copy.eval()


@torch.no_grad()
def seeded_run(model: XVLM) -> dict[str, torch.Tensor]:
    torch.manual_seed(1)
    return everything(model)


def test_forms_hold_only_their_parts():
    vqa = presets.create("blocksworld-micro-student", form="vqa")
    parts = {name for name, _ in vqa.named_children()}
    assert parts == {"vision", "text", "decoder"}
    pretrain = presets.create("blocksworld-micro-student")
    assert not any(name.startswith("decoder") for name, _ in pretrain.named_parameters())
    with pytest.raises(ValueError, match='form "vqa"'):
        pretrain.decode(*([None] * 4))


@torch.no_grad()
def test_one_pass_equals_text_then_fusion():
    model = presets.create("blocksworld-micro-teacher").eval()
    images, ids, mask = inputs()
    image = model.encode_image(images).last
    image_mask = torch.rand(3, 37) > 0.3
    whole = model.multimodal(ids, mask, image, image_mask, Capture.of(range(5), range(4), range(4)))
    text = model.encode_text(ids, mask, Capture.of([2]))
    fused = model.fuse(text.last, mask, image, image_mask, Capture.of([0, 2], [1], [0]))
    torch.testing.assert_close(whole.last, fused.last)
    torch.testing.assert_close(whole.hidden[2], fused.hidden[0])
    torch.testing.assert_close(whole.attention[3].q, fused.attention[1].q)
    torch.testing.assert_close(whole.cross_attention[2].k, fused.cross_attention[0].k)
    assert set(whole.cross_attention) == {2, 3} and set(whole.attention) == {0, 1, 2, 3}
    assert torch.equal(whole.cross_attention[2].key_mask, image_mask)


@torch.no_grad()
def test_the_decoder_is_causal_and_reads_the_visible_states():
    model = presets.create("blocksworld-micro-teacher", form="vqa").eval()
    ids, mask = torch.randint(1, 256, (2, 6)), torch.ones(2, 6, dtype=torch.bool)
    states, state_mask = torch.randn(2, 5, 32), torch.ones(2, 5, dtype=torch.bool)
    state_mask[:, 3:] = False
    output = model.decode(ids, mask, states, state_mask, Capture.of([0, 2], [0], [1]))
    assert output.attention[0].causal and not output.cross_attention[1].causal
    torch.testing.assert_close(model.decode(ids, None, states, state_mask).logits, output.logits)
    later, hidden = ids.clone(), states.clone()
    later[:, 4] += 1
    hidden[:, 3:] += 1
    changed = model.decode(later % 256, mask, hidden, state_mask).logits
    torch.testing.assert_close(changed[:, :4], output.logits[:, :4])
    assert not torch.allclose(changed[:, 4:], output.logits[:, 4:])


def test_temperature_is_clamped_and_its_gradient_is_not():
    model = presets.create("blocksworld-micro-student")
    for value, expected in ((0.07, 0.07), (2.0, 0.5), (1e-6, 0.001)):
        model.contrastive.value.data.fill_(value)
        model.zero_grad()
        temperature = model.temperature()
        temperature.sum().backward()
        assert temperature.shape == (1,) and temperature.item() == pytest.approx(expected)
        assert model.contrastive.value.grad.item() == 1.0


def test_touch_reaches_every_parameter_of_the_heads():
    model = presets.create("blocksworld-micro-student")
    value = model.touch(HEADS)
    assert value.shape == () and value.item() == 0.0
    value.backward()
    for name, parameter in model.named_parameters():
        is_head = not name.startswith(("vision", "text."))
        touched = is_head or name == "text.embeddings.word.weight"
        assert (parameter.grad is not None) == touched, name
        assert parameter.grad is None or not parameter.grad.any(), name
    assert model.touch(set()).item() == 0.0
    with pytest.raises(ValueError, match="no part 'itm'"):
        model.touch({"itm"})
    vqa = presets.create("blocksworld-micro-student", form="vqa")
    vqa.touch({"decoder"}).backward()
    with pytest.raises(ValueError, match="'bbox_head'"):
        vqa.touch({"bbox_head"})


def test_tied_weights_are_listed():
    model = presets.create("blocksworld-micro-student")
    assert model.external_parameters() == [(model.mlm_head, model.text.embeddings.word.weight)]
    vqa = presets.create("blocksworld-micro-student", form="vqa")
    assert vqa.external_parameters() == [(vqa.decoder.head, vqa.decoder.embeddings.word.weight)]


def test_gate_slots_have_the_names_and_sizes_of_the_configuration():
    model = presets.create(
        "blocksworld-micro-teacher",
        form="vqa",
        vision={"heads": (2, 1, 1, 0), "ffn": (128, 7, 128, 0)},
    )
    slots = model.gate_slots()
    assert all(isinstance(slot, GateSlot) for slot in slots.values())
    assert {id(slot) for slot in slots.values()} == {
        id(module) for module in model.modules() if isinstance(module, GateSlot)
    }
    assert slots.keys() == model.parameters_per_unit().keys()
    assert [slots[f"vision.{i}.heads"].units for i in range(4)] == [2, 1, 1, 0]
    assert [slots[f"vision.{i}.ffn"].units for i in range(4)] == [128, 7, 128, 0]
    fusion = [name for name in slots if name.startswith("fusion.1.")]
    assert fusion == ["fusion.1.self_heads", "fusion.1.cross_heads", "fusion.1.ffn"]
    assert [name for name in slots if name.startswith("text.")][-1] == "text.1.ffn"
    assert list(slots)[-1] == "decoder.1.ffn"


def test_unit_costs_are_what_removal_saves():
    def count(**overrides) -> int:
        model = presets.create("blocksworld-micro-student", form="vqa", **overrides)
        return sum(parameter.numel() for parameter in model.parameters())

    costs = presets.create("blocksworld-micro-student", form="vqa").parameters_per_unit()
    two, full = {"heads": (2, 1)}, count()
    assert count(vision=two) - full == costs["vision.0.heads"]
    assert count(vision={"ffn": (127, 128)}) - full == -costs["vision.0.ffn"]
    assert count(text={"heads": (1, 2)}) - full == costs["fusion.0.self_heads"]
    assert count(text={"cross_heads": (0,)}) - full == -costs["fusion.0.cross_heads"]
    assert count(text={"ffn": (128, 0)}) - full == -128 * costs["fusion.0.ffn"]
    assert count(**{"decoder.cross_heads": (2,)}) - full == costs["decoder.0.cross_heads"]
    with torch.device("meta"):
        published = presets.create("xvlm-clip-base").parameters_per_unit()
    # per head (4 * 768^2 + 3 * 768) / 12: the output bias stays
    assert published["vision.0.heads"] == 4 * 768 * 64 + 3 * 64
    assert published["fusion.0.cross_heads"] == 4 * 768 * 64 + 3 * 64
    assert published["text.0.ffn"] == 1537


@torch.no_grad()
def test_a_fully_pruned_model_still_runs():
    overrides = {
        "vision": {"heads": (0, 0), "ffn": (0, 0)},
        "text": {"heads": (0, 0), "cross_heads": (0,), "ffn": (0, 0)},
        "decoder": {"heads": (0,), "cross_heads": (0,), "ffn": (0,)},
    }
    model = presets.create("blocksworld-micro-student", form="vqa", **overrides).eval()
    assert everything(model)["decode"].shape == (3, 8, 256)


def test_gates_reach_every_sub_layer():
    model = presets.create("blocksworld-micro-teacher", form="vqa")
    slots = model.gate_slots()
    leaves = {}
    for name, slot in slots.items():
        leaves[name] = slot.z = torch.full((slot.units,), 0.7, requires_grad=True)
    everything(model)["decode"].square().mean().backward()
    for name, leaf in leaves.items():
        assert leaf.grad is not None and leaf.grad.any(), name
    assert not any("gate" in key for key in model.state_dict())


def test_dropout_only_while_training():
    model = presets.create("blocksworld-micro-student", text={"dropout": 0.3})
    _, ids, mask = inputs()
    assert not torch.equal(model.encode_text(ids, mask).last, model.encode_text(ids, mask).last)
    model.eval()
    assert torch.equal(model.encode_text(ids, mask).last, model.encode_text(ids, mask).last)


def test_fresh_weights():
    model = presets.create(
        "efficientvlm",
        vision={"heads": (12,), "ffn": (3072,)},
        text={
            "text_layers": 1,
            "heads": (12, 12),
            "cross_heads": (12,),
            "ffn": (3072, 3072),
            "vocab_size": 1000,
        },
    )
    assert model.text.embeddings.word.weight.std().item() == pytest.approx(0.02, rel=0.02)
    assert not model.text.embeddings.word.weight[0].any()
    layer = model.text.layers[1]
    assert layer.cross_attention.q.weight.std().item() == pytest.approx(0.02, rel=0.02)
    assert not layer.ffn.fc1.bias.any() and (layer.ffn_norm.weight == 1).all()
    attention = model.vision.blocks[0].attention
    assert isinstance(attention, Attention)
    assert attention.q.weight.std().item() == pytest.approx(768**-0.5, rel=0.02)
    assert attention.out.weight.std().item() == pytest.approx((768 * 2) ** -0.5, rel=0.02)
    assert model.contrastive.value.item() == pytest.approx(0.07)
