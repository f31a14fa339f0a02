"""X-VLM's key layout, every form, both ways."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

from models import presets
from models.checkpoints import xvlm as published
from models.vision import resize_positions
from models.xvlm import XVLM

FORMS = ("pretrain", "retrieval", "vqa", "nlvr2_pretrain", "nlvr2", "captioning", "grounding")
SEEN = {"head_dim": 32, "region_layers": 2}


def model_of(form: str, **overrides) -> XVLM:
    torch.manual_seed(0)
    model = presets.create("blocksworld-micro-teacher", form=form, **overrides)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_()
    return model


def keys_expected(form: str, vision: int, text: int, fusion: int) -> int:
    """EFFICIENTVLM's layout: 8 + 16 a vision layer, 6 + 16 a text and 26 a fusion layer."""
    copies = 2 if form.startswith("nlvr2") else 1
    encoders = 8 + 16 * vision + 6 + 16 * text + 26 * fusion * copies
    heads = {
        "pretrain": 7 + 1 + 4 + 6 + 6,
        "retrieval": 1 + 4 + 6,
        "vqa": 6 + 26 * fusion + 7,
        "nlvr2_pretrain": 2 + 2,
        "nlvr2": 6,
        "captioning": 7,
        "grounding": 6,
    }
    return encoders + heads[form]


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(("name", "layers"), [("xvlm-clip-base", 6), ("efficientvlm", 3)])
def test_full_size_key_counts_and_sizes(name, layers, form):
    with torch.device("meta"):
        model = presets.create(name, form=form)
    state = published.to_published(model.state_dict())
    assert len(state) == keys_expected(form, 2 * layers, layers, layers)
    if form == "pretrain":
        assert len(state) == {6: 482, 3: 260}[layers]
    found = published.config_of(state)
    assert found.form == form and found.decoder == model.config.decoder
    assert found.vision == model.config.vision and found.text == model.config.text
    converted, report = published.from_published(state)
    assert converted.keys() == model.state_dict().keys() and not report.unexpected


def test_the_documented_table_holds():
    page = (Path(__file__).resolve().parents[3] / "docs" / "models.md").read_text()
    rows = re.findall(r"\| `(\w+)` \|[^|]*\| (\d+) \|" + r" ([\d.]+)M \| (\d+) \|" * 2, page)
    assert len(rows) == 6
    for form, pixels, *counts in rows:
        for place, name in enumerate(("xvlm-clip-base", "efficientvlm")):
            with torch.device("meta"):
                model = presets.create(name, form=form)
            parameters = sum(parameter.numel() for parameter in model.parameters())
            keys = len(published.to_published(model.state_dict()))
            found = [f"{parameters / 1e6:.2f}", str(keys)]
            assert found == counts[2 * place : 2 * place + 2], (form, name)
            assert model.config.vision.image_size == int(pixels)


@pytest.mark.parametrize("form", FORMS)
def test_there_and_back_bit_for_bit(form):
    model = model_of(form)
    state = published.to_published(model.state_dict())
    assert published.form_of(state) == form
    config = published.config_of(state, **SEEN)
    again = model_of(form)
    with torch.no_grad():
        for parameter in again.parameters():
            parameter.zero_()
    report = published.load(again, state)
    assert (config.decoder, config.text.pair_heads) == (
        model.config.decoder,
        model.config.text.pair_heads,
    )
    assert report.missing == [] and len(report.loaded) == len(model.state_dict())
    assert len(report.renamed) + len(report.ignored) == len(state)
    for key, value in model.state_dict().items():
        assert torch.equal(again.state_dict()[key], value), key
    back = published.to_published(again.state_dict())
    assert back.keys() == state.keys()
    for key, value in state.items():
        assert torch.equal(back[key], value) and back[key].dtype == value.dtype, key


def test_the_temperature_is_a_scalar_there_and_one_element_here():
    state = published.to_published(model_of("retrieval").state_dict())
    assert state["temp"].shape == () and "text_encoder.encoder.layer.0.output.dense.bias" in state
    assert published.from_published(state)[0]["contrastive.value"].shape == (1,)


def test_names_of_a_layer_in_every_form():
    """Section by section as published; a fusion layer is number 2 of this model."""
    places = {
        "pretrain": "text_encoder.bert.encoder.layer.2",
        "grounding": "text_encoder.encoder.layer.2",
        "captioning": "text_decoder.bert.encoder.layer.2",
        "nlvr2": "text_encoder.encoder.layer.2",
    }
    for form, place in places.items():
        model = model_of(form)
        state = published.to_published(model.state_dict())
        query = model.state_dict()["text.layers.2.cross_attention.q.weight"]
        assert torch.equal(state[f"{place}.crossattention.self.query.weight"], query), form
    model = model_of("vqa")
    state = published.to_published(model.state_dict())
    query = model.state_dict()["decoder.layers.0.cross_attention.q.weight"]
    name = "text_decoder.bert.encoder.layer.0.crossattention.self.query.weight"
    assert torch.equal(state[name], query)
    bias = model.state_dict()["decoder.head.bias"]
    assert torch.equal(state["text_decoder.cls.predictions.decoder.bias"], bias)


def test_keys_shared_within_a_pair_are_stored_twice():
    state = published.to_published(model_of("nlvr2").state_dict())
    for kind in ("key.weight", "value.bias"):
        names = [f"text_encoder.encoder.layer.{i}.crossattention.self.{kind}" for i in (2, 3)]
        assert torch.equal(state[names[0]], state[names[1]])
    state[names[1]] = state[names[1]] + 1
    with pytest.raises(ValueError, match=re.escape(f"{names[1]} differs from {names[0]}")):
        published.from_published(state)


@pytest.mark.parametrize("form", ["pretrain", "captioning"])
def test_tied_copies(form):
    model = model_of(form)
    state = published.to_published(model.state_dict())
    stack = {"pretrain": "text_encoder.", "captioning": "text_decoder."}[form]
    head, word = f"{stack}cls.predictions.", f"{stack}bert.embeddings.word_embeddings.weight"
    one_copy = {k: v for k, v in state.items() if k not in (f"{head}bias", word)}
    published.load(model_of(form), one_copy)  # a file that stores shared tensors once
    untied = {**state, f"{head}decoder.weight": state[word] + 1}
    with pytest.raises(ValueError, match="decoder.weight differs from"):
        published.load(model, untied)


def test_pruning_gates_are_recognised():
    model = model_of("pretrain")
    state = published.to_published(model.state_dict())
    state["l0_module.vision_head_loga"] = torch.zeros(4, 1)
    state["l0_module.lambda_1"] = torch.zeros(())
    report = published.load(model, state)
    assert (
        "l0_module.lambda_1" in report.ignored and "2 tensors of pruning gates" in report.notes[0]
    )


def test_positions_follow_the_image_size():
    state = published.to_published(model_of("pretrain").state_dict())
    larger = model_of("pretrain", vision={"image_size": 64})
    assert published.load(larger, state).resized == ["vision.embeddings.position"]
    expected = resize_positions(state["vision_encoder.pos_embed.weight"], 8)
    assert torch.equal(larger.vision.embeddings.position, expected)
    state["vision_encoder.pos_embed.weight"] = torch.zeros(20, 32)
    with pytest.raises(ValueError, match="a class token and a square of patches"):
        published.load(larger, state)


def test_other_models_are_told_apart():
    state = published.to_published(model_of("pretrain").state_dict())
    swin = {**state, "vision_encoder.layers.0.blocks.0.norm1.weight": torch.ones(2)}
    with pytest.raises(ValueError, match="Swin"):
        published.form_of(swin)
    with pytest.raises(ValueError, match="DeiT"):
        published.form_of({**state, "vision_encoder.blocks.0.norm1.weight": torch.ones(2)})
    with pytest.raises(ValueError, match="RoBERTa"):
        published.form_of({**state, "text_encoder.roberta.x": torch.ones(2)})
    with pytest.raises(ValueError, match=r"x\.pth: not a checkpoint of X-VLM"):
        published.form_of({"encoder.weight": torch.ones(2)}, "x.pth")
    with pytest.raises(ValueError, match="holds form 'pretrain', the model is 'grounding'"):
        published.load(model_of("grounding"), state)


def test_wrong_keys_and_shapes_are_named():
    model = model_of("grounding")
    state = published.to_published(model.state_dict())
    gone = state.pop("bbox_head.0.bias")
    with pytest.raises(ValueError, match=r"missing bbox_head\.linear\.bias"):
        published.load(model, state)
    for pattern in ("bbox_head.linear.bias", "bbox_head", "bbox_*"):
        assert published.load(model, state, allow_missing=[pattern]).missing
    with pytest.raises(ValueError, match=r"missing bbox_head"):
        published.load(model, state, allow_missing=["bbox_head.lin"])
    state |= {"bbox_head.0.bias": gone, "extra.weight": gone}
    with pytest.raises(ValueError, match=r"unexpected extra\.weight"):
        published.load(model, state)
    report = published.load(model, state, allow_unexpected=["extra.*"])
    assert report.unexpected == ["extra.weight"]
    del state["extra.weight"]
    with pytest.raises(ValueError, match="multiples of head size 48; give vision.head_dim"):
        published.config_of(state, head_dim=48)
    state["bbox_head.0.bias"] = gone.long()
    with pytest.raises(ValueError, match="holds torch.int64 values, not weights"):
        published.load(model, state)


def test_models_that_are_not_published_have_no_names():
    model = model_of("pretrain").state_dict()
    without = {key: value for key, value in model.items() if not key.startswith("itm_head")}
    with pytest.raises(ValueError, match="no name in the published format"):
        published.to_published(without)
    del model["vision.embeddings.class_token"]
    with pytest.raises(ValueError, match="needs CLIP's ViT"):
        published.to_published(model)
