"""What a finished walk from teacher to pruned model measured: summary.json, and the page over it."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

__all__ = ["MODELS", "summarise", "write_summary"]

MODELS = ("teacher", "student", "pruned")
_EXAMPLES = 8


def _load(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8"))


def _types(scores: Mapping[str, float], prefix: str) -> dict[str, float]:
    start = prefix + "/"
    return {
        name.removeprefix(start): value for name, value in scores.items() if name.startswith(start)
    }


def _without_rounds(rows: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    return {
        batch: {key: value for key, value in row.items() if key != "seconds"}
        for batch, row in rows.items()
    }


def summarise(
    scores: Mapping[str, Mapping[str, float]], bench: Mapping[str, Any], seconds: float
) -> dict[str, Any]:
    """summary.json from the evaluations (by model; the teacher's has the blind numbers) and the
    bench.

    retention: pruned accuracy over the teacher's. speedup: the teacher's median latency over the
    pruned model's, by batch size. What is beyond these is under "details".
    """
    blind = scores["teacher"]["blind_accuracy"]
    measured = bench["models"]
    models = {
        name: {
            "params": measured[name]["parameters"]["total"],
            "params_prunable": measured[name]["parameters"]["prunable"],
            "accuracy": scores[name]["accuracy"],
            "blind_accuracy": blind,
            "macs": measured[name]["macs"]["total"],
            "latency_ms": {
                batch: row["median"] for batch, row in measured[name]["latency"].items()
            },
        }
        for name in MODELS
    }
    teacher, student, pruned = (models[name] for name in MODELS)

    def faster(slow: Mapping[str, Any]) -> dict[str, float]:
        return {
            batch: slow["latency_ms"][batch] / value
            for batch, value in pruned["latency_ms"].items()
        }

    above = teacher["accuracy"] - blind
    details = {
        "questions": int(scores["pruned"]["accuracy_count"]),
        "threads": bench["threads"],
        "repeats": bench["repeats"],
        "top_k": bench["top_k"],
        "retention_above_blind": (pruned["accuracy"] - blind) / above if above > 0 else None,
        "speedup_over_student": faster(student),
        "sparsity": {"exported": 1 - pruned["params_prunable"] / student["params_prunable"]},
        "accuracy_by_type": {name: _types(scores[name], "accuracy") for name in MODELS}
        | {"blind": _types(scores["teacher"], "blind_accuracy")},
        "latency": {name: _without_rounds(measured[name]["latency"]) for name in MODELS},
        "parameters": {name: measured[name]["parameters"] for name in MODELS},
        "macs": {name: measured[name]["macs"] for name in MODELS},
    }
    return {
        "task": "vqa",
        "device": bench["device"],
        "models": models,
        "retention": pruned["accuracy"] / teacher["accuracy"] if teacher["accuracy"] else 0.0,
        "speedup": faster(teacher),
        "seconds": seconds,
        "details": details,
    }


def _examples(
    out: Path, paths: Mapping[str, Path], top_k: int, max_tokens: int
) -> list[dict[str, Any]]:
    """Pictures of the test split with all models' answers, a disagreement first where there is one."""
    import torch
    from PIL import Image

    from data_pipeline.text import load_tokenizer
    from models import from_pretrained
    from train.evaluation.accuracy import find_split, vqa_loader
    from train.evaluation.vqa import AnswerList, rank_answers

    split = find_split(out / "data", "vqa", "test")
    tokenizer = load_tokenizer(out / "data" / "tokenizer")
    answers = AnswerList.load(split, tokenizer)
    models = {name: from_pretrained(path) for name, path in paths.items()}
    loader = vqa_loader(split, tokenizer, models["teacher"], 32, max_tokens, 32)
    batch = next(iter(loader))
    with torch.inference_mode():
        said = {name: rank_answers(model, batch, answers, top_k) for name, model in models.items()}
    rows = _choose(
        batch, {n: [answers.strings[i] for i in index.tolist()] for n, index in said.items()}
    )
    folder = out / "examples"
    folder.mkdir(parents=True, exist_ok=True)
    result = []
    for number, row in enumerate(rows):
        pixels = batch.images[batch.image_index[row]].permute(1, 2, 0).contiguous().numpy()
        Image.fromarray(pixels).save(folder / f"{number}.png")
        result.append(
            {
                "image": f"{folder.name}/{number}.png",
                "question": batch.questions[row],
                "answer": max(batch.answers[row], key=batch.answers[row].__getitem__),
                "type": batch.question_types[row],
                "predictions": {n: answers.strings[int(index[row])] for n, index in said.items()},
            }
        )
    return result


def _choose(batch: Any, said: Mapping[str, Sequence[str]]) -> list[int]:
    """Rows to show: one disagreement, then a picture of its own and another question type each."""
    rows = [row for row, valid in enumerate(batch.valid.tolist()) if valid]
    apart = [row for row in rows if len({answers[row] for answers in said.values()}) > 1]
    chosen: list[int] = []
    pictures: set[int] = set()
    seen: dict[str, int] = {}
    for row in apart[:1] + rows:
        picture, kind = int(batch.image_index[row]), batch.question_types[row]
        if picture in pictures or seen.get(kind, 0) > min(seen.values(), default=0):
            continue
        chosen.append(row)
        pictures.add(picture)
        seen[kind] = seen.get(kind, 0) + 1
        if len(chosen) == _EXAMPLES:
            break
    return chosen


def write_summary(
    out: Path,
    paths: Mapping[str, Path],
    stages: Sequence[tuple[str, float]],
    seconds: float,
    top_k: int,
    max_tokens: int,
) -> None:
    """`summary.json` and `report.html` of a finished walk.

    Args:
        out: the walk's folder, with eval/NAME.json and bench.json in it.
        paths: model folder of "teacher", "student" and "pruned".
        stages: (name, seconds) of each stage.
        top_k, max_tokens: how the models were evaluated, for the examples.
    """
    from models.config import ModelConfig
    from train.export.collect import kept_widths
    from train.export.report import verdict, write_report

    scores = {name: _load(out / "eval" / f"{name}.json") for name in MODELS}
    summary = summarise(scores, _load(out / "bench.json"), seconds)
    configs = {n: ModelConfig.load(p / "config.json") for n, p in paths.items()}
    details = summary["details"]
    details["gates"] = kept_widths(configs["pruned"], configs["student"])
    details["sparsity"]["target"] = _target(out / "prune" / "run.yaml")
    details["stages"] = [{"name": name, "seconds": round(took, 1)} for name, took in stages]
    details["examples"] = _examples(out, paths, top_k, max_tokens)
    text = json.dumps(summary, indent=2) + "\n"
    (out / "summary.json").write_text(text, encoding="utf-8")
    page = write_report([out], out / "report.html")
    print(f"\n{verdict(summary)}\nsummary: {out / 'summary.json'}\nreport:  {page}")


def _target(path: Path) -> float | None:
    import yaml

    values = yaml.safe_load(path.read_text(encoding="utf-8")) if path.is_file() else {}
    return ((values or {}).get("prune") or {}).get("sparsity")
