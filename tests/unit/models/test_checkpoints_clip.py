"""CLIP's vision tower under both spellings; numbers are compared in test_oracles.py."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest
import torch
from transformers import CLIPConfig, CLIPModel, CLIPVisionConfig, CLIPVisionModel

from models.checkpoints import clip
from models.vision import VisionEncoder, resize_positions

TOWER = {
    "hidden_size": 32,
    "num_hidden_layers": 4,
    "num_attention_heads": 2,
    "intermediate_size": 48,
    "image_size": 32,
    "patch_size": 8,
}
_OPENAI = [
    ("vision_model.embeddings.class_embedding", "visual.class_embedding"),
    ("vision_model.embeddings.patch_embedding", "visual.conv1"),
    ("vision_model.embeddings.position_embedding.weight", "visual.positional_embedding"),
    ("vision_model.pre_layrnorm", "visual.ln_pre"),
    ("vision_model.post_layernorm", "visual.ln_post"),
    ("vision_model.encoder.layers", "visual.transformer.resblocks"),
    ("visual_projection.weight", "visual.proj"),
    ("layer_norm", "ln_"),
    ("mlp.fc1", "mlp.c_fc"),
    ("mlp.fc2", "mlp.c_proj"),
    ("self_attn", "attn"),
]


def foreign() -> dict[str, torch.Tensor]:
    """A whole CLIP under transformers' names."""
    torch.manual_seed(0)
    text = {**TOWER, "vocab_size": 50}
    del text["image_size"], text["patch_size"]
    model = CLIPModel(CLIPConfig(vision_config=TOWER, text_config=text))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_()
    return dict(model.state_dict())


def as_openai(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The same weights as OpenAI and open_clip name them."""
    result = {"token_embedding.weight": torch.ones(2, 2), "ln_final.bias": torch.ones(2)}
    for key, value in state.items():
        if not key.startswith("vision_model.") and key != "visual_projection.weight":
            continue
        for theirs, name in _OPENAI:
            key = key.replace(theirs, name)
        if re.search(r"attn\.[qkv]_proj", key):
            continue
        result[key] = value
    for layer in range(TOWER["num_hidden_layers"]):
        for kind in ("weight", "bias"):
            place = f"vision_model.encoder.layers.{layer}.self_attn"
            parts = [state[f"{place}.{part}_proj.{kind}"] for part in "qkv"]
            fused = f"visual.transformer.resblocks.{layer}.attn.in_proj_{kind}"
            result[fused] = torch.cat(parts)
    return result


def encoder_of(state: dict[str, torch.Tensor], **changes) -> VisionEncoder:
    return VisionEncoder(replace(clip.config_of(state, head_dim=16), **changes))


def test_sizes_are_read_off_the_tensors():
    config = clip.config_of(foreign(), head_dim=16)
    assert (config.image_size, config.patch_size, config.width) == (32, 8, 32)
    assert config.heads == (2,) * 4 and config.ffn == (48,) * 4 and config.region_layers == 1
    assert clip.config_of(as_openai(foreign()), head_dim=16) == config
    with pytest.raises(ValueError, match="not a multiple of head size 64; give vision.head_dim"):
        clip.config_of(foreign())
    with pytest.raises(ValueError, match="holds no CLIP vision tower"):
        clip.config_of({"bert.pooler.dense.weight": torch.ones(1)})


def test_what_the_configuration_says_besides():
    values = CLIPConfig(vision_config={**TOWER, "hidden_act": "gelu"}).to_dict()
    expected = {"activation": "gelu", "norm_eps": 1e-5, "head_dim": 16}
    assert clip.sizes_of(values) == expected
    assert clip.sizes_of(CLIPVisionConfig(**TOWER, hidden_act="gelu").to_dict()) == expected
    with pytest.raises(ValueError, match="model_type 'bert'"):
        clip.sizes_of({"model_type": "bert"})
    with pytest.raises(ValueError, match="hidden_act 'relu'"):
        clip.sizes_of({"model_type": "clip_vision_model", "hidden_act": "relu"})


def test_both_spellings_give_the_same_encoder():
    state = foreign()
    first, second = encoder_of(state), encoder_of(state)
    report = clip.load(first, state)
    assert report.missing == [] and report.unexpected == []
    assert "text_projection.weight" in report.ignored and "logit_scale" in report.ignored
    assert len(report.renamed) + len(report.ignored) == len(state)
    other = clip.load(second, as_openai(state))
    assert "visual.proj" in other.ignored and "token_embedding.weight" in other.ignored
    fused = other.renamed["visual.transformer.resblocks.3.attn.in_proj_bias"]
    assert fused == [f"blocks.3.attention.{part}.bias" for part in "qkv"]
    for key, value in first.state_dict().items():
        assert torch.equal(second.state_dict()[key], value), key
    bias = state["vision_model.encoder.layers.2.self_attn.k_proj.bias"]
    assert torch.equal(first.state_dict()["blocks.2.attention.k.bias"], bias)


def test_a_tower_alone_has_no_prefix():
    torch.manual_seed(0)
    state = CLIPVisionModel(CLIPVisionConfig(**TOWER)).state_dict()
    assert clip.load(encoder_of(dict(state)), state).unexpected == []


def test_half_the_depth_takes_every_second_layer():
    state = foreign()
    config = clip.config_of(state, head_dim=16)
    half = VisionEncoder(replace(config, heads=(2, 2), ffn=(48, 48)))
    report = clip.load(half, state)
    for ours, theirs in ((0, 1), (1, 3)):
        bias = state[f"vision_model.encoder.layers.{theirs}.mlp.fc1.bias"]
        assert torch.equal(half.state_dict()[f"blocks.{ours}.ffn.fc1.bias"], bias)
    assert "vision_model.encoder.layers.0.mlp.fc1.bias" in report.ignored
    clip.load(half, state, (0, 0))
    bias = state["vision_model.encoder.layers.0.mlp.fc1.bias"]
    assert torch.equal(half.state_dict()["blocks.1.ffn.fc1.bias"], bias)
    with pytest.raises(ValueError, match=r"layer map \(0, 4\) needs 2 entries from 0 to 3"):
        clip.load(half, state, (0, 4))


def test_positions_follow_the_image_size():
    state = foreign()
    larger = encoder_of(state, image_size=48)
    assert clip.load(larger, state).resized == ["embeddings.position"]
    table = state["vision_model.embeddings.position_embedding.weight"]
    assert torch.equal(larger.embeddings.position, resize_positions(table, 6))


def test_foreign_and_missing_keys_are_named():
    state = foreign()
    encoder = encoder_of(state)
    with pytest.raises(ValueError, match="unexpected vision_model.head.weight"):
        clip.load(encoder, {**state, "vision_model.head.weight": torch.ones(1)})
    del state["vision_model.encoder.layers.1.mlp.fc2.bias"]
    with pytest.raises(ValueError, match=r"missing blocks\.1\.ffn\.fc2\.bias"):
        clip.load(encoder, state)
    assert clip.load(encoder, state, allow_missing=["blocks.*.fc2.bias"]).missing
    state["vision_model.pre_layrnorm.bias"] = torch.ones(3)
    with pytest.raises(ValueError, match=r"embeddings\.norm\.bias has shape \(3,\)"):
        clip.load(encoder, state, allow_missing=["blocks.1"])
