"""Losses agree with values computed by the published EfficientVLM code.

The fixture holds outputs of that code (commit 4e28570) on a 4-layer teacher and a 2-layer student:
features, logits, hidden states, attention maps (probabilities) and every loss term. Only the losses
are under test here: stored states go in, stored losses must come out.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from models.outputs import AttentionTrace
from train.losses.distillation import (
    LayerPairs,
    attention_mse,
    attention_probabilities,
    hidden_mse,
    hidden_mse_terms,
    layer_pairs,
    logits_kl,
    probabilities_mse,
)
from train.losses.vl import (
    box_losses,
    contrastive_loss,
    generalized_iou,
    matching_labels,
    matching_loss,
    mlm_loss,
    negative_weights,
)

FILE = Path(__file__).parent / "data" / "published_losses.safetensors"
CLOSE = {"rtol": 1e-4, "atol": 2e-5}
# Pass of the step -> (name in the stored losses, student depth).
PASSES = {
    "vision": ("image", 2),
    "text": ("text", 1),
    "itm_pos": ("pos", 1),
    "itm_neg": ("neg", 1),
    "mlm": ("mlm", 2),
}
STORED = [("general", name) for name in PASSES] + [
    ("region", name) for name in ("vision", "text", "itm_pos")
]


@pytest.fixture(scope="module")
def values() -> dict[str, Tensor]:
    return load_file(FILE)


def _pairs(name: str) -> LayerPairs:
    depth = PASSES[name][1]
    return layer_pairs(depth, 2 * depth)


def _list(values: dict[str, Tensor], prefix: str) -> dict[int, Tensor]:
    return {int(key.rsplit("/", 1)[1]): x for key, x in values.items() if key.startswith(prefix)}


def _trace_of(probabilities: Tensor) -> AttentionTrace:
    """A trace whose softmax is the given map: q = log P, k = identity; keys with P = 0 masked."""
    mask = (probabilities > 0).all(dim=2).all(dim=1)  # (B, Nk)
    q = probabilities.clamp(min=1e-30).log()
    k = torch.eye(probabilities.shape[-1]).expand(*probabilities.shape[:2], -1, -1)
    return AttentionTrace(q, k, scale=1.0, key_mask=mask)


def test_contrastive(values: dict[str, Tensor]) -> None:
    image, text = values["general/image_feat"], values["general/text_feat"]
    temperature = values["general/temp"].reshape(1)
    loss, similarities = contrastive_loss(image, text, temperature)
    torch.testing.assert_close(loss, values["general/loss_itc"], **CLOSE)
    torch.testing.assert_close(similarities.image_to_text, values["general/itc_logits"], **CLOSE)
    torch.testing.assert_close(
        similarities.text_to_image, values["general/itc_logits"].t(), **CLOSE
    )
    grouped, _ = contrastive_loss(image, text, temperature, groups=values["general/idx"])
    torch.testing.assert_close(grouped, values["general/loss_itc_idx"], **CLOSE)


def test_negative_weights(values: dict[str, Tensor]) -> None:
    logits, index = values["general/itc_logits"], values["general/idx"]
    own, same = torch.arange(len(index)), index[:, None] == index[None, :]
    for way, similarity in (("i2t", logits), ("t2i", logits.t())):
        for suffix, mask in (("", None), ("_idx", same)):
            stored = values[f"general/itm_weights_{way}{suffix}"].double()
            torch.testing.assert_close(negative_weights(similarity, own, mask), stored, **CLOSE)


@pytest.mark.parametrize("batch", ["general", "region"])
def test_matching_and_mlm(values: dict[str, Tensor], batch: str) -> None:
    itm, mlm = values[f"{batch}/student/itm_logits"], values[f"{batch}/student/mlm_logits"]
    labels = matching_labels(len(itm) // 3)
    if batch == "general":
        assert labels.tolist() == values["general/itm_labels"].tolist()
    torch.testing.assert_close(
        matching_loss(itm, labels), values[f"kd/{batch}/task_loss_itm"], **CLOSE
    )
    torch.testing.assert_close(
        mlm_loss(mlm, values[f"{batch}/masked_ids"]), values[f"kd/{batch}/task_loss_mlm"], **CLOSE
    )


@pytest.mark.parametrize("case", ["", "_all_rows"])
def test_boxes(values: dict[str, Tensor], case: str) -> None:
    is_region = values["region/is_image"] == 0
    if case:
        is_region = torch.ones_like(is_region)
    l1, giou = box_losses(values["region/bbox"], values["region/target_bbox"], is_region)
    torch.testing.assert_close(l1, values[f"region/loss_bbox{case}"], **CLOSE)
    torch.testing.assert_close(giou, values[f"region/loss_giou{case}"], **CLOSE)


def test_boxes_with_a_target_of_negative_size(values: dict[str, Tensor]) -> None:
    """L1 as published; GIoU loses the broken row only (the published code loses all of them)."""
    target, is_region = values["region/target_bbox_degenerate"], values["region/is_image"] == 0
    l1, giou = box_losses(values["region/bbox"], target, is_region)
    torch.testing.assert_close(l1, values["region/loss_bbox_degenerate"], **CLOSE)
    assert values["region/loss_giou_degenerate"] == 0
    sound = is_region & (target[:, 2:] >= 0).all(dim=1)
    assert 0 < sound.sum() < is_region.sum()
    _, giou_of_sound = box_losses(values["region/bbox"], target, sound)
    torch.testing.assert_close(giou, giou_of_sound * sound.sum() / is_region.sum())


def test_generalized_iou(values: dict[str, Tensor]) -> None:
    a, b = values["boxes/boxes_a"], values["boxes/boxes_b"]
    torch.testing.assert_close(generalized_iou(a[:, None], b[None]), values["boxes/giou"], **CLOSE)


@pytest.mark.parametrize(("batch", "name"), STORED)
def test_hidden_per_layer(values: dict[str, Tensor], batch: str, name: str) -> None:
    student = _list(values, f"{batch}/student/{name}/hidden/")
    teacher = _list(values, f"{batch}/teacher/{name}/hidden/")
    terms = torch.stack(hidden_mse_terms(student, teacher, _pairs(name)))
    stored = values[f"kd/{batch}/per_layer/{PASSES[name][0]}_hidden"]
    torch.testing.assert_close(terms, stored, **CLOSE)
    torch.testing.assert_close(hidden_mse(student, teacher, _pairs(name)), stored.sum(), **CLOSE)


@pytest.mark.parametrize("batch", ["general", "region"])
def test_last_image_state_dropped(values: dict[str, Tensor], batch: str) -> None:
    student = _list(values, f"{batch}/student/vision/hidden/")
    teacher = _list(values, f"{batch}/teacher/vision/hidden/")
    torch.testing.assert_close(
        hidden_mse(student, teacher, _pairs("vision"), drop_last=True),
        values[f"kd/{batch}/image_hidden_loss_drop_last"],
        **CLOSE,
    )


@pytest.mark.parametrize(("batch", "name"), STORED)
def test_attention_per_layer(values: dict[str, Tensor], batch: str, name: str) -> None:
    stored = values[f"kd/{batch}/per_layer/{PASSES[name][0]}_attn"]
    for i, j in _pairs(name).attention:
        student = values[f"{batch}/student/{name}/attention/{i}"]
        teacher = values[f"{batch}/teacher/{name}/attention/{j}"]
        torch.testing.assert_close(probabilities_mse(student, teacher), stored[i], **CLOSE)
        torch.testing.assert_close(attention_probabilities(_trace_of(student)), student, **CLOSE)
        streamed = attention_mse(_trace_of(student), _trace_of(teacher), chunk=200)
        torch.testing.assert_close(streamed, stored[i], **CLOSE)


@pytest.mark.parametrize("batch", ["general", "region"])
@pytest.mark.parametrize(("temperature", "folder"), [(1.0, ""), (2.5, "temperature_2.5/")])
@pytest.mark.parametrize("head", ["itm", "mlm"])
def test_logits(
    values: dict[str, Tensor], batch: str, temperature: float, folder: str, head: str
) -> None:
    student = values[f"{batch}/student/{head}_logits"]
    teacher = values[f"{batch}/teacher/{head}_logits"]
    stored = values[f"kd/{batch}/{folder}{head}_logits_loss"]
    torch.testing.assert_close(logits_kl(student, teacher, temperature), stored, **CLOSE)


@pytest.mark.parametrize("drop_last", [False, True])
def test_total_of_the_general_step(values: dict[str, Tensor], drop_last: bool) -> None:
    """All terms with the published weights: 0.6 task + 0.4 distillation."""
    task = sum(values[f"kd/general/task_loss_{name}"] for name in ("itc", "itm", "mlm"))
    distilled = torch.zeros(())
    for name in PASSES:
        student = _list(values, f"general/student/{name}/hidden/")
        teacher = _list(values, f"general/teacher/{name}/hidden/")
        image = name == "vision"
        hidden = hidden_mse(student, teacher, _pairs(name), drop_last=image and drop_last)
        distilled += hidden * (0.1 if image else 1.0)
        for i, j in _pairs(name).attention:
            distilled += probabilities_mse(
                values[f"general/student/{name}/attention/{i}"],
                values[f"general/teacher/{name}/attention/{j}"],
            )
    for head in ("itm", "mlm"):
        distilled += logits_kl(
            values[f"general/student/{head}_logits"], values[f"general/teacher/{head}_logits"]
        )
    suffix = "_drop_last" if drop_last else ""
    stored = values[f"kd/general/loss_in_total{suffix}"]
    torch.testing.assert_close(0.6 * task + 0.4 * distilled, stored, **CLOSE)
