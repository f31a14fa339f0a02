"""Trimmed and slim models as ONNX graphs and torch programs, in mode "bucket": made by the command
line, run from the files alone.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from models import presets
from models.generation import GenerationSettings, generate
from models.trim_config import TrimmingConfig
from models.trimming import with_trimming
from models.xvlm import XVLM
from tests.unit.train.test_trim import decisive
from train.main import main

SLIM: dict[str, Any] = {"vision.ffn": (5, 9, 3, 4), "text.ffn": (0, 9, 4, 5)}
TRIMMING: dict[str, Any] = {
    "vision": (1, 2), "vision_keep": (20, 9), "fusion": (0, 1), "fusion_keep": (5, 4),
    "guided": True, "heads": ("vision",), "bottleneck": 8, "projection": 4,
}  # fmt: skip


def made(form: str, folder: Path, **changes: Any) -> XVLM:
    """A slim model whose trimmers choose, saved in the mode in which training leaves it."""
    torch.manual_seed(0)
    values: dict[str, Any] = {"vision.heads": (2,) * 4, "vision.head_dim": 16, **SLIM}
    model = presets.create("blocksworld-micro-teacher", **values)
    model = XVLM(model.config.as_form(form))
    settings: dict[str, Any] = TRIMMING | {"mode": "gather"} | changes
    trimming = TrimmingConfig(**settings)
    model = decisive(with_trimming(model, trimming)).eval()
    model.save_pretrained(folder)
    model.set_trimming("bucket")
    return model


def exported(model: Path, kind: str, out: Path) -> dict[str, Any]:
    assert main(["export", str(model), "--format", kind, "--out", str(out)]) == 0
    described = json.loads((out / "graphs.json").read_text())
    assert max(max(found.values()) for found in described["check"]["graphs"].values()) <= 1e-4
    return described


def pixels(count: int) -> Tensor:
    random = torch.Generator().manual_seed(1)
    return torch.randint(0, 256, (count, 3, 48, 48), generator=random, dtype=torch.uint8)


def programs(described: dict[str, Any], out: Path) -> dict[str, Any]:
    return {
        name: torch.export.load(out / graph["file"]).module()
        for name, graph in described["graphs"].items()
    }


@pytest.mark.slow
@pytest.mark.parametrize("form", ["vqa", "nlvr2"])
def test_questions_by_torch_programs(tmp_path: Path, form: str) -> None:
    model = made(form, tmp_path / "model", **({"fusion": (0, 1)} if form == "vqa" else {}))
    described = exported(tmp_path / "model", "torch", tmp_path / "out")
    names = ["text_encoder", "image_encoder", "fusion", *(["decoder"] if form == "vqa" else [])]
    assert list(described["graphs"]) == names
    shape = described["graphs"]["fusion"]["inputs"][2]["shape"]
    assert shape == ["batch", 1 + TRIMMING["vision_keep"][-1], model.config.vision.width]
    load = programs(described, tmp_path / "out")
    ids = torch.randint(2, 200, (3, 6), generator=torch.Generator().manual_seed(2))
    mask = torch.ones(3, 6, dtype=torch.bool)
    mask[1, 4:] = False
    images = pixels(6 if form == "nlvr2" else 3).split(3)
    with torch.no_grad():
        words = load["text_encoder"](ids, mask)[0]
        states = [load["image_encoder"](image, words)[0] for image in images]
        found = load["fusion"](words, mask, *states)[0]
        text = model.encode_text(ids, mask).last
        own = [model.encode_image(image, guide=text[:, 0]).last for image in images]
        fused = model.fuse(text, mask, own if form == "nlvr2" else own[0]).last
        expected = model.truth_logits(fused) if form == "nlvr2" else fused
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)
    other = torch.roll(words, 1, 0)  # another question, other patches
    assert not torch.allclose(load["image_encoder"](images[0], other)[0], states[0], atol=1e-3)


class Onnx:
    """The files of a folder, and nothing else of ours."""

    def __init__(self, folder: Path) -> None:
        runtime = pytest.importorskip("onnxruntime", reason="pip install 'espalier[onnx]'")
        self.sessions = {
            path.stem: runtime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
            for path in folder.glob("*.onnx")
        }

    def __call__(self, graph: str, **inputs: np.ndarray) -> dict[str, np.ndarray]:
        session = self.sessions[graph]
        names = [output.name for output in session.get_outputs()]
        return dict(zip(names, session.run(None, inputs), strict=True))


@pytest.mark.slow
def test_captions_by_onnx_graphs(tmp_path: Path) -> None:
    pytest.importorskip("onnxscript", reason="pip install 'espalier[onnx]'")
    model = made("captioning", tmp_path / "model")
    exported(tmp_path / "model", "onnx", tmp_path / "out")
    images, prompt = pixels(2), torch.tensor([[1, 30, 31], [1, 32, 33]])
    settings = GenerationSettings(end_id=250, beams=1, max_length=8, min_length=8)
    with torch.no_grad():
        guide = model.encode_text(prompt, None).last[:, 0]
        states = model.encode_image(images, guide=guide).last
        expected = generate(model, prompt, states, settings=settings).ids

    run = Onnx(tmp_path / "out")
    pictures = run("image_encoder", images=images.numpy(), text_ids=prompt.numpy())["image_states"]
    np.testing.assert_allclose(pictures, states.numpy(), atol=1e-4)
    ids = prompt.numpy()
    found = run("decoder_start", text_ids=ids, image_states=pictures)
    kept = {name: value for name, value in found.items() if name != "next_logits"}
    assert {v.shape[2] for k, v in kept.items() if k.startswith("image_keys")} == {6, 5}
    while True:
        logits = found["next_logits"]
        logits[:, settings.end_id] = -np.inf
        ids = np.concatenate([ids, logits.argmax(1)[:, None]], axis=1)
        if ids.shape[1] == settings.max_length:
            break
        found = run("decoder_step", text_ids=ids, **kept)
        kept |= {
            name.removeprefix("longer_"): value
            for name, value in found.items()
            if name.startswith("longer_")
        }
    assert ids.tolist() == expected.tolist()


@pytest.mark.parametrize(
    ("form", "changes", "complaint"),
    [
        ("vqa", {"vision_keep": None}, "vision_keep"),
        ("vqa", {"text": (1,), "text_keep": (3,)}, "trim.text=[]"),
        ("captioning", {"heads": ("text",)}, "decoder_step does not see"),
    ],
)
def test_models_that_cannot_be_written(
    form: str, changes: dict[str, Any], complaint: str, tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    made_ = {"text.heads": (2,) * 4, "text.head_dim": 16}
    torch.manual_seed(0)
    model = presets.create("blocksworld-micro-teacher", **made_)
    trimming = TrimmingConfig(**(TRIMMING | changes))
    with_trimming(XVLM(model.config.as_form(form)), trimming).save_pretrained(tmp_path / "model")
    argv = ["export", str(tmp_path / "model"), "--format", "torch", "--out", str(tmp_path / "out")]
    assert main(argv) == 2
    assert complaint in " ".join(capsys.readouterr().err.split())
