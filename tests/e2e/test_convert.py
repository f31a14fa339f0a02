"""`espalier convert` as a user types it: files in, folders out, one message for what is wrong."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import (
    BertConfig,
    BertForMaskedLM,
    CLIPVisionConfig,
    CLIPVisionModel,
    RobertaConfig,
    RobertaForMaskedLM,
)

from models import from_pretrained, presets
from models.checkpoints.build import fresh_keys
from models.checkpoints.xvlm import to_published
from train.main import main

LAYERS: dict[str, Any] = {"hidden_size": 32, "num_attention_heads": 4, "intermediate_size": 48}
TEXT = {
    "vocab_size": 40,
    "max_positions": 12,
    "width": 32,
    "head_dim": 8,
    "text_layers": 2,
    "heads": [4] * 4,
    "cross_heads": [4] * 2,
    "ffn": [48] * 4,
}


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Tiny checkpoints as their makers write them."""
    folder = tmp_path_factory.mktemp("foreign")
    torch.manual_seed(0)
    vision = CLIPVisionConfig(num_hidden_layers=3, image_size=32, patch_size=8, **LAYERS)
    CLIPVisionModel(vision).save_pretrained(folder / "clip")
    text = BertConfig(
        vocab_size=40, max_position_embeddings=12, num_hidden_layers=4, hidden_act="gelu", **LAYERS
    )
    BertForMaskedLM(text).save_pretrained(folder / "bert", max_shard_size="20KB")
    (folder / "bert" / "vocab.txt").write_text("[PAD]\n")
    (folder / "text.json").write_text(json.dumps({"embed_dim": 16, "text": TEXT}))
    return folder


def convert(*arguments: object) -> int:
    return main(["convert", *map(str, arguments)])


def initial(files: Path, out: Path) -> None:
    assert convert("clip", files / "clip", "--out", out, "--config", files / "text.json") == 0
    assert convert("bert", files / "bert", "--into", out) == 0


def test_initial_weights_from_clip_and_sharded_bert(files, tmp_path, capsys):
    out = tmp_path / "initial"
    initial(files, out)
    said = capsys.readouterr().out
    assert "sizes from config.json and text.json" in said and "fresh" in said
    model = from_pretrained(out)
    assert model.config.vision.head_dim == 8 and model.config.text.norm_eps == 1e-12
    clip = load_file(files / "clip" / "model.safetensors")
    name = "encoder.layers.2.mlp.fc1.bias"
    bias = clip.get(name, clip.get(f"vision_model.{name}"))
    assert torch.equal(model.state_dict()["vision.blocks.2.ffn.fc1.bias"], bias)
    fresh = fresh_keys(out)
    assert "itm_head.linear.weight" in fresh and "text.layers.2.cross_attention.q.bias" in fresh
    assert "text.layers.2.attention.q.bias" not in fresh
    heads = ("image_projection.", "text_projection.", "contrastive.", "itm_head.", "bbox_head.")
    assert all(key.startswith(heads) or ".cross_" in key for key in fresh)
    assert (out / "vocab.txt").read_text() == "[PAD]\n"
    record = json.loads((out / "conversion.json").read_text())
    assert [entry["kind"] for entry in record["conversions"]] == ["clip", "bert"]


@pytest.mark.parametrize("suffix", ["pth", "safetensors"])
def test_out_to_xvlm_and_back_bit_for_bit(suffix, files, tmp_path, capsys):
    initial(files, tmp_path / "a")
    file = tmp_path / f"x.{suffix}"
    assert convert("to-xvlm", tmp_path / "a", "--out", file) == 0
    assert convert("xvlm", file, "--out", tmp_path / "b") == 0
    assert "sizes from the file itself" in capsys.readouterr().out
    for name in ("model.safetensors", "config.json"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes(), name
    assert fresh_keys(tmp_path / "b") == set()
    assert not list(tmp_path.rglob("*.partial"))


@pytest.mark.parametrize("form", ["vqa", "nlvr2", "captioning"])
def test_a_task_form_at_another_image_size(form, files, tmp_path):
    initial(files, tmp_path / "a")
    assert convert("to-xvlm", tmp_path / "a", "--out", tmp_path / "x.pth") == 0
    out = tmp_path / form
    argv = ("xvlm", tmp_path / "x.pth", "--out", out, "--form", form, "--image-size", 48)
    assert convert(*argv) == 0
    model = from_pretrained(out)
    assert model.config.form == form and model.config.vision.image_size == 48
    fresh = fresh_keys(out)
    assert fresh if form == "nlvr2" else not fresh
    assert convert("to-xvlm", out, "--out", tmp_path / "y.pth") == 0
    assert convert("xvlm", tmp_path / "y.pth", "--out", tmp_path / "again") == 0
    weights = [(tmp_path / f / "model.safetensors").read_bytes() for f in (form, "again")]
    assert weights[0] == weights[1]


def test_a_shallower_model_takes_every_second_layer_or_those_named(files, tmp_path):
    text = {**TEXT, "text_layers": 1, "heads": [4, 4], "cross_heads": [4]}
    small = {"text": text, "vision": {"width": 32, "heads": [1], "ffn": [8], "region_layers": 0}}
    small["text"]["ffn"] = [48, 48]
    (tmp_path / "small.json").write_text(json.dumps(small))
    argv = ("bert", files / "bert", "--config", tmp_path / "small.json", "--seed", 3)
    assert convert(*argv, "--out", tmp_path / "spread") == 0
    assert convert(*argv, "--out", tmp_path / "chosen", "--layers", "1,3") == 0
    first, second = (from_pretrained(tmp_path / f).state_dict() for f in ("spread", "chosen"))
    assert all(torch.equal(first[key], second[key]) for key in first)
    assert convert(*argv, "--out", tmp_path / "other", "--layers", "0,0") == 0
    other = from_pretrained(tmp_path / "other").state_dict()
    key = "text.layers.1.ffn.fc1.weight"
    assert torch.equal(other[key], other["text.layers.0.ffn.fc1.weight"])
    assert not torch.equal(other[key], first[key])


def test_two_streams_start_from_clip_without_its_last_block_and_roberta(tmp_path):
    """METER's start: text layers from RoBERTa, the fusion layers of both streams fresh."""
    torch.manual_seed(0)
    vision = CLIPVisionConfig(num_hidden_layers=3, image_size=32, patch_size=8, **LAYERS)
    CLIPVisionModel(vision).save_pretrained(tmp_path / "clip")
    text = RobertaConfig(
        vocab_size=40, max_position_embeddings=14, type_vocab_size=1, num_hidden_layers=2, **LAYERS
    )
    RobertaForMaskedLM(text).save_pretrained(tmp_path / "roberta")
    fusion = {"heads": [4, 4], "cross_heads": [4, 4], "ffn": [48, 48]}
    sizes = {"heads": [4, 4], "ffn": [48, 48], "width": 32, "head_dim": 8, "patch_size": 8}
    shape = {
        "embed_dim": 16,
        "text": TEXT,
        "vision": sizes | {"image_size": 48, "region_layers": 0},
    }
    (tmp_path / "shape.json").write_text(json.dumps(shape | {"image_fusion": fusion}))
    out, start = tmp_path / "initial", ("--config", tmp_path / "shape.json", "--layers", "0,1")
    assert convert("clip", tmp_path / "clip", "--out", out, *start) == 0
    assert convert("bert", tmp_path / "roberta", "--into", out, "--layers", "0,1") == 0
    model, fresh = from_pretrained(out), fresh_keys(out)
    assert model.config.image_fusion is not None and model.config.text.position_offset == 2
    crossing = ("text.layers.2.", "text.layers.3.", "image_fusion.")
    keys = set(model.state_dict())
    assert {key for key in keys if key.startswith(crossing)} <= fresh
    loaded = ("vision.", "text.embeddings.", "text.layers.0.", "text.layers.1.", "mlm_head.")
    assert not {key for key in keys if key.startswith(loaded)} & fresh


class Hostile:
    def __reduce__(self):
        return (print, ("code ran",))


def test_a_preset_may_stand_for_the_sizes(tmp_path):
    model = presets.create("blocksworld-micro-student")
    torch.save(to_published(model.state_dict()), tmp_path / "plain.pth")  # no configuration inside
    argv = ("xvlm", tmp_path / "plain.pth", "--out", tmp_path / "out")
    assert convert(*argv, "--config", "blocksworld-micro-student") == 0
    assert from_pretrained(tmp_path / "out").config == model.config


def test_a_model_is_not_written_over_by_another(files, tmp_path, capsys):
    out = tmp_path / "model"
    argv = ("clip", files / "clip", "--out", out, "--config", files / "text.json")
    assert convert(*argv) == 0
    before = (out / "model.safetensors").read_bytes()
    assert convert(*argv, "--seed", 1) == 2
    assert "holds a model already" in capsys.readouterr().err
    assert (out / "model.safetensors").read_bytes() == before
    assert convert("bert", files / "bert", "--out", out, "--into", out) == 0


def test_bad_input_is_one_message_and_exit_2(files, tmp_path, capsys):
    out = tmp_path / "out"
    torch.save({"model": Hostile()}, tmp_path / "hostile.pth")
    (tmp_path / "short.safetensors").write_bytes(
        (files / "clip" / "model.safetensors").read_bytes()[:-9]
    )
    (tmp_path / "list.json").write_text("[]")
    clip = files / "clip"
    cases = [
        (("xvlm", tmp_path / "hostile.pth", "--out", out), "hostile.pth: not a readable.*refused"),
        (("clip", tmp_path / "short.safetensors", "--out", out), "short.safetensors: not a read"),
        (("clip", tmp_path / "none.bin", "--out", out), "none.bin: no such weight file"),
        (("xvlm", clip, "--out", out), "not a checkpoint of X-VLM"),
        (("clip", files / "bert", "--out", out), "config.json: model_type 'bert'"),
        (("clip", clip), "--out: name the folder"),
        (("clip", clip, "--out", out, "--config", "nothing"), "--config nothing: neither a file"),
        (("clip", clip, "--out", out, "--config", tmp_path / "list.json"), "list.json: expected"),
        (("clip", clip, "--out", out, "--layers", "1,x"), "--layers 1,x: expected numbers"),
        (("clip", clip, "--out", out, "--tokenizer", tmp_path / "no"), "--tokenizer .*no such"),
        (("clip", clip, "--out", out, "--into", tmp_path / "no"), "config.json: not found"),
        (("to-xvlm", clip, "--out", tmp_path), "--out: name the file"),
    ]
    for arguments, message in cases:
        assert convert(*arguments) == 2, arguments
        said = capsys.readouterr()
        assert re.search(message, said.err) and "Traceback" not in said.err, said.err
        assert "code ran" not in said.out
    assert not out.exists()
