"""benchmarks/trimming.py and trim_speed.py: the plan, equal costs, what is compared, and the page."""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from data_pipeline.blocksworld.build import build_blocksworld
from data_pipeline.blocksworld.scenes import Scene, Thing, scene_digest, split_of
from data_pipeline.blocksworld.vocabulary import write_tokenizer
from data_pipeline.text import TextEncoder, load_tokenizer
from models import presets
from models.trim_config import TrimmingConfig
from models.trimmers import TokenTrimmer
from models.trimming import baselines, dense_macs, with_trimming
from models.xvlm import XVLM
from train.evaluation.items import Items
from train.evaluation.macs import count_macs
from train.evaluation.vqa import AnswerList, rank_answers
from train.evaluation.workload import Workload
from train.recipes_io import find_recipe, load_run_config
from train.stages.check import check_stage

BENCHMARKS = Path(__file__).parents[3] / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))
import table  # noqa: E402  # pyright: ignore[reportMissingImports]
import trim_behaviour  # noqa: E402  # pyright: ignore[reportMissingImports]
import trim_models  # noqa: E402  # pyright: ignore[reportMissingImports]
import trim_speed  # noqa: E402  # pyright: ignore[reportMissingImports]
import trimming  # noqa: E402  # pyright: ignore[reportMissingImports]
import trimming_page  # noqa: E402  # pyright: ignore[reportMissingImports]

PATCHES = 36


@pytest.fixture(scope="module")
def encoder(tmp_path_factory) -> TextEncoder:
    folder = tmp_path_factory.mktemp("tokenizer")
    write_tokenizer(folder)
    return TextEncoder(load_tokenizer(folder), 20)


def small(guided: bool = True, **changes: Any) -> XVLM:
    """A trimmed model whose trimmers look at the text alone when `guided`."""
    torch.manual_seed(0)
    config = presets.config("blocksworld-micro-teacher", form="vqa", text={"vocab_size": 80})
    values = {"vision": (0, 2), "fusion": (0,), "guided": guided, "mode": "gather"} | changes
    model = with_trimming(XVLM(config), TrimmingConfig(**values)).eval()
    with torch.no_grad():
        for part in model.modules():
            if isinstance(part, TokenTrimmer):
                part.fc2.bias.zero_()
                part.fc2.weight.normal_(0.0, 0.5)
                if part.guided:
                    part.alpha.fill_(1.0)
    return model


def asked(model: XVLM, rows: int = 4) -> trim_models.Asked:
    random = torch.Generator().manual_seed(2)
    size = model.config.vision.image_size
    ids = torch.randint(2, 77, (rows, 9), generator=random)
    mask = torch.ones_like(ids, dtype=torch.bool)
    mask[1:2, 5:] = False
    images = torch.randint(0, 256, (rows, 3, size, size), generator=random, dtype=torch.uint8)
    return trim_models.Asked(images, ids, mask)


def test_every_cell_comes_after_what_it_needs_and_its_command_is_valid(tmp_path):
    cells = trimming.make_plan(tmp_path, {"vqa": 2, "retrieval": 1}, (0.5, 0.35))
    before: set[str] = set()
    for cell in cells:
        assert set(cell.after) <= before, cell.name
        before.add(cell.name)
        if cell.argv:
            verb, recipe, *overrides = cell.argv
            config, _ = load_run_config(find_recipe(recipe), [f"stage={verb}", *overrides])
            check_stage(config)
            kind, _, budget = cell.kind.partition("@")
            if budget:
                assert config.trim is not None
                assert f"{config.trim.budget:g}" == budget
                assert (config.trim.guided is False) == (kind == "self")
                assert config.seed == cell.seed
                assert Path(config.out) / "model" == cell.model
    assert len(before) == len(cells)
    # Seed 0: trim, two on its weights, five baselines, latency; vqa: behaviour, self alone as well.
    assert len(cells) == 2 + 2 * (11 + 9) + 2 * 4


def test_a_cell_is_another_one_when_the_training_it_follows_changes(tmp_path):
    cells = trimming.make_plan(tmp_path, {"vqa": 1}, (0.5, 0.35))
    names = trimming.identities(cells)
    assert len(set(names.values())) == len(cells)
    at = next(n for n, cell in enumerate(cells) if cell.name == "vqa/trim-0.5-0")
    other = replace(cells[at], argv=(*cells[at].argv, "optim.lr=1"))
    changed = trimming.identities([*cells[:at], other, *cells[at + 1 :]])
    moved = {name for name in names if names[name] != changed[name]}
    assert moved == {name for name in names if "-0.5" in name and "self" not in name}


@pytest.mark.parametrize("task", ["vqa", "retrieval"])
def test_rows_are_of_different_pictures_and_have_no_padding(task, tmp_path):
    build_blocksworld(tmp_path, 12, val=2, test=4, image_size=48, tasks=(task,))
    rows = trim_models.load_asked(
        tmp_path / task / "test", task, load_tokenizer(tmp_path / "tokenizer"), 48, 3, 20
    )
    assert len(rows) == 3 and all(row.mask.all() for row in rows)
    assert not torch.equal(rows[0].images, rows[1].images)


@torch.inference_mode()
def test_a_pass_as_it_is_served_answers_as_the_evaluation_does():
    model = small()
    rows = asked(model)
    answers = Workload(answers=12).answer_list(80)
    batch = argparse.Namespace(
        images=rows.images, image_index=torch.arange(4), question_ids=rows.ids,
        question_mask=rows.mask,
    )  # fmt: skip
    expected = rank_answers(model, batch, answers, 3)  # type: ignore[arg-type]
    for mode in ("mask", "gather", "packed", "off"):
        model.set_trimming(mode)
        if mode == "off":
            expected = rank_answers(model, batch, answers, 3)  # type: ignore[arg-type]
        assert torch.equal(trim_models.respond(model, rows, answers, 3), expected), mode
    model.set_trimming("mask")
    order = torch.tensor([1, 2, 3, 0])
    guides: list[torch.Tensor] = []
    hook = model.vision.trimmers.tokens["0"].register_forward_pre_hook(  # type: ignore[union-attr]
        lambda _, inputs: guides.append(inputs[1])
    )
    for told in (None, order):
        trim_models.respond(model, rows, answers, 3, told)
    hook.remove()
    assert torch.equal(guides[0][order], guides[1]) and not torch.equal(*guides)


def test_counted_cost_is_the_analytic_one_and_falls_with_the_counts():
    model = small().eval()
    model.set_trimming("off")
    rows, answers = [asked(model, 1)], Workload(answers=8).answer_list(80)
    config = replace(model.config, trimming=None)
    expected = sum(dense_macs(config, 9).values())
    expected += count_macs(config, None, 9, 2, trim_speed.TOP_K)["decoder"]
    assert trim_models.counted_macs(model, rows, answers, trim_speed.TOP_K) == expected
    costs = [
        trim_models.counted_macs(
            baselines.apply(model, "tome", keep=keep), rows, answers, trim_speed.TOP_K
        )
        for keep in trim_models.schedules("tome", PATCHES, 4, ())[::12]
    ]
    assert costs == sorted(costs, reverse=True) and len(set(costs)) > 2


@pytest.mark.parametrize("name", ["random", "uniform", "evit", "tome", "resolution"])
def test_schedules_can_be_kept_and_go_from_everything_to_little(name):
    found = trim_models.schedules(name, PATCHES, 4, (20, 18, 9, 4))
    assert found[0][0] == PATCHES
    assert all(sum(a) > sum(b) for a, b in zip(found, found[1:], strict=False))
    for keep in found:
        assert list(keep) == sorted(keep, reverse=True) and keep[-1] >= 1
        if name == "tome":
            assert all(b >= a // 2 for a, b in zip((PATCHES, *keep), keep, strict=False))
    assert sum(found[-1]) <= sum(found[0]) / 3


def test_a_baseline_never_gets_less_than_what_it_is_compared_with():
    options = [(n,) for n in range(50, 0, -1)]
    for target in (0.0, 7.0, 7.5, 49.9, 50.0, 60.0):
        kept = trim_models.cheapest(options, lambda keep: float(keep[0]), target)[0]
        assert kept == next((n for n in range(1, 51) if n >= target), 50)


def test_probes_ask_about_two_things_of_test_pictures():
    for probe in trim_behaviour.probes(20):
        assert split_of(scene_digest(probe.scene.things)) == "test"
        shapes = [thing.shape for thing in probe.scene.things]
        one, same, other = (
            text.split()[-1] for text in (probe.question, probe.reworded, probe.other)
        )
        assert one == same != other and probe.question != probe.reworded
        assert shapes.count(one) == shapes.count(other) == 1


def test_overlap_is_of_sets_of_patches():
    one = torch.tensor([[1, 1, 0, 0], [1, 0, 0, 0]]).bool()
    other = torch.tensor([[0, 1, 1, 0], [1, 0, 0, 0]]).bool()
    assert trim_behaviour.intersection_over_union(one, other).tolist() == pytest.approx(
        [1 / 3, 1.0]
    )


def by_first_token(model: XVLM) -> None:
    """Trimmers keep what lies in the direction of the text: the text decides."""
    with torch.no_grad():
        for part in model.modules():
            if isinstance(part, TokenTrimmer):
                part.fc2.weight.zero_()
                part.alpha.fill_(5.0)
        for parameter in model.text.parameters():
            if parameter.ndim == 2:
                parameter.mul_(4.0)  # fresh texts are all alike


def test_texts_that_decide_are_seen_to_decide_and_texts_that_do_not_are_not(encoder):
    model, found = small(mode="mask"), trim_behaviour.probes(12)
    by_first_token(model)
    told = trim_behaviour.overlap(model, encoder, found)
    assert told["two_wordings"] < 1 and told["two_things"] < 1
    with torch.no_grad():
        for part in model.modules():
            if isinstance(part, TokenTrimmer):
                part.alpha.zero_()
                part.fc2.weight.normal_()
    told = trim_behaviour.overlap(model, encoder, found)
    assert told["two_wordings"] == told["two_things"] == 1.0
    assert told["difference"] == {"mean": 0.0, "low": 0.0, "high": 0.0}


def test_crowded_pictures_are_seen_to_cost_more(encoder, monkeypatch):
    model = small(guided=False, mode="mask")
    scenes = {n: Scene((Thing("small", "red", "circle", 20, 20),) * n, f"k{n}") for n in (1, 5)}
    monkeypatch.setattr(
        trim_behaviour, "draw_scene", lambda *key: (scenes[1 if key[-1] % 2 else 5], 0)
    )
    monkeypatch.setattr(
        trim_behaviour, "picture",
        lambda scene, size: torch.full((1, 3, size, size), 50 * len(scene.things)).byte(),
    )  # fmt: skip
    kinds = {"count": "how many things are there", "existence": "is there a red circle"}
    asked = [{"question": text, "type": kind} for kind, text in kinds.items()]
    told = trim_behaviour.crowd(model, encoder, 8, lambda scene: asked)
    assert (told["pictures"], told["questions"]) == (8, 16)
    assert set(told["mmacs_by_type"]) == set(told["correlation_by_type"]) == set(kinds)
    for value in told["correlation_by_type"].values():
        assert abs(value) > 0.999
    assert set(told["mmacs_by_things"]) == {"1", "5"}
    low, high = told["mmacs_by_things"].values()
    assert (told["correlation"] > 0) == (high > low) and abs(told["correlation"]) > 0.9


def test_shuffling_compares_answers_of_the_same_questions(monkeypatch):
    answers = AnswerList(("yes", "no"), torch.zeros(2, 3).long(), torch.ones(2, 3).bool())
    batch = argparse.Namespace(
        valid=torch.tensor([True, True, True, True, False]), image_index=torch.arange(5),
        images=torch.arange(5), question_ids=torch.arange(5), question_mask=torch.ones(5),
        answers=({"yes": 1.0}, {"no": 1.0}, {"yes": 1.0}, {"yes": 1.0}, {"no": 1.0}),
        keys=tuple("aabbc"),
    )  # fmt: skip

    def respond(model: Any, rows: Any, answers: Any, top_k: int, order: Any = None) -> Any:
        assert rows.ids.tolist() == [0, 1, 2, 3]
        if order is None:
            return torch.tensor([0, 1, 0, 0])  # all right
        assert order.tolist() == [2, 3, 0, 1]
        return torch.tensor([0, 0, 0, 0])  # the second is wrong

    monkeypatch.setattr(trim_behaviour, "respond", respond)
    told = trim_behaviour.shuffled(None, [batch], answers, 2)
    assert (told["questions"], told["own_text"], told["other_text"]) == (4, 1.0, 0.75)
    assert told["difference"]["mean"] == 0.25


def cell(work: Path, kind: str, seed: int, right: float, **marker: Any) -> table.Cell:
    """A finished cell that answers a share of 4 questions about each of 50 pictures."""
    name = "vqa/" + kind.replace("@", "-") + f"-{seed}"
    made = table.Cell(name, "vqa", kind, seed, (), Path("m"))
    table.write_json(work / name / "finished.json", {
        "identity": name, "seconds": 1.0, "load_average": [0, 0, 0], **marker,
    })  # fmt: skip
    sums = np.full(50, 4 * right)
    Items(tuple(map(str, range(50))), {"accuracy": sums}, {"accuracy": np.full(50, 4.0)}).save(
        work / name / "items.npz"
    )
    return made


def test_the_docs_describe_the_pictures_that_are_scored():
    told = " ".join((BENCHMARKS.parent / "docs" / "trimming-benchmarks.md").read_text().split())
    size = {"image_size": trimming.IMAGE_SIZE}
    config = presets.config("blocksworld-teacher", form="vqa", vision=size)
    macs = dense_macs(config, 10, 2)
    share = round(100 * macs["vision"] / sum(macs.values()))
    assert (
        f"shown at {trimming.IMAGE_SIZE} px, so a picture has {config.vision.patches} patches"
        in told
    )
    assert f"{share} % of the teacher's MACs lie in the vision encoder" in told


def test_the_file_and_the_page_say_what_the_cells_found(tmp_path):
    row = {"median": 8.0, "q1": 7.0, "q3": 9.0, "speedup": {"median": 1.25}}
    times = {"dense": row, "trimmed, gather": row, "trimmed, packed": row | {"median": 4.0}}
    cells = [
        cell(tmp_path, "teacher", 0, 0.9, macs=100.0),
        cell(tmp_path, "trim@0.5", 0, 0.895, macs=49.0, profile=[9.0], full_score=0.91),
        cell(tmp_path, "trim@0.5", 1, 0.885, macs=51.0, profile=[9.0], full_score=0.92),
        cell(tmp_path, "tome@0.5", 0, 0.7, macs=52.0, keep=[8]),
        cell(tmp_path, "latency@0.5", 0, 0.0, latency={"1": times, "32": times},
             rows_of_a_call={"1": 8, "32": 32}),
    ]  # fmt: skip
    left = table.Cell("vqa/evit-0.5", "vqa", "evit@0.5", 0, (), Path("m"))
    args = argparse.Namespace(
        work=tmp_path, json=tmp_path / "t.json", page=tmp_path / "trimming-results.md",
        tasks=("vqa",), command="python x", began="", draws=50, scale_steps=1.0,
    )  # fmt: skip
    trimming_page.write_results(
        [*cells, left], {c.name: c.name for c in cells} | {left.name: ""}, args
    )
    result = json.loads(args.json.read_text())
    assert result["not_run"] == ["vqa/evit-0.5"]
    methods = result["tasks"]["vqa"]["budgets"]["0.5"]["methods"]
    assert methods["trim"]["seeds"] == [0, 1] and methods["trim"]["macs_share"] == [0.49, 0.51]
    assert methods["tome"]["trimmed_minus_it"]["seeds"] == pytest.approx([0.195, 0.185])
    page = args.page.read_text()
    for wanted in (
        "| trimmed (adaptive) | 0, 1 | 50.0 % | 89.50, 88.50 | -1.00 [-1.00, -1.00] |  | "
        "0.50 ms, 1.25x |",
        "| merging (ToMe) | 0 | 52.0 % | 70.00 | -20.00 [-20.00, -20.00] | +19.00",
        "| class attention (EViT) | not run |",
        "2.00x fewer (met), 1.00 points lost (met), ahead of those that were run.",
        "trimming off: 91.00, 92.00", "Not run yet: vqa/evit-0.5.",
        "![vqa-macs](trimming-results-vqa-macs.svg)",
    ):  # fmt: skip
        assert wanted in page, wanted
    assert "merging (ToMe)" in (tmp_path / "trimming-results-vqa-macs.svg").read_text()


def test_a_baseline_that_is_as_fast_and_loses_less_is_named():
    def method(lost: float) -> dict:
        return {"minus_dense": {"mean": -lost / 100}}

    def times(**speedup: float) -> dict:
        return {kind: {"median": 1 / x, "speedup": {"median": x}} for kind, x in speedup.items()}

    budgets = {
        "0.5": {
            "methods": {"trim": method(1.0), "uniform": method(4.0), "tome": method(9.0)},
            "latency": {"32": times(trimmed=1.5, uniform=1.99, tome=3.0)},
        },
        "0.35": {"methods": {"trim": method(5.0)}, "latency": {"32": times(trimmed=2.0)}},
    }
    assert trimming_page._in_time({"budgets": budgets}) == [
        "- By the time of a batch of 32, budget 0.5 (1.50x, 1.00 lost): ahead of all.",
        "- By the time of a batch of 32, budget 0.35 (2.00x, 5.00 lost): not ahead of learned "
        "scores, fixed counts at budget 0.5 (1.99x, 4.00 lost).",
        "",
    ]
    for each in budgets.values():
        del each["latency"]
    assert trimming_page._in_time({"budgets": budgets}) == []


def test_speed_models_cost_what_they_are_to_cost():
    answers = Workload(answers=16).answer_list(80)
    base = presets.config(
        "blocksworld-micro-teacher", form="vqa", vision={"heads": (2,) * 4, "head_dim": 16}
    )
    narrow = trim_speed.uniform_widths(base, 0.35)
    assert narrow.vision.heads == (1,) * 4 and narrow.vision.ffn == (83,) * 4
    dense = trim_speed.macs_of(trim_speed.empty(base), answers)
    parts = sum(dense_macs(base, trim_speed.TOKENS).values())
    assert dense == parts + trim_speed.decoder_macs_of(base, answers)
    made = trim_speed.trimmed(base, answers, 0.7)
    assert made.trimming is not None and made.trimming.mode == "bucket"
    assert 0.65 * dense < trim_speed.macs_of(trim_speed.empty(made), answers) <= 0.7 * dense
    with pytest.raises(ValueError, match="no counts"):
        trim_speed.trimmed(base, answers, 0.2)
    device = torch.device("cpu")
    configs = {"teacher": base, "student": base, "trimmed": made, "pruned and trimmed": made}
    found = trim_speed.measure(trim_speed.calls_of(configs, device, torch.float32), 2, 2, device)
    assert set(found) == {*configs, "trimmed, gather", "pruned and trimmed, gather"}
    told = trim_speed.verdicts(found)
    assert set(told) == {"trimmed over student", "pruned and trimmed over teacher"}
    assert all(one["met"] == (one["median"] >= one["goal"]) for one in told.values())
