"""The vision encoder: region batches, sizes, normalisation, prefix tokens and pooling."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from models import presets
from models.initialise import task_form_from_pretrained
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


def region_batch(encoder: VisionEncoder) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    size = encoder.config.image_size
    mask = torch.rand(3, encoder.config.output_tokens) > 0.5
    mask[:, :2] = True
    return torch.randn(2, 3, size, size), mask, torch.tensor([1, 0, 1])


VARIANTS = {
    "registers": {"register_tokens": 3},
    "registers without positions": {"register_tokens": 2, "prefix_positions": False},
    "mean": {"class_token": False, "pooling": "mean"},
    "mean beside a class token": {"pooling": "mean", "final_norm": "pooled"},
    "attention pooling": {"class_token": False, "pooling": "map", "pool_ffn": 24},
    "registers only": {"class_token": False, "register_tokens": 1, "pooling": "mean"},
    "class token with a norm of its own": {"final_norm": "pooled"},
    "no final norm": {"final_norm": "none", "qkv_bias": False, "patch_bias": True},
}


def variant(name: str, **changes) -> VisionEncoder:
    torch.manual_seed(0)
    config = presets.config("blocksworld-micro-teacher").vision
    encoder = VisionEncoder(replace(config, **VARIANTS[name], **changes)).eval()
    encoder.initialise()
    with torch.no_grad():
        for parameter in encoder.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return encoder


def by_hand(encoder: VisionEncoder, image: torch.Tensor, visible: torch.Tensor) -> torch.Tensor:
    """One image, one row: token by token, blocks with and without the mask, then pooling."""
    config, parts = encoder.config, encoder.embeddings
    patches = parts.patch(image[None])[0]
    prefix = [] if parts.class_token is None else [parts.class_token]
    prefix += [] if parts.registers is None else list(parts.registers)
    if config.prefix_positions:
        x = torch.stack([*prefix, *patches]) + parts.position
    else:
        x = torch.stack([*prefix, *(patches + parts.position)])
    x = parts.norm(x)[None]
    keys = torch.cat([torch.ones(len(prefix), dtype=torch.bool), visible])[None]
    for index, block in enumerate(encoder.blocks):
        masked = index >= config.layers - config.region_layers
        x, _ = block(x, keys if masked else None)
    x = encoder.norm(x[0]) if config.final_norm == "tokens" else x[0]
    patches = x[len(prefix) :]
    shown = patches[visible]
    if config.pooling == "class":
        first = x[0]
    elif encoder.pool is not None:
        first = encoder.pool(shown[None])[0, 0]
    else:
        first = shown.mean(dim=0)
    if config.final_norm == "pooled":
        first = encoder.norm(first)
    return torch.stack([first, *patches])


@pytest.mark.parametrize("name", VARIANTS)
@pytest.mark.parametrize("region_layers", [2, 0])
@torch.no_grad()
def test_what_leaves_the_encoder_is_one_token_and_the_patches(name, region_layers):
    encoder = variant(name, region_layers=region_layers)
    images, mask, index = region_batch(encoder)
    output = encoder(images, None, mask, index)
    assert output.full.shape == (2, 37, 32) and output.rows.last.shape == (3, 37, 32)
    full = torch.ones(36, dtype=torch.bool)
    for row, image in enumerate(images):
        torch.testing.assert_close(output.full[row], by_hand(encoder, image, full))
    for row in range(3):
        expected = by_hand(encoder, images[index[row]], mask[row, 1:])
        torch.testing.assert_close(output.rows.last[row], expected)
    torch.testing.assert_close(encoder(images).last, output.full)


@pytest.mark.parametrize("name", VARIANTS)
def test_every_weight_gets_a_gradient(name):
    encoder = variant(name)
    images, mask, index = region_batch(encoder)
    output = encoder(images, None, mask, index)
    (output.rows.last.pow(3).sum() + output.full.pow(3).sum()).backward()
    unused = {key for key, value in encoder.named_parameters() if value.grad is None}
    assert unused == set()


def test_hidden_states_hold_all_tokens_of_the_blocks():
    encoder = variant("registers")
    assert (encoder.config.tokens, encoder.config.output_tokens) == (40, 37)
    images, mask, index = region_batch(encoder)
    output = encoder(images, Capture.of([0, 4], [3]), mask, index).rows
    assert output.hidden[0].shape == (2, 40, 32) and output.hidden[4].shape == (5, 40, 32)
    seen = output.attention[3].key_mask[:3]
    assert seen[:, :4].all() and torch.equal(seen[:, 4:], mask[:, 1:])


def test_region_masks_of_another_grid_are_refused():
    encoder = variant("registers")
    images, mask, index = region_batch(encoder)
    with pytest.raises(ValueError, match="40 columns, the model expects 37"):
        encoder(images, None, torch.cat([mask, mask[:, :3]], dim=1), index)


def test_resizing_keeps_as_many_rows_as_stand_in_front():
    positions = torch.randn(3 + 16, 4)
    resized = resize_positions(positions, 6, prefix=3)
    assert resized.shape == (39, 4) and torch.equal(resized[:3], positions[:3])
    assert torch.equal(resized[3:], resize_positions(positions[2:], 6)[1:])
    assert torch.equal(resized[3:], resize_positions(positions[3:], 6, prefix=0))


def test_a_task_form_of_another_size_keeps_the_rows_in_front():
    for changes, rows in (({"register_tokens": 3}, 4), ({"prefix_positions": False}, 0)):
        pretrained = presets.create("blocksworld-micro-student", vision=changes)
        config = pretrained.config.as_form("vqa", image_size=64)
        model = task_form_from_pretrained(pretrained, "vqa", config=config)
        old, new = (m.vision.embeddings.position for m in (pretrained, model))
        assert new.shape[0] == rows + 64
        assert torch.equal(new, resize_positions(old.detach(), 8, rows))


def test_stochastic_depth_only_while_training():
    torch.manual_seed(0)
    config = replace(presets.config("blocksworld-micro-teacher").vision, drop_path=0.9)
    encoder, images = VisionEncoder(config), torch.randn(4, 3, 48, 48)
    encoder.initialise()
    assert not torch.equal(encoder(images).last, encoder(images).last)
    encoder.eval()
    assert torch.equal(encoder(images).last, encoder(images).last)
