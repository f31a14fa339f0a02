"""`espalier data build SOURCE`: published data sets to shards."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from data_pipeline.importers.common import Counts

__all__ = ["add_build_parsers", "add_common_options", "common_options", "names", "run_build"]


def names(text: str) -> tuple[str, ...]:
    """The parts of "a, b,c"."""
    return tuple(part.strip() for part in text.split(",") if part.strip())


def add_common_options(parser: argparse.ArgumentParser) -> None:
    """The options that every source has."""
    parser.add_argument("--out", type=Path, required=True, metavar="DIR")
    parser.add_argument("--split", default="train", help="folder of the shards (default: train)")
    parser.add_argument(
        "--max-side", type=int, default=0, metavar="PX", help="scale larger images down"
    )
    parser.add_argument("--per-shard", type=int, default=1000, metavar="N")
    parser.add_argument(
        "--processes", type=int, metavar="P", help="at most this many (default: one per core)"
    )
    parser.add_argument(
        "--skip-bad",
        action="store_true",
        help="leave out missing or broken images, and list them in skipped.jsonl",
    )


def common_options(args: argparse.Namespace) -> dict[str, Any]:
    """What those options say, as keywords of the build functions."""
    return {
        "split": args.split,
        "max_side": args.max_side,
        "per_shard": args.per_shard,
        "processes": args.processes,
        "skip_bad": args.skip_bad,
    }


def _coco_parser(sources: Any) -> None:
    coco = sources.add_parser(
        "coco-captions",
        help="COCO captions, instances, Karpathy's splits",
        epilog="example: espalier data build coco-captions --captions captions_train2017.json "
        "--instances instances_train2017.json --images train2017.zip --out data/coco",
    )
    captions = coco.add_mutually_exclusive_group(required=True)
    captions.add_argument("--captions", type=Path, metavar="FILE", help="captions_*.json")
    captions.add_argument("--karpathy", type=Path, metavar="FILE", help="dataset_coco.json")
    coco.add_argument(
        "--karpathy-splits",
        type=names,
        default=(),
        metavar="NAMES",
        help="which of train,restval,val,test (default: the one named by --split)",
    )
    coco.add_argument(
        "--instances",
        type=Path,
        action="append",
        default=[],
        metavar="FILE",
        help="instances_*.json: a region for each object (may be repeated)",
    )
    coco.add_argument(
        "--images",
        type=Path,
        action="append",
        required=True,
        metavar="DIR|ZIP",
        help="folder or zip of the images (may be repeated)",
    )
    coco.add_argument(
        "--tasks", type=names, default=("pretrain",), help="of pretrain,captioning,retrieval"
    )
    add_common_options(coco)
    coco.set_defaults(build=_run_coco)


def _run_coco(args: argparse.Namespace) -> dict[str, Counts]:
    from data_pipeline.importers.coco import build_coco_captions

    return build_coco_captions(
        args.captions,
        args.images,
        args.out,
        tasks=args.tasks,
        instances=args.instances,
        karpathy=args.karpathy,
        karpathy_splits=args.karpathy_splits,
        **common_options(args),
    )


# Each adds its parser, whose default `build` is a function: arguments -> {task: Counts}.
_PARSERS = (_coco_parser,)


def add_build_parsers(verbs: Any) -> None:
    """Adds `build` and its sources to the verbs of `espalier data`."""
    verb = verbs.add_parser(
        "build",
        help="import a published data set",
        description="Run it again after a kill to go on. Under mpirun the ranks share the shards.",
        epilog="example: espalier data build coco-captions --captions captions_train2017.json "
        "--images train2017.zip --out data/coco",
    )
    sources = verb.add_subparsers(dest="source", required=True, metavar="SOURCE")
    for add in _PARSERS:
        add(sources)


def run_build(args: argparse.Namespace) -> int:
    """Runs the chosen source; one line for each folder that it wrote."""
    from data_pipeline.parallel import shares

    found: Mapping[str, Counts] = args.build(args)
    if shares()[0] == 0:
        for task, counts in found.items():
            print(f"{args.out / task / args.split}: {counts.line()}")
    return 0
