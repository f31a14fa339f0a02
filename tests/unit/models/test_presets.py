"""Presets: published parameter counts, and overrides."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

from models import presets
from models.xvlm import XVLM


def count(module: torch.nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def on_meta(name: str, **arguments) -> XVLM:
    with torch.device("meta"):
        return presets.create(name, **arguments)


@pytest.mark.parametrize(
    ("name", "form", "millions", "exact"),
    [
        ("xvlm-clip-base", "pretrain", 212.27, 212_268_609),
        ("efficientvlm", "pretrain", 120.12, 120_122_433),
        ("xvlm-clip-base", "vqa", 290.59, 290_585_658),
        ("efficientvlm", "vqa", 170.08, 170_084_154),
    ],
)
def test_published_totals(name, form, millions, exact):
    total = count(on_meta(name, form=form))
    assert round(total / 1e6, 2) == millions
    assert total == exact


@pytest.mark.parametrize(
    ("name", "vision", "text", "fusion"),
    [("xvlm-clip-base", 85.80, 42.53, 56.71), ("efficientvlm", 43.27, 21.26, 28.36)],
)
def test_published_parts(name, vision, text, fusion):
    model = on_meta(name)
    first = model.config.text.text_layers
    assert count(model.vision) / 1e6 == pytest.approx(vision, abs=0.006)
    assert count(model.text.embeddings) / 1e6 == pytest.approx(23.84, abs=0.006)
    assert count(model.text.layers[:first]) / 1e6 == pytest.approx(text, abs=0.006)
    assert count(model.text.layers[first:]) / 1e6 == pytest.approx(fusion, abs=0.006)
    assert count(model.mlm_head) / 1e6 == pytest.approx(0.62, abs=0.006)
    heads = (
        model.image_projection,
        model.text_projection,
        model.contrastive,
        model.itm_head,
        model.bbox_head,
    )
    assert sum(map(count, heads)) / 1e6 == pytest.approx(2.77, abs=0.006)


def test_overrides_nested_and_dotted():
    config = presets.config(
        "blocksworld-teacher",
        form="vqa",
        vision={"image_size": 64},
        **{"text.vocab_size": 300, "embed_dim": 8},
    )
    assert (config.vision.image_size, config.text.vocab_size, config.embed_dim) == (64, 300, 8)
    assert config.vision.patch_size == 8
    assert presets.config("blocksworld-teacher").text.vocab_size == 256


def test_wrong_names_are_errors():
    with pytest.raises(ValueError, match="did you mean 'efficientvlm'"):
        presets.config("eficientvlm")
    with pytest.raises(ValueError, match=r"text\.vocabulary"):
        presets.config("efficientvlm", text={"vocabulary": 3})


def test_the_student_is_half_the_teacher():
    teacher, student = (presets.config(f"blocksworld-{role}") for role in ("teacher", "student"))
    assert teacher.vision.layers == 2 * student.vision.layers
    assert teacher.text.text_layers == 2 * student.text.text_layers
    assert teacher.text.fusion_layers == 2 * student.text.fusion_layers
    assert teacher.vision.region_layers == 2 * student.vision.region_layers


def test_importing_the_package_is_cheap():
    code = "import sys, models; from models import presets; print('torch' in sys.modules)"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.stdout.strip() == "False", result.stderr
