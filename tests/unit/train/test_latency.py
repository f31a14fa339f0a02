"""Turns, quartiles and shapes of the latency measurement; no assertion on real time."""

from __future__ import annotations

import pytest
import torch

from models import presets
from train.evaluation import latency


def test_calls_take_turns_and_each_round_starts_with_another() -> None:
    order: list[str] = []
    calls = [(name, lambda name=name: order.append(name)) for name in "abc"]
    ticks = iter(range(1000))
    seconds = latency.interleave(calls, 4, warm_up=1, clock=lambda: float(next(ticks)))
    assert "".join(order) == "abc" + "abc" + "bca" + "cab" + "abc"
    assert seconds == {name: [1.0] * 4 for name in "abc"}


def test_the_device_is_waited_for_before_and_after_each_call() -> None:
    order: list[str] = []
    latency.interleave(
        [("a", lambda: order.append("call"))],
        1,
        0,
        synchronise=lambda: order.append("wait"),
        clock=lambda: float(order.append("clock") or 0),
    )
    assert order == ["wait", "clock", "call", "wait", "clock"]


def test_summary_is_median_and_quartiles_in_milliseconds() -> None:
    found = latency.summarise([0.004, 0.001, 0.002, 0.003, 0.005])
    assert found == pytest.approx({"median": 3.0, "q1": 2.0, "q3": 4.0, "repeats": 5.0})
    with pytest.raises(ValueError, match="two repeats"):
        latency.summarise([1.0])


def test_measure_gives_every_model_and_batch_and_restores_the_threads() -> None:
    models = [
        (name, presets.create(f"blocksworld-micro-{name}", form="vqa"))
        for name in ("teacher", "student")
    ]
    answers = latency.synthetic_answers(6, 100)
    before = torch.get_num_threads()
    found = latency.measure(models, answers, (1, 3), threads=before + 1, repeats=2, top_k=2)
    assert torch.get_num_threads() == before
    assert {name: list(rows) for name, rows in found.items()} == dict.fromkeys(
        ("teacher", "student"), ["1", "3"]
    )
    row = found["teacher"]["3"]
    assert row["q1"] <= row["median"] <= row["q3"]
    assert row["rows_per_s"] == pytest.approx(3e3 / row["median"])


def test_two_models_of_one_name_are_refused() -> None:
    model = presets.create("blocksworld-micro-student", form="vqa")
    with pytest.raises(ValueError, match="same name"):
        latency.measure([("a", model), ("a", model)], latency.synthetic_answers(2, 9))
