"""Modes of a trimmed model side by side: every form runs in each, MACs say what ran, words say what
follows; no assertion on real time.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from models import from_pretrained
from models.config import ModelConfig
from models.trim_config import TrimmingConfig
from models.trimming import without_trimming
from models.xvlm import XVLM
from tests.unit.train.test_trim import decisive, trimmed
from train.evaluation import bench, trim_bench, trim_steps
from train.evaluation.trim_bench import bench_modes, mode_table, modes_of, verdict
from train.evaluation.trim_steps import counts_to_time, latency_by_count, on_steps, step_of
from train.evaluation.workload import WHOLE, Inputs, Workload, calls_of
from train.main import main

WORK = Workload(text_tokens=6, answers=5, top_k=3, beams=2, caption_tokens=9)
CPU = torch.device("cpu")


def counted(task: str, **changes: Any) -> XVLM:
    """A trimmed model with counts: 5 patches at the first site, then 3."""
    values: dict[str, Any] = {"vision": (1, 2), "vision_keep": (5, 3)}
    if task != "retrieval":
        values |= {"fusion": (0,), "fusion_keep": (2,)}
    return decisive(trimmed(task, **(values | changes)))


@pytest.mark.parametrize("task", ["vqa", "nlvr2", "retrieval", "captioning", "grounding"])
def test_every_mode_of_every_form_answers_alike(task):
    """With counts all modes make the same decisions, so the calls give the same values."""
    model = counted(task).eval()
    inputs = Inputs.random(model.config, 2, WORK, CPU)
    values: dict[str, list[Any]] = {}
    for mode in ("mask", "gather", "bucket", "packed"):
        model.set_trimming(mode, fixed=True)
        with torch.inference_mode():
            calls = calls_of(model, 2, WORK, CPU, inputs)
            for name, call in calls.items():
                values.setdefault(name, []).append(call())
    assert WHOLE in values
    for name, found in values.items():
        for other in found[1:]:
            assert other == pytest.approx(found[0], abs=1e-4), name


def saved(path: Path, model: XVLM) -> Path:
    model.save_pretrained(path)
    return path


def test_modes_take_turns_on_random_inputs_with_counts(tmp_path: Path) -> None:
    folder = saved(tmp_path / "model", counted("vqa"))
    found = bench_modes(folder, (1, 3), WORK, repeats=3, warm_up=1)
    assert found["modes"] == ["off", "mask", "gather", "bucket", "packed"]
    for size in ("1", "3"):
        latency, macs = found["latency"][size], found["macs"][size]
        assert set(latency) == set(found["modes"])
        pairs = zip(latency["off"]["seconds"], latency["gather"]["seconds"], strict=True)
        ratio = sorted(a / b for a, b in pairs)[1]
        assert found["speedup"][size]["gather"]["median"] == ratio
        assert macs["gather"] == macs["bucket"] < macs["off"] < macs["mask"]
    told = mode_table(found)
    assert "calibrated counts" in told and "batch 3:" in told and "bucket keeps fixed" in told


def row(off: float, **modes: tuple[float, float]) -> dict[str, Any]:
    """A result of one batch: speed-ups as (lower quartile, median)."""
    speedup = {m: {"q1": q, "median": r, "q3": r} for m, (q, r) in modes.items()}
    return {
        "best": {"8": trim_bench._best(speedup)},
        "speedup": {"8": speedup},
        "macs": {"8": {"off": off, **dict.fromkeys(modes, off / 2)}},
    }


@pytest.mark.parametrize(
    ("modes", "words"),
    [
        ({"gather": (1.4, 1.5), "packed": (1.5, 1.7)}, "packed is the fastest, 1.70x as fast"),
        (
            {"gather": (0.7, 0.8)},
            "does not pay on this device: the fastest mode, gather, takes 1.25x",
        ),
        ({"gather": (0.98, 1.01)}, "does not pay for certain: gather is 1.01x"),
        ({"mask": (3.0, 3.0), "gather": (0.7, 0.8)}, "does not pay on this device"),
    ],
)
def test_the_verdict(modes: dict[str, tuple[float, float]], words: str) -> None:
    result = row(100.0, **modes)
    told = verdict(result, "8")
    assert words in told and "2.00x fewer MACs" in told
    # What is stored is what is said.
    assert (result["best"]["8"] == "off") == ("mode off" in told)


def test_a_plain_bench_keeps_counts_and_says_so(tmp_path: Path) -> None:
    model = counted("vqa", mode="gather")
    folders = {"trimmed": saved(tmp_path / "trimmed", model)}
    folders["full"] = saved(tmp_path / "full", without_trimming(model))
    found = bench.bench(folders, (1,), WORK, repeats=2, warm_up=0)
    modes = bench_modes(folders["trimmed"], (1,), WORK, repeats=2, warm_up=0)
    assert found["models"]["trimmed"]["macs"]["total"] == modes["macs"]["1"]["gather"]
    assert found["models"]["trimmed"]["trimming"] == "gather"
    assert "trimming" not in found["models"]["full"]
    assert bench.table(found).count("each site keeps its calibrated count") == 1
    bare = saved(tmp_path / "bare", trimmed("vqa", mode="gather"))
    with pytest.raises(ValueError, match=r"bare.*no counts.*--modes --data"):
        bench.bench({"bare": bare}, (1,), WORK)
    off = saved(tmp_path / "off", trimmed("vqa", mode="off"))
    assert "trims in" not in bench.table(bench.bench({"off": off}, (1,), WORK, repeats=2))


def test_models_without_modes_or_counts(tmp_path: Path) -> None:
    from tests.unit.train.test_downstream_tasks import model as plain

    with pytest.raises(ValueError, match="no trimmers"):
        modes_of(plain("vqa"))
    folder = saved(tmp_path / "model", trimmed("vqa"))
    assert "bucket" not in modes_of(from_pretrained(folder))
    with pytest.raises(ValueError, match="--data FOLDER"):
        bench_modes(folder, (1,), WORK, repeats=2)


def test_the_command_stores_the_fastest_mode(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, out = saved(tmp_path / "model", counted("grounding")), tmp_path / "modes.json"
    weights = (folder / "model.safetensors").read_bytes()
    seconds = {"off": 3.0, "mask": 0.5, "gather": 2.0, "bucket": 1.0, "packed": 4.0}

    def turns(calls: Any, repeats: int, *_: Any, **__: Any) -> dict[str, list[float]]:
        for _, call in calls:
            call()
        return {name: [seconds[name]] * repeats for name, _ in calls}

    monkeypatch.setattr(trim_bench, "interleave", turns)
    argv = ["bench", str(folder), "--modes", "--batch", "1,2", "--repeats", "2"]
    argv += ["--text-tokens", "6", "--device", "cpu", "--json", str(out)]
    assert main([*argv, "--write-mode", "2"]) == 0
    told = capsys.readouterr().out
    assert "bucket is the fastest, 3.00x as fast" in told and "mode bucket" in told
    config = ModelConfig.load(folder / "config.json")
    assert config.trimming is not None and config.trimming.mode == "bucket"
    assert from_pretrained(folder).vision.trimmers.mode == "bucket"  # type: ignore[union-attr]
    assert (folder / "model.safetensors").read_bytes() == weights
    assert json.loads(out.read_text())["best"] == {"1": "bucket", "2": "bucket"}
    for wrong, complaint in (
        (["--write-mode", "4"], "add it to --batch"),
        ([str(folder)], "one model"),
    ):
        assert main([*argv[:2], *wrong, *argv[2:]] if wrong[0][0] != "-" else argv + wrong) == 2
        assert complaint in capsys.readouterr().err
    assert main(["bench", str(folder), "--write-mode", "1", "--batch", "1"]) == 2
    assert "belongs to --modes" in capsys.readouterr().err


# --- steps ----------------------------------------------------------------------------------------


def test_a_count_goes_to_the_end_of_its_step():
    table = {8: 1.0, 16: 1.0, 24: 1.01, 32: 2.0, 40: 2.5, 48: 2.0, 56: 3.0}
    expected = {1: 24, 8: 24, 17: 24, 24: 24, 25: 48, 40: 48, 47: 48, 50: 56, 60: 60}
    assert {count: step_of(count, table) for count in expected} == expected
    moved = on_steps(TrimmingConfig(vision=(1, 2, 3), vision_keep=(41, 20, 3)), table)
    assert moved.vision_keep == (48, 24, 24)
    with pytest.raises(ValueError, match="at least one count"):
        step_of(3, {})
    with pytest.raises(ValueError, match="vision_keep is not set"):
        on_steps(TrimmingConfig(vision=(1,)), table)


@settings(deadline=None, max_examples=60)
@given(
    st.dictionaries(st.integers(1, 60), st.floats(0.1, 10.0), min_size=1, max_size=8),
    st.lists(st.integers(1, 60), min_size=1, max_size=5),
)
def test_steps_never_cost_tokens_or_more_time(table, counts):
    counts = sorted(counts, reverse=True)
    sites = tuple(range(len(counts)))
    found = on_steps(TrimmingConfig(vision=sites, vision_keep=tuple(counts)), table).vision_keep
    assert found is not None and list(found) == sorted(found, reverse=True)
    for count in counts:
        step = step_of(count, table)
        assert step >= count
        if step in table and count in table:
            assert table[step] <= table[count] * 1.02 + 1e-9


def test_the_table_is_of_the_blocks_behind_the_first_site(tmp_path, monkeypatch):
    model = counted("vqa")
    lengths: list[tuple[int, int]] = []

    def watch(place: int, block: torch.nn.Module) -> None:
        block.register_forward_pre_hook(lambda _, given: lengths.append((place, given[0].shape[1])))

    for place, block in enumerate(model.vision.blocks):
        watch(place, block)
    table = latency_by_count(model, 2, [2, 7], repeats=2, warm_up=0)
    assert list(table) == [2, 7] and all(value > 0 for value in table.values())
    assert set(lengths) == {(place, n) for place in (1, 2, 3) for n in (3, 8)}
    assert counts_to_time(36) == [8, 16, 24, 32, 36]

    folder = saved(tmp_path / "model", counted("vqa"))
    monkeypatch.setattr(
        trim_steps, "latency_by_count", lambda _, __, counts, **___: dict.fromkeys(counts, 1.0)
    )
    found = trim_steps.round_counts(folder, 4)
    assert found["before"] == [5, 3] and found["after"] == [9, 9]  # nine patches, one step
    trimming = ModelConfig.load(folder / "config.json").trimming
    assert trimming is not None and trimming.vision_keep == (9, 9)
