"""ModelConfig: JSON round trip, forms, and errors that name the key."""

from __future__ import annotations

import json
from typing import get_args

import pytest

from models import presets
from models.config import ONE_STREAM, Form, ModelConfig

FORMS = [
    (name, form)
    for form in get_args(Form)
    for name in presets.names()
    if presets.config(name).image_fusion is None or form not in ONE_STREAM
]


@pytest.mark.parametrize(("name", "form"), FORMS)
def test_json_round_trip(name, form, tmp_path):
    config = presets.config(name, form=form)
    config.save(tmp_path / "config.json")
    assert ModelConfig.load(tmp_path / "config.json") == config


def test_an_unknown_key_is_named(tmp_path):
    values = presets.config("blocksworld-student").to_dict()
    values["vision"]["widht"] = 3
    path = tmp_path / "config.json"
    path.write_text(json.dumps(values))
    with pytest.raises(ValueError, match=r"config\.json: vision\.widht"):
        ModelConfig.load(path)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ({"vision.image_size": 50}, "multiple of patch_size"),
        ({"vision.heads": (4,)}, "one entry per layer"),
        ({"text.cross_heads": (4, 4)}, "one per fusion layer"),
        ({"decoder": {}}, 'form "vqa"'),
        ({"text.pair_heads": (4,)}, "pair_heads belongs to forms"),
    ],
)
def test_shapes_that_do_not_fit_are_refused(override, message):
    with pytest.raises(ValueError, match=message):
        presets.config("blocksworld-student", **override)


def test_the_decoder_takes_the_widths_of_the_fusion_layers():
    base = presets.config(
        "blocksworld-teacher",
        text={"heads": (4, 4, 3, 2), "cross_heads": (1, 0), "ffn": (512, 512, 100, 0)},
    )
    decoder = base.as_form("vqa").decoder
    assert decoder is not None
    assert (decoder.heads, decoder.cross_heads, decoder.ffn) == ((3, 2), (1, 0), (100, 0))
    assert base.as_form("vqa").as_form("pretrain") == base
    with pytest.raises(ValueError, match="unequal widths"):
        base.as_form("vqa", decoder_layers=3)


def test_forms_and_image_size():
    config = presets.config("blocksworld-teacher").as_form("vqa", decoder_layers=5, image_size=64)
    assert config.decoder is not None and config.decoder.layers == 5
    assert config.vision.tokens == 65
    with pytest.raises(ValueError, match="form 'nlvr' is unknown"):
        config.as_form("nlvr")


def test_two_images_double_the_fusion_layers():
    base = presets.config(
        "blocksworld-teacher",
        text={"heads": (4, 4, 3, 2), "cross_heads": (1, 0), "ffn": (512, 512, 100, 0)},
    )
    text = base.as_form("nlvr2_pretrain").text
    assert text.text_layers == 2 and text.fusion_layers == 4
    assert text.heads == (4, 4, 3, 3, 2, 2) and text.ffn == (512, 512, 100, 100, 0, 0)
    assert text.cross_heads == (1, 1, 0, 0) and text.pair_heads == (1, 0)
    assert base.as_form("nlvr2_pretrain").as_form("nlvr2").text == text
    assert base.as_form("nlvr2").as_form("vqa") == base.as_form("vqa")


def test_a_decoder_that_is_there_is_kept():
    config = presets.config("blocksworld-teacher", form="vqa", **{"decoder.ffn": (7, 0)})
    assert config.as_form("vqa", image_size=64).decoder == config.decoder
    assert config.as_form("captioning").decoder is None


@pytest.mark.parametrize(
    ("cross", "shared", "message"),
    [
        ((4, 4, 4, 4), (4,), "one per two consecutive"),
        ((4, 2, 4, 4), (3, 4), "pair 0 shares 3 heads, its layers use 4 and 2"),
        ((2, 2, 1, 1), (4, 3), "pair 1 shares 3 heads"),
    ],
)
def test_pairs_that_do_not_fit_are_refused(cross, shared, message):
    change = {"cross_heads": cross, "pair_heads": shared}
    with pytest.raises(ValueError, match=message):
        presets.config("blocksworld-teacher", form="nlvr2", text=change)


def test_pairs_that_were_pruned_differently_lead_nowhere_else():
    config = presets.config(
        "blocksworld-teacher",
        form="nlvr2",
        text={"cross_heads": (3, 2, 4, 4), "pair_heads": (4, 4)},
    )
    assert config.as_form("nlvr2") == config
    with pytest.raises(ValueError, match="pair 0 were pruned differently"):
        config.as_form("retrieval")
