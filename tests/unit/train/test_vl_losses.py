"""Task losses: values by hand, gradients, and the corners (no masked slot, region row, partner)."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import example, given, settings
from hypothesis import strategies as st

from train.losses.assignment import draw_assignments
from train.losses.vl import (
    Similarities,
    _draw,
    answer_loss,
    box_losses,
    contrastive_loss,
    generalized_iou,
    hard_negatives,
    matching_labels,
    matching_loss,
    mlm_loss,
    negative_weights,
    same_pairs,
)


def _generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def _features(rows: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    x = torch.randn(2, rows, 8, generator=_generator(seed))
    image, text = F.normalize(x, dim=-1).unbind(0)
    return image, text


def test_contrastive_is_symmetric_cross_entropy() -> None:
    image, text = _features(5)
    temperature = torch.tensor([0.2], requires_grad=True)
    loss, similarities = contrastive_loss(image, text, temperature)
    logits = image @ text.t() / 0.2
    labels = torch.arange(5)
    wanted = (F.cross_entropy(logits, labels) + F.cross_entropy(logits.t(), labels)) / 2
    torch.testing.assert_close(loss, wanted)
    torch.testing.assert_close(similarities.image_to_text, logits)
    loss.backward()
    assert temperature.grad is not None and temperature.grad.shape == (1,)


def _cross_entropy(row: list[float], share: list[float]) -> float:
    """- sum_c share_c log softmax(row)_c, by loops."""
    total = math.log(sum(math.exp(x) for x in row))
    return -sum(s * (x - total) for x, s in zip(row, share, strict=True))


@settings(max_examples=25, deadline=None)
@given(
    groups=st.lists(st.integers(0, 3), min_size=1, max_size=6),
    seed=st.integers(0, 999),
    temperature=st.floats(0.05, 2.0),
)
def test_contrastive_by_loops(groups: list[int], seed: int, temperature: float) -> None:
    rows = range(len(groups))
    image, text = (x.double() for x in _features(len(groups), seed))
    wanted = plain = 0.0
    for mine, other in ((image, text), (text, image)):
        for i in rows:
            row = [
                sum(float(a) * float(b) for a, b in zip(mine[i], other[j], strict=True))
                / temperature
                for j in rows
            ]
            equal = [float(groups[i] == groups[j]) for j in rows]
            wanted += _cross_entropy(row, [e / sum(equal) for e in equal])
            plain += _cross_entropy(row, [float(i == j) for j in rows])
    scale = 2 * len(groups)
    grouped, _ = contrastive_loss(image, text, temperature, groups=torch.tensor(groups))
    assert grouped.item() == pytest.approx(wanted / scale, rel=1e-9)
    assert contrastive_loss(image, text, temperature)[0].item() == pytest.approx(
        plain / scale, rel=1e-9
    )


def test_published_scaling_changes_nothing_on_one_rank() -> None:
    image, text = _features(4)
    grads = []
    for published in (False, True):
        leaf = image.clone().requires_grad_()
        contrastive_loss(leaf, text, 0.1, published_scaling=published)[0].backward()
        grads.append(leaf.grad)
    torch.testing.assert_close(grads[0], grads[1])


def test_contrastive_of_half_features_is_computed_in_float32() -> None:
    image, text = _features(4)
    loss, _ = contrastive_loss(image.half(), text.half(), torch.tensor([0.01], dtype=torch.half))
    assert loss.dtype == torch.float32 and torch.isfinite(loss)


@settings(max_examples=40, deadline=None)
@given(rows=st.integers(2, 9), seed=st.integers(0, 10_000), local=st.booleans())
def test_negatives_are_never_the_own_or_an_equal_pair(rows: int, seed: int, local: bool) -> None:
    image, text = _features(rows, seed)
    _, similarities = contrastive_loss(image, text, 0.05)
    groups = torch.randint(0, rows, (rows,), generator=_generator(seed))
    groups[0], groups[1] = -1, -2  # so that every row has a partner of another group
    same = same_pairs(groups)
    drawn = hard_negatives(similarities, _generator(seed), same=same, local=local)
    for index in drawn:
        assert ((index >= 0) & (index < rows)).all()
        assert not same[torch.arange(rows), index].any()


def test_negatives_follow_their_weights() -> None:
    image, text = _features(4)
    _, similarities = contrastive_loss(image, text, 0.5)
    generator, counts = _generator(), torch.zeros(4, 4)
    draws = 4000
    for _ in range(draws):
        index = hard_negatives(similarities, generator).text_for_image
        counts[torch.arange(4), index] += 1
    weights = negative_weights(similarities.image_to_text, torch.arange(4)).float()
    wanted = weights / weights.sum(dim=1, keepdim=True)
    torch.testing.assert_close(counts / draws, wanted, atol=0.03, rtol=0)
    assert (counts.diagonal() == 0).all()


def test_a_point_on_an_edge_does_not_choose_a_row_of_weight_zero() -> None:
    """The uniform number 0 falls on the first edge, which belongs to the own pair of row 0."""
    similarity = torch.zeros(3, 3)
    assert _draw(similarity, torch.zeros(3), torch.arange(3), None).tolist() == [1, 0, 0]


def test_negatives_are_a_function_of_the_generator() -> None:
    _, similarities = contrastive_loss(*_features(16), 0.5)
    first, second = (hard_negatives(similarities, _generator(3)) for _ in range(2))
    other = hard_negatives(similarities, _generator(4))
    assert torch.equal(first.image_for_text, second.image_for_text)
    assert torch.equal(first.text_for_image, second.text_for_image)
    assert not torch.equal(first.text_for_image, other.text_for_image)
    assert not torch.equal(first.text_for_image, first.image_for_text)


def test_random_numbers_reach_the_device_without_waiting_for_it(monkeypatch) -> None:
    """A copy that blocks would make the host wait for everything enqueued so far."""
    waits, plain = [], torch.Tensor.to

    def to(self: torch.Tensor, *args: Any, **options: Any) -> torch.Tensor:
        if args and isinstance(args[0], torch.device):
            waits.append(not options.get("non_blocking"))
        return plain(self, *args, **options)

    monkeypatch.setattr(torch.Tensor, "to", to)
    scores = torch.randn(4, 4)
    hard_negatives(Similarities(scores, scores.t()), _generator())
    draw_assignments(_features(4)[0], torch.arange(4), _generator())
    assert waits == [False, False]


def test_rows_of_the_global_batch_draw_what_one_rank_would() -> None:
    """The two halves of a batch, as two ranks would hold them, draw what the whole batch draws."""
    _, whole = contrastive_loss(*_features(8), 0.3)
    wanted = hard_negatives(whole, _generator(5))
    for half in (slice(0, 4), slice(4, 8)):
        own = Similarities(whole.image_to_text[half], whole.text_to_image[half])
        drawn = hard_negatives(own, _generator(5), own_index=torch.arange(8)[half])
        assert torch.equal(drawn.text_for_image, wanted.text_for_image[half])
        assert torch.equal(drawn.image_for_text, wanted.image_for_text[half])


def test_local_negatives_stay_on_the_own_rows() -> None:
    _, whole = contrastive_loss(*_features(8), 0.3)
    own = Similarities(whole.image_to_text[4:], whole.text_to_image[4:])
    for index in hard_negatives(own, _generator(), own_index=torch.arange(4, 8), local=True):
        assert (index >= 4).all() and not (index == torch.arange(4, 8)).any()


def test_a_row_whose_partners_are_all_equal_still_gets_another_row() -> None:
    _, similarities = contrastive_loss(*_features(3), 0.3)
    drawn = hard_negatives(similarities, _generator(), same=torch.ones(3, 3, dtype=torch.bool))
    for index in drawn:
        assert not (index == torch.arange(3)).any()


def test_one_row_has_no_negative() -> None:
    _, similarities = contrastive_loss(*_features(1), 0.3)
    with pytest.raises(ValueError, match="at least 2 rows"):
        hard_negatives(similarities, _generator())


def test_matching_labels() -> None:
    assert matching_labels(2).tolist() == [1, 1, 0, 0, 0, 0]


def test_mlm_ignores_unused_slots_and_is_zero_without_any() -> None:
    logits = torch.randn(2, 3, 7, generator=_generator(), requires_grad=True)
    labels = torch.tensor([[1, -100, -100], [5, 2, -100]])
    rows = logits.flatten(0, 1)[[0, 3, 4]]
    torch.testing.assert_close(
        mlm_loss(logits, labels), F.cross_entropy(rows, torch.tensor([1, 5, 2]))
    )
    none = mlm_loss(logits, torch.full((2, 3), -100))
    assert none == 0
    none.backward()
    assert logits.grad is not None and (logits.grad == 0).all()


@settings(max_examples=25, deadline=None)
@given(
    labels=st.lists(
        st.lists(st.sampled_from([-100, 0, 3, 6]), min_size=3, max_size=3), min_size=1, max_size=4
    ),
    seed=st.integers(0, 999),
)
def test_mlm_and_matching_by_loops(labels: list[list[int]], seed: int) -> None:
    generator = _generator(seed)
    logits = torch.randn(len(labels), 3, 7, generator=generator, dtype=torch.float64)
    found = [
        _cross_entropy(logits[b, m].tolist(), [float(c == label) for c in range(7)])
        for b, row in enumerate(labels)
        for m, label in enumerate(row)
        if label != -100
    ]
    wanted = sum(found) / max(1, len(found))
    assert mlm_loss(logits, torch.tensor(labels)).item() == pytest.approx(wanted, rel=1e-9)

    rows = len(labels)
    pairs = torch.randn(3 * rows, 2, generator=generator, dtype=torch.float64)
    each = [_cross_entropy(pairs[i].tolist(), [i >= rows, i < rows]) for i in range(3 * rows)]
    loss = matching_loss(pairs, matching_labels(rows))
    assert loss.item() == pytest.approx(sum(each) / len(each), rel=1e-9)


def test_giou_by_hand() -> None:
    a = torch.tensor([[0.0, 0.0, 2.0, 2.0], [0.0, 0.0, 1.0, 1.0], [0.0, 0.0, 1.0, 1.0]])
    b = torch.tensor([[1.0, 1.0, 3.0, 3.0], [0.0, 0.0, 1.0, 1.0], [2.0, 0.0, 3.0, 1.0]])
    wanted = torch.tensor([1 / 7 - 2 / 9, 1.0, -1 / 3])
    torch.testing.assert_close(generalized_iou(a, b), wanted)


def test_boxes_average_over_region_rows_only() -> None:
    pred = torch.tensor([[0.5, 0.5, 0.2, 0.2], [0.1, 0.1, 0.1, 0.1]], requires_grad=True)
    target = torch.tensor([[0.5, 0.5, 0.4, 0.2], [0.9, 0.9, 0.1, 0.1]])
    l1, giou = box_losses(pred, target, torch.tensor([True, False]))
    torch.testing.assert_close(l1, torch.tensor(0.2))
    torch.testing.assert_close(giou, torch.tensor(0.5))
    (l1 + giou).backward()
    assert pred.grad is not None and (pred.grad[1] == 0).all() and pred.grad[0].abs().sum() > 0


@pytest.mark.parametrize("value", [0.3, 0.0, float("nan")])
def test_boxes_without_region_rows_are_an_exact_zero_with_a_gradient(value: float) -> None:
    pred = torch.full((3, 4), value, requires_grad=True)
    l1, giou = box_losses(pred, torch.rand(3, 4), torch.zeros(3, dtype=torch.bool))
    assert l1 == 0 and giou == 0
    (l1 + giou).backward()
    assert pred.grad is not None and (pred.grad == 0).all()


def test_boxes_of_size_zero_are_finite() -> None:
    pred = torch.tensor([[0.5, 0.5, 0.0, 0.0]], requires_grad=True)
    l1, giou = box_losses(pred, pred.detach().clone(), torch.tensor([True]))
    (l1 + giou).backward()
    assert torch.isfinite(giou) and pred.grad is not None and torch.isfinite(pred.grad).all()


def _box_loops(pred: list[float], target: list[float]) -> tuple[float, float | None]:
    """L1 and 1 - GIoU of (cx, cy, w, h); None for a box of negative size."""
    l1 = sum(abs(a - b) for a, b in zip(pred, target, strict=True))
    if min(pred[2], pred[3], target[2], target[3]) < 0:
        return l1, None
    inner = hull = 1.0
    for axis in (0, 1):
        low = [box[axis] - box[axis + 2] / 2 for box in (pred, target)]
        high = [box[axis] + box[axis + 2] / 2 for box in (pred, target)]
        inner *= max(0.0, min(high) - max(low))
        hull *= max(high) - min(low)
    union = pred[2] * pred[3] + target[2] * target[3] - inner
    return l1, 1 - (inner / union - (hull - union) / hull)


# Sizes a loop can divide by; the tests below take the others.
_SIZE = st.one_of(st.floats(0.01, 1.0), st.floats(-0.5, -0.01))
_BOX = st.tuples(st.floats(0, 1), st.floats(0, 1), _SIZE, _SIZE)
_GOOD = st.tuples(st.floats(0, 1), st.floats(0, 1), st.floats(0.01, 1), st.floats(0.01, 1))


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(_GOOD, _BOX, st.booleans()), min_size=1, max_size=5))
def test_boxes_by_loops(rows: list[tuple[tuple[float, ...], tuple[float, ...], bool]]) -> None:
    """Also batches without a region row, and those whose boxes are all broken."""
    found = [_box_loops(list(pred), list(target)) for pred, target, _ in rows]
    regions = [pair for pair, (_, _, region) in zip(found, rows, strict=True) if region]
    count = max(1, len(regions))
    pred = torch.tensor([row[0] for row in rows], dtype=torch.float64, requires_grad=True)
    target = torch.tensor([row[1] for row in rows], dtype=torch.float64)
    l1, giou = box_losses(pred, target, torch.tensor([row[2] for row in rows]))
    assert l1.item() == pytest.approx(sum(a for a, _ in regions) / count, abs=1e-9)
    wanted = sum(b for _, b in regions if b is not None) / count
    assert giou.item() == pytest.approx(wanted, abs=1e-7)
    (l1 + giou).backward()
    assert pred.grad is not None and torch.isfinite(pred.grad).all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@settings(max_examples=40, deadline=None)
@given(
    logits=st.lists(st.sampled_from([-80.0, -17.0, -9.0, 0.0, 9.0, 80.0]), min_size=8, max_size=8),
    sizes=st.lists(st.sampled_from([-0.2, 0.0, 1e-6, 0.5, 1.0]), min_size=4, max_size=4),
)
@example(logits=[0.0, -80.0, -17.0, -9.0, *[-80.0] * 4], sizes=[0.0, 0.0, -0.2, -0.2])
def test_gradients_of_degenerate_boxes_fit_half_precision_under_a_loss_scale(
    dtype: torch.dtype, logits: list[float], sizes: list[float]
) -> None:
    """Predicted sizes down to sigmoid(-80), targets of negative, zero and tiny size."""
    leaf = torch.tensor(logits, dtype=dtype).view(2, 4).requires_grad_()
    target = torch.tensor([[0.5, 0.5, *sizes[:2]], [0.5, 0.5, *sizes[2:]]])
    l1, giou = box_losses(leaf.float().sigmoid(), target, torch.tensor([True, True]))
    assert torch.isfinite(l1) and torch.isfinite(giou)
    ((l1 + giou) * 1024).backward()
    assert leaf.grad is not None and torch.isfinite(leaf.grad).all()


def test_boxes_that_are_all_broken_leave_an_exact_zero_of_giou() -> None:
    pred = torch.full((2, 4), 0.5, requires_grad=True)
    target = torch.tensor([[0.5, 0.5, -0.1, 0.2], [0.5, 0.5, 0.1, -0.2]])
    _, giou = box_losses(pred, target, torch.tensor([True, True]))
    assert giou == 0
    giou.backward()
    assert pred.grad is not None and (pred.grad == 0).all()


def _answers() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    logits = torch.randn(3, 4, 6, generator=_generator())
    ids = torch.tensor([[2, 4, 3, 0], [2, 5, 4, 3], [2, 3, 0, 0]])
    mask = torch.tensor([[1, 1, 1, 0], [1, 1, 1, 1], [1, 1, 0, 0]]).bool()
    return logits, ids, mask, torch.tensor([0.75, 0.25, 1.0])


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_answer_loss_by_hand(smoothing: float) -> None:
    logits, ids, mask, weight = _answers()
    wanted = 0.0
    for a in range(3):
        for t in range(1, 4):
            if not mask[a, t]:
                continue
            log_p = logits[a, t - 1].log_softmax(dim=-1)
            token = int(ids[a, t])
            for c in range(6):
                share = 1 - smoothing if c == token else smoothing / 6
                wanted -= float(weight[a] * share * log_p[c])
    loss = answer_loss(logits, ids, mask, weight, questions=2, smoothing=smoothing)
    assert float(loss) == pytest.approx(wanted / 2, rel=1e-5)


def test_answer_loss_ignores_logits_of_padding_and_of_the_last_position() -> None:
    logits, ids, mask, weight = _answers()
    leaf = logits.clone().requires_grad_()
    answer_loss(leaf, ids, mask, weight, questions=2).backward()
    assert leaf.grad is not None
    assert (leaf.grad[:, -1] == 0).all() and (leaf.grad[2, 1:] == 0).all()
    assert (leaf.grad[2, 0] != 0).any()


def test_answer_loss_needs_questions() -> None:
    with pytest.raises(ValueError, match="questions=0"):
        answer_loss(*_answers(), questions=0)
