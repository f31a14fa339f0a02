"""timm's ViTs, tiny and random, against the vision encoder with the same weights."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import pytest
import timm
import torch
from timm.layers import LayerNorm, QuickGELU
from timm.models.deit import VisionTransformerDistilled
from timm.models.vision_transformer import VisionTransformer

from models.backbones import timm_module_fields
from models.checkpoints import timm as converter
from models.part_configs import VisionConfig
from models.vision import VisionEncoder, resize_positions

TINY = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 3, "num_heads": 2}
VITS = {
    "vit": {},
    "deit3": {"no_embed_class": True, "init_values": 1e-6},
    "clip": {
        "pre_norm": True,
        "norm_layer": partial(LayerNorm, eps=1e-5),
        "act_layer": QuickGELU,
    },
    "clip laion": {"pre_norm": True, "norm_layer": partial(LayerNorm, eps=1e-5)},
    "siglip": {"class_token": False, "global_pool": "map"},
    "siglip2": {"class_token": False, "global_pool": "map", "act_layer": "gelu_tanh"},
    "siglip gap": {"class_token": False, "global_pool": "avg", "fc_norm": False},
    "dinov2": {"init_values": 1e-5},
    "dinov2 reg": {"init_values": 1e-5, "reg_tokens": 4, "no_embed_class": True},
    "reg gap": {"class_token": False, "reg_tokens": 4, "global_pool": "avg", "fc_norm": False},
    "reg map": {"class_token": False, "reg_tokens": 4, "global_pool": "map"},
    "gap": {"class_token": False, "global_pool": "avg", "qkv_bias": False},
    "gap beside a class token": {"global_pool": "avg"},
    "radio": {"reg_tokens": 7, "no_embed_class": True, "final_norm": False},
    "odd ffn": {"mlp_ratio": 3.7362, "class_token": False, "global_pool": "map"},
    "distilled": {},
}


def foreign(name: str, **changes) -> VisionTransformer:
    torch.manual_seed(0)
    kind = VisionTransformerDistilled if name == "distilled" else VisionTransformer
    model = kind(num_classes=7, **{**TINY, **VITS[name], **changes}).eval()
    with torch.no_grad():
        for (
            parameter
        ) in model.parameters():  # biases, norms, tokens and scales are trivial when fresh
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def our_fields(model: VisionTransformer) -> VisionConfig:
    return VisionConfig(**timm_module_fields(model), region_layers=1)


def expected_output(model: VisionTransformer, images: torch.Tensor) -> torch.Tensor:
    """timm's pooled token (before the classifier), and its patch tokens."""
    tokens = model.forward_features(images)
    if isinstance(model, VisionTransformerDistilled):
        first = tokens[:, 0]
    else:
        first = model.forward_head(tokens, pre_logits=True)
    return torch.cat([first[:, None], tokens[:, model.num_prefix_tokens :]], dim=1)


@pytest.mark.parametrize("name", VITS)
@torch.no_grad()
def test_the_encoder_agrees_with_timm(name):
    model = foreign(name)
    encoder = VisionEncoder(our_fields(model)).eval()
    report = converter.load(encoder, model.state_dict())
    assert report.missing == [] and report.unexpected == []
    assert set(report.ignored) <= {
        f"{h}.{k}" for h in ("head", "head_dist") for k in ("weight", "bias")
    }
    images = torch.randn(2, 3, 32, 32)
    torch.testing.assert_close(
        encoder(images).last, expected_output(model, images), atol=1e-5, rtol=1e-5
    )


@pytest.mark.parametrize("name", VITS)
def test_the_configuration_is_read_off_the_weights(name):
    model = foreign(name)
    wanted = our_fields(model)
    unseen = {"activation": wanted.activation, "norm_eps": wanted.norm_eps}
    found = converter.config_of(model.state_dict(), head_dim=16, region_layers=1, **unseen)
    # neither how a ViT with class token pools, nor the scale's start, is in the weights
    hidden = {"layer_scale": wanted.layer_scale}
    if name == "gap beside a class token":
        assert found.pooling == "mean"
    assert replace(found, **hidden) == wanted


@pytest.mark.parametrize("name", ["vit", "siglip", "dinov2 reg", "reg gap"])
def test_positions_follow_the_image_size(name):
    model = foreign(name)
    encoder = VisionEncoder(replace(our_fields(model), image_size=64))
    state = model.state_dict()
    assert converter.load(encoder, state).resized == ["embeddings.position"]
    table = state["pos_embed"][0]
    prefix = len(table) - 16
    assert prefix == {"vit": 1, "siglip": 0, "dinov2 reg": 0, "reg gap": 4}[name]
    position = encoder.embeddings.position
    assert torch.equal(position[:prefix], table[:prefix])
    assert torch.equal(position, resize_positions(table, 8, prefix))


@torch.no_grad()
def test_a_timm_model_at_dynamic_size_is_the_same_encoder():
    """At its own size a dynamic model computes what a fixed one does."""
    model = foreign("dinov2 reg", dynamic_img_size=True)
    encoder = VisionEncoder(our_fields(model)).eval()
    converter.load(encoder, model.state_dict())
    images = torch.randn(1, 3, 32, 32)
    torch.testing.assert_close(
        encoder(images).last, expected_output(model, images), atol=1e-5, rtol=1e-5
    )


def test_an_attention_pool_that_is_not_wanted_is_left_out():
    model = foreign("siglip")
    encoder = VisionEncoder(replace(our_fields(model), pooling="mean", pool_ffn=0))
    report = converter.load(encoder, model.state_dict())
    assert "attn_pool.kv.weight" in report.ignored and report.missing == []


def test_what_does_not_fit_is_named():
    state = dict(foreign("vit").state_dict())
    encoder = VisionEncoder(converter.config_of(state, head_dim=16))
    state["reg_token"] = torch.zeros(1, 4, 32)
    with pytest.raises(ValueError, match="unexpected reg_token"):
        converter.load(encoder, state)
    del state["blocks.0.mlp.fc2.bias"]
    with pytest.raises(ValueError, match=r"missing blocks\.0\.ffn\.fc2\.bias"):
        converter.load(encoder, state, allow_unexpected=True)
    report = converter.load(
        encoder, state, allow_unexpected=True, allow_missing=["blocks.0.ffn.fc2"]
    )
    assert report.missing == ["blocks.0.ffn.fc2.bias"] and report.unexpected == ["reg_token"]
    state["blocks.0.attn.q_norm.weight"] = torch.ones(16)
    with pytest.raises(ValueError, match=r"unexpected blocks\.0\.attn\.q_norm\.weight"):
        converter.load(encoder, state, allow_missing=["*"])
    with pytest.raises(ValueError, match="pos_embed is missing"):
        converter.config_of({})
    with pytest.raises(ValueError, match="not a multiple of head size 64; give vision.head_dim"):
        converter.config_of(foreign("vit").state_dict())


@torch.no_grad()
def test_a_full_size_model_loads_and_agrees():
    torch.manual_seed(0)
    model = timm.create_model("vit_tiny_patch16_224", pretrained=False, num_classes=0).eval()
    encoder = VisionEncoder(our_fields(model)).eval()
    converter.load(encoder, model.state_dict())
    images = torch.randn(1, 3, 224, 224)
    torch.testing.assert_close(
        encoder(images).last, model.forward_features(images), atol=1e-5, rtol=1e-5
    )
