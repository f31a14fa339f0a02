"""Whole models from foreign weights: sizes, what stays fresh, and models that are put together."""

from __future__ import annotations

import json

import pytest
import torch
from transformers import BertConfig, BertForMaskedLM, CLIPVisionConfig, CLIPVisionModel

from models import presets
from models.checkpoints import build, xvlm
from models.checkpoints.build import Options
from models.checkpoints.files import foreign_config

_WORD = "bert.embeddings.word_embeddings.weight"
VISION = {"head_dim": 8}
TEXT = {"head_dim": 8}
SMALL_TEXT = {
    "vocab_size": 40,
    "max_positions": 12,
    "width": 32,
    "text_layers": 2,
    "heads": [4] * 4,
    "cross_heads": [4] * 2,
    "ffn": [48] * 4,
    **TEXT,
}


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def tower() -> dict[str, torch.Tensor]:
    config = CLIPVisionConfig(
        hidden_size=32,
        num_hidden_layers=3,
        num_attention_heads=4,
        intermediate_size=64,
        image_size=16,
        patch_size=8,
    )
    return dict(CLIPVisionModel(config).state_dict())


def bert_weights(layers: int = 4) -> dict[str, torch.Tensor]:
    config = BertConfig(
        vocab_size=40,
        hidden_size=32,
        num_hidden_layers=layers,
        num_attention_heads=4,
        intermediate_size=48,
        max_position_embeddings=12,
    )
    return dict(BertForMaskedLM(config).state_dict())


def initial() -> build.Conversion:
    sizes = {"vision": VISION, "text": SMALL_TEXT, "embed_dim": 16}
    first = build.build("clip", tower(), Options(sizes=sizes))
    return build.build("bert", bert_weights(), base=first.model, base_fresh=first.fresh)


def test_clip_then_bert_leave_cross_attention_and_heads_fresh():
    made = initial()
    modules = {key.split(".")[0] for key in made.fresh}
    assert modules == {
        "bbox_head",
        "contrastive",
        "image_projection",
        "itm_head",
        "text",
        "text_projection",
    }
    assert all(".cross_" in key for key in made.fresh if key.startswith("text."))
    state, words = made.model.state_dict(), bert_weights()
    assert torch.equal(
        state["vision.blocks.2.norm2.bias"], tower()["encoder.layers.2.layer_norm2.bias"]
    )
    assert state["text.embeddings.word.weight"].shape == words[_WORD].shape
    assert set(made.report.missing) <= set(made.fresh)


def test_the_order_of_the_two_does_not_matter():
    vision, text = tower(), bert_weights()
    sizes = {"vision": VISION, "text": SMALL_TEXT, "embed_dim": 16}
    config = build.build("clip", vision, Options(sizes=sizes)).model.config
    whole = {k: v for k, v in config.to_dict().items() if k not in ("form", "decoder")}
    results = []
    for kinds in (("clip", "bert"), ("bert", "clip")):
        weights = {"clip": vision, "bert": text}
        first = build.build(kinds[0], weights[kinds[0]], Options(sizes=whole))
        both = build.build(kinds[1], weights[kinds[1]], base=first.model, base_fresh=first.fresh)
        loaded = {k: v for k, v in both.model.state_dict().items() if k not in both.fresh}
        results.append((both.fresh, loaded))
    assert results[0][0] == results[1][0]
    assert all(torch.equal(value, results[1][1][key]) for key, value in results[0][1].items())


def test_bert_alone_takes_its_sizes_and_halves_its_layers():
    made = build.build("bert", bert_weights(), Options(sizes={"text": TEXT}))
    text = made.model.config.text
    assert (text.vocab_size, text.max_positions, text.text_layers) == (40, 12, 2)
    assert text.heads == (4,) * 4 and text.cross_heads == (4,) * 2 and text.ffn == (48,) * 4
    assert any("text.activation gelu" in note for note in made.report.notes)
    with pytest.raises(ValueError, match="not a multiple of head size 64; give text.head_dim"):
        build.build("bert", bert_weights())


def test_a_base_keeps_what_was_loaded():
    made = initial()
    with pytest.raises(ValueError, match=r"text\..* of the model folder does not fit"):
        wider = Options(sizes={"text": {"ffn": [64] * 4}})
        build.build("clip", tower(), wider, base=made.model, base_fresh=made.fresh)
    with pytest.raises(ValueError, match="does not go into another model"):
        build.build("xvlm", {}, base=made.model)
    larger = build.build(
        "bert", bert_weights(), Options(image_size=32), base=made.model, base_fresh=made.fresh
    )
    assert larger.model.config.vision.image_size == 32 and larger.fresh == made.fresh
    assert larger.model.vision.embeddings.position.shape == (17, 32)


def test_a_task_form_knows_its_fresh_keys():
    model = presets.create("blocksworld-micro-teacher")
    state = xvlm.to_published(model.state_dict())
    sizes = {"vision": {"head_dim": 32}, "text": {"head_dim": 32}}
    options = Options(sizes=sizes, form="nlvr2", image_size=64)
    made = build.build("xvlm", state, options)
    assert made.model.config.form == "nlvr2" and made.model.config.vision.image_size == 64
    assert made.fresh and all(key.startswith("cls_head.") for key in made.fresh)
    del (
        state["text_encoder.cls.predictions.bias"],
        state["text_encoder.cls.predictions.decoder.bias"],
    )
    with pytest.raises(ValueError, match=r"missing mlm_head\.bias"):
        build.build("xvlm", state, options)
    caption = Options(sizes=sizes, form="captioning", allow_missing=["mlm_head.bias"])
    assert build.build("xvlm", state, caption).fresh == ["lm_head.bias"]


def test_a_backbone_by_name_stands_for_its_sizes():
    import timm

    vit = timm.create_model("vit_tiny_patch16_224", pretrained=False, depth=2)
    sizes = {
        "vision": {"backbone": "timm/vit_tiny_patch16_224", "heads": [3, 3], "ffn": [768, 768]},
        "text": SMALL_TEXT,
    }
    made = build.build("timm", vit.state_dict(), Options(sizes=sizes))
    assert made.model.config.vision.norm_eps == 1e-6 and made.model.config.image_mean[0] == 0.5
    assert all(key.startswith("vision.") for key in made.report.loaded) and not made.report.notes
    images = torch.randn(1, 3, 224, 224)
    with torch.no_grad():
        expected = vit.eval().forward_features(images)
        torch.testing.assert_close(
            made.model.encode_image(images).last, expected, atol=1e-5, rtol=1e-4
        )


def test_unknown_kinds_and_sizes():
    with pytest.raises(ValueError, match="kind 'swin' is unknown"):
        build.build("swin", {})
    with pytest.raises(ValueError, match=r"checkpoint: sizes: vision\.widht"):
        build.build("clip", tower(), Options(sizes={"vision": {**VISION, "widht": 3}}))
    with pytest.raises(ValueError, match="a layer map belongs to clip and bert"):
        model = presets.create("blocksworld-micro-teacher")
        state = xvlm.to_published(model.state_dict())
        sizes = {"vision": {"head_dim": 32}, "text": {"head_dim": 32}}
        build.build("xvlm", state, Options(sizes=sizes, layer_map=(0,)))


def test_the_record_remembers_every_key_and_what_is_fresh(tmp_path):
    assert build.fresh_keys(tmp_path) == set()
    made = initial()
    build.write_record(tmp_path, made, {"kind": "bert"})
    assert build.fresh_keys(tmp_path) == set(made.fresh)
    (tmp_path / "next").mkdir()
    build.write_record(tmp_path / "next", made, {"kind": "clip"}, before=tmp_path)
    values = json.loads((tmp_path / "next" / build.RECORD).read_text())
    assert [entry["kind"] for entry in values["conversions"]] == ["bert", "clip"]
    assert values["conversions"][0]["renamed"]["bert.embeddings.LayerNorm.bias"] == [
        "text.embeddings.norm.bias"
    ]
    (tmp_path / build.RECORD).write_text("{}")
    with pytest.raises(ValueError, match="conversion.json: not a record"):
        build.fresh_keys(tmp_path)


@pytest.mark.parametrize("kind", ["roberta", "distilbert", "electra"])
def test_relatives_of_bert_with_their_configuration(kind, tmp_path):
    """What no tensor shows (RoBERTa's unused positions) comes from the config.json beside."""
    from transformers import AutoConfig, AutoModel

    sizes = {
        "roberta": {"max_position_embeddings": 14, "pad_token_id": 1},
        "distilbert": {"max_position_embeddings": 12, "dim": 32, "n_layers": 4, "n_heads": 4},
        "electra": {"max_position_embeddings": 12, "embedding_size": 16},
    }[kind]
    layers = {"hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 4}
    ffn = {"hidden_dim": 48} if kind == "distilbert" else {"intermediate_size": 48, **layers}
    foreign = AutoModel.from_config(AutoConfig.for_model(kind, vocab_size=40, **ffn, **sizes))
    foreign.eval().save_pretrained(tmp_path)
    file, values = foreign_config(tmp_path / "model.safetensors")
    beside = build.sizes_beside("bert", values, file)
    vision = {"width": 32, "heads": [1], "ffn": [8], "region_layers": 0, "image_size": 16}
    split = {"text_layers": 4, "cross_heads": []}
    whole = build.merged({"vision": vision, "text": split}, beside)
    made = build.build("bert", foreign.state_dict(), Options(sizes=whole))
    ids = torch.randint(3, 40, (2, 12))
    with torch.no_grad():
        ours, theirs = made.model.encode_text(ids, None).last, foreign(ids).last_hidden_state
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)
