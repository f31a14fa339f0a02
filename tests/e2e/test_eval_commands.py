"""eval, bench, predict, export and report on a tiny data set and tiny models, through the command
line.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from data_pipeline.blocksworld.build import build_blocksworld
from data_pipeline.text import load_tokenizer
from models import from_pretrained, presets
from train.evaluation.accuracy import questions_of
from train.main import main


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("blocks") / "data"
    build_blocksworld(
        folder, 40, val=4, test=6, image_size=48, tasks=("pretrain", "vqa"), processes=1
    )
    return folder


@pytest.fixture(scope="module")
def models(data: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    tokenizer = load_tokenizer(data / "tokenizer")
    root = tmp_path_factory.mktemp("models")
    torch.manual_seed(0)
    for name, depth in (("big", "teacher"), ("small", "student")):
        made = presets.create(
            f"blocksworld-micro-{depth}", form="vqa", text={"vocab_size": len(tokenizer)}
        )
        made.save_pretrained(root / name, tokenizer=tokenizer)
    pretrained = presets.create("blocksworld-micro-student", text={"vocab_size": len(tokenizer)})
    pretrained.save_pretrained(root / "pretrained", tokenizer=tokenizer)
    return {name: root / name for name in ("big", "small", "pretrained")}


def test_eval_counts_every_question_once_and_reports_the_blind_baseline(
    data: Path, models: dict[str, Path], tmp_path: Path
) -> None:
    out = tmp_path / "scores.json"
    argv = ["eval", str(models["small"]), "--task", "vqa", "--data", str(data), "--json", str(out)]
    assert main([*argv, "--batch", "4", "--top-k", "4"]) == 0
    scores = json.loads(out.read_text())
    asked = list(questions_of(data / "vqa" / "test"))
    assert scores["accuracy_count"] == len(asked) > 20
    assert 0 <= scores["accuracy"] <= 1
    assert {f"accuracy/{kind}" for _, kind, _ in asked} <= scores.keys()
    built = json.loads((data / "dataset.json").read_text())
    assert scores["blind_accuracy"] == pytest.approx(built["blind_accuracy"], abs=1e-9)


def test_eval_does_not_depend_on_the_batch_size(
    data: Path, models: dict[str, Path], tmp_path: Path
) -> None:
    scores = []
    for batch in ("1", "5"):
        out = tmp_path / f"{batch}.json"
        argv = ["eval", str(models["big"]), "--task", "vqa", "--data", str(data)]
        assert main([*argv, "--batch", batch, "--no-blind", "--json", str(out)]) == 0
        scores.append(json.loads(out.read_text()))
    assert scores[0] == scores[1]


def test_eval_of_a_model_without_decoder_is_refused(
    data: Path, models: dict[str, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    argv = ["eval", str(models["pretrained"]), "--task", "vqa", "--data", str(data)]
    assert main(argv) == 2
    assert "espalier finetune" in capsys.readouterr().err


def test_eval_of_a_missing_split_names_it(
    data: Path, models: dict[str, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    argv = ["eval", str(models["small"]), "--task", "vqa", "--data", str(data), "--split", "dev"]
    assert main(argv) == 2
    assert "vqa/dev/manifest.json" in capsys.readouterr().err


def test_bench_measures_every_model_and_batch(models: dict[str, Path], tmp_path: Path) -> None:
    out = tmp_path / "bench.json"
    argv = ["bench", str(models["big"]), str(models["small"]), "--batch", "1,2", "--repeats", "3"]
    assert main([*argv, "--warm-up", "1", "--top-k", "2", "--json", str(out)]) == 0
    found = json.loads(out.read_text())["models"]
    assert list(found) == ["big", "small"]
    assert all(list(model["latency"]) == ["1", "2"] for model in found.values())
    assert len(found["big"]["latency"]["2"]["seconds"]) == 3
    assert found["big"]["macs"]["total"] > found["small"]["macs"]["total"]


def test_bench_refuses_two_models_of_one_name(
    models: dict[str, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["bench", str(models["big"]), str(models["big"])]) == 2
    assert "--names" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("task", "model", "key"),
    [
        ("vqa", "small", "answer"),
        ("retrieval", "pretrained", "probability"),
        ("grounding", "pretrained", "box"),
    ],
)
def test_predict(
    task: str,
    model: str,
    key: str,
    data: Path,
    models: dict[str, Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    from PIL import Image

    picture = tmp_path / "a.png"
    Image.new("RGB", (60, 40), (200, 30, 30)).save(picture)
    argv = ["predict", str(models[model]), "--task", task, "--image", str(picture)]
    argv += ["--text", "How many circles are there?", "--json"]
    argv += ["--answers", str(data / "vqa" / "answers.json")] if task == "vqa" else []
    assert main(argv) == 0
    said = json.loads(capsys.readouterr().out)
    assert key in said
    if task == "vqa":
        assert said["answer"] in json.loads((data / "vqa" / "answers.json").read_text())
    if task == "retrieval":
        assert 0 <= said["probability"] <= 1


def test_predict_names_a_file_that_is_no_picture(
    models: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "a.png").write_text("no picture")
    argv = ["predict", str(models["pretrained"]), "--task", "retrieval", "--text", "a red circle"]
    assert main([*argv, "--image", str(tmp_path / "a.png")]) == 2
    assert "a.png" in capsys.readouterr().err


def test_export_writes_a_folder_that_loads_and_a_card(
    models: dict[str, Path], tmp_path: Path
) -> None:
    out = tmp_path / "shipped"
    argv = ["export", str(models["small"]), "--out", str(out), "--dense", str(models["small"])]
    assert main([*argv, "--dtype", "fp16"]) == 0
    shipped, source = from_pretrained(out), from_pretrained(models["small"])
    for name, value in source.state_dict().items():
        assert torch.equal(shipped.state_dict()[name], value.half().float()), name
    card = (out / "README.md").read_text()
    assert f"{sum(p.numel() for p in source.parameters()):,} parameters" in card
    assert "Sparsity 0.00 %" in card
    assert load_tokenizer(out)
    assert (out / "model.safetensors").stat().st_size < 0.6 * (
        models["small"] / "model.safetensors"
    ).stat().st_size


def test_export_onto_itself_is_refused(
    models: dict[str, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["export", str(models["small"]), "--out", str(models["small"])]) == 2
    assert "another folder" in capsys.readouterr().err


def test_report_of_no_run_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["report", str(tmp_path), "--out", str(tmp_path / "a.html")]) == 2
    assert "metrics.jsonl" in capsys.readouterr().err
