"""What the finished cells of benchmarks/trimming.py say: trimming.json, and from it page and plots."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from table import ROOT, Cell, finished, read_json, write_json

SAID = {
    "trim": "trimmed (adaptive)",
    "self": "trimmed, not told the text (ablation)",
    "uniform": "learned scores, fixed counts",
    "random-trained": "random patches, trimmed weights",
    "random": "random patches",
    "evit": "class attention (EViT)",
    "evit-fused": "class attention, fused token (EViT)",
    "tome": "merging (ToMe)",
    "resolution": "smaller pictures",
}
_COLOURS = dict(
    zip(
        SAID,
        (
            "#0b6e4f",
            "#6cc24a",
            "#3f9c7c",
            "#b9a44c",
            "#8a8f8c",
            "#2a6fb0",
            "#7fb2e5",
            "#c0562f",
            "#7d4f9e",
        ),
        strict=True,
    )
)
LOST = 0.01  # the goal: accuracy that may be lost at half the multiply-accumulates
_KNOWN = ("macs", "keep", "profile", "validation", "full_score")


def write_results(cells: Sequence[Cell], names: Mapping[str, str], args: Any) -> None:
    """trimming.json of what is finished, the page and the plots beside it."""
    from train.provenance import provenance

    done = [cell for cell in cells if finished(cell, args.work, names[cell.name])]
    tasks = {
        task: told
        for task in args.tasks
        if (told := _task([c for c in done if c.task == task], args))
    }
    known = {cell.name: read_json(args.work / cell.name / "finished.json") for cell in done}
    result = {
        "what": "accuracy of adaptive trimming and of its baselines against their cost",
        "command": args.command,
        "began": args.began,
        "tasks": tasks,
        "not_run": [cell.name for cell in cells if cell not in done],
        "seconds": {name: one["seconds"] for name, one in known.items()},
        "load_average": {name: one["load_average"] for name, one in known.items()},
        "draws": args.draws,
        "scale_steps": args.scale_steps,
        "provenance": provenance(1),
    }
    write_json(args.json, result)
    for name, plot in plots(result).items():
        (args.page.parent / f"{args.page.stem}-{name}.svg").write_text(plot, encoding="utf-8")
    args.page.write_text(page(result, args.page.stem), encoding="utf-8")


def _task(cells: Sequence[Cell], args: Any) -> dict[str, Any] | None:
    """Scores and costs by budget and method; None without the model that is trimmed."""
    from train.evaluation.items import HEADLINE, Items

    teacher = next((cell for cell in cells if cell.kind == "teacher"), None)
    if teacher is None or teacher.task is None:
        return None
    dense = Items.load(args.work / teacher.name / "items.npz")
    headline = HEADLINE[teacher.task]
    told: dict[str, Any] = {
        "items": dense.items,
        "pictures": len(dense.units),
        "dense": {
            "score": float(dense.score(headline)),
            "macs": read_json(args.work / teacher.name / "finished.json").get("macs"),
        },
        "budgets": {},
    }
    found: dict[str, dict[str, list[Cell]]] = {}
    for cell in cells:
        kind, _, budget = cell.kind.partition("@")
        if budget:
            found.setdefault(budget, {}).setdefault(kind, []).append(cell)
    for budget, kinds in found.items():
        told["budgets"][budget] = _budget(kinds, dense, headline, told["dense"]["macs"], args)
    return told


def _budget(
    kinds: Mapping[str, Sequence[Cell]], dense: Any, headline: Any, macs: float | None, args: Any
) -> dict[str, Any]:
    from train.evaluation.items import Items
    from train.evaluation.paired import difference

    result: dict[str, Any] = {"methods": {}}
    scored: dict[str, dict[int, Any]] = {}
    for kind in SAID:
        cells = kinds.get(kind, ())
        if not cells:
            continue
        scored[kind] = {c.seed: Items.load(args.work / c.name / "items.npz") for c in cells}
        markers = [read_json(args.work / c.name / "finished.json") for c in cells]
        ours = list(scored[kind].values())
        lost = difference(ours, [dense] * len(ours), headline, args.draws)
        result["methods"][kind] = {
            "seeds": list(scored[kind]),
            "scores": [float(items.score(headline)) for items in ours],
            "minus_dense": lost.to_dict(),
            "macs_share": [m["macs"] / macs for m in markers] if macs else None,
            "runs": [{key: m[key] for key in _KNOWN if key in m} for m in markers],
        }
    trimmed = scored.get("trim", {})
    for kind, theirs in scored.items():
        if kind == "trim" or not trimmed:
            continue
        # What needs no training is one number: every seed is compared with it.
        both = [seed for seed in trimmed if seed in theirs or len(theirs) == 1]
        pairs = [theirs.get(seed, next(iter(theirs.values()))) for seed in both]
        lead = difference([trimmed[seed] for seed in both], pairs, headline, args.draws)
        result["methods"][kind]["trimmed_minus_it"] = lead.to_dict()
    for cell in (*kinds.get("latency", ()), *kinds.get("behaviour", ())):
        marker = read_json(args.work / cell.name / "finished.json")
        if cell.kind.startswith("latency"):
            result |= {key: marker[key] for key in ("latency", "rows_of_a_call")}
        else:
            told = {key: marker[key] for key in ("overlap", "shuffled_text", "crowd")}
            result.setdefault("behaviour", {})[str(cell.seed)] = told
    return result


# -- plots -----------------------------------------------------------------------------------------


def plots(result: Mapping[str, Any]) -> dict[str, str]:
    """ "TASK-macs" and "TASK-latency" -> SVG: points lost against cost, a line for each method."""
    found = {}
    for task, told in result["tasks"].items():
        for name, x_of, label in (
            ("macs", _share, "multiply-accumulates, share of the full model's"),
            ("latency", _slowness, "time of a batch of 32, share of the full model's"),
        ):
            if plot := _plot(told, x_of, label, f"{task}: accuracy lost against {name}"):
                found[f"{task}-{name}"] = plot
    return found


def _share(budget: Mapping[str, Any], kind: str) -> float | None:
    shares = budget["methods"][kind]["macs_share"]
    return sum(shares) / len(shares) if shares else None


def _slowness(budget: Mapping[str, Any], kind: str) -> float | None:
    row = latency_of(budget, kind, "32")
    return 1 / row["speedup"]["median"] if row else None


def _plot(told: Mapping[str, Any], x_of: Any, x_label: str, label: str) -> str:
    from train.export.charts import lines

    series: dict[str, tuple[str, list[tuple[float, float]]]] = {}
    for kind, said in SAID.items():
        values = [
            (x, -100 * budget["methods"][kind]["minus_dense"]["mean"])
            for budget in told["budgets"].values()
            if kind in budget["methods"] and (x := x_of(budget, kind)) is not None
        ]
        if values:
            series[said] = (_COLOURS[kind], [*sorted(values), (1.0, 0.0)])
    return lines(series, x_label, "points lost", label) if series else ""


def latency_of(budget: Mapping[str, Any], kind: str, batch: str) -> Mapping[str, Any] | None:
    """The timed row of a method; of a trimmed model's modes the fastest."""
    timed = budget.get("latency", {}).get(batch, {})
    rows = [
        row
        for name, row in timed.items()
        if name.split(",")[0] == ("trimmed" if kind == "trim" else kind)
    ]
    return min(rows, key=lambda row: row["median"], default=None)


# -- the page --------------------------------------------------------------------------------------


def _interval(value: Mapping[str, Any]) -> str:
    mean, low, high = (100 * value[key] for key in ("mean", "low", "high"))
    return f"{mean:+.2f} [{low:+.2f}, {high:+.2f}]"


def _time(row: Mapping[str, Any] | None, rows: int) -> str:
    if row is None:
        return "not run"
    return f"{row['median'] / rows:.2f} ms, {row['speedup']['median']:.2f}x"


def _budget_lines(budget: str, told: Mapping[str, Any], task: str) -> list[str]:
    sizes = told.get("rows_of_a_call", {"1": 1, "32": 32})
    lines = [
        f"### Budget {budget}",
        "",
        "| method | seeds | MACs | score | minus the full model | trimmed minus it | batch 1 | batch 32 |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for kind, said in SAID.items():
        row = told["methods"].get(kind)
        if row is None and kind == "self" and task == "retrieval":
            continue  # its trimmers are never told a text
        if row is None:
            lines.append(f"| {said} | not run | | | | | | |")
            continue
        shares, lead = row["macs_share"], row.get("trimmed_minus_it")
        cost = f"{100 * sum(shares) / len(shares):.1f} %" if shares else ""
        scores = ", ".join(f"{100 * score:.2f}" for score in row["scores"])
        lines.append(
            f"| {said} | {', '.join(map(str, row['seeds']))} | {cost} | {scores} | "
            f"{_interval(row['minus_dense'])} | {_interval(lead) if lead else ''} | "
            f"{_time(latency_of(told, kind, '1'), sizes['1'])} | "
            f"{_time(latency_of(told, kind, '32'), sizes['32'])} |"
        )
    if "trim" in told["methods"]:
        full = [run["full_score"] for run in told["methods"]["trim"]["runs"]]
        lines += [
            "",
            "The trimmed weights with trimming off: "
            f"{', '.join(f'{100 * score:.2f}' for score in full)}.",
        ]
    if "self" in told["methods"]:
        lead = _interval(told["methods"]["self"]["trimmed_minus_it"])
        lines += ["", f"Guided by the text against judged by the image alone: {lead} points."]
    behaviour = _behaviour_lines(told)
    return [*lines, "", *behaviour, *([""] if behaviour else [])]


def _behaviour_lines(told: Mapping[str, Any]) -> list[str]:
    lines = []
    for seed, found in told.get("behaviour", {}).items():
        overlap, text, crowd = found["overlap"], found["shuffled_text"], found["crowd"]
        costs, kinds = (
            ", ".join(f"{n} {macs:.1f}" for n, macs in crowd[f"mmacs_by_{group}"].items())
            for group in ("things", "type")
        )
        each = ", ".join(f"{n} {value:.2f}" for n, value in crowd["correlation_by_type"].items())
        lines += [
            f"Seed {seed}. Kept patches of two wordings of a question overlap by "
            f"{100 * overlap['two_wordings']:.1f} %, of questions about two things by "
            f"{100 * overlap['two_things']:.1f} %; difference {_interval(overlap['difference'])}. "
            "Trimmers that are told another picture's question lose "
            f"{_interval(text['difference'])} points. MMACs by things in the picture: {costs}; "
            f"correlation {crowd['correlation']:.2f} ({each}). By type of question: {kinds}.",
        ]
    return lines


def _verdict(told: Mapping[str, Any]) -> str:
    """The goal of half the cost for one point, ahead of every baseline."""
    half = told["budgets"].get("0.5", {}).get("methods", {})
    if "trim" not in half:
        return "Goal (2x fewer MACs for at most 1 point, ahead of every baseline): not run."
    trim = half["trim"]
    share = sum(trim["macs_share"]) / len(trim["macs_share"])
    lost = -trim["minus_dense"]["mean"]
    rivals = {kind: row for kind, row in half.items() if kind not in ("trim", "self")}
    behind = [SAID[kind] for kind, row in rivals.items() if row["trimmed_minus_it"]["low"] <= 0]
    ahead = "all" if SAID.keys() <= half.keys() | {"self"} else "those that were run"
    return (
        f"Goal, 2x fewer MACs for at most 1 point, ahead of every baseline: {1 / share:.2f}x fewer "
        f"({'met' if share <= 0.5 else 'missed'}), {100 * lost:.2f} points lost "
        f"({'met' if lost <= LOST else 'missed'}), "
        + (f"ahead of {ahead}." if not behind else f"not surely ahead of: {', '.join(behind)}.")
    )


def _in_time(told: Mapping[str, Any], batch: str = "32") -> list[str]:
    """Whether a baseline, at any of the budgets, is as fast (within 2 %) and loses no more."""
    timed = {
        (budget, kind): (row["speedup"]["median"], -100 * method["minus_dense"]["mean"])
        for budget, each in told["budgets"].items()
        for kind, method in each["methods"].items()
        if kind != "self" and (row := latency_of(each, kind, batch))
    }
    lines = []
    for budget in told["budgets"]:
        if (budget, "trim") not in timed:
            continue
        speedup, lost = timed[budget, "trim"]
        better = [
            f"{SAID[kind]} at budget {other} ({their:.2f}x, {lose:.2f} lost)"
            for (other, kind), (their, lose) in timed.items()
            if kind != "trim" and their >= 0.98 * speedup and lose <= lost
        ]
        lines.append(
            f"- By the time of a batch of {batch}, budget {budget} ({speedup:.2f}x, {lost:.2f} lost): "
            + (f"not ahead of {'; '.join(better)}." if better else "ahead of all.")
        )
    return [*lines, ""] if lines else []


def page(result: Mapping[str, Any], stem: str = "trimming-results") -> str:
    """The page from trimming.json alone."""
    lines = [
        "# Adaptive trimming against its baselines, on blocksworld",
        "",
        "Written by `benchmarks/trimming.py` from `benchmarks/results/trimming.json`; do not edit.",
        "",
        "The task's teacher (four vision blocks, 81 patches) is trimmed in front of every block. A "
        "baseline gets the smallest counts with which it costs at least as many multiply-accumulates "
        "(MACs) as the trimmed model, so a lead over it is at equal cost or less. MACs are counted by "
        "torch while questions are answered one by one, the ranking of answers included; MACs that "
        "the choice needs count as well. Baselines of the first kind need no training and run on the "
        "teacher; the trimmed model, fixed counts and random patches on trimmed weights share their "
        "weights, which have been trained on. Differences are in points with paired bootstrap 95 % "
        "intervals over test pictures. Times are medians of one row, and how many times as fast as "
        "the full model, round by round, in turns in one process on a shared machine; a trimmed "
        "model's is that of its fastest mode. In so small a model a pass is mostly overhead: what "
        "MACs are worth at full size is in `benchmarks/results/trim_speed.json`.",
        "",
    ]
    if result["scale_steps"] != 1.0:
        lines += [f"A trial: steps times {result['scale_steps']:g}.", ""]
    drawn = plots(result)
    for task, told in result["tasks"].items():
        lines += [
            f"## {task}",
            "",
            f"{told['items']:,} items about {told['pictures']:,} pictures. The full model: "
            f"{100 * told['dense']['score']:.2f}, {told['dense']['macs'] / 1e6:.1f} MMACs.",
            "",
            _verdict(told),
            "",
            *_in_time(told),
        ]
        lines += [f"![{name}]({stem}-{name}.svg)" for name in drawn if name.startswith(task)]
        lines.append("")
        for budget, row in told["budgets"].items():
            lines += _budget_lines(budget, row, task)
    if result["not_run"]:
        lines += [f"Not run yet: {', '.join(result['not_run'])}.", ""]
    lines += [f"Commit {result['provenance']['commit']}. Command: `{result['command']}`", ""]
    return "\n".join(lines)


if __name__ == "__main__":  # page and plots anew, from the file
    source = json.loads((ROOT / "benchmarks/results/trimming.json").read_text(encoding="utf-8"))
    for plot_name, drawn_plot in plots(source).items():
        Path(ROOT / f"docs/trimming-results-{plot_name}.svg").write_text(
            drawn_plot, encoding="utf-8"
        )
    (ROOT / "docs/trimming-results.md").write_text(page(source), encoding="utf-8")
