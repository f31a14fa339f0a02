"""Costs from the configuration against what torch counts while the parts run."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from models import presets
from models.config import HEADS, PAIRED, Form, ModelConfig
from models.summary import PARTS, parameters, part_of, prunable, summarise
from models.xvlm import XVLM

TEXT, ANSWER, MASKED = 11, 3, 2
FORMS: tuple[Form, ...] = tuple(HEADS)
UNEVEN: dict[str, Any] = {
    "vision.heads": (3, 0),
    "vision.ffn": (100, 7),
    "text.heads": (2, 4),
    "text.cross_heads": (1,),
    "text.ffn": (31, 300),
}
VARIANTS: dict[str, dict[str, Any]] = {
    "dense": {},
    "pruned": UNEVEN,
    "no heads and units left": {"text.cross_heads": (0,), "text.ffn": (0, 0), "vision.ffn": (0, 9)},
    "registers": {"vision.register_tokens": 3, "vision.pooling": "mean"},
    "attention pooling, no biases": {
        "vision": {"class_token": False, "pooling": "map", "pool_ffn": 50, "qkv_bias": False}
    },
    "other widths and narrow words": {
        "vision.width": 64,
        "vision.heads": (2, 2),
        "text.word_width": 48,
    },
}


def config_of(form: Form, variant: str) -> ModelConfig:
    changes: Any = VARIANTS[variant]
    return presets.config("blocksworld-student", **changes).as_form(form)


def counted(run: Callable[[], Tensor]) -> tuple[Tensor, int]:
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        result = run()
    return result, counter.get_total_flops() // 2


def run_parts(model: XVLM) -> dict[str, int]:
    """MACs of each part, every module of the form once, as torch counts them."""
    config = model.config
    macs: dict[str, int] = dict.fromkeys(PARTS, 0)
    image = torch.randn(1, 3, config.vision.image_size, config.vision.image_size)
    ids = torch.ones(1, TEXT, dtype=torch.int64)
    states, macs["vision"] = counted(lambda: model.encode_image(image).last)
    both: Any = states
    if config.form in PAIRED:
        macs["vision"] *= 2
        both = (states, states)
    text, macs["text"] = counted(lambda: model.encode_text(ids, None).last)
    fused, macs["fusion"] = counted(lambda: model.fuse(text, None, both).last)
    if config.form == "vqa":
        answer = torch.ones(1, ANSWER, dtype=torch.int64)
        _, macs["decoder"] = counted(lambda: model.decode(answer, None, fused, None).logits)
    positions = torch.zeros(1, MASKED, dtype=torch.int64)
    word = model.text.embeddings.word.weight
    heads: dict[str, Callable[[], Tensor]] = {
        "image_projection": lambda: model.image_feature(states),
        "text_projection": lambda: model.text_feature(text),
        "contrastive": lambda: model.temperature(),
        "itm_head": lambda: model.match_logits(fused),
        "bbox_head": lambda: model.predict_box(fused),
        "cls_head": lambda: model.truth_logits(fused),
        "ta_head": lambda: model.assignment_logits(fused),
        "mlm_head": lambda: model.mlm_logits(fused, positions),
        "lm_head": lambda: model.lm_head(fused, word_weight=word),
        "decoder": lambda: fused,
    }
    macs["heads"] = sum(counted(heads[name])[1] for name in HEADS[config.form])
    return macs


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("form", FORMS)
def test_macs_are_what_torch_counts(form: Form, variant: str) -> None:
    config = config_of(form, variant)
    model = XVLM(config).eval().requires_grad_(False)  # the counter trips over views of leaves
    found = summarise(model, text_tokens=TEXT, answer_tokens=ANSWER, masked_tokens=MASKED)
    expected = run_parts(model)
    assert found.macs["total"] == sum(expected.values())
    parts = {part: cost for part, cost in expected.items() if cost}
    assert {part: cost for part, cost in found.macs.items() if cost and part != "total"} == parts


@pytest.mark.parametrize("form", FORMS)
def test_a_configuration_says_the_same_as_its_model(form: Form) -> None:
    config = config_of(form, "pruned")
    model = XVLM(config)
    found = summarise(config)
    assert found == summarise(model)
    assert found.parameters["total"] == sum(p.numel() for p in model.parameters())
    assert set(found.macs) == set(found.parameters)
    names = {name.split(".")[0] for name in model.gate_slots()}
    assert set(found.prunable) == names | {"total"}
    for part in names:
        cost = model.parameters_per_unit()
        units = {n: s.units for n, s in model.gate_slots().items() if n.startswith(f"{part}.")}
        assert found.prunable[part] == sum(cost[name] * count for name, count in units.items())


def test_other_sizes_and_lengths() -> None:
    config = presets.config("blocksworld-student")
    large = presets.config("blocksworld-student", vision={"image_size": 96})
    assert summarise(config, 96, 20).macs == summarise(large, text_tokens=20).macs
    assert summarise(config, 96).macs["text"] == summarise(config).macs["text"]
    assert summarise(config, 96).macs["fusion"] > summarise(config).macs["fusion"]
    with pytest.raises(ValueError, match="image_size 50 is not a multiple of the patches' 8 px"):
        summarise(config, 50)


def test_published_sizes() -> None:
    """212.27M and 120.12M. Of the published 92,104,704 prunable ones, 20,736 are output biases of
    attention and feed-forward parts, which stay however much is cut.
    """
    teacher = summarise(presets.config("xvlm-clip-base"))
    student = summarise(presets.config("efficientvlm"), 384, 40)
    assert round(teacher.parameters["total"] / 1e6, 2) == 212.27
    assert round(student.parameters["total"] / 1e6, 2) == 120.12
    assert student.prunable["total"] == 92_083_968
    text = str(student)
    assert "efficientvlm (pretrain), 384 px, 40 text tokens" in text and "120.12M" in text
    assert student.to_dict()["macs"] == student.macs


def test_parts_of_names() -> None:
    names = {
        "vision.blocks.0.norm1.weight": "vision",
        "text.embeddings.word.weight": "text",
        "text.layers.1.ffn.fc1.bias": "text",
        "text.layers.2.cross_norm.bias": "fusion",
        "fusion.0.ffn": "fusion",
        "decoder.layers.3.ffn.fc1.bias": "decoder",
        "itm_head.linear.weight": "heads",
    }
    assert {name: part_of(name, 2) for name in names} == names
    model = presets.create("blocksworld-micro-student")
    assert parameters(model)["prunable"] == prunable(model)["total"]
