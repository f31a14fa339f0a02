"""Backbone names become explicit configurations; what does not fit is refused by name."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from timm.layers import SwiGLUPacked
from timm.models.vision_transformer import (
    ParallelScalingBlock,
    ResPostBlock,
    VisionTransformer,
)

from models import presets
from models.backbones import hf_fields, timm_fields, timm_module_fields
from models.config import ModelConfig
from models.part_configs import VisionConfig
from models.vision import VisionEncoder
from models.xvlm import XVLM

NAMES = [
    "vit_base_patch16_224",
    "vit_base_patch16_clip_224",
    "vit_base_patch16_clip_quickgelu_224.openai",
    "vit_large_patch14_clip_336",
    "deit_base_distilled_patch16_384",
    "deit3_small_patch16_224",
    "vit_base_patch16_siglip_256",
    "vit_so400m_patch14_siglip_378",
    "vit_so400m_patch14_siglip_gap_384",
    "vit_base_patch14_dinov2",
    "vit_large_patch14_reg4_dinov2",
    "vit_so150m_patch16_reg4_map_256",
    "vit_medium_patch16_gap_256",
    "vit_base_patch16_radio_v3",
]


@pytest.mark.parametrize("name", NAMES)
def test_full_size_parameter_counts_are_timms(name):
    fields = timm_fields(name)
    del fields["image_mean"], fields["image_std"]
    with torch.device("meta"):
        encoder = VisionEncoder(VisionConfig(**fields, region_layers=2))
        module = timm.create_model(name, num_classes=0)
    ours, theirs = (sum(p.numel() for p in part.parameters()) for part in (encoder, module))
    assert ours == theirs
    assert encoder.config.image_size == module.patch_embed.img_size[0]


@pytest.mark.parametrize(
    ("name", "wanted"),
    [
        ("swin_tiny_patch4_window7_224", "SwinTransformer is no plain ViT; supported are"),
        ("eva02_tiny_patch14_224", "Eva is no plain ViT"),
        ("vit_relpos_small_patch16_224", "VisionTransformerRelPos is no plain ViT"),
        ("vit_giant_patch14_dinov2", "feed-forward part of kind GluMlp: not supported; supported"),
        ("beit3_base_patch16_224", "a norm or gate inside the attention"),
        ("vit_base_patch16_klip_224", "no model 'vit_base_patch16_klip_224'; did you mean .*clip"),
    ],
)
def test_other_architectures_are_refused_by_name(name, wanted):
    with pytest.raises(ValueError, match=wanted):
        timm_fields(name)


@pytest.mark.parametrize(
    ("arguments", "wanted"),
    [
        ({"qk_norm": True}, "norms of queries and keys"),
        ({"mlp_layer": SwiGLUPacked}, "feed-forward part of kind"),
        ({"block_fn": ParallelScalingBlock}, "blocks of kind ParallelScalingBlock"),
        ({"block_fn": ResPostBlock}, "blocks of kind ResPostBlock"),
        ({"norm_layer": "rmsnorm"}, "norms of kind RmsNorm"),
        ({"act_layer": "silu"}, "activation SiLU"),
        ({"proj_bias": False}, "attention output without bias"),
        ({"pos_embed": "none"}, "no learned positions"),
        ({"in_chans": 4}, "4 image channels"),
        ({"img_size": (32, 64)}, "not square"),
        ({"global_pool": "max"}, "pooling 'max'"),
        ({"global_pool": "avg", "pool_include_prefix": True}, "includes class or register tokens"),
        ({"embed_norm_layer": "layernorm"}, "patch embedding PatchEmbed with LayerNorm"),
        ({"scale_mlp_norm": True}, "a norm inside the feed-forward part"),
    ],
)
def test_each_part_that_does_not_exist_here_is_named(arguments, wanted):
    tiny = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 1, "num_heads": 2}
    with torch.device("meta"):
        module = VisionTransformer(**{**tiny, **arguments})
    with pytest.raises(ValueError, match=wanted):
        timm_module_fields(module)


def test_norms_with_different_eps_are_refused():
    module = VisionTransformer(img_size=32, patch_size=8, embed_dim=32, depth=1, num_heads=2)
    module.norm.eps = 1e-3
    with pytest.raises(ValueError, match="norms with different eps"):
        timm_module_fields(module)


def test_a_name_becomes_explicit_fields_and_stays_as_a_note(tmp_path):
    values = {"vision": {"backbone": "timm/vit_small_patch14_reg4_dinov2", "image_size": 224}}
    config = ModelConfig.from_dict(values)
    vision = config.vision
    assert vision.backbone == "timm/vit_small_patch14_reg4_dinov2"
    assert (vision.width, vision.heads, vision.patch_size) == (384, (6,) * 12, 14)
    assert (vision.register_tokens, vision.prefix_positions, vision.activation) == (
        4,
        False,
        "gelu",
    )
    assert vision.image_size == 224 and vision.region_layers == 4 and vision.tokens == 5 + 256
    assert config.image_mean == (0.485, 0.456, 0.406)
    config.save(tmp_path / "config.json")
    assert ModelConfig.load(tmp_path / "config.json") == config
    assert values["vision"] == {  # the caller's values are left alone
        "backbone": "timm/vit_small_patch14_reg4_dinov2",
        "image_size": 224,
    }


def test_a_saved_configuration_needs_the_backbone_no_more(tmp_path):
    file = bert_config(tmp_path)
    config = ModelConfig.from_dict({"text": {"backbone": f"hf/{file}"}})
    config.save(tmp_path / "saved.json")
    file.unlink()
    assert ModelConfig.load(tmp_path / "saved.json") == config
    with pytest.raises(FileNotFoundError, match=r"text\.backbone .*config\.json: no such file"):
        ModelConfig.from_dict({"text": {"backbone": f"hf/{file}"}})


def test_explicit_fields_win_and_depths_follow_them(tmp_path):
    config = ModelConfig.from_dict(
        {
            "image_mean": (0.0, 0.0, 0.0),
            "vision": {
                "backbone": "timm/vit_base_patch16_clip_224",
                "heads": (12,) * 6,
                "ffn": (3072,) * 6,
            },
            "text": {
                "backbone": f"hf/{bert_config(tmp_path)}",
                "heads": (2,) * 3,
                "ffn": (48,) * 3,
                "dropout": 0.0,
            },
        }
    )
    assert config.vision.layers == 6 and config.vision.region_layers == 2 and config.vision.pre_norm
    assert config.text.text_layers == 1 and config.text.cross_heads == (2, 2)
    assert config.text.dropout == 0.0 and config.text.attention_dropout == 0.1
    assert config.image_mean == (0.0, 0.0, 0.0) and config.image_std != (0.0, 0.0, 0.0)


def test_a_preset_s_section_gives_way_to_a_backbone(tmp_path):
    config = presets.config(
        "efficientvlm",
        form="vqa",
        embed_dim=64,
        **{
            "vision.backbone": "timm/vit_base_patch16_siglip_224",
            "text": {"backbone": f"hf/{bert_config(tmp_path)}"},
        },
    )
    assert config.embed_dim == 64 and config.image_mean == (0.5, 0.5, 0.5)
    assert config.vision.pooling == "map" and config.vision.image_size == 224
    assert config.decoder is not None and config.decoder.ffn == (48, 48)
    assert presets.config("efficientvlm", form="vqa").vision.image_size == 480
    with torch.device("meta"):
        XVLM(config)


@pytest.mark.parametrize(
    ("section", "backbone", "wanted"),
    [
        ("vision", "hf/x", "recipe: vision.backbone 'hf/x': write timm/NAME"),
        ("vision", "timm/", "write timm/NAME"),
        ("text", "timm/vit_base_patch16_224", "write hf/PATH"),
        ("vision", "timm/resnet18", "vision.backbone 'timm/resnet18': ResNet is no plain ViT"),
    ],
)
def test_errors_name_the_key(section, backbone, wanted):
    with pytest.raises(ValueError, match=wanted):
        ModelConfig.from_dict({section: {"backbone": backbone}}, where="recipe")


def test_an_unknown_key_beside_a_backbone_is_named():
    values = {"vision": {"backbone": "timm/vit_tiny_patch16_224", "widht": 3}}
    with pytest.raises(ValueError, match=r"vision\.widht"):
        ModelConfig.from_dict(values)


@pytest.mark.parametrize(
    ("changes", "wanted"),
    [
        ({"pooling": "mean", "class_token": False}, None),
        ({"class_token": False}, 'vision.pooling "class" needs vision.class_token'),
        ({"pooling": "map"}, 'vision.pool_ffn belongs to vision.pooling "map"'),
        ({"pool_ffn": 8}, 'vision.pool_ffn belongs to vision.pooling "map"'),
    ],
)
def test_pooling_must_fit_the_tokens(changes, wanted):
    if wanted is None:
        presets.config("blocksworld-student", vision=changes)
        return
    with pytest.raises(ValueError, match=wanted):
        presets.config("blocksworld-student", vision=changes)


def bert_config(folder: Path, **changes: Any) -> Path:
    values = {
        "model_type": "bert",
        "vocab_size": 60,
        "hidden_size": 32,
        "num_hidden_layers": 4,
        "num_attention_heads": 2,
        "intermediate_size": 48,
        "max_position_embeddings": 24,
    }
    file = folder / "config.json"
    file.write_text(json.dumps(values | changes))
    return file


@pytest.mark.parametrize(
    ("changes", "wanted"),
    [
        ({"model_type": "deberta-v2"}, r"model_type 'deberta-v2' \(disentangled attention\)"),
        ({"model_type": "albert"}, r"\(its layers share their weights\).*encoders are: bert, "),
        ({"model_type": "gpt2"}, "model_type 'gpt2' is not supported"),
        ({"model_type": None}, "model_type None is not supported"),
        ({"hidden_act": "relu"}, "activation 'relu' is not supported"),
        ({"is_decoder": True}, "is_decoder is not supported"),
        ({"add_cross_attention": True}, "add_cross_attention is not supported"),
        ({"position_embedding_type": "relative_key"}, "position_embedding_type 'relative_key'"),
        ({"num_attention_heads": 3}, "hidden size 32 for 3 heads"),
        ({"num_attention_heads": "many"}, "(.|\n)*num_attention_heads"),
    ],
)
def test_text_encoders_that_do_not_fit_are_refused(changes, wanted, tmp_path):
    with pytest.raises(ValueError, match=rf"config\.json: .*{wanted}"):
        hf_fields(bert_config(tmp_path, **changes))


def test_text_files_that_cannot_be_read(tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere: no such file"):
        hf_fields(tmp_path / "nowhere")
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ValueError, match=r"config\.json: not a readable JSON file"):
        hf_fields(tmp_path)


def test_defaults_of_the_family_fill_what_the_file_leaves_out(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "distilbert"}')
    fields = hf_fields(tmp_path)
    assert (fields["width"], len(fields["ffn"]), fields["type_vocab_size"]) == (768, 6, 0)
    (tmp_path / "config.json").write_text('{"model_type": "xlm-roberta"}')
    fields = hf_fields(tmp_path)
    assert (fields["position_offset"], fields["max_positions"], fields["pad_id"]) == (2, 510, 1)
