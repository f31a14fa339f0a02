"""The report page: what it reads, that it needs nothing from outside, and its charts."""

from __future__ import annotations

import json
import re
import xml.etree.ElementTree as ET
from pathlib import Path

import pytest

from models import presets
from train.export import charts
from train.export.collect import Collected, collect, kept_widths, read_metrics
from train.export.report import render, verdict


def svg_of(text: str) -> ET.Element:
    return ET.fromstring(text)


def test_ticks_are_round_and_cover_the_range() -> None:
    assert charts.nice_ticks(0.0, 10.0) == [0.0, 5.0, 10.0]
    ticks = charts.nice_ticks(0.13, 0.94)
    assert ticks[0] <= 0.13 and ticks[-1] >= 0.94
    assert charts.nice_ticks(3.0, 3.0)[0] <= 3.0
    assert charts.nice_ticks(float("nan"), 1.0) == [0.0, 1.0]


def test_points_lie_where_their_values_say() -> None:
    data = [
        charts.Point("a", 2.0, 0.9, "#111111", 1.5, 2.5),
        charts.Point("b", 8.0, 0.8, "#222222"),
    ]
    svg = svg_of(charts.points(data, "ms", "accuracy", "told & <shown>"))
    space = "{http://www.w3.org/2000/svg}"
    circles = {c.get("fill"): c for c in svg.iter(f"{space}circle")}
    a, b = circles["#111111"], circles["#222222"]
    assert float(a.get("cx", 0)) < float(b.get("cx", 0))
    assert float(a.get("cy", 0)) < float(b.get("cy", 0))  # up is more accurate
    assert svg.get("role") == "img" and svg.get("aria-label") == "told & <shown>"
    assert svg.findtext(f"{space}title") == "told & <shown>"


def test_lines_leave_out_what_is_not_finite_and_say_nothing_of_nothing() -> None:
    values = [(0.0, 1.0), (1.0, float("nan")), (2.0, 0.5)]
    path = re.search(r'<path d="(M[^"]+)"', charts.lines({"a": ("#111", values)}, "x", "y", "l"))
    assert path and path[1].count("L") == 1
    assert charts.lines({"a": ("#111", [])}, "x", "y", "l") == ""


def test_long_curves_are_thinned() -> None:
    values = [(float(i), float(i % 7)) for i in range(5000)]
    text = charts.lines({"a": ("#111", values)}, "x", "y", "l")
    assert len(text) < 12_000


@pytest.mark.parametrize("longest", [6, 22, 34, 60])
def test_names_of_curves_do_not_run_into_each_other(longest: int) -> None:
    names = ["n" * longest, *(f"curve {i}" for i in range(5))]
    svg = svg_of(charts.lines({name: ("#111", [(0, 1), (1, 2)]) for name in names}, "x", "y", "l"))
    places = {
        text.text: (float(text.get("x", 0)), text.get("y"))
        for text in svg.iter("{http://www.w3.org/2000/svg}text")
        if text.text in names
    }
    assert len(places) == len(names)
    first, row = places[names[0]]
    beside = [x for x, y in places.values() if y == row and x > first]
    assert all(first + 5.8 * longest < x - 21 for x in beside)
    assert longest < 30 or not beside


def test_curves_of_few_values_show_each() -> None:
    few, many = ([(float(i), float(i)) for i in range(n)] for n in (4, 40))
    for values, dots in ((few, 4), (many, 0)):
        svg = svg_of(charts.lines({"a": ("#111", values)}, "x", "y", "l"))
        assert len(list(svg.iter("{http://www.w3.org/2000/svg}circle"))) == dots


def test_kept_bars_are_as_long_as_the_kept_share() -> None:
    svg = svg_of(charts.kept_bars([("0 FFN", 128, 512), ("1 FFN", 512, 512)], "#123456", "kept"))
    rects = [r for r in svg.iter("{http://www.w3.org/2000/svg}rect")]
    widths = [float(r.get("width", 0)) for r in rects if r.get("fill") == "#123456"]
    assert widths[0] == pytest.approx(widths[1] / 4, abs=0.1)
    assert "128/512" in "".join(svg.itertext())


def test_metrics_of_a_resumed_run_are_in_order_and_a_cut_line_is_left_out(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    rows = [
        {"step": s, "loss": {"total": v}} for s, v in ((10, 3.0), (20, 2.0), (10, 2.9), (30, 1.0))
    ]
    path.write_text("\n".join(map(json.dumps, rows)) + '\n{"step": 40, "lo')
    records = read_metrics(path)
    assert [(r["step"], r["loss"]["total"]) for r in records] == [(10, 2.9), (20, 2.0), (30, 1.0)]
    path.write_text('{"step": 1}\nnonsense\n{"step": 2}\n')
    with pytest.raises(ValueError, match=r"metrics\.jsonl:2"):
        read_metrics(path)


def test_kept_widths_by_part_and_layer() -> None:
    dense = presets.config("blocksworld-student", form="vqa")
    pruned = presets.config(
        "blocksworld-student", form="vqa", **{"vision.heads": (3, 1), "decoder.ffn": (50,)}
    )
    kept = kept_widths(pruned, dense)
    assert list(kept) == ["vision", "text", "fusion", "decoder"]
    assert kept["vision"][:2] == [("0 heads", 3, 4), ("1 heads", 1, 4)]
    assert ("0 FFN", 50, 512) in kept["decoder"]
    with pytest.raises(ValueError, match="depth"):
        kept_widths(pruned, presets.config("blocksworld-teacher", form="vqa"))


def test_a_pruning_run_alone_shows_its_gates(tmp_path: Path) -> None:
    run, source = tmp_path / "prune", tmp_path / "source"
    for folder in (run / "model", run / "dense", source):
        folder.mkdir(parents=True)
    presets.config("blocksworld-student", form="vqa").save(run / "dense" / "config.json")
    # What pruning began with has another form and depth.
    presets.config("blocksworld-teacher", form="pretrain").save(source / "config.json")
    small = presets.config("blocksworld-student", form="vqa", **{"vision.heads": (3, 1)})
    small.save(run / "model" / "config.json")
    (run / "run.yaml").write_text(f"stage: prune\nmodel: {source}\n")
    (run / "metrics.jsonl").write_text('{"step": 1, "loss": {"total": 2.0}}\n')
    found = collect([run])
    assert found.kept["vision"][0] == ("0 heads", 3, 4)
    assert "decoder" in found.kept
    assert "What pruning kept" in render(found)
    (run / "dense" / "config.json").unlink()
    assert not collect([run]).kept


def test_verdict_tells_only_what_was_measured() -> None:
    models = {"teacher": {"params": 100}, "pruned": {"params": 40}}
    told = verdict({"models": models, "retention": 0.973, "speedup": {"1": 1.5, "32": 2.25}})
    assert told == (
        "The pruned model keeps 97.3% of the teacher's accuracy, answers 1.50x as fast at batch 1 "
        "and 2.25x as fast at batch 32 and has 40% of its parameters."
    )
    assert verdict({}) == "No comparison was measured in these runs."


def test_page_of_half_a_summary_renders() -> None:
    page = render(Collected(names=["a"], summary={"task": "vqa", "models": {"teacher": {}}}))
    assert "<table>" in page and "None" not in page and "nan" not in page


def test_names_are_escaped() -> None:
    page = render(Collected(names=["<script>alert(1)</script>"]))
    assert "<script" not in page and "&lt;script&gt;" in page


def test_collect_names_what_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no such run"):
        collect([tmp_path / "absent"])
    (tmp_path / "summary.json").write_text("{")
    with pytest.raises(ValueError, match=r"summary\.json"):
        collect([tmp_path])
