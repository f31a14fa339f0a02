"""What is shown of trimming: dark patches, bracketed words, histograms, and the report's section."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from torch import Tensor

from models.xvlm import XVLM
from tests.unit.train.test_trim import batch_of, context, decisive, task_of, trimmed
from train.evaluation.trim_pictures import drawn, trim_pictures
from train.export.collect import collect
from train.export.report import write_report
from train.export.trimming import cost_chart, trimming_section
from train.monitor.pictures import kept_patches
from train.runtime.distributed import Distributed


class Words:
    """A tokenizer whose words are numbers."""

    all_special_tokens: tuple[str, ...] = ()

    def decode(self, ids: list[int], skip_special_tokens: bool = True) -> str:
        return " ".join(self.convert_ids_to_tokens(ids))

    def convert_ids_to_tokens(self, ids: list[int]) -> list[str]:
        return [f"w{token}" for token in ids]


def test_dropped_patches_are_dark_and_the_others_untouched():
    image = torch.full((3, 96, 96), 200, dtype=torch.uint8)
    kept = torch.zeros(3, 3, dtype=torch.bool)
    kept[1, 2] = True
    found = kept_patches(image, kept)
    assert found.shape == (3, 192, 192)
    inside = found[:, 1:-1, 1:-1]
    bright = (inside == 200).all(0)
    assert bright[63:127, 127:].all() and int(bright.sum()) == 64 * 63
    assert inside[:, ~bright].float().mean() < 100
    named = kept_patches(image, kept, "block 1: 1/9")
    assert not torch.equal(named, found) and torch.equal(named[:, 40:], found[:, 40:])


def shown(
    task: str, count: int = 8, **changes: Any
) -> tuple[XVLM, Any, Any, list[Tensor], list[str]]:
    model = decisive(trimmed(task, **changes)).eval()
    model.set_trimming("mask")
    batch, wrapped = batch_of(task, model), task_of(task, model)
    with torch.inference_mode():
        done = wrapped.base.score(model, batch, context(), wrapped.base.shares(batch, context()))
        pictures, texts = drawn(model, done, batch, Words(), count)
    return model, batch, done, pictures, texts


@pytest.mark.parametrize("task", ["vqa", "nlvr2", "retrieval", "captioning", "grounding"])
def test_a_strip_shows_the_sites_of_its_own_row(task):
    model, batch, done, pictures, texts = shown(task)
    rows = batch.valid.nonzero()[:, 0].tolist()
    assert len(pictures) == len(texts) == len(rows)
    lines = 2 if task == "nlvr2" else 1
    trimming = model.config.trimming
    assert trimming is not None
    last, sites = len(trimming.vision), len(trimming.vision) + bool(trimming.fusion)
    side = pictures[0].shape[1] // lines
    assert pictures[0].shape == (3, lines * side, (1 + sites) * side)
    grid = model.config.vision.image_size // model.config.vision.patch_size
    site = done.image.trimming.sites[trimming.vision[-1]]
    for picture, row in zip(pictures, rows, strict=True):
        for line in range(lines):
            index = batch.second_index if line else batch.image_index
            seen = row + line * batch.rows if done.image.per_text else int(index[row])
            kept = site.keep()[seen, -(grid**2) :].view(grid, grid) > 0
            strip = picture[:, line * side : (line + 1) * side]
            original, panel = strip[:, :, :side], strip[:, :, last * side : (last + 1) * side]
            step = side // grid
            for y in range(1, grid):  # a label is in the first row
                for x in range(grid):
                    cut = (
                        slice(y * step + 4, y * step + step - 4),
                        slice(x * step + 4, x * step + step - 4),
                    )
                    same = torch.equal(panel[:, *cut], original[:, *cut])
                    assert same == bool(kept[y, x])


def test_the_text_says_what_it_costs_and_which_words_went():
    model, batch, done, _, texts = shown("vqa", text=(1, 2))
    costs = [float(text.rpartition("costs ")[2].split()[0]) for text in texts]
    assert all(5 < cost < 130 for cost in costs) and len(set(costs)) > 1
    kept = done.fused.trimming.sites[2].keep() > 0
    for row, text in enumerate(texts):
        words = text.split("\n")[0].split()
        for place, word in enumerate(words):
            name = f"w{int(batch.question_ids[row, place])}"
            assert word == (name if kept[row, place] else f"[-{name}-]")
    assert "[-" in "".join(texts)
    retrieved = shown("retrieval")[4]  # images are shared: no row has a cost of its own
    assert not any("costs" in text for text in retrieved)


class Board:
    def __init__(self) -> None:
        self.written: dict[str, Any] = {}

    def pictures(self, step: int, tag: str, images: Tensor, captions: list[str]) -> None:
        self.written[tag] = images, captions

    def histograms(self, step: int, values: dict[str, Tensor]) -> None:
        self.written |= values


@pytest.mark.parametrize("task", ["vqa", "retrieval"])
def test_a_run_writes_pictures_and_histograms_and_goes_on(task):
    model, board = decisive(trimmed(task)).train(), Board()
    dist = Distributed(0, 0, 1, torch.device("cpu"), "gloo")
    batch, wrapped = batch_of(task, model), task_of(task, model)
    trim_pictures(board, 3, model, wrapped, [batch], dist, Words(), count=2)  # type: ignore[arg-type]
    images, captions = board.written[f"{task}/kept"]
    assert len(images) == len(captions) == 2 and images.dtype == torch.uint8
    shares, kept = board.written["trim/macs_share"], board.written["trim/kept_patches"]
    assert shares.shape == (4,) and (shares > 0.05).all() and (shares < 1.3).all()
    assert (kept >= 0).all() and (kept <= 1).all()
    assert model.training


# --- the report -----------------------------------------------------------------------------------

TRIM = {
    "full": {"accuracy": 0.912, "accuracy_count": 64.0},
    "trimmed": {"accuracy": 0.9035, "accuracy_count": 64.0},
    "budget": 0.5, "macs_share": 0.4987, "macs_share_min": 0.31, "macs_share_max": 0.72,
    "macs_share_histogram": {"edges": [0.0, 0.25, 0.5, 0.75, 1.0], "counts": [0.0, 40.0, 24.0, 0.0]},
    "samples": 64,
    "sites": {"vision.1": {"tokens": 37, "mean": 20.4, "most": 28}},
    "heads": {"vision.0": 0.8}, "keep": {"vision": [24], "fusion": None, "text": None},
}  # fmt: skip


def test_the_report_tells_what_stays():
    page = trimming_section({"trim <a>": TRIM})
    for told in ("50.0 %", "49.9 %", "31.0 % to 72.0 %", "0.9035", "20/37", "80/100", "trim &lt;a"):
        assert told in page, told
    assert "_count" not in page and "0.25 to 0.50: 40" in page
    assert trimming_section({}) == ""


def test_a_run_directory_brings_its_trimming(tmp_path):
    run = tmp_path / "trim"
    run.mkdir()
    records = [
        {"step": n, "metrics": {"macs_share": 1 - 0.1 * n, "target_share": 0.5}} for n in range(3)
    ]
    (run / "metrics.jsonl").write_text("\n".join(map(json.dumps, records)) + "\n")
    (run / "trim.json").write_text(json.dumps(TRIM))
    found = collect([run])
    assert found.trims == {"trim": TRIM}
    page = write_report([run], tmp_path / "page.html").read_text()
    assert "What trimming keeps" in page and "cost of trimmed passes" in page
    assert cost_chart(found.curves[0].series, "trim").startswith("<svg")
