"""When a teacher on a stream of its own may begin: as soon as all it reads has been enqueued, and
before the student's last pass, or there would be nothing to run beside.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from typing import Any

import pytest

from models.xvlm import XVLM
from train.config import KdConfig
from train.runtime.teacher import Teacher
from train.tasks.base import Losses
from train.tasks.pretrain import PretrainTask
from train.tasks.vqa import VqaTask


def neighbour(name: str) -> Any:
    """A test module of this folder (tests are no package)."""
    spec = spec_from_file_location(name, Path(__file__).with_name(f"{name}.py"))
    assert spec is not None and spec.loader is not None
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


general, downstream = neighbour("test_tasks"), neighbour("test_downstream_tasks")
assigned = neighbour("test_assignment")
TASKS = ("pretrain", "vqa", "nlvr2_pretrain", "nlvr2", "retrieval", "captioning", "grounding")


class Side:
    """Stands for `SideStream`: notes when inputs are ready and when the block runs."""

    def __init__(self, log: list[str]) -> None:
        self.log = log

    def inputs_ready(self) -> None:
        self.log.append("ready")

    @contextmanager
    def running(self) -> Iterator[None]:
        self.log.append("teacher")
        yield


def step(task: str, side: list[str] | None, log: list[str], monkeypatch: Any) -> Losses:
    if task in downstream.TASKS:
        student, theirs = downstream.model(task), downstream.model(task, "teacher", 1)
        made = downstream.TASKS[task]({}, KdConfig(), student.config, theirs.config)
        batch = downstream.batch(task, student.config)
    elif task == "nlvr2_pretrain":
        student, theirs = assigned.model(task), assigned.model(task, "teacher", 1)
        made = assigned.AssignmentTask({}, KdConfig(), student.config, theirs.config)
        batch = assigned.batch()
    else:
        kind, make = {"pretrain": PretrainTask, "vqa": VqaTask}[task], general.model
        student = make("blocksworld-micro-student", task)
        theirs = make("blocksworld-micro-teacher", task, 1)
        made = kind({}, KdConfig(), student.config, theirs.config)
        batch = getattr(general, f"{task}_batch")(student.config)
    teacher: Teacher = general.frozen(theirs)
    if side is not None:
        teacher._side = Side(log)  # type: ignore[assignment]
    for name in ("encode_image", "encode_text", "fuse", "multimodal", "decode"):
        _log_passes(name, student, log, monkeypatch)
    return made.losses(student, teacher, batch, general.context())


def _log_passes(name: str, student: XVLM, log: list[str], monkeypatch: Any) -> None:
    run = getattr(XVLM, name)

    def logged(self: XVLM, *args: Any, **kwargs: Any) -> Any:
        if self is student:
            log.append(name)
        return run(self, *args, **kwargs)

    monkeypatch.setattr(XVLM, name, logged)


@pytest.mark.parametrize("task", TASKS)
def test_the_teacher_may_begin_before_the_students_last_pass(task, monkeypatch):
    log: list[str] = []
    losses = step(task, [], log, monkeypatch)
    assert log.count("ready") == log.count("teacher") == 1
    ready, runs = log.index("ready"), log.index("teacher")
    beside = log[ready + 1 : runs]
    assert beside, "the student does nothing while the teacher runs"
    if task in ("pretrain", "retrieval"):  # the drawn negatives come from the student's features
        assert {"encode_image", "encode_text"} <= set(log[:ready])
    elif task == "nlvr2_pretrain":
        assert log[:ready] == ["encode_image"]
    else:
        assert ready == 0
    alone = step(task, None, [], monkeypatch)
    assert {n: t.item() for n, t in losses.terms.items()} == {
        n: t.item() for n, t in alone.terms.items()
    }


def test_without_a_stream_of_its_own_nothing_is_settled_early(monkeypatch):
    settled: list[str] = []
    monkeypatch.setattr(
        "train.losses.gather.RowExchange.settle", lambda self: settled.append("settled")
    )
    step("pretrain", None, [], monkeypatch)
    assert settled == []
    step("pretrain", [], [], monkeypatch)
    assert settled == ["settled", "settled"]
