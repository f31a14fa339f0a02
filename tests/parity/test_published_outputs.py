"""The model reproduces outputs of the published X-VLM / EfficientVLM code on the same weights.

tests/parity/data holds weights, inputs and outputs of small seeded models (4/4 and 2/2 layers,
width 64, fp32, CPU). "state/" keys carry the published names, so the key map is tested as well.
Maps are stored after softmax; the trace must give them back.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from data_pipeline.regions import patch_mask
from models.checkpoints import xvlm as published
from models.initialise import task_form_from_pretrained
from models.outputs import AttentionTrace, Capture, EncoderOutput
from models.vision import resize_positions
from models.xvlm import XVLM
from train.losses.vl import contrastive_loss

DATA = Path(__file__).parent / "data"
ALL = Capture.of(range(9), range(8), range(8))


def tensors(name: str) -> dict[str, Tensor]:
    merged: dict[str, Tensor] = {}
    for file in sorted(DATA.glob(f"{name}*.safetensors")):
        merged |= load_file(file)
    return merged


def state_of(case: dict[str, Tensor]) -> dict[str, Tensor]:
    return {k.removeprefix("state/"): v for k, v in case.items() if k.startswith("state/")}


def build(case: dict[str, Tensor]) -> XVLM:
    state = state_of(case)
    vision_layers = sum(key.endswith("layer_norm1.bias") for key in state)
    config = published.config_of(state, head_dim=16, region_layers=vision_layers // 2)
    model = XVLM(config)
    published.load(model, state)
    return model.eval()


@pytest.fixture(scope="module", params=["student", "teacher"])
def loaded(request) -> tuple[str, XVLM, dict[str, Tensor]]:
    case = tensors(f"pretrain_{request.param}")
    return request.param, build(case), case


def close(actual: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(actual, expected, atol=2e-5, rtol=1e-4)


def attention_map(trace: AttentionTrace) -> Tensor:
    scores = trace.q @ trace.k.transpose(-1, -2) * trace.scale
    if trace.key_mask is not None:
        scores = scores.masked_fill(~trace.key_mask[:, None, None], float("-inf"))
    return scores.softmax(-1)


def compare(output: EncoderOutput, case: dict[str, Tensor], prefix: str, attention: str) -> int:
    """Compares every stored state and map of a pass; returns how many there were."""
    compared = 0
    for kind, found in ((attention, output.attention), ("cross_attn", output.cross_attention)):
        # the published code numbers cross-attention from its first fusion layer
        traces = [attention_map(found[index]) for index in sorted(found)]
        for index, actual in enumerate(traces):
            close(actual, case[f"{prefix}/{kind}/{index}"])
            compared += 1
    for index, state in output.hidden.items():
        close(state, case[f"{prefix}/hidden/{index}"])
        compared += 1
    stored = sum(key.startswith(prefix + "/") and "/neg" not in key for key in case)
    assert compared == stored, f"{prefix}: {stored} stored, {compared} compared"
    return compared


@torch.no_grad()
def test_pretraining_outputs(loaded):
    _, model, case = loaded
    ids, mask = case["in/text_ids"], case["in/text_atts"].bool()
    image = model.encode_image(case["in/images"], ALL)
    close(image.last, case["out/image_embeds"])
    compare(image, case, "out/vision", "attn")
    text = model.encode_text(ids, mask, ALL)
    close(text.last, case["out/text_embeds"])
    compare(text, case, "out/text", "attn")
    image_feature, text_feature = model.image_feature(image.last), model.text_feature(text.last)
    close(image_feature, case["out/image_feat"])
    close(text_feature, case["out/text_feat"])
    close(image_feature @ text_feature.T / model.temperature(), case["out/itc_logits"])
    fused = model.fuse(text.last, mask, image.last, None, ALL)
    close(fused.last, case["out/fusion_pos"])
    compare(fused, case, "out/itm_pos", "self_attn")
    whole = model.multimodal(ids, mask, image.last, torch.ones(image.last.shape[:2]).bool())
    close(whole.last, case["out/multi_modal"])
    rows, columns = case["in/itm_text_idx"], case["in/itm_image_idx"]
    pairs = model.fuse(text.last[rows], mask[rows], image.last[columns])
    close(model.match_logits(pairs.last), case["out/itm_logits"])


@torch.no_grad()
def test_masked_token_outputs(loaded):
    _, model, case = loaded
    image = model.encode_image(case["in/images"]).last
    mask = case["in/text_atts"].bool()
    output = model.multimodal(case["in/text_ids_masked"], mask, image, None, ALL)
    compare(output, case, "out/mlm", "self_attn")
    close(model.mlm_logits(output.last, case["in/masked_pos"]), case["out/mlm_logits"])


@torch.no_grad()
def test_region_outputs(loaded):
    name, model, _ = loaded
    case = tensors("region")
    index, region_mask = case["in/idx_to_group_img"], case["in/image_atts"].bool()
    image = model.encode_image(case["in/images"], ALL, region_mask=region_mask, image_index=index)
    close(image.rows.last, case[f"out/{name}/image_embeds"])
    close(image.full[index], case[f"out/{name}/image_embeds_full"])
    compare(image.rows, case, f"out/{name}/vision", "attn")
    close(model.image_feature(image.rows.last), case[f"out/{name}/image_feat"])
    mask = case["in/text_atts"].bool()
    text = model.encode_text(case["in/text_ids"], mask, ALL)
    compare(text, case, f"out/{name}/text", "attn")
    output = model.multimodal(case["in/text_ids_masked"], mask, image.rows.last, region_mask)
    mlm = model.mlm_logits(output.last, case["in/masked_pos"])
    close(mlm, case[f"out/{name}/mlm_logits"])
    fused = model.fuse(text.last, mask, image.full[index], None, ALL)
    box = {k: v for k, v in case.items() if k.startswith(f"out/{name}/bbox/")}
    compare(fused, box, f"out/{name}/bbox", "self_attn")
    close(model.predict_box(fused.last), case[f"out/{name}/bbox"])
    rows = torch.arange(len(index))
    texts = torch.cat([rows, rows, case["in/neg_text"]])
    images = torch.cat([rows, case["in/neg_image"], rows])
    pairs = model.fuse(text.last[texts], mask[texts], image.rows.last[images], region_mask[images])
    close(model.match_logits(pairs.last), case[f"out/{name}/itm_logits"])
    grounding = task_form_from_pretrained(model, "grounding").eval()
    close(grounding.predict_box(fused.last), case[f"out/{name}/bbox"])


@torch.no_grad()
def test_retrieval_with_several_texts_of_an_image(loaded):
    """The retrieval form, its negatives drawn outside the pairs of the same image."""
    _, source, case = loaded
    model = task_form_from_pretrained(source, "retrieval").eval()
    mask = case["in/text_atts"].bool()
    image = model.encode_image(case["in/images"]).last
    text = model.encode_text(case["in/text_ids"], mask).last
    rows = torch.arange(len(mask))
    texts = torch.cat([rows, rows, case["in/itm_idx_neg_text"]])
    images = torch.cat([rows, case["in/itm_idx_neg_image"], rows])
    fused = model.fuse(text[texts], mask[texts], image[images]).last
    close(model.match_logits(fused), case["out/itm_logits_idx"])


@torch.no_grad()
@pytest.mark.parametrize("side", ["low", "high"])
def test_the_temperature_is_clamped_as_published(loaded, side):
    _, model, case = loaded
    kept = model.contrastive.value.clone()
    try:
        model.contrastive.value.fill_(case[f"in/clamp_{side}_temp_before"].item())
        close(model.temperature(), case[f"out/clamp_{side}_temp_after"].reshape(1))
        features = case["out/image_feat"], case["out/text_feat"]
        loss, _ = contrastive_loss(*features, model.temperature())
        close(loss, case[f"out/clamp_{side}_loss_itc"])
    finally:
        model.contrastive.value.copy_(kept)


def test_keys_survive_the_way_there_and_back(loaded):
    _, model, case = loaded
    state = state_of(case)
    back = published.to_published(model.state_dict())
    assert back.keys() == state.keys()
    for key, value in state.items():
        assert torch.equal(back[key], value), key


@pytest.mark.parametrize("grid", [3, 4, 5, 6])
def test_position_resize(grid):
    case = load_file(DATA / "positions.safetensors")
    resized = resize_positions(case["in/pos_embed_4x4"], grid)
    torch.testing.assert_close(resized, case[f"out/pos_embed_{grid}x{grid}"], atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize(("size", "patch"), [(32, 8), (224, 16)])
def test_patches_of_a_box(size, patch):
    case = load_file(DATA / "patch_masks.safetensors")
    corner, extent = (
        case[f"in/mask_{size}_{patch}_boxes"].double().numpy().reshape(-1, 2, 2).swapaxes(0, 1)
    )
    boxes = np.concatenate([corner + extent / 2, extent], axis=1) / size
    assert np.array_equal(patch_mask(boxes, size, patch), case[f"out/mask_{size}_{patch}"].numpy())
