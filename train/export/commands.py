"""The verbs `espalier export` and `espalier report`."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

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
    parser.add_argument("--format", choices=["safetensors"], default="safetensors")
    parser.add_argument("--out", type=Path, required=True, help="folder to write")
    parser.add_argument(
        "--dtype", choices=["fp32", "fp16", "bf16"], default="fp16", help="weights on disk"
    )
    parser.add_argument(
        "--dense", type=Path, help="unpruned model folder, for the sparsity in the card"
    )
    parser.add_argument("--metrics", type=Path, help="JSON of espalier eval --json, for the card")
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


def _metrics(path: Path | None) -> dict[str, float]:
    if path is None:
        return {}
    if not path.is_file():
        raise FileNotFoundError(
            f"--metrics {path}: no such file; make it with espalier eval --json"
        )
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise ValueError(f"--metrics {path}: not JSON ({error})") from error
    if not isinstance(values, dict):
        raise ValueError(f"--metrics {path}: expected a JSON object")
    return {name: float(value) for name, value in values.items() if isinstance(value, int | float)}


def _export(args: argparse.Namespace) -> int:
    from models import from_pretrained
    from train.evaluation.macs import parameters
    from train.export.card import Facts
    from train.export.safetensors import export_safetensors

    metrics = _metrics(args.metrics)
    dense = None if args.dense is None else parameters(from_pretrained(args.dense))["prunable"]
    facts = Facts.of_run(args.model, metrics, dense)
    done = export_safetensors(args.model, args.out, args.dtype, facts, args.tokenizer)
    print(
        f"{args.out}: {done['parameters']:,} parameters, {done['bytes'] / 1e6:.2f} MB in "
        f"{done['dtype']}"
    )
    return 0


def _report(args: argparse.Namespace) -> int:
    from train.export.report import write_report

    print(write_report(args.runs, args.out, args.title))
    return 0
