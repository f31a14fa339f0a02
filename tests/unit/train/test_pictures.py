"""Frames and attention drawn into pictures, seen in their pixels."""

from __future__ import annotations

import torch

from train.monitor.pictures import draw_boxes, framed, overlay

RED, GREEN = (255, 0, 0), (0, 128, 0)


def is_colour(picture: torch.Tensor, colour: tuple[int, int, int]) -> torch.Tensor:
    """(H, W) bool."""
    return (picture == torch.tensor(colour, dtype=torch.uint8)[:, None, None]).all(0)


def test_a_frame_lies_where_its_box_is() -> None:
    black = torch.zeros(3, 200, 200, dtype=torch.uint8)
    found = is_colour(draw_boxes(black, [((0.5, 0.25, 0.5, 0.2), "red")]), RED)
    rows, columns = found.any(1).nonzero()[:, 0], found.any(0).nonzero()[:, 0]
    assert (int(rows.min()), int(rows.max())) == (30, 70)
    assert (int(columns.min()), int(columns.max())) == (50, 150)
    assert not found[40:60, 60:140].any(), "it is a frame, not a plate"
    assert not black.any(), "the batch's own picture is left alone"


def test_later_frames_lie_on_top_and_boxes_may_reach_outside() -> None:
    black = torch.zeros(3, 200, 200, dtype=torch.uint8)
    box = (0.5, 0.5, 0.5, 0.5)
    both = draw_boxes(black, [(box, "red"), (box, "green")])
    assert not is_colour(both, RED).any() and is_colour(both, GREEN).any()
    outside = draw_boxes(black, [((1.0, 1.0, 0.5, 0.5), "red"), ((5.0, 5.0, 0.1, 0.1), "green")])
    assert is_colour(outside, RED)[150].any() and not is_colour(outside, GREEN).any()


def test_small_pictures_are_enlarged_whole() -> None:
    small = torch.randint(0, 256, (3, 48, 48), dtype=torch.uint8)
    large = framed(small, "red")
    assert large.shape == (3, 192, 192)
    assert is_colour(large, RED)[0].all() and is_colour(large, RED)[:, -1].all()
    assert torch.equal(large[:, 4:-4:4, 4:-4:4], small[:, 1:-1, 1:-1])


def test_attention_is_red_where_it_is_largest() -> None:
    grey = torch.full((3, 192, 192), 100, dtype=torch.uint8)
    weights = torch.zeros(4, 4)
    weights[1, 2] = 0.03
    found = overlay(grey, weights).float()
    redness = found[0] - found[2]
    row, column = divmod(int(redness.argmax()), 192)
    assert 48 <= row < 96 and 96 <= column < 144
    assert redness[:, :48].abs().max() == 0, "nothing is tinted where nothing looks"
    assert torch.equal(overlay(grey, weights), overlay(grey, 10 * weights)), "where, not how much"
    assert (overlay(grey, torch.zeros(4, 4)).float()[0] < 130).all()
