"""The text of --dry-run: work, epochs, hours, and the memory table."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from train import stages
from train.config import RunConfig, UserError
from train.monitor.flops import StepCost
from train.recipes_io import load_run_config
from train.stages import dry_run
from train.stages.dry_run import Asked, default_ranks, describe
from train.stages.memory import StepMemory
from train.stages.plan import Speed, measured_speed, samples_of_data, work

RECIPES = Path(__file__).parents[3] / "train" / "recipes"


def recipe(*overrides: str) -> RunConfig:
    return load_run_config(RECIPES / "efficientvlm-4m.yaml", list(overrides))[0]


@pytest.fixture
def no_trial(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, bool]]:
    """Memory without running a step: 1 GiB for each row of a micro-batch; notes the sizes."""
    asked: list[tuple[int, bool]] = []

    def step(config: RunConfig, *_: object, region: bool) -> StepMemory:
        rows = config.data.region.rows if region else config.data.batch
        asked.append((rows, region))
        return StepMemory(rows << 30, 0, 0, 4, 0)

    monkeypatch.setattr(dry_run, "step_memory", step)
    return asked


def test_work_by_hand() -> None:
    config = recipe(
        "optim.steps=10", "engine.accumulate=3", "data.batch=5",
        "data.region={probability: 0.5, images: 2, rows: 4}",
    )  # fmt: skip
    total = work(config, StepCost(general=7.0, region=2.0), ranks=2, data_samples=100)
    assert (total.global_batch, total.samples, total.epochs) == (30, 300, 3.0)
    assert total.rows == 10 * 6 * (5 + 0.5 * 4)
    assert total.flops == 10 * 6 * (7 + 0.5 * 2)
    speed = Speed(2.0, "given")
    assert total.hours(speed) == pytest.approx(total.rows / 2 / 3600)
    # All of the work in all of the time, over both devices.
    assert total.flops_per_s(speed, 2) == pytest.approx(total.flops / (total.rows / 2) / 2)


def test_questions_are_rows(tmp_path: Path) -> None:
    config = load_run_config(
        RECIPES / "blocksworld-prune.yaml", ["data.batch=5", "data.rows_per_image=3"]
    )[0]
    total = work(config, StepCost(1.0), ranks=1, data_samples=None)
    assert total.rows == 3 * total.samples and total.epochs is None


def test_epochs_where_the_data_are(tmp_path: Path) -> None:
    from data_pipeline.blocksworld.build import build_blocksworld

    build_blocksworld(tmp_path, scenes=12, val=4, test=4, image_size=32, tasks=("pretrain",))
    folder = tmp_path / "pretrain" / "train"
    assert samples_of_data(recipe(f"data.train={folder}")) == 12
    both = f"data.train=[{{path: {folder}}}, {{path: {tmp_path / 'pretrain' / 'val'}}}]"
    assert samples_of_data(recipe(both)) == 16
    assert samples_of_data(recipe(f"data.train=[{{path: {folder}}}, {{path: nowhere}}]")) is None
    assert samples_of_data(recipe("data.train=https://example.org/x")) is None


def a_run(folder: Path, rates: list[float | None], world: int | None) -> Path:
    folder.mkdir()
    lines = [json.dumps({"step": n, "samples_per_s": rate}) for n, rate in enumerate(rates)]
    (folder / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    (folder / "run.yaml").write_text(yaml.safe_dump({"provenance": {"world_size": world}}))
    return folder


def test_speed_of_an_earlier_run(tmp_path: Path) -> None:
    run = a_run(tmp_path / "slow-start", [5, None, 80, 90, 110, 120], 2)
    speed = measured_speed(run, 8)
    assert speed.samples_per_s == 400.0 and "100.0 on 2 ranks, scaled evenly" in speed.source
    assert measured_speed(run, 2).samples_per_s == 100.0
    with pytest.raises(FileNotFoundError, match=r"metrics\.jsonl.*--like"):
        measured_speed(tmp_path, 1)
    with pytest.raises(UserError, match="no record has samples_per_s"):
        measured_speed(a_run(tmp_path / "empty", [None], 1), 1)
    with pytest.raises(UserError, match=r"provenance\.world_size"):
        measured_speed(a_run(tmp_path / "alone", [3.0], None), 1)


def test_what_is_asked_is_checked() -> None:
    wrongs: tuple[dict[str, Any], ...] = (
        {"ranks": (0,)},
        {"samples_per_s": 0.0},
        {"samples_per_s": -1.0},
        {"samples_per_s": 1.0, "like": Path("x")},
    )
    for wrong in wrongs:
        with pytest.raises(UserError, match="--"):
            Asked(**wrong)


def test_default_ranks_follow_a_launcher(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    assert default_ranks() == (8, 1, 64)
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert default_ranks() == (2,)


def table(text: str) -> list[list[str]]:
    lines = text.splitlines()
    head = next(n for n, line in enumerate(lines) if line.split()[:2] == ["ranks", "ZeRO"])
    return [line.split() for line in lines[head + 1 :]]


def test_the_table_has_every_stage_and_number_of_ranks(no_trial: list[tuple[int, bool]]) -> None:
    text = describe(recipe(), Asked(ranks=(2, 16), samples_per_s=1000.0))
    rows = table(text)
    assert [row[:2] for row in rows] == [
        [ranks, stage] for ranks in ("2", "16") for stage in ("0", "1*", "2", "3")
    ]
    assert all(row[5] == "128.00" for row in rows)
    assert no_trial == [(128, False), (128, True)], "equal micro-batches are tried once"
    assert "256 images: 128 a micro-batch x 1 accumulated x 2 ranks" in text
    assert "hours at 1,000.0 samples/s (given)" in text and "of NVIDIA A100" in text


def test_a_global_batch_shrinks_with_the_ranks(no_trial: list[tuple[int, bool]]) -> None:
    sizes = ("data.global_batch=64", "data.region.probability=0")
    rows = table(describe(recipe(*sizes), Asked(ranks=(4, 8, 3))))
    activations = {row[0]: row[5] for row in rows if len(row) > 5 and row[1].startswith("0")}
    assert activations == {"4": "16.00", "8": "8.00"}
    assert rows[-1][0] == "3" and "multiple" in " ".join(rows[-1])
    assert sorted(no_trial) == [(8, False), (16, False)]


def test_fp16_has_no_stage_0(no_trial: list[tuple[int, bool]]) -> None:
    rows = table(describe(recipe("engine.precision=fp16"), Asked(ranks=(1,))))
    assert [row[1] for row in rows] == ["1*", "2", "3"]


def test_only_the_first_rank_prints(
    no_trial: list[tuple[int, bool]],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    for rank in ("0", "1"):
        monkeypatch.setenv("RANK", rank)
        assert stages.run(recipe(), dry_run=True, plan={"ranks": (2,)}) == 0
    assert capsys.readouterr().out.count("memory per device") == 1
