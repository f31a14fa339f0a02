"""What a run leaves behind: metrics.jsonl and event files are read back, also after a resume."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from train.config import LogConfig
from train.monitor import Monitor, flatten
from train.monitor.jsonl import read_jsonl
from train.monitor.pictures import answer_caption, caption_grid
from train.monitor.throughput import Throughput, duration


class Clock:
    """Seconds that pass only when told to."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def _record(step: int) -> dict[str, Any]:
    return {
        "loss": {"total": torch.tensor(1.0 / step), "itc": 0.5},
        "lr": 1e-3,
        "sparsity": {"target": torch.tensor([0.25]), "vision": 0.1},
    }


def _events(folder: Path) -> EventAccumulator:
    events = EventAccumulator(
        str(folder / "tensorboard"), size_guidance={"scalars": 0, "images": 0}
    )
    events.Reload()
    return events


def _monitor(folder: Path, stream: io.StringIO | None = None, **options: Any) -> Monitor:
    options = {"total_steps": 10, "rank": 0, "log": LogConfig(every=2)} | options
    return Monitor(folder, stream=stream or io.StringIO(), **options)


def _lines(folder: Path) -> list[dict[str, Any]]:
    return list(read_jsonl(folder / "metrics.jsonl"))


def test_lines_and_scalars(tmp_path: Path) -> None:
    clock = Clock()
    with _monitor(tmp_path, epoch=lambda: clock.now / 4, clock=clock) as monitor:
        for step in range(1, 6):
            with monitor.waiting():
                clock.now += 0.5
            clock.now += 1.5
            monitor.step(step, 32 * step, _record(step))
    lines = _lines(tmp_path)
    assert [line["step"] for line in lines] == [1, 2, 3, 4, 5]
    last = lines[-1]
    assert list(last)[:4] == ["step", "samples", "epoch", "time"]
    assert last["samples"] == 160 and last["epoch"] == clock.now / 4 == 2.5
    assert last["loss"] == pytest.approx({"total": 0.2, "itc": 0.5})
    assert last["sparsity"] == {"target": 0.25, "vision": 0.1}
    assert (last["samples_per_s"], last["data_wait"], last["eta"]) == (16.0, 0.5, 10.0)
    events = _events(tmp_path)
    total = events.Scalars("loss/total")
    assert [event.step for event in total] == [1, 2, 3, 4, 5]
    assert total[-1].value == pytest.approx(0.2)
    assert total[-1].wall_time == pytest.approx(last["time"])
    assert {"lr", "epoch", "samples_per_s", "sparsity/target"} <= set(events.Tags()["scalars"])


def test_values_of_the_record_are_not_overridden(tmp_path: Path) -> None:
    with _monitor(tmp_path) as monitor:
        for step in (1, 2):
            monitor.step(step, step, {"data_wait": 7.0, "epoch": 3.0})
    assert [(line["data_wait"], line["epoch"]) for line in _lines(tmp_path)] == [(7.0, 3.0)] * 2


def test_a_tensor_keeps_the_value_it_had(tmp_path: Path) -> None:
    value = torch.tensor(1.0)
    with _monitor(tmp_path, log=LogConfig(every=100)) as monitor:
        monitor.step(1, 1, {"norm": value})
        value.mul_(5)
        monitor.step(2, 2, {"norm": value})
    assert [line["norm"] for line in _lines(tmp_path)] == [1.0, 5.0]


def test_written_once_an_interval(tmp_path: Path) -> None:
    monitor = _monitor(tmp_path, log=LogConfig(every=3))
    seen = []
    for step in range(1, 8):
        monitor.step(step, step, {"lr": 0.1})
        seen.append(len(_lines(tmp_path)))
    assert seen == [0, 0, 3, 3, 3, 6, 6]
    monitor.close()
    assert len(_lines(tmp_path)) == 7
    monitor.close()
    monitor.step(8, 8, {})
    assert len(_lines(tmp_path)) == 7


def test_not_a_number_stays_valid_json(tmp_path: Path) -> None:
    with _monitor(tmp_path) as monitor:
        monitor.step(1, 1, {"loss": {"total": torch.tensor(float("nan"))}, "lr": float("inf")})
    text = (tmp_path / "metrics.jsonl").read_text()
    line = json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))
    assert line["loss"]["total"] is None and line["lr"] is None


def test_metrics_are_scalars(tmp_path: Path) -> None:
    with _monitor(tmp_path) as monitor, pytest.raises(ValueError, match=r"norms has shape \(3,\)"):
        monitor.step(1, 1, {"norms": torch.zeros(3)})


def test_resume_removes_what_came_after_the_checkpoint(tmp_path: Path) -> None:
    with _monitor(tmp_path) as monitor:
        for step in range(1, 9):
            monitor.step(step, step, {"lr": 1.0})
        monitor.step(4, 4, {"validation": {"accuracy": 0.5}})
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 9, "sam')  # killed while writing
    with _monitor(tmp_path, resume_step=5) as monitor:
        for step in (6, 7):
            monitor.step(step, step, {"lr": 2.0})
    assert [line["step"] for line in _lines(tmp_path)] == [1, 2, 3, 4, 5, 4, 6, 7]
    assert not list(tmp_path.glob("*.new"))
    scalars = _events(tmp_path).Scalars("lr")
    assert [(event.step, event.value) for event in scalars] == [
        *((step, 1.0) for step in range(1, 6)),
        (6, 2.0),
        (7, 2.0),
    ]


def test_a_fresh_run_starts_empty(tmp_path: Path) -> None:
    for value in (1.0, 2.0):
        with _monitor(tmp_path) as monitor:
            monitor.step(1, 1, {"lr": value})
    assert [line["lr"] for line in _lines(tmp_path)] == [2.0]
    assert [event.value for event in _events(tmp_path).Scalars("lr")] == [2.0]


def test_a_broken_line_is_named(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\nnonsense\n{"step": 2}\n')
    with pytest.raises(ValueError, match=r"metrics\.jsonl:2: .*remove the line"):
        list(read_jsonl(path))


def test_histograms(tmp_path: Path) -> None:
    with _monitor(tmp_path) as monitor:
        values = {
            "gates/vision": torch.tensor([0.0, 1.0, float("nan"), 1.0]),
            "gates/none": torch.tensor([]),
        }
        monitor.histograms(3, values)
    events = _events(tmp_path)
    assert events.Tags()["histograms"] == ["gates/vision"]
    (event,) = events.Histograms("gates/vision")
    assert event.step == 3
    assert (event.histogram_value.num, event.histogram_value.sum) == (3, 2)


def test_pictures(tmp_path: Path) -> None:
    images = torch.zeros(3, 3, 48, 48, dtype=torch.uint8)
    images[:, 0] = 255
    captions = [answer_caption("what colour?", "blue", "red")] * 3
    with _monitor(tmp_path) as monitor:
        monitor.pictures(2, "examples", images, captions)
    events = _events(tmp_path)
    (event,) = events.Images("examples")
    assert event.step == 2
    stored = Image.open(io.BytesIO(event.encoded_image_string)).convert("RGB")
    assert torch.equal(
        torch.frombuffer(bytearray(stored.tobytes()), dtype=torch.uint8),
        caption_grid(images, captions).permute(1, 2, 0).flatten(),
    )
    (tag,) = events.Tags()["tensors"]
    text = events.Tensors(tag)[0].tensor_proto.string_val[0].decode()
    assert "says: blue (wrong)" in text and "answer: red" in text


def test_grid_has_pictures_with_text_below() -> None:
    images = torch.zeros(3, 3, 64, 64, dtype=torch.uint8)
    images[:, 0] = 255
    grid = caption_grid(images, ["a", "", "a question that is far too long for one line " * 2])
    assert grid.dtype == torch.uint8 and grid.shape[0] == 3
    red = (grid[0] == 255) & (grid[1] == 0)
    assert red.sum() == 3 * 192 * 192  # enlarged threefold, three of the four cells used
    below = (grid < 128).all(dim=0)
    half = grid.shape[1] // 2
    assert below[:half].any() and below[half:].any()


def test_grid_wraps_words_longer_than_a_picture() -> None:
    images = torch.zeros(1, 3, 64, 64, dtype=torch.uint8)
    narrow, wide = caption_grid(images, ["x" * 20]), caption_grid(images, ["x" * 60])
    assert wide.shape[2] == narrow.shape[2] and wide.shape[1] > narrow.shape[1]
    endless = caption_grid(images, ["word " * 500])
    assert endless.shape[1] < 192 + 7 * 18 + 30


@pytest.mark.parametrize(
    "images",
    [
        torch.zeros(1, 3, 8, 8),
        torch.zeros(1, 1, 8, 8, dtype=torch.uint8),
        torch.zeros(0, 3, 8, 8, dtype=torch.uint8),
    ],
)
def test_grid_refuses_other_pictures(images: torch.Tensor) -> None:
    with pytest.raises(ValueError, match="uint8"):
        caption_grid(images, ["a"] * len(images))


def test_grid_needs_a_caption_a_picture() -> None:
    with pytest.raises(ValueError, match="2 pictures but 1 captions"):
        caption_grid(torch.zeros(2, 3, 8, 8, dtype=torch.uint8), ["a"])


def test_other_ranks_write_nothing(tmp_path: Path) -> None:
    stream = io.StringIO()
    with _monitor(tmp_path / "run", stream, rank=1) as monitor:
        monitor.step(1, 1, _record(1))
        monitor.histograms(1, {"a": torch.ones(2)})
        monitor.pictures(1, "a", torch.zeros(1), [])
        monitor.message("hello")
        assert monitor.wants_histograms(200) and not monitor.wants_histograms(201)
        assert monitor.wants_pictures(500) and not monitor.wants_pictures(499)
    assert not (tmp_path / "run").exists() and not stream.getvalue()


def test_intervals_of_zero_are_never() -> None:
    monitor = Monitor("unused", 1, 1, LogConfig(histograms_every=0, pictures_every=0))
    assert not monitor.wants_histograms(0) and not monitor.wants_pictures(0)


def test_lines_on_a_pipe(tmp_path: Path) -> None:
    stream, clock = io.StringIO(), Clock()
    with _monitor(tmp_path, stream, clock=clock) as monitor:
        for step in range(1, 5):
            clock.now += 60
            monitor.step(step, 60 * step, _record(step))
        monitor.message("saved")
    first, second, third = stream.getvalue().splitlines()
    assert first == "step 2/10  loss 0.5  lr 0.001  target 0.25  samples/s 1  eta 0:08:00"
    assert second.startswith("step 4/10") and second.endswith("eta 0:06:00")
    assert third == "saved"


def test_a_bar_on_a_terminal(tmp_path: Path) -> None:
    stream = Terminal()
    with _monitor(tmp_path, stream, resume_step=2) as monitor:
        for step in range(3, 11):
            monitor.step(step, step, _record(step))
        monitor.message("saved")
    shown = stream.getvalue()
    assert "2/10" in shown and "10/10" in shown and "loss=0.1" in shown and "saved\n" in shown


def test_throughput_forgets_the_start() -> None:
    clock = Clock()
    rates = Throughput(100, window=2, clock=clock)
    assert rates.update(1, 10) == {}
    clock.now = 100.0
    assert rates.update(2, 20)["samples_per_s"] == pytest.approx(0.1)
    assert rates.update(2, 20) == {}
    for step in (3, 4):
        clock.now += 1.0
        latest = rates.update(step, 10 * step)
    assert latest["samples_per_s"] == 10.0 and latest["eta"] == 96.0


def test_duration() -> None:
    assert duration(59.6) == "0:01:00"
    assert duration(3 * 86400 + 3661) == "3d 1:01:01"
    assert duration(-1) == "0:00:00"


def test_flatten() -> None:
    assert dict(flatten({"loss": {"itc": 1}, "lr": 2})) == {"loss/itc": 1, "lr": 2}


def test_a_flush_between_intervals_does_not_shift_them(tmp_path: Path) -> None:
    with _monitor(tmp_path, log=LogConfig(every=3)) as monitor:
        for step in (3, 4):
            monitor.step(step, step, _record(step))
        assert [line["step"] for line in _lines(tmp_path)] == [3]
        monitor.flush()  # a checkpoint
        monitor.step(6, 6, _record(6))
        assert [line["step"] for line in _lines(tmp_path)] == [3, 4, 6]
