"""The verbs `espalier export` and `espalier report`."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from train.export.card import Facts

__all__ = ["add_parsers", "run"]


def add_parsers(subparsers: Any) -> None:
    """Add the two verbs to `argparse` subparsers."""
    text = "A model to ship: weights, configuration, tokenizer and model card; pruned models are smaller."
    parser = subparsers.add_parser(
        "export",
        help=text,
        description=text,
        epilog="example: espalier export runs/prune/model --format safetensors --out shipped/pruned",
    )
    parser.set_defaults(export_verb="export")
    parser.add_argument("model", type=Path, help="model folder")
    parser.add_argument(
        "--format",
        choices=["safetensors", "onnx", "torch"],
        default="safetensors",
        help="weights for from_pretrained, or graphs (fp32) for onnxruntime or torch.export.load",
    )
    parser.add_argument("--out", type=Path, required=True, help="folder to write")
    parser.add_argument(
        "--dtype",
        choices=["fp32", "fp16", "bf16"],
        help="weights on disk (safetensors; default fp16). Graphs are fp32",
    )
    parser.add_argument(
        "--dense", type=Path, help="unpruned model folder, for the sparsity in the card"
    )
    parser.add_argument("--metrics", type=Path, help="JSON of espalier eval --json, for the card")
    parser.add_argument(
        "--bench", type=Path, help="JSON of espalier bench --json with this model, for the card"
    )
    parser.add_argument("--bench-name", help="the model's name there; default: by its folder")
    parser.add_argument("--tokenizer", type=Path, help="tokenizer folder, where the model has none")

    text = "One self-contained HTML page that compares runs."
    parser = subparsers.add_parser(
        "report",
        help=text,
        description=text,
        epilog="example: espalier report runs/demo --out runs/demo/report.html",
    )
    parser.set_defaults(export_verb="report")
    parser.add_argument("runs", type=Path, nargs="+", metavar="RUN", help="run directories")
    parser.add_argument("--out", type=Path, required=True, help="HTML file to write")
    parser.add_argument("--title", default=None)


def run(args: argparse.Namespace) -> int:
    """Run the verb that `args` names. Returns the exit code; bad input raises
    ValueError/FileNotFoundError.
    """
    return {"export": _export, "report": _report}[args.export_verb](args)


def _read(option: str, path: Path | None) -> dict[str, Any]:
    """The JSON object behind --metrics or --bench; empty without the option."""
    if path is None:
        return {}
    verb = "eval" if option == "--metrics" else "bench"
    if not path.is_file():
        raise FileNotFoundError(
            f"{option} {path}: no such file; make it with espalier {verb} --json"
        )
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise ValueError(f"{option} {path}: not JSON ({error})") from error
    if not isinstance(values, dict):
        raise ValueError(f"{option} {path}: expected a JSON object")
    return values


def _metrics(args: argparse.Namespace) -> dict[str, Any]:
    """The evaluation. Raises ValueError when it is of another model: a card tells no strangers'
    numbers.
    """
    values = _read("--metrics", args.metrics)
    told = values.get("model")
    if told is not None and Path(told).resolve() not in (args.model.resolve(), args.out.resolve()):
        raise ValueError(
            f"--metrics {args.metrics} is of {told}, not of {args.model}: run espalier eval on it"
        )
    return values


def _bench(args: argparse.Namespace) -> tuple[dict[str, Any], str]:
    """The bench, and this model's name in it. Raises ValueError where that is not known for sure:
    every run's folder is called model.
    """
    values = _read("--bench", args.bench)
    if not values:
        return {}, ""
    models = values.get("models")
    if not isinstance(models, dict):
        raise ValueError(
            f"--bench {args.bench}: no models in it; make it with espalier bench --json"
        )
    places = (str(args.model.resolve()), str(args.out.resolve()))
    found = [name for name, row in models.items() if row.get("folder") in places]
    own = args.model.resolve().name
    if own in models and "folder" not in models[own]:  # of earlier versions
        found.append(own)
    if args.bench_name is None and not found:
        raise ValueError(
            f"--bench {args.bench} has {', '.join(models)}, none of them in {args.model}: say which "
            "is this model with --bench-name"
        )
    name = args.bench_name or found[0]
    if name not in models:
        raise ValueError(f"--bench-name {name}: {args.bench} has {', '.join(models)}")
    return values, name


def _export(args: argparse.Namespace) -> int:
    from models import from_pretrained
    from train.evaluation.macs import parameters
    from train.export.card import Facts
    from train.export.safetensors import export_safetensors

    if args.format != "safetensors" and args.dtype not in (None, "fp32"):
        raise ValueError(f"--dtype {args.dtype}: graphs are exported in fp32 only")
    evaluation, (bench, name) = _metrics(args), _bench(args)
    dense = None if args.dense is None else parameters(from_pretrained(args.dense))["prunable"]
    facts = Facts.of_run(args.model, evaluation, dense, bench, name)
    if args.format != "safetensors":
        return _export_graphs(args, facts)
    done = export_safetensors(args.model, args.out, args.dtype or "fp16", facts, args.tokenizer)
    print(
        f"{args.out}: {done['parameters']:,} parameters, {done['bytes'] / 1e6:.2f} MB in "
        f"{done['dtype']}"
    )
    return 0


def _export_graphs(args: argparse.Namespace, facts: Facts) -> int:
    from train.export.portable import TOLERANCE, export_graphs

    try:
        done = export_graphs(args.model, args.out, args.format, facts, args.tokenizer)
    except RuntimeError as error:
        print(f"espalier export: {error}", file=sys.stderr)
        return 1
    check = done["check"]
    print(f"{args.out}: {done['parameters']:,} parameters, checked by {check['runtime']}")
    for name, graph in done["graphs"].items():
        worst = max(check["graphs"][name].values())
        print(
            f"  {graph['file']:22s} {graph['bytes'] / 1e6:9.2f} MB   largest difference {worst:.1e} "
            f"(at most {TOLERANCE:g})"
        )
    return 0


def _report(args: argparse.Namespace) -> int:
    from train.export.report import write_report

    print(write_report(args.runs, args.out, args.title))
    return 0
