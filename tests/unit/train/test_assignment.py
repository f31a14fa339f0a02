"""Text assignment, the domain stage of NLVR2: the draws against a loop, the loss against rows one by
one, and what becomes of the model afterwards.
"""

from __future__ import annotations

import math
from collections import Counter
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from data_pipeline.task_batches import RetrievalBatch
from models import presets
from models.initialise import task_form
from models.xvlm import XVLM
from train.config import KdConfig
from train.losses import assignment
from train.losses.assignment import FIRST, NEITHER, SECOND, Assignments, draw_assignments
from train.runtime.teacher import Teacher
from train.tasks.assignment import AssignmentTask
from train.tasks.base import Losses, StepContext

VOCABULARY, TOKENS, ROWS = 40, 8, 5
GROUPS = torch.tensor([7, 8, 7, 9, 4])


def model(form: str = "nlvr2_pretrain", role: str = "student", seed: int = 0) -> XVLM:
    torch.manual_seed(seed)
    name = f"blocksworld-micro-{role}"
    return presets.create(name, form=form, text={"vocab_size": VOCABULARY})


def batch(seed: int = 5) -> RetrievalBatch:
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.tensor([TOKENS, 6, 5, 7, 4])
    return RetrievalBatch(
        images=torch.randint(0, 256, (ROWS, 3, 48, 48), dtype=torch.uint8, generator=generator),
        image_index=torch.arange(ROWS),
        valid=torch.tensor([True, True, True, True, False]),
        keys=("k",) * ROWS,
        text_ids=torch.randint(5, VOCABULARY, (ROWS, TOKENS), generator=generator),
        text_mask=torch.arange(TOKENS)[None] < lengths[:, None],
        groups=GROUPS,
        captions=("t",) * ROWS,
        image_ids=("i",) * ROWS,
    )


def features(rows: int, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return F.normalize(torch.randn(rows, 6, generator=generator), dim=-1)


def one_negative(feature: torch.Tensor, row: int, u: float, out: set[int]) -> int:
    """The smallest column whose share, added to those before it, is above u."""
    allowed = [c for c in range(len(feature)) if c not in out]
    weights = [math.exp(float(feature[row].double() @ feature[c].double()) / 0.07) for c in allowed]
    below = 0.0
    for column, weight in zip(allowed, weights, strict=True):
        below += weight / sum(weights)
        if u < below:
            return column
    return allowed[-1]


def naive(feature: torch.Tensor, groups: torch.Tensor, seed: int) -> list[tuple[int, int, int]]:
    kinds, orders, ones, twos = torch.rand(
        4, len(feature), generator=torch.Generator().manual_seed(seed)
    ).tolist()
    found = []
    for row in range(len(feature)):
        own = {c for c in range(len(feature)) if groups[c] == groups[row]}
        negative = one_negative(feature, row, ones[row], own)
        if kinds[row] >= 1 / 3:
            swapped = orders[row] < 0.5
            found.append((negative, row, SECOND) if swapped else (row, negative, FIRST))
        else:
            theirs = {c for c in range(len(feature)) if groups[c] == groups[negative]}
            other = one_negative(feature, row, twos[row], own | theirs)
            found.append((negative, other, NEITHER))
    return found


@settings(max_examples=30, deadline=None)
@given(rows=st.integers(4, 9), seed=st.integers(0, 2**20), same=st.booleans())
def test_draws_are_those_of_a_loop(rows, seed, same):
    feature, groups = features(rows, seed), torch.arange(rows)
    if same:
        groups[rows - 1] = groups[0]
    found = draw_assignments(feature, groups, torch.Generator().manual_seed(seed))
    rows_found = torch.stack(list(found), dim=1).tolist()
    assert [tuple(row) for row in rows_found] == naive(feature, groups, seed)


def test_a_third_each_is_first_second_and_neither():
    feature, groups = features(300, 1), torch.arange(300)
    label = draw_assignments(feature, groups, torch.Generator().manual_seed(2)).label
    counts = Counter(label.tolist())
    assert set(counts) == {FIRST, SECOND, NEITHER}
    assert all(70 <= count <= 130 for count in counts.values())  # 100 +- 3.7 deviations


def test_a_lone_image_still_gets_two_different_others():
    groups = torch.tensor([3, 3, 3, 3])
    for seed in range(20):
        found = draw_assignments(features(4, 0), groups, torch.Generator().manual_seed(seed))
        for row, (first, second, label) in enumerate(torch.stack(list(found), 1).tolist()):
            assert first != second
            assert (row in (first, second)) == (label != NEITHER)
    with pytest.raises(ValueError, match=r"at least 3: raise data\.batch"):
        draw_assignments(features(2, 0), groups[:2], torch.Generator())


def ranks(monkeypatch, feature, groups, local: bool) -> Assignments:
    """The draws of two ranks that hold half of the rows each, one after the other."""
    half, parts = len(feature) // 2, []
    everything = {feature.dtype: feature, groups.dtype: groups}
    for rank in (0, 1):
        own = torch.arange(half) + rank * half
        monkeypatch.setattr(assignment, "rank_and_world", lambda rank=rank: (rank, 2))
        monkeypatch.setattr(assignment, "own_rows", lambda *_, own=own: own)
        monkeypatch.setattr(assignment, "all_gather_no_grad", lambda x: everything[x.dtype])
        generator = torch.Generator().manual_seed(4)
        parts.append(draw_assignments(feature[own], groups[own], generator, local))
    return Assignments(*(torch.cat(column) for column in zip(*parts, strict=True)))


def test_ranks_draw_what_one_process_would(monkeypatch):
    feature, groups = features(10, 3), torch.arange(10)
    alone = draw_assignments(feature, groups, torch.Generator().manual_seed(4))
    both = ranks(monkeypatch, feature, groups, local=False)
    assert all(torch.equal(a, b) for a, b in zip(alone, both, strict=True))


def test_local_draws_stay_on_their_rank(monkeypatch):
    both = ranks(monkeypatch, features(10, 3), torch.arange(10), local=True)
    for index in (both.first, both.second):
        assert torch.equal(index // 5, torch.arange(10) // 5)


# -- the task --------------------------------------------------------------------------------------


def losses_of(student: XVLM, teacher: XVLM | None = None, kd: KdConfig | None = None) -> Losses:
    theirs = None if teacher is None else teacher.config
    task = AssignmentTask({}, kd or KdConfig(), student.config, theirs)
    frozen = None
    if teacher is not None:
        frozen = Teacher(teacher, torch.float32, torch.device("cpu"), "torch")
    context = StepContext(0, 0, 1, torch.Generator().manual_seed(1))
    return task.losses(student, frozen, batch(), context)


def test_loss_and_accuracy_row_by_row():
    student, data = model().eval(), batch()
    losses = losses_of(student)
    feature = student.image_feature(student.encode_image(data.images).last).detach()
    logits, labels = [], []
    for row, (first, second, label) in enumerate(naive(feature, GROUPS, 1)):
        left, right = (student.encode_image(data.images[n : n + 1]).last for n in (first, second))
        ids, mask = data.text_ids[row : row + 1], data.text_mask[row : row + 1]
        logits.append(student.ta_head(student.multimodal(ids, mask, (left, right)).last[:, 0]))
        labels.append(label)
    expected = torch.stack([
        F.cross_entropy(row, torch.tensor([label])) for row, label in zip(logits, labels, strict=True)
    ]).mean()  # fmt: skip
    torch.testing.assert_close(losses.terms["assignment"], expected)
    right = [int(row.argmax()) == label for row, label in zip(logits, labels, strict=True)]
    assert float(losses.metrics["accuracy"]) == pytest.approx(sum(right) / ROWS)


@pytest.mark.parametrize("distil", [False, True])
def test_what_is_trained(distil):
    student = model()
    losses = losses_of(student, model(role="teacher", seed=1) if distil else None)
    losses.total().backward()
    idle = [name for name, p in student.named_parameters() if p.grad is None]
    frozen = AssignmentTask({}, KdConfig(), student.config, None).frozen_parts()
    assert idle == [n for n, _ in student.named_parameters() if n.startswith(frozen)] != []
    assert any(name.startswith("kd_") for name in losses.terms) == distil
    assert losses.terms.keys() == losses.weights.keys()


def test_teacher_and_student_judge_the_same_pairs():
    losses = losses_of(model().eval(), model(), KdConfig(cross_attention=True))
    for name, term in losses.terms.items():
        if name.startswith("kd_"):
            assert term.item() == pytest.approx(0.0, abs=1e-6), name


def test_evaluation_counts_valid_rows_and_repeats_itself():
    student = model().eval()
    task = AssignmentTask({}, KdConfig(), student.config, None)
    with torch.no_grad():
        first, again = (task.evaluate(student, batch())["accuracy"] for _ in range(2))
    assert int(first[1]) == 4 and 0 <= int(first[0]) <= 4
    assert int(first[0]) == int(again[0])


def test_nlvr2_starts_from_the_domain_stage():
    before: Any = model()
    after, report = task_form(before, "nlvr2")
    assert report.fresh and all(name.startswith("cls_head.") for name in report.fresh)
    for name, value in after.state_dict().items():
        if not name.startswith("cls_head."):
            assert torch.equal(value, before.state_dict()[name]), name
