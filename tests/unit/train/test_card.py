"""The model card and its facts."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import pytest
import torch

from models import presets
from models.pruning.surgery import prune, sparsity_report
from train.evaluation.macs import parameters
from train.export import commands
from train.export.card import Facts, card
from train.export.safetensors import export_safetensors


def test_card_tells_parameters_sparsity_shape_metrics_and_recipe(tmp_path: Path) -> None:
    dense = parameters(presets.create("blocksworld-student", form="vqa"))["prunable"]
    model = presets.create("blocksworld-student", form="vqa", **{"vision.heads": (3, 1)})
    manifest = tmp_path / "data" / "train"
    manifest.mkdir(parents=True)
    (manifest / "manifest.json").write_text(
        json.dumps({"task": "vqa", "samples": 7, "hash": "abc123", "shards": []})
    )
    (tmp_path / "run.yaml").write_text(f"stage: prune\ndata:\n  train: {manifest}\n")
    facts = Facts.of_run(tmp_path / "model", {"accuracy": 0.91}, dense)
    text = card(model, facts, "fp16", 2_000_000)
    removed = 4 * (4 * 128 * 32 + 3 * 32)
    assert f"Sparsity {100 * removed / dense:.2f} %" in text
    assert "| vision | 2 | 3 1 | | 512 |" in text
    assert "| accuracy | 0.9100 |" in text and "`abc123`" in text
    assert "stage: prune" in text and "2.00 MB of fp16" in text


def test_only_the_pruned_model_of_a_run_has_its_sparsity(tmp_path: Path) -> None:
    dense = presets.create("blocksworld-micro-student", form="vqa")
    wanted = {name: torch.ones(slot.units) for name, slot in dense.gate_slots().items()}
    wanted["vision.0.ffn"][4:] = 0
    slim = prune(dense, wanted)
    (tmp_path / "run.yaml").write_text("stage: prune\n")
    (tmp_path / "sparsity.json").write_text(json.dumps(sparsity_report(dense, slim)))
    told = card(slim, Facts.of_run(tmp_path / "model"), "fp16", 1)
    assert "| pruned part | kept | of | sparsity |" in told
    assert "pruned part" not in card(dense, Facts.of_run(tmp_path / "dense"), "fp16", 1)


def test_card_says_which_step_was_selected(tmp_path: Path) -> None:
    model = presets.create("blocksworld-micro-student")
    (tmp_path / "run.yaml").write_text("stage: finetune\n")
    found = {"metric": "accuracy", "step": 40, "value": 0.5, "last_step": 100, "last_value": 0.25}
    (tmp_path / "selected.json").write_text(json.dumps(found))
    text = card(model, Facts.of_run(tmp_path / "model"), "fp32", 1)
    assert "Of step 40 of 100, by accuracy on the validation data (0.5000)" in text
    (tmp_path / "selected.json").write_text(json.dumps(found | {"step": 100, "value": None}))
    text = card(model, Facts.of_run(tmp_path / "model"), "fp32", 1)
    assert "Of the last step, 100: no validation of accuracy counted." in text


def test_card_of_a_model_without_a_run_has_no_empty_chapters(tmp_path: Path) -> None:
    text = card(presets.create("blocksworld-micro-student"), Facts.of_run(tmp_path), "fp32", 1)
    assert "## Recipe" not in text and "Sparsity" not in text
    assert text.count("Not measured.") == 2 and "| metric |" not in text


def test_export_refuses_an_unknown_type_and_an_infinite_cast(tmp_path: Path) -> None:
    model = presets.create("blocksworld-micro-student")
    next(model.parameters()).data.fill_(1e6)
    model.save_pretrained(tmp_path / "a")
    with pytest.raises(ValueError, match="fp64"):
        export_safetensors(tmp_path / "a", tmp_path / "b", "fp64")
    with pytest.raises(ValueError, match="range of"):
        export_safetensors(tmp_path / "a", tmp_path / "b", "fp16")
    assert not (tmp_path / "b").exists()


def bench_of(path: Path, models: dict[str, dict[str, str]]) -> Path:
    path.write_text(json.dumps({"models": models}))
    return path


def name_in_bench(model: Path, bench: Path, *more: str) -> str:
    parser = argparse.ArgumentParser()
    commands.add_parsers(parser.add_subparsers())
    argv = ["export", str(model), "--out", f"{model}-out", "--bench", str(bench), *more]
    return commands._bench(parser.parse_args(argv))[1]


def test_a_bench_of_other_runs_is_not_taken_for_this_models(tmp_path: Path) -> None:
    other, mine = tmp_path / "a" / "model", tmp_path / "b" / "model"
    told = bench_of(
        tmp_path / "told.json", {"teacher": {"folder": "/t"}, "model": {"folder": f"{other}"}}
    )
    assert name_in_bench(other, told) == "model"
    with pytest.raises(ValueError, match=r"told\.json has teacher, model, none of .*--bench-name"):
        name_in_bench(mine, told)
    assert name_in_bench(mine, told, "--bench-name", "teacher") == "teacher"
    with pytest.raises(ValueError, match="--bench-name nobody"):
        name_in_bench(mine, told, "--bench-name", "nobody")
    old = bench_of(tmp_path / "old.json", {"teacher": {}, "model": {}})
    assert name_in_bench(mine, old) == "model"
