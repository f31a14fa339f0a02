"""Workloads of every form, their parts and MACs, and the conclusions; no assertion on real time."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from models import presets
from models.summary import summarise, vision_macs
from models.xvlm import XVLM
from train.evaluation import bench
from train.evaluation.macs import count_macs
from train.evaluation.workload import PARTS, WHOLE, Workload, calls_of

WORK = Workload(text_tokens=6, answers=5, top_k=3, beams=2, caption_tokens=9)
CPU = torch.device("cpu")


@pytest.mark.parametrize(
    "form", ["vqa", "retrieval", "pretrain", "nlvr2", "nlvr2_pretrain", "grounding", "captioning"]
)
def test_every_form_is_done_whole_and_in_parts(form: str) -> None:
    model = presets.create("blocksworld-micro-student", form=form).eval()
    calls = calls_of(model, 2, WORK, CPU)
    wanted = {"captioning": {"vision", "decoder"}, "vqa": set(PARTS)}
    assert calls.keys() - {WHOLE} == wanted.get(form, {"vision", "text", "fusion"})
    macs = bench._macs(model, WORK, CPU)
    assert sum(macs[part] for part in macs if part != "total") == macs["total"]
    assert macs["vision"] >= vision_macs(model.config) * (2 if "nlvr2" in form else 1)
    if form in ("retrieval", "nlvr2", "grounding"):
        assert macs["total"] == summarise(model, text_tokens=6).macs["total"]
    if form == "vqa":
        assert macs == count_macs(model.config, text_tokens=6, top_k=3)
    with torch.inference_mode(), FlopCounterMode(display=False) as counter:
        calls[WHOLE]()
    assert counter.get_total_flops() // 2 == 2 * macs["total"], "two rows"


def test_macs_of_a_model_with_layers_that_lost_all_heads() -> None:
    full = presets.config("blocksworld-micro-student", form="vqa")
    none = [0] * len(full.vision.heads)
    empty = XVLM(presets.config("blocksworld-micro-student", form="vqa", vision={"heads": none}))
    macs, before = (bench._macs(model.eval(), WORK, CPU) for model in (empty, XVLM(full)))
    assert 0 < macs["vision"] < before["vision"] and macs["decoder"] == before["decoder"]


def folder(path: Path, name: str, form: str = "retrieval") -> Path:
    presets.create(f"blocksworld-micro-{name}", form=form).save_pretrained(path / name)
    return path / name


def test_bench_of_two_models(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    folders = {name: folder(tmp_path, name) for name in ("teacher", "student")}
    found = bench.bench(folders, (1, 3), WORK, repeats=3, warm_up=1)
    student = found["models"]["student"]
    assert found["speedup"].keys() == {"student"} and found["form"] == "retrieval"
    teacher = found["models"]["teacher"]["parts"]["3"]["fusion"]["seconds"]
    pairs = zip(teacher, student["parts"]["3"]["fusion"]["seconds"], strict=True)
    assert (
        found["speedup"]["student"]["3"]["fusion"]["median"] == sorted(a / b for a, b in pairs)[1]
    )
    assert student["latency"]["3"] == student["parts"]["3"][WHOLE]
    assert found["macs_ratio"]["student"] > 1.5
    assert 0 < student["peak_bytes"]["1"] < student["peak_bytes"]["3"]
    told = bench.table(found)
    assert "student" in told and "fewer MACs" in told and "batch 3" in told
    assert "rofiler" not in capfd.readouterr().err, "torch's profiler writes to the terminal"


def test_models_of_two_forms_are_no_comparison(tmp_path: Path) -> None:
    folders = {"a": folder(tmp_path, "teacher"), "b": folder(tmp_path, "student", "grounding")}
    with pytest.raises(ValueError, match="student is of form 'grounding'"):
        bench.bench(folders, (1,), WORK)


def test_a_batch_that_does_not_fit_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    measure = bench.measure

    def small(models, batch, *args, **kwargs):
        if batch > 1:
            raise torch.OutOfMemoryError("too large")
        return measure(models, batch, *args, **kwargs)

    monkeypatch.setattr(bench, "measure", small)
    found = bench.bench({"a": folder(tmp_path, "student")}, (1, 64), WORK, repeats=2, parts=False)
    assert found["out_of_memory"] == [64] and list(found["models"]["a"]["latency"]) == ["1"]
    assert "batch 64: does not fit" in bench.table(found)


@pytest.mark.parametrize(
    ("lower", "expected"),
    [
        ({"1": 0.9, "8": 1.1, "32": 1.5}, 8),
        ({"1": 1.1, "8": 0.9, "32": 1.5}, 32),
        ({"1": 1.1, "8": 1.2, "32": 1.0}, None),
        ({"32": 1.5, "1": 1.2}, 1),
    ],
)
def test_break_even_holds_for_all_larger_batches(
    lower: dict[str, float], expected: int | None
) -> None:
    rows = {size: {WHOLE: {"q1": value}} for size, value in lower.items()}
    assert bench.break_even(rows) == expected
