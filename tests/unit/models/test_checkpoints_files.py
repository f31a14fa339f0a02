"""Foreign weight files: what is read, and what is refused without running anything."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import save_file

from models.checkpoints.files import foreign_config, read_checkpoint, read_weights, weight_file

STATE = {"a.weight": torch.arange(6.0).view(2, 3), "b.bias": torch.ones(4)}


def same(state: dict[str, torch.Tensor]) -> bool:
    return state.keys() == STATE.keys() and all(torch.equal(state[k], STATE[k]) for k in state)


@pytest.mark.parametrize(
    "content",
    [
        STATE,
        {"model": STATE, "config": {"x": [1]}, "epoch": 3},
        {"state_dict": {f"module.{key}": value for key, value in STATE.items()}},
    ],
    ids=["plain", "model", "data-parallel"],
)
def test_torch_files_are_unwrapped(content, tmp_path):
    torch.save(content, tmp_path / "x.pth")
    read = read_checkpoint(tmp_path / "x.pth")
    assert same(read.state) and read.config == content.get("config", {})


def test_safetensors_alone_and_in_a_folder(tmp_path):
    save_file(STATE, tmp_path / "model.safetensors", {"config": json.dumps({"x": 1})})
    assert same(read_weights(tmp_path / "model.safetensors"))
    assert weight_file(tmp_path) == tmp_path / "model.safetensors"
    assert read_checkpoint(tmp_path).config == {"x": 1}


def shards(folder, kind: str = "safetensors") -> None:
    places = {}
    for index, (key, value) in enumerate(STATE.items()):
        name = f"part-{index}.{kind}"
        write = save_file if kind == "safetensors" else torch.save
        write({key: value}, folder / name)
        places[key] = name
    base = "model.safetensors" if kind == "safetensors" else "pytorch_model.bin"
    (folder / f"{base}.index.json").write_text(json.dumps({"weight_map": places}))


@pytest.mark.parametrize("kind", ["safetensors", "bin"])
def test_shards_are_put_together(kind, tmp_path):
    shards(tmp_path, kind)
    assert same(read_weights(tmp_path))


def test_bad_shards_are_named(tmp_path):
    shards(tmp_path)
    index = tmp_path / "model.safetensors.index.json"
    good = json.loads(index.read_text())
    index.write_text(json.dumps({"weight_map": {"a.weight": "../part-0.safetensors"}}))
    with pytest.raises(
        ValueError, match=r"a\.weight: '\.\./part-0.* not a file of the same folder"
    ):
        read_weights(tmp_path)
    good["weight_map"]["c"] = "part-1.safetensors"
    index.write_text(json.dumps(good))
    with pytest.raises(ValueError, match="part-1.safetensors: c is missing"):
        read_weights(tmp_path)
    (tmp_path / "part-1.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match="part-1.safetensors: missing"):
        read_weights(tmp_path)
    index.write_text("[]")
    with pytest.raises(ValueError, match="expected a JSON object"):
        read_weights(tmp_path)
    index.write_text("{}")
    with pytest.raises(ValueError, match="weight_map is missing"):
        read_weights(tmp_path)


@pytest.mark.parametrize("kind", ["pth", "safetensors"])
def test_files_cut_short_are_named(kind, tmp_path):
    path = tmp_path / f"x.{kind}"
    (save_file if kind == "safetensors" else torch.save)(STATE, path)
    whole = path.read_bytes()
    for part in (0, 1, 7, len(whole) // 3, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:part])
        with pytest.raises(ValueError, match=rf"x\.{kind}: not a readable weight file"):
            read_weights(path)


class Hostile:
    def __reduce__(self):
        return (print, ("code ran",))


@pytest.mark.parametrize("legacy", [False, True])
def test_code_in_a_pickle_is_refused(legacy, tmp_path, capsys):
    content = {"model": {**STATE, "c": Hostile()}}
    torch.save(content, tmp_path / "x.bin", _use_new_zipfile_serialization=not legacy)
    with pytest.raises(ValueError, match=r"refused.*\(print\).*run code.*safetensors"):
        read_weights(tmp_path / "x.bin")
    assert capsys.readouterr().out == ""


@pytest.mark.filterwarnings("ignore:.*torch.jit")
@pytest.mark.filterwarnings("ignore:.torch.load. received a zip file")
def test_programs_and_other_things_are_refused(tmp_path):
    torch.jit.script(torch.nn.Linear(2, 2)).save(str(tmp_path / "program.pt"))
    with pytest.raises(ValueError, match="a TorchScript program, not weights"):
        read_weights(tmp_path / "program.pt")
    (tmp_path / "text.bin").write_text("hello")
    with pytest.raises(ValueError, match=r"text\.bin: not a readable weight file: .*cut short"):
        read_weights(tmp_path / "text.bin")
    torch.save([1, 2], tmp_path / "list.bin")
    with pytest.raises(ValueError, match="no state dict"):
        read_weights(tmp_path / "list.bin")
    with pytest.raises(FileNotFoundError, match="holds none of model.safetensors"):
        read_weights(tmp_path)


def test_only_foreign_configurations_are_taken(tmp_path):
    file = tmp_path / "model.safetensors"
    assert foreign_config(file) is None
    (tmp_path / "config.json").write_text('{"form": "pretrain"}')
    assert foreign_config(file) is None
    (tmp_path / "config.json").write_text('{"model_type": "bert"}')
    assert foreign_config(file) == (tmp_path / "config.json", {"model_type": "bert"})
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ValueError, match="config.json: not a readable JSON"):
        foreign_config(file)
