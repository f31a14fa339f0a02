"""What the table's finished cells say: table.json, and from it the page docs/results.md."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from cells import Cell, finished, read_json, write_json
from table import KINDS, PICTURES, ROOT

GOAL = 0.984
_SAID = {
    "student": "student with KD",
    "pruned": "student, pruned (modal-adaptive)",
    "uniform": "student, pruned (uniform)",
    "no_kd": "student without a teacher",
}
_UNIT = {
    "vqa": "accuracy",
    "retrieval": "mean of recall at 1, 5, 10 both ways, among 1,000 pictures",
    "nlvr2": "accuracy",
    "captioning": "CIDEr",
    "grounding": "accuracy at IoU 0.5",
}


def _blind(work: Path, task: str, limit: int, gallery: int) -> Any:
    """The blind baseline's `Items`, worked out once."""
    from train.evaluation.items import Items, blind_items

    path = work / task / "blind" / f"items-{limit}-{gallery}.npz"
    if not path.is_file():
        path.parent.mkdir(parents=True, exist_ok=True)
        folder = work / "data" / task
        blind_items(task, folder / "train", folder / "test", limit, gallery).save(path)
    return Items.load(path)


def _task(task: str, cells: Sequence[Cell], args: Any) -> dict[str, Any] | None:
    """Scores, retentions and differences of the finished cells of a task; None without a teacher."""
    from train.evaluation.items import HEADLINE, Items
    from train.evaluation.paired import difference, retention

    found = {c.kind + f"-{c.seed}": Items.load(args.work / c.name / "items.npz") for c in cells}
    teacher = found.get("teacher-0")
    if teacher is None:
        return None
    limit = args.pictures or PICTURES[task]
    blind = _blind(args.work, task, limit, min(args.gallery, limit))
    headline = HEADLINE[task]
    result: dict[str, Any] = {
        "metric": _UNIT[task],
        "items": teacher.items,
        "pictures": len(teacher.units),
        "blind": float(blind.score(headline)),
        "teacher": {"score": float(teacher.score(headline)), "metrics": _metrics(teacher)},
        "students": {},
    }
    by_kind: dict[str, dict[int, Any]] = {kind: {} for kind in KINDS}
    for cell in cells:
        if cell.kind in by_kind:
            by_kind[cell.kind][cell.seed] = found[f"{cell.kind}-{cell.seed}"]
    for kind, seeds in by_kind.items():
        if seeds:
            kept = retention(teacher, list(seeds.values()), headline, args.draws)
            result["students"][kind] = {
                "seeds": list(seeds),
                "scores": [float(items.score(headline)) for items in seeds.values()],
                "metrics": [_metrics(items) for items in seeds.values()],
                "retention": kept.to_dict(),
                "models": [_size(c) for c in cells if c.kind == kind],
            }
    for name, one, other in (
        ("modal-adaptive minus uniform", "pruned", "uniform"),
        ("with KD minus without", "student", "no_kd"),
    ):
        both = sorted(by_kind[one].keys() & by_kind[other].keys())
        if both:
            ours, theirs = ([by_kind[kind][seed] for seed in both] for kind in (one, other))
            value = difference(ours, theirs, headline, args.draws)
            result.setdefault("differences", {})[name] = value.to_dict()
    return result


def _metrics(items: Any) -> dict[str, float]:
    return {name: float(value) for name, value in items.means().items()}


def _size(cell: Cell) -> dict[str, Any]:
    """Parameters from the weights' header, and the share of prunable ones that pruning removed."""
    from safetensors import safe_open

    with safe_open(str(ROOT / cell.model / "model.safetensors"), "pt") as file:
        shapes = [file.get_slice(name).get_shape() for name in file.keys()]  # noqa: SIM118
    known: dict[str, Any] = {"parameters": sum(_product(shape) for shape in shapes)}
    report = read_json(cell.model.parent / "sparsity.json")
    return known | ({"sparsity": report} if report else {})


def _product(shape: Sequence[int]) -> int:
    total = 1
    for side in shape:
        total *= side
    return total


def write_results(cells: Sequence[Cell], names: Mapping[str, str], args: Any) -> None:
    """table.json of what is finished, and the page made from it."""
    from train.provenance import provenance

    done = [cell for cell in cells if finished(cell, args.work, names[cell.name])]
    tasks = {
        task: told
        for task in args.tasks
        if (told := _task(task, [cell for cell in done if cell.task == task], args))
    }
    known = [read_json(args.work / cell.name / "finished.json") for cell in done]
    result = {
        "what": "scores of blocksworld students, and what they retain of their teachers",
        "command": args.command,
        "began": args.began,
        "tasks": tasks,
        "not_run": [cell.name for cell in cells if cell not in done],
        "seconds": {cell.name: one["seconds"] for cell, one in zip(done, known, strict=True)},
        "load_average": {
            cell.name: one["load_average"] for cell, one in zip(done, known, strict=True)
        },
        "draws": args.draws,
        "gallery": args.gallery,
        "scale_steps": args.scale_steps,
        "provenance": provenance(1),
    }
    write_json(args.json, result)
    args.page.write_text(page(result), encoding="utf-8")


# -- the page --------------------------------------------------------------------------------------


def _percent(value: float) -> str:
    return f"{100 * value:.2f}"


def _interval(value: Mapping[str, Any], sign: str = "") -> str:
    mean, low, high = (100 * value[key] for key in ("mean", "low", "high"))
    return f"{mean:{sign}.2f} [{low:{sign}.2f}, {high:{sign}.2f}]"


def _task_lines(task: str, told: Mapping[str, Any]) -> list[str]:
    lines = [
        f"## {task}",
        "",
        f"Score: {told['metric']}, times 100, on {told['items']:,} items about "
        f"{told['pictures']:,} pictures.",
        "",
        "| model | seeds | score (mean) | each seed | retention, % [95 %] | parameters |",
        "|---|---|---|---|---|---|",
        f"| without looking | | {_percent(told['blind'])} | | | |",
        f"| teacher | | {_percent(told['teacher']['score'])} | | 100 | |",
    ]
    for kind in KINDS:
        row = told["students"].get(kind)
        if row is None:
            lines.append(f"| {_SAID[kind]} | not run | | | | |")
            continue
        scores, sizes = row["scores"], [model["parameters"] for model in row["models"]]
        lines.append(
            f"| {_SAID[kind]} | {len(scores)} | {_percent(sum(scores) / len(scores))} | "
            f"{', '.join(map(_percent, scores))} | {_interval(row['retention'])} | "
            f"{sum(sizes) / len(sizes):,.0f} |"
        )
    lines.append("")
    for name, value in told.get("differences", {}).items():
        lines.append(f"{name[0].upper()}{name[1:]}: {_interval(value, '+')} points.")
    if "pruned" in told["students"]:
        kept = told["students"]["pruned"]["retention"]
        verdict = "met" if kept["low"] >= GOAL else "missed"
        lines.append(f"Goal, lower bound of the pruned student of at least 98.4 %: {verdict}.")
    return [*lines, ""]


def page(result: Mapping[str, Any]) -> str:
    """docs/results.md from table.json alone."""
    lines = [
        "# What is left of the teacher on blocksworld?",
        "",
        "Written by `benchmarks/table.py` from `benchmarks/results/table.json`; do not edit.",
        "",
        "Teacher: 4 vision, 2 text, 2 fusion layers. Students: half the depth, cut from the "
        "teacher, pre-trained and fine-tuned with it (KD) or without. Intervals: paired bootstrap "
        f"over test pictures, {result['draws']:,} draws; they do not contain the spread over seeds, "
        "which the seeds show. The student without a teacher starts from the same layers and "
        "trains as many steps, but has no task vector (docs/distillation.md), so its gap is of "
        "both. Retrieval searches galleries of "
        f"{result['gallery']:,} pictures.",
        "",
    ]
    if result["scale_steps"] != 1.0:
        lines += [f"A trial: steps times {result['scale_steps']:g}.", ""]
    for task, told in result["tasks"].items():
        lines += _task_lines(task, told)
    if result["not_run"]:
        lines += [f"Not run yet: {', '.join(result['not_run'])}.", ""]
    commit = result["provenance"]["commit"]
    lines += [f"Commit {commit}. Command: `{result['command']}`", ""]
    return "\n".join(lines)


if __name__ == "__main__":  # the page anew, from the file
    source = json.loads((ROOT / "benchmarks/results/table.json").read_text(encoding="utf-8"))
    (ROOT / "docs/results.md").write_text(page(source), encoding="utf-8")
