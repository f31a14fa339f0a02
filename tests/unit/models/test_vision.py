"""The vision encoder: region batches, sizes, normalisation; and agreement with timm's ViT."""

from __future__ import annotations

from dataclasses import replace

import pytest
import timm
import torch

from models import presets
from models.checkpoints import timm as converter
from models.outputs import Capture
from models.vision import VisionEncoder, resize_positions
from models.xvlm import XVLM


@pytest.fixture
def model() -> XVLM:
    torch.manual_seed(0)
    return presets.create("blocksworld-micro-teacher").eval()


@torch.no_grad()
def test_a_region_batch_equals_images_encoded_one_by_one(model):
    images = torch.randn(2, 3, 48, 48)
    index = torch.tensor([1, 0, 1])
    mask = torch.rand(3, 37) > 0.5
    mask[:, 0] = True
    output = model.encode_image(
        images, Capture.of(range(5), range(4)), region_mask=mask, image_index=index
    )
    torch.testing.assert_close(output.full, model.encode_image(images).last)
    everything = torch.ones(3, 37, dtype=torch.bool)
    unmasked = model.encode_image(images, region_mask=everything, image_index=index)
    torch.testing.assert_close(unmasked.rows.last, output.full[index])
    assert not torch.allclose(output.rows.last, unmasked.rows.last, atol=1e-3)
    # layers below the region layers run once per image
    assert [output.rows.hidden[i].shape[0] for i in range(5)] == [2, 2, 2, 5, 5]
    assert [output.rows.attention[i].q.shape[0] for i in range(4)] == [2, 2, 5, 5]
    assert output.rows.attention[1].key_mask is None
    assert torch.equal(output.rows.attention[3].key_mask[:3], mask)
    assert output.rows.attention[3].key_mask[3:].all()


@torch.no_grad()
def test_hidden_patches_have_no_influence_in_the_region_layers(model):
    """With every layer a region layer, pixels outside the region cannot reach the class token."""
    config = replace(model.config.vision, region_layers=4)
    encoder = VisionEncoder(config).eval()
    encoder.load_state_dict(model.vision.state_dict())
    images = torch.randn(1, 3, 48, 48)
    mask = torch.ones(1, 37, dtype=torch.bool)
    mask[0, 1] = False  # the patch in the upper left corner
    index = torch.zeros(1, dtype=torch.int64)
    before = encoder(images, None, mask, index).rows.last[0, 0]
    images[..., :8, :8] += 1
    torch.testing.assert_close(encoder(images, None, mask, index).rows.last[0, 0], before)


@torch.no_grad()
def test_zero_region_layers_still_give_a_row_per_region(model):
    encoder = VisionEncoder(replace(model.config.vision, region_layers=0)).eval()
    index = torch.tensor([0, 0, 1])
    mask = torch.zeros(3, 37, dtype=torch.bool)
    output = encoder(torch.randn(2, 3, 48, 48), None, mask, index)
    torch.testing.assert_close(output.rows.last, output.full[index])


def test_a_region_mask_needs_an_index(model):
    with pytest.raises(ValueError, match="image_index"):
        model.encode_image(torch.randn(1, 3, 48, 48), region_mask=torch.ones(1, 37).bool())


def test_images_of_another_size_are_refused(model):
    with pytest.raises(ValueError, match=r"\(N, 3, 48, 48\)"):
        model.encode_image(torch.randn(1, 3, 64, 64))


@torch.no_grad()
def test_uint8_images_are_normalised(model):
    pixels = torch.randint(0, 256, (2, 3, 48, 48), dtype=torch.uint8)
    mean = torch.tensor(model.config.image_mean).view(3, 1, 1)
    std = torch.tensor(model.config.image_std).view(3, 1, 1)
    expected = model.encode_image((pixels / 255 - mean) / std).last
    torch.testing.assert_close(model.encode_image(pixels).last, expected)


def test_normalisation_keeps_its_precision_in_half_models(model):
    pixels = torch.randint(0, 256, (1, 3, 48, 48), dtype=torch.uint8)
    full = model._normalise(pixels)
    assert torch.equal(model.half()._normalise(pixels), full)


def test_resizing_positions_keeps_the_class_row():
    positions = torch.randn(17, 4)
    resized = resize_positions(positions, 6)
    assert resized.shape == (37, 4) and resized.is_contiguous()
    assert torch.equal(resized[0], positions[0])
    assert torch.equal(resize_positions(positions, 4), positions)


@pytest.mark.parametrize(
    ("name", "extra", "ours"),
    [
        ("vit_tiny_patch16_224", {}, {}),
        ("vit_tiny_patch16_224", {"pre_norm": True, "init_values": 0.1}, {}),
        (
            "vit_base_patch16_clip_quickgelu_224",
            {"depth": 2, "img_size": 64},
            {"activation": "quick_gelu", "norm_eps": 1e-5},
        ),
    ],
)
@torch.no_grad()
def test_a_timm_vit_loads_and_agrees(name, extra, ours):
    torch.manual_seed(0)
    extra = {"img_size": 64, "depth": 3, **extra}
    foreign = timm.create_model(name, pretrained=False, num_classes=7, **extra).eval()
    for parameter in foreign.parameters():  # biases, norms and scales are trivial when fresh
        parameter.add_(0.02 * torch.randn_like(parameter))
    state = foreign.state_dict()
    encoder = VisionEncoder(converter.config_of(state, **ours)).eval()
    report = converter.load(encoder, state)
    assert report.missing == [] and report.unexpected == [] and "head.weight" in report.ignored
    images = torch.randn(2, 3, 64, 64)
    expected = foreign.forward_features(images)
    torch.testing.assert_close(encoder(images).last, expected, atol=1e-5, rtol=1e-4)


def test_timm_errors_name_the_keys():
    foreign = timm.create_model("vit_tiny_patch16_224", img_size=32, depth=1, num_classes=0)
    state = dict(foreign.state_dict())
    encoder = VisionEncoder(converter.config_of(state))
    state["reg_token"] = torch.zeros(1, 4, 192)
    with pytest.raises(ValueError, match="unexpected reg_token"):
        converter.load(encoder, state)
    del state["blocks.0.mlp.fc2.bias"]
    with pytest.raises(ValueError, match=r"missing blocks\.0\.ffn\.fc2\.bias"):
        converter.load(encoder, state, allow_unexpected=True)
    report = converter.load(
        encoder, state, allow_unexpected=True, allow_missing=["blocks.0.ffn.fc2"]
    )
    assert report.missing == ["blocks.0.ffn.fc2.bias"] and report.unexpected == ["reg_token"]
    with pytest.raises(ValueError, match="cls_token is missing"):
        converter.config_of({})


def test_timm_positions_follow_the_image_size():
    foreign = timm.create_model("vit_tiny_patch16_224", img_size=32, depth=1, num_classes=0)
    state = foreign.state_dict()
    encoder = VisionEncoder(replace(converter.config_of(state), image_size=64))
    assert converter.load(encoder, state).resized == ["embeddings.position"]
    expected = resize_positions(state["pos_embed"][0], 4)
    assert torch.equal(encoder.embeddings.position, expected)


def test_stochastic_depth_only_while_training():
    torch.manual_seed(0)
    config = replace(presets.config("blocksworld-micro-teacher").vision, drop_path=0.9)
    encoder, images = VisionEncoder(config), torch.randn(4, 3, 48, 48)
    encoder.initialise()
    assert not torch.equal(encoder(images).last, encoder(images).last)
    encoder.eval()
    assert torch.equal(encoder(images).last, encoder(images).last)
