"""The verbs of `espalier data`: blocksworld, build, index, plan, verify, inspect."""

from __future__ import annotations

import argparse
import json
import os
import sys
from pathlib import Path
from typing import Any

from data_pipeline.importers.commands import add_build_parsers, run_build
from data_pipeline.simulate import add_plan_parser, run_plan

__all__ = ["add_parsers", "run"]

_ALL_TASKS = "pretrain,vqa,nlvr2,retrieval,captioning,grounding"


def _names(text: str) -> tuple[str, ...]:
    return tuple(part.strip() for part in text.split(",") if part.strip())


def _processes() -> int:
    return max(1, len(os.sched_getaffinity(0)))


def _blocksworld_parser(verbs: Any) -> None:
    verb = verbs.add_parser(
        "blocksworld",
        help="write the embedded data set: shards, indexes, manifests and tokenizer",
        description="Pictures of coloured shapes with captions, regions, questions and statements.",
        epilog="example: espalier data blocksworld --out data/blocks --scenes 20000 --seed 1",
    )
    verb.add_argument("--out", type=Path, required=True, metavar="DIR")
    verb.add_argument("--scenes", type=int, default=20000, metavar="N", help="training scenes")
    small = "(default: scenes / 20, at least 200)"
    verb.add_argument("--val", type=int, metavar="N", help=f"validation scenes {small}")
    verb.add_argument("--test", type=int, metavar="N", help=f"test scenes {small}")
    verb.add_argument("--image-size", type=int, default=64, metavar="S", help="pixels a side")
    verb.add_argument("--seed", type=int, default=0, metavar="K")
    verb.add_argument(
        "--tasks", type=_names, default=_names(_ALL_TASKS), help=f"default: {_ALL_TASKS}"
    )
    verb.add_argument("--format", choices=("jpg", "png"), default="jpg")
    verb.add_argument("--processes", type=int, default=_processes(), metavar="P")
    verb.add_argument(
        "--exclude",
        type=Path,
        action="append",
        default=[],
        metavar="FILE",
        help="scenes-SPLIT.npy of another data folder: leave its scenes out (may be repeated)",
    )


def _index_parser(verbs: Any) -> None:
    verb = verbs.add_parser(
        "index",
        help="(re)build the indexes and manifests of existing shards, and filter samples",
        description="Writes X.tar.idx beside each shard and manifest.json beside them. Shards whose "
        "index is current are not read again. Filters change no shard: they are one bit a sample "
        "(keep.bits) and part of the manifest's hash.",
        epilog="examples: espalier data index data/blocks/vqa/train; "
        "espalier launch --mpi -n 4 -- data index data/cc3m; "
        "espalier data index data/coco/pretrain/train --drop-leaks data/flickr30k/retrieval/test",
    )
    verb.add_argument("folder", type=Path, metavar="DIR")
    verb.add_argument("--task", help="task of the shards (default: the manifest's, or the path's)")
    verb.add_argument("--split", help="split of the shards (default: likewise)")
    verb.add_argument("--force", action="store_true", help="read every shard again and compare")
    verb.add_argument("--processes", type=_positive, metavar="P", help="default: one a core")
    verb.add_argument(
        "--drop-leaks",
        type=Path,
        nargs="+",
        default=[],
        metavar="DIR",
        help="leave out pictures that occur in these data folders (by id and by look)",
    )
    verb.add_argument(
        "--drop-duplicates", action="store_true", help="keep one of pictures that look the same"
    )
    verb.add_argument(
        "--min-side", type=_positive, metavar="PX", help="leave out pictures with a shorter side"
    )
    verb.add_argument(
        "--min-words", type=_positive, metavar="N", help="leave out samples with shorter texts"
    )
    verb.add_argument("--no-filter", action="store_true", help="remove an earlier filter")


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"expected a number of at least 1, not {text}")
    return value


def add_parsers(subparsers: Any) -> None:
    """Add `data` and its verbs to the top parser's subparsers (or the verbs to a `data` parser)."""
    if isinstance(subparsers, argparse.ArgumentParser):
        parser = subparsers
    else:
        parser = subparsers.add_parser(
            "data",
            help="make, index, check and look at training data",
            epilog="example: espalier data verify data/blocks",
        )
    verbs = parser.add_subparsers(dest="data_verb", required=True, metavar="VERB")
    _blocksworld_parser(verbs)
    add_build_parsers(verbs)
    _index_parser(verbs)
    add_plan_parser(verbs)
    verify = verbs.add_parser(
        "verify",
        help="check every sample; exit 1 and a list when something is wrong",
        epilog="example: espalier data verify data/blocks --json",
    )
    verify.add_argument("folder", type=Path, metavar="DIR")
    verify.add_argument("--processes", type=_positive, metavar="P", help="default: one a core")
    verify.add_argument("--json", action="store_true", help="print one JSON object")
    inspect = verbs.add_parser(
        "inspect",
        help="counts, sizes, keys, and a contact sheet",
        epilog="example: espalier data inspect data/blocks --show 12",
    )
    inspect.add_argument("folder", type=Path, metavar="DIR")
    inspect.add_argument("--json", action="store_true", help="print one JSON object")
    inspect.add_argument("--show", type=int, default=0, metavar="K", help="samples in the sheet")
    inspect.add_argument(
        "--png", type=Path, help="the sheet's file (default: DIR/contact_sheet.png)"
    )


def _run_blocksworld(args: argparse.Namespace) -> int:
    from data_pipeline.blocksworld.build import build_blocksworld

    content = build_blocksworld(
        args.out,
        args.scenes,
        val=args.val,
        test=args.test,
        image_size=args.image_size,
        seed=args.seed,
        tasks=args.tasks,
        kind=args.format,
        processes=args.processes,
        exclude=args.exclude,
    )
    scenes = ", ".join(f"{count} {split}" for split, count in content["scenes"].items())
    print(f"{args.out}: {scenes} scenes at {args.image_size} px for {', '.join(content['tasks'])}")
    if "blind_accuracy" in content:
        print(f"language-only baseline: {content['blind_accuracy']:.1%} of the test questions")
    return 0


def _run_index(args: argparse.Namespace) -> int:
    from data_pipeline.indexing import data_folders, index_folder
    from data_pipeline.parallel import together

    wanted = bool(args.drop_leaks or args.drop_duplicates or args.min_side or args.min_words)
    if wanted and args.no_filter:
        raise ValueError("--no-filter: leave it out where filters are given, they replace the old")
    with together():
        folders = data_folders(args.folder)
    for folder in folders:
        report = index_folder(
            folder,
            task=args.task,
            split=args.split,
            force=args.force,
            processes=args.processes,
            old_filter="replace" if wanted else "drop" if args.no_filter else "keep",
        )
        for note in report.notes if report else ():
            print(f"{folder}: warning: {note}", file=sys.stderr)
        if report:
            print(report.line())
        if wanted:
            _filter(folder, args)
    return 0


def _filter(folder: Path, args: argparse.Namespace) -> None:
    from data_pipeline.filters import FilterRules, apply

    rules = FilterRules(
        leaks=tuple(args.drop_leaks),
        duplicates=args.drop_duplicates,
        min_side=args.min_side or 0,
        min_words=args.min_words or 0,
    )
    content = apply(folder, rules, args.processes)
    if content is not None:
        dropped = content["filter"]["dropped"].items()
        said = ", ".join(f"{count} dropped by {rule}" for rule, count in dropped)
        print(f"{folder}: {content['samples']} samples kept, {said or 'none dropped'}")


def _run_verify(args: argparse.Namespace) -> int:
    from data_pipeline.verify import verify

    counts, problems = verify(args.folder, args.processes)
    if args.json:
        found = [problem.as_dict() for problem in problems]
        print(json.dumps({**counts, "problems": found}, indent=1))
    else:
        for problem in problems:
            print(problem.line())
        verdict = f"{len(problems)} problems" if problems else "all is well"
        print(f"{counts['samples']} samples in {counts['shards']} shards: {verdict}")
    return 1 if problems else 0


def _run_inspect(args: argparse.Namespace) -> int:
    from data_pipeline.inspection import contact_sheet, describe, summary_lines

    rows = describe(args.folder)
    sheet = None
    if args.show > 0:
        sheet = contact_sheet(args.folder, args.show, args.png or args.folder / "contact_sheet.png")
    if args.json:
        print(json.dumps({"folders": rows, "sheet": sheet and str(sheet)}, indent=1))
        return 0
    print("\n".join(summary_lines(rows)))
    if sheet:
        print(f"contact sheet: {sheet}", file=sys.stderr)
    return 0


_RUN = {
    "blocksworld": _run_blocksworld,
    "build": run_build,
    "index": _run_index,
    "plan": run_plan,
    "verify": _run_verify,
    "inspect": _run_inspect,
}


def run(args: argparse.Namespace) -> int:
    """Run the chosen verb: 0 done, 1 problems found. Bad input: ValueError, FileNotFoundError."""
    return _RUN[args.data_verb](args)
