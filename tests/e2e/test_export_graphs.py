"""Slim models as ONNX graphs and torch.export programs, made by the command line: what a person
builds from the files alone answers as the model does.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from models import from_pretrained, presets
from models.generation import GenerationSettings, generate
from models.xvlm import XVLM
from train.evaluation.vqa import AnswerList, rank_states
from train.export import portable
from train.main import main

# Fully pruned layers: an attention and a feed-forward part without any unit.
SLIM: dict[str, Any] = {
    "vision.heads": (0, 1),
    "vision.ffn": (5, 0),
    "text.heads": (0, 1),
    "text.ffn": (0, 9),
}


def made(form: str, folder: Path, **widths: Any) -> XVLM:
    torch.manual_seed(0)
    model = presets.create("blocksworld-micro-student", form=form, **SLIM | widths).eval()
    model.save_pretrained(folder)
    return model


def exported(model: Path, kind: str, out: Path) -> dict[str, Any]:
    assert main(["export", str(model), "--format", kind, "--out", str(out)]) == 0
    return json.loads((out / "graphs.json").read_text())


def pixels(count: int) -> torch.Tensor:
    random = torch.Generator().manual_seed(1)
    return torch.randint(0, 256, (count, 3, 48, 48), generator=random, dtype=torch.uint8)


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
def test_question_answering_by_onnx_graphs(tmp_path: Path) -> None:
    pytest.importorskip("onnxscript", reason="pip install 'espalier[onnx]'")
    model = made("vqa", tmp_path / "model", **{"decoder.heads": (0,), "decoder.ffn": (3,)})
    described = exported(tmp_path / "model", "onnx", tmp_path / "out")
    assert list(described["graphs"]) == ["image_encoder", "text_encoder", "fusion", "decoder"]
    assert max(max(found.values()) for found in described["check"]["graphs"].values()) <= 1e-4
    card = (tmp_path / "out" / "README.md").read_text()
    assert "| decoder.onnx |" in card and described["check"]["runtime"] in card

    images, rows = pixels(3), 3
    ids = torch.randint(2, 200, (rows, 6), generator=torch.Generator().manual_seed(2))
    mask = torch.ones(rows, 6, dtype=torch.bool)
    mask[1, 4:] = False
    answers = AnswerList(
        tuple("abcdef"),
        torch.tensor([[1, 9, 2, 0], [1, 9, 8, 2], [1, 7, 2, 0], [1, 5, 4, 2], [1, 6, 2, 0], [1, 3, 2, 0]]),
        torch.tensor([[1, 1, 1, 0], [1] * 4, [1, 1, 1, 0], [1] * 4, [1, 1, 1, 0], [1, 1, 1, 0]]).bool(),
    )  # fmt: skip
    with torch.no_grad():
        states = model.multimodal(ids, mask, model.encode_image(images).last).last
        expected = rank_states(model, states, mask, answers, top_k=6).tolist()
        start = answers.ids[:1, :1].expand(rows, 1)
        first = model.decode(start, None, states, mask).logits[:, 0]

    run, seen = Onnx(tmp_path / "out"), {"text_mask": mask.numpy()}
    pictures = run("image_encoder", images=images.numpy())["image_states"]
    words = run("text_encoder", text_ids=ids.numpy(), **seen)["text_states"]
    fused = run("fusion", text_states=words, image_states=pictures, **seen)["question_states"]
    every = {
        "answer_ids": answers.ids.expand(rows, -1, -1).numpy(),
        "answer_mask": answers.mask.expand(rows, -1, -1).numpy(),
    }
    scores = run("decoder", question_states=fused, **seen, **every)
    assert scores["log_likelihood"].argmax(1).tolist() == expected
    np.testing.assert_allclose(scores["first_log_p"], first.log_softmax(-1).numpy(), atol=1e-4)

    # The program of docs/export.md, on the first row.
    page = (Path(__file__).resolve().parents[2] / "docs" / "export.md").read_text()
    program = page[page.index("import numpy as np, onnxruntime") :].split("```")[0]
    names: dict[str, Any] = {name: value[:1] for name, value in every.items()}
    names |= {"images": images[:1].numpy(), "ids": ids[:1].numpy()}
    exec(program.replace("shipped/onnx", str(tmp_path / "out")), names)
    assert names["best"] == expected[0]


@pytest.mark.slow
def test_captions_token_by_token_by_onnx_graphs(tmp_path: Path) -> None:
    pytest.importorskip("onnxscript", reason="pip install 'espalier[onnx]'")
    model = made("captioning", tmp_path / "model")
    exported(tmp_path / "model", "onnx", tmp_path / "out")
    images, prompt = pixels(2), torch.tensor([[1, 30, 31], [1, 32, 33]])
    settings = GenerationSettings(end_id=250, beams=1, max_length=9, min_length=9)
    with torch.no_grad():
        expected = generate(model, prompt, model.encode_image(images).last, settings=settings).ids

    run = Onnx(tmp_path / "out")
    pictures = run("image_encoder", images=images.numpy())["image_states"]
    ids, found = (
        prompt.numpy(),
        run("decoder_start", text_ids=prompt.numpy(), image_states=pictures),
    )
    kept = {name: value for name, value in found.items() if name != "next_logits"}
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


@pytest.mark.slow
def test_two_pictures_by_a_torch_program(tmp_path: Path) -> None:
    model = made("nlvr2", tmp_path / "model", **{"text.heads": (0, 1, 1), "text.ffn": (0, 9, 3)})
    described = exported(tmp_path / "model", "torch", tmp_path / "out")
    load = {
        name: torch.export.load(tmp_path / "out" / graph["file"]).module()
        for name, graph in described["graphs"].items()
    }
    ids, mask = torch.tensor([[1, 40, 41, 2]]), torch.ones(1, 4, dtype=torch.bool)
    left, right = pixels(2).split(1)
    with torch.no_grad():
        states = [load["image_encoder"](image)[0] for image in (left, right)]
        words = load["text_encoder"](ids, mask)[0]
        found = load["fusion"](words, mask, *states)[0]
        own = [model.encode_image(image).last for image in (left, right)]
        expected = model.truth_logits(model.multimodal(ids, mask, own).last)
    assert torch.allclose(found, expected, atol=1e-5)
    # Only what a graph uses is in its file.
    assert not any("text" in name for name in load["image_encoder"].state_dict())


def test_a_graph_that_disagrees_is_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    made("grounding", tmp_path / "model")
    keep, graphs_of = portable._keep_cases, portable.graphs_of
    monkeypatch.setattr(portable, "graphs_of", lambda model: graphs_of(model)[:1])

    def other(graph: Any, sizes: Any, folder: Path) -> None:
        keep(graph, sizes, folder)
        for path in folder.glob(f"{graph.name}.1.npz"):
            held = dict(np.load(path))
            name = f"out_{graph.outputs[0]}"
            np.savez(path, **held | {name: held[name] + 0.01})

    monkeypatch.setattr(portable, "_keep_cases", other)
    argv = ["export", str(tmp_path / "model"), "--format", "torch", "--out", str(tmp_path / "out")]
    assert main(argv) == 1
    told = capsys.readouterr().err
    assert "image_encoder.image_states is 0.0" in told and "disagrees with the model" in told
    assert not (tmp_path / "out" / "README.md").exists()


def test_a_slim_model_in_three_lines_of_a_fresh_process(tmp_path: Path) -> None:
    import subprocess
    import sys

    model = made("vqa", tmp_path / "model", **{"decoder.heads": (0,), "decoder.ffn": (3,)})
    argv = ["export", str(tmp_path / "model"), "--dtype", "fp32", "--out", str(tmp_path / "out")]
    assert main(argv) == 0
    card = (tmp_path / "out" / "README.md").read_text()
    lines = card.split("```python\n")[1].split("```")[0]
    lines = lines.replace("path/to/this/folder", str(tmp_path / "out"))
    program = lines + (
        "import torch\n"
        "images = torch.arange(2 * 3 * 48 * 48).remainder(251).view(2, 3, 48, 48).to(torch.uint8)\n"
        "ids = torch.tensor([[1, 40, 41, 2], [1, 50, 51, 2]])\n"
        "states = model.multimodal(ids, None, model.encode_image(images).last).last\n"
        "print(model.decode(ids, None, states, None).logits.sum(-1).tolist())\n"
    )
    root = Path(__file__).resolve().parents[2]
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=root, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    images = torch.arange(2 * 3 * 48 * 48).remainder(251).view(2, 3, 48, 48).to(torch.uint8)
    ids = torch.tensor([[1, 40, 41, 2], [1, 50, 51, 2]])
    states = model.multimodal(ids, None, model.encode_image(images).last).last
    expected = model.decode(ids, None, states, None).logits.sum(-1)
    assert torch.allclose(torch.tensor(json.loads(done.stdout)), expected, rtol=1e-6)
    assert from_pretrained(tmp_path / "out").config.vision.heads == (0, 1)


@pytest.mark.parametrize(
    ("more", "complaint"),
    [
        (["--dtype", "fp16"], "fp32 only"),
        (["--metrics", "other.json"], "is of elsewhere, not of"),
        (["--bench", "bench.json"], "--bench-name"),
    ],
)
def test_requests_that_make_no_sense(
    more: list[str], complaint: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    made("grounding", tmp_path / "model")
    (tmp_path / "other.json").write_text('{"model": "elsewhere", "accuracy": 1.0}')
    (tmp_path / "bench.json").write_text('{"models": {"a": {}, "b": {}}}')
    more = [str(tmp_path / word) if word.endswith(".json") else word for word in more]
    argv = ["export", str(tmp_path / "model"), "--format", "torch", "--out", str(tmp_path / "out")]
    assert main([*argv, *more]) == 2
    assert complaint in capsys.readouterr().err
