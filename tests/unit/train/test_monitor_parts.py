"""Around the monitor: stalls, DeepSpeed's events, Weights & Biases, gates as pictures, settings."""

from __future__ import annotations

import io
import logging
import sys
import threading
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy
import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.hparams.metadata import (
    parse_experiment_plugin_data,
    parse_session_start_info_plugin_data,
)

from train.config import LogConfig, UserError
from train.monitor import Monitor
from train.monitor.deepspeed import EngineEvents, attach
from train.monitor.heatmaps import gate_heatmaps
from train.monitor.watchdog import StallWatchdog

# --- stalls -----------------------------------------------------------------------------------------


class Clock:
    """Seconds that pass only when told to."""

    now = 0.0

    def __call__(self) -> float:
        return self.now


def test_a_stall_is_told_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    clock, log = Clock(), tmp_path / "rank_0000.log"
    log.write_text("before\n")
    dog = StallWatchdog(log, 60, clock)
    with caplog.at_level(logging.WARNING):
        clock.now = 59
        assert not dog.check() and log.read_text() == "before\n"
        clock.now = 61
        assert dog.check() and not dog.check()
        clock.now = 500
        assert not dog.check(), "the same stall"
        dog.beat()
        clock.now = 561
        assert dog.check(), "another one"
    text = log.read_text()
    assert text.startswith("before\n") and text.count("most recent call first") >= 2
    assert "test_a_stall_is_told_once" in text
    messages = [record.getMessage() for record in caplog.records]
    assert "no step has finished for 61 s" in messages[0] and str(log) in messages[0]
    assert messages[1] == "the stall is over after 500 s"


def test_the_thread_sees_what_the_main_thread_waits_for(tmp_path: Path) -> None:
    log, told = tmp_path / "rank.log", threading.Event()

    class Telling(StallWatchdog):
        def check(self) -> bool:
            found = super().check()
            if found:
                told.set()
            return found

    with Telling(log, 1e-3) as dog:
        assert told.wait(30)
        dog.beat()
    assert "test_the_thread_sees" in log.read_text() and dog._thread is not None
    assert not dog._thread.is_alive()


def test_zero_minutes_watch_nothing(tmp_path: Path) -> None:
    with StallWatchdog(tmp_path / "rank.log", 0) as dog:
        assert dog._thread is None


# --- DeepSpeed --------------------------------------------------------------------------------------


def engine(breakdown: bool, profile: bool, file: str | None = None) -> Any:
    settings = SimpleNamespace(flops_profiler_config=SimpleNamespace(output_file=file))
    return SimpleNamespace(
        _config=settings,
        monitor="theirs",
        wall_clock_breakdown=lambda: breakdown,
        flops_profiler_enabled=lambda: profile,
        flops_profiler_output_file=lambda: settings.flops_profiler_config.output_file,
    )


def test_events_that_we_have_ourselves_are_dropped() -> None:
    events = EngineEvents()
    events.write_events(
        [("Train/Samples/lr", 0.1, 8), ("Train/Samples/elapsed_time_ms_forward", 3.0, 8)]
    )
    events.write_events([("Train/Samples/elapsed_time_ms_forward", 5.0, 16)])
    assert events.take() == {"elapsed_time_ms_forward": 5.0} and events.take() == {}


def test_only_an_engine_that_asks_is_connected(tmp_path: Path) -> None:
    plain = engine(False, False)
    assert attach(plain, tmp_path) is None and plain.monitor == "theirs"
    both = engine(True, True)
    assert attach(both, tmp_path) is both.monitor
    assert both.flops_profiler_output_file() == str(tmp_path / "flops_profile.txt")
    named = engine(False, True, "mine.txt")
    attach(named, tmp_path)
    assert named.flops_profiler_output_file() == "mine.txt"


# --- gates ------------------------------------------------------------------------------------------


def test_heat_maps_show_what_is_open() -> None:
    slots = {
        "vision.0.heads": torch.tensor([1.0, 0.0, 1.0, 0.0]),
        "vision.0.ffn": torch.tensor([1.0] * 30 + [0.0] * 10),
        "text.1.heads": torch.zeros(2),
    }
    found = gate_heatmaps(slots)
    assert list(found) == ["gates/vision", "gates/text"]
    vision, text = found["gates/vision"], found["gates/text"]
    assert vision.dtype == torch.uint8 and vision.shape[0] == 3

    def pixels(picture: torch.Tensor, colour: tuple[int, int, int]) -> int:
        return int((picture == torch.tensor(colour, dtype=torch.uint8)[:, None, None]).all(0).sum())

    cell = 22 * 22
    assert pixels(vision, (33, 115, 88)) == 2 * cell + 195 * 22  # two heads, 75 % of a 260 px bar
    assert pixels(text, (33, 115, 88)) == 0 and pixels(text, (236, 239, 237)) == 2 * cell


# --- settings and final metrics ---------------------------------------------------------------------


def read(folder: Path) -> EventAccumulator:
    events = EventAccumulator(str(folder / "tensorboard"), size_guidance={"images": 0})
    events.Reload()
    return events


def monitor(folder: Path, **options: Any) -> Monitor:
    options = {"total_steps": 4, "rank": 0, "log": LogConfig(every=1)} | options
    return Monitor(folder, stream=io.StringIO(), **options)


def test_settings_stand_beside_final_metrics(tmp_path: Path) -> None:
    settings = {"optim.lr": 1e-3, "teacher.path": None, "model": "a|b", "prune": True}
    with monitor(tmp_path, settings=settings) as writer:
        for step in (1, 2):
            writer.step(step, step, {"loss": {"total": 1 / step, "itc": 3.0}, "lr": 0.1})
        writer.step(2, 2, {"validation": {"itm": 0.75}})
        writer.finished()
    events = read(tmp_path)
    content = events.SummaryMetadata("_hparams_/session_start_info").plugin_data.content
    info = parse_session_start_info_plugin_data(content).hparams
    assert info["optim.lr"].number_value == 1e-3
    assert (info["teacher.path"].string_value, info["prune"].string_value) == ("None", "True")
    content = events.SummaryMetadata("_hparams_/experiment").plugin_data.content
    experiment = parse_experiment_plugin_data(content)
    assert {m.name.tag for m in experiment.metric_infos} == {
        "final/loss/total",
        "final/samples_per_s",
        "final/validation/itm",
    }
    assert events.Scalars("final/loss/total")[0].value == 0.5
    (table,) = (tag for tag in events.Tags()["tensors"] if tag.startswith("configuration"))
    text = events.Tensors(table)[0].tensor_proto.string_val[0].decode()
    assert "| `optim.lr` | `0.001` |" in text and r"`a\|b`" in text
    assert [path.name for path in (tmp_path / "tensorboard").iterdir() if path.is_dir()] == []


def test_an_image_is_written_as_it_is(tmp_path: Path) -> None:
    with monitor(tmp_path) as writer:
        writer.image(3, "gates/vision", torch.zeros(3, 5, 7, dtype=torch.uint8))
    (event,) = read(tmp_path).Images("gates/vision")
    assert (event.step, event.height, event.width) == (3, 5, 7)


# --- Weights & Biases -------------------------------------------------------------------------------


class FakeRun:
    def __init__(self) -> None:
        self.logged: list[dict[str, Any]] = []
        self.summary: dict[str, float] = {}
        self.axes: list[Any] = []
        self.finished = False

    def define_metric(self, *names: Any, **options: Any) -> None:
        self.axes.append((names, options))

    def log(self, values: dict[str, Any]) -> None:
        assert not self.finished
        self.logged.append(values)

    def finish(self) -> None:
        self.finished = True


@pytest.fixture
def fake_wandb(monkeypatch: pytest.MonkeyPatch) -> Any:
    module: Any = ModuleType("wandb")
    module.__spec__ = SimpleNamespace(name="wandb")
    module.calls, module.run = [], FakeRun()
    module.init = lambda **options: module.calls.append(options) or module.run
    module.Image = lambda pixels: ("image", pixels)
    monkeypatch.setitem(sys.modules, "wandb", module)
    return module


def test_a_named_project_gets_everything(tmp_path: Path, fake_wandb: Any) -> None:
    log = LogConfig(every=1, wandb="espalier")
    with monitor(tmp_path / "mine", log=log, settings={"seed": 3}) as writer:
        writer.step(1, 8, {"loss": {"total": 0.5}, "lr": float("nan")})
        writer.pictures(1, "shown", torch.zeros(1, 3, 8, 8, dtype=torch.uint8), ["a"])
        writer.finished()
    (call,) = fake_wandb.calls
    assert (call["project"], call["name"], call["config"]) == ("espalier", "mine", {"seed": 3})
    first, picture = fake_wandb.run.logged
    assert first["step"] == 1 and first["loss/total"] == 0.5 and "lr" not in first
    kind, pixels = picture["shown"]
    assert kind == "image" and isinstance(pixels, numpy.ndarray) and pixels.shape[2] == 3
    assert fake_wandb.run.summary["final/loss/total"] == 0.5 and fake_wandb.run.finished
    with monitor(tmp_path / "mine", log=log):
        pass
    assert fake_wandb.calls[1]["id"] == call["id"], "a resumed run goes on in its page"


@pytest.mark.parametrize("rank", [0, 1])
def test_a_missing_package_is_named_on_every_rank(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, rank: int
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"log\.wandb: x: .*pip install wandb"):
        monitor(tmp_path, rank=rank, log=LogConfig(wandb="x"))
    assert not list(tmp_path.iterdir()), "nothing was begun"


def test_other_ranks_open_no_page(tmp_path: Path, fake_wandb: Any) -> None:
    with monitor(tmp_path, rank=1, log=LogConfig(wandb="x")) as writer:
        writer.image(1, "a", torch.zeros(3, 2, 2, dtype=torch.uint8))
        writer.finished()
    assert not fake_wandb.calls and not list(tmp_path.iterdir())
