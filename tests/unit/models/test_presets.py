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
        ("xvlm-clip-base", "retrieval", 210.75, 210_747_395),
        ("efficientvlm", "retrieval", 118.60, 118_601_219),
        ("xvlm-clip-base", "vqa", 290.59, 290_585_658),
        ("efficientvlm", "vqa", 170.08, 170_084_154),
        ("xvlm-clip-base", "nlvr2", 259.98, 259_977_218),
        ("efficientvlm", "nlvr2", 143.02, 143_019_266),
        ("xvlm-clip-base", "captioning", 209.79, 209_788_986),
        ("efficientvlm", "captioning", 117.64, 117_642_810),
        ("xvlm-clip-base", "grounding", 210.36, 210_356_740),
        ("efficientvlm", "grounding", 118.21, 118_210_564),
    ],
)
def test_published_totals(name, form, millions, exact):
    """Millions as published; at the published image sizes (224, 480 for questions, else 384)."""
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


def test_the_domain_stage_of_nlvr2_stays_at_the_size_of_pretraining():
    model = on_meta("efficientvlm", form="nlvr2_pretrain")
    assert model.config.vision.tokens == 197
    final = on_meta("efficientvlm", form="nlvr2", **{"vision.image_size": 224})
    assert count(model.text) == count(final.text)
    assert model.ta_head.weight.shape == (3, 768) and model.config.text.pair_heads == (12,) * 3
    assert len(model.text.layers) == 3 + 6


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
