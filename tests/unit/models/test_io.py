"""Model folders: what is written comes back, and what is wrong is named."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

import models
from models import presets
from models.checkpoints import conversion
from models.checkpoints import xvlm as published
from models.xvlm import XVLM


@pytest.fixture
def model() -> XVLM:
    torch.manual_seed(0)
    return presets.create("blocksworld-micro-student")


def test_round_trip(model, tmp_path):
    model.save_pretrained(tmp_path / "model")
    again = models.from_pretrained(tmp_path / "model")
    assert again.config == model.config and not again.training
    for name, value in model.state_dict().items():
        assert torch.equal(again.state_dict()[name], value), name
    assert all(p.requires_grad and p.is_contiguous() for p in again.parameters())
    images = torch.randint(0, 256, (1, 3, 48, 48), dtype=torch.uint8)
    assert torch.equal(model.eval().encode_image(images).last, again.encode_image(images).last)


def test_half_on_disk_is_float32_in_memory(model, tmp_path):
    model.save_pretrained(tmp_path, dtype=torch.float16)
    assert {v.dtype for v in load_file(tmp_path / "model.safetensors").values()} == {torch.float16}
    again = models.from_pretrained(tmp_path)
    for name, value in model.state_dict().items():
        assert torch.equal(again.state_dict()[name], value.half().float()), name
    half = models.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert {p.dtype for p in half.parameters()} == {torch.bfloat16}


def test_per_layer_widths_come_back(tmp_path):
    widths = {"heads": (0, 1), "ffn": (0, 17)}
    model = presets.create("blocksworld-micro-student", vision=widths)
    model.save_pretrained(tmp_path)
    again = models.from_pretrained(tmp_path)
    assert again.config.vision.ffn == (0, 17) and again.config.vision.heads == (0, 1)
    images = torch.zeros(1, 3, 48, 48, dtype=torch.uint8)
    assert torch.equal(model.eval().encode_image(images).last, again.encode_image(images).last)


def test_training_after_loading_leaves_the_file_alone(model, tmp_path):
    model.save_pretrained(tmp_path)
    again = models.from_pretrained(tmp_path)
    again.itm_head.linear.weight.data.zero_()
    stored = load_file(tmp_path / "model.safetensors")["itm_head.linear.weight"]
    assert torch.equal(stored, model.itm_head.linear.weight)


class FakeTokenizer:
    def save_pretrained(self, folder: str) -> None:
        with open(f"{folder}/tokenizer.json", "w") as file:
            file.write("{}")


def test_tokenizer_files_go_along(model, tmp_path):
    model.save_pretrained(tmp_path / "a", tokenizer=FakeTokenizer())
    assert (tmp_path / "a" / "tokenizer.json").read_text() == "{}"
    source = tmp_path / "tokenizer"
    source.mkdir()
    (source / "vocab.txt").write_text("a\n")
    model.save_pretrained(tmp_path / "b", tokenizer=source)
    assert (tmp_path / "b" / "vocab.txt").read_text() == "a\n"
    assert not list((tmp_path / "b").glob(".*"))
    with pytest.raises(FileNotFoundError, match="no such tokenizer folder"):
        model.save_pretrained(tmp_path / "b", tokenizer=tmp_path / "none")


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
def test_a_missing_file_is_named(model, tmp_path, name):
    model.save_pretrained(tmp_path)
    (tmp_path / name).unlink()
    with pytest.raises(FileNotFoundError, match=name):
        models.from_pretrained(tmp_path)


def test_wrong_keys_and_shapes_are_named(model, tmp_path):
    model.save_pretrained(tmp_path)
    state = load_file(tmp_path / "model.safetensors")
    del state["itm_head.linear.bias"]
    state["itm_head.linear.b"] = torch.zeros(1)
    state["mlm_head.bias"] = torch.zeros(3)
    save_file(state, tmp_path / "model.safetensors")
    with pytest.raises(ValueError) as caught:
        models.from_pretrained(tmp_path)
    message = str(caught.value)
    assert "missing itm_head.linear.bias" in message
    assert "unexpected itm_head.linear.b;" in message
    assert "mlm_head.bias has shape (3,), the configuration says (256,)" in message


def test_damaged_files_are_named(model, tmp_path):
    model.save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"nonsense")
    with pytest.raises(ValueError, match="model.safetensors: not a readable"):
        models.from_pretrained(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ValueError, match=r"config\.json"):
        models.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    ("name", "form", "keys"),
    [
        ("xvlm-clip-base", "pretrain", 482),
        ("efficientvlm", "pretrain", 260),
    ],
)
def test_published_key_counts(name, form, keys):
    with torch.device("meta"):
        model = presets.create(name, form=form)
    state = published.to_published(model.state_dict())
    assert len(state) == keys
    assert published.config_of(state).vision == model.config.vision
    assert published.config_of(state).text == model.config.text
    converted, report = published.from_published(state)
    assert converted.keys() == model.state_dict().keys() and report.unexpected == []


def test_published_answer_models(tmp_path):
    model = presets.create("blocksworld-micro-teacher", form="vqa")
    state = published.to_published(model.state_dict())
    assert "text_encoder.encoder.layer.3.crossattention.self.key.weight" in state
    assert "text_decoder.bert.encoder.layer.1.crossattention.self.key.weight" in state
    torch.save({"model": state, "epoch": 3}, tmp_path / "checkpoint.pth")
    again = presets.create("blocksworld-micro-teacher", form="vqa")
    report = published.load(again, conversion.read_weights(tmp_path / "checkpoint.pth"))
    assert report.missing == [] and len(report.loaded) == len(model.state_dict())
    assert str(report).startswith(f"{len(report.loaded)} loaded, 0 missing")
    for key, value in model.state_dict().items():
        assert torch.equal(again.state_dict()[key], value), key
    config = published.config_of(state, head_dim=32, region_layers=2)
    assert config.decoder == model.config.decoder and config.form == "vqa"


def test_published_errors_name_the_keys():
    model = presets.create("blocksworld-micro-student")
    state = published.to_published(model.state_dict())
    gone = state.pop("text_encoder.bert.encoder.layer.0.output.dense.bias")
    with pytest.raises(ValueError, match=r"missing text\.layers\.0\.ffn\.fc2\.bias"):
        published.load(model, state)
    assert published.load(model, state, allow_missing=["text.layers.0.ffn"]).missing
    state["text_encoder.bert.encoder.layer.0.output.dense.bias"] = gone[:3]
    with pytest.raises(ValueError, match=r"has shape \(3,\), the model \(32,\)"):
        published.load(model, state)
    with pytest.raises(ValueError, match="no name in the published format"):
        published.to_published({"vision.blocks.0.scale1.gamma": gone})


def test_published_positions_follow_the_image_size():
    state = published.to_published(presets.create("blocksworld-micro-student").state_dict())
    larger = presets.create("blocksworld-micro-student", vision={"image_size": 64})
    assert published.load(larger, state).resized == ["vision.embeddings.position"]


class Hostile:
    def __reduce__(self):
        return (print, ("code ran",))


def test_foreign_files_never_run_code(tmp_path, capsys):
    torch.save({"model": Hostile()}, tmp_path / "bad.pth")
    with pytest.raises(ValueError, match="bad.pth: not a readable weight file"):
        conversion.read_weights(tmp_path / "bad.pth")
    assert capsys.readouterr().out == ""
    torch.save({"epoch": 3}, tmp_path / "empty.pth")
    with pytest.raises(ValueError, match="no state dict"):
        conversion.read_weights(tmp_path / "empty.pth")
    with pytest.raises(FileNotFoundError, match="none.bin"):
        conversion.read_weights(tmp_path / "none.bin")


def test_config_json_is_plain(model, tmp_path):
    model.save_pretrained(tmp_path)
    values = json.loads((tmp_path / "config.json").read_text())
    assert values["vision"]["heads"] == [1, 1] and values["form"] == "pretrain"
