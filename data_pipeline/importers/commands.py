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


def add_common_options(parser: argparse.ArgumentParser, *, out: bool = True) -> None:
    """The options that every source has. `out`: whether --out is required."""
    parser.add_argument("--out", type=Path, required=out, metavar="DIR")
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
        nargs="+",
        default=[],
        metavar="FILE",
        help="instances_*.json: a region for each object",
    )
    coco.add_argument(
        "--images",
        type=Path,
        nargs="+",
        required=True,
        metavar="DIR|ZIP",
        help="folders and zips of the images",
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


def _genome_parser(sources: Any) -> None:
    genome = sources.add_parser(
        "visual-genome",
        help="Visual Genome: regions, objects with attributes, questions",
        description="Regions and objects become OUT/pretrain/SPLIT, questions OUT/vqa/SPLIT.",
        epilog="example: espalier data build visual-genome --image-data image_data.json "
        "--regions region_descriptions.json --objects objects.json --attributes attributes.json "
        "--images images.zip images2.zip --out data/vg",
    )
    files = {
        "--image-data": "image_data.json",
        "--regions": "region_descriptions.json: a region for each phrase",
        "--objects": "objects.json: a region for each object",
        "--attributes": "attributes.json: of those objects",
        "--questions": "question_answers.json: further VQA training questions",
    }
    for name, text in files.items():
        required = name == "--image-data"
        genome.add_argument(name, type=Path, metavar="FILE", help=text, required=required)
    genome.add_argument(
        "--images",
        type=Path,
        nargs="+",
        required=True,
        metavar="DIR|ZIP",
        help="VG_100K and VG_100K_2, or images.zip and images2.zip",
    )
    genome.add_argument(
        "--captions",
        choices=("none", "regions"),
        default="none",
        help="regions: the phrases are captions of the whole image, and no boxes are kept "
        "(for the general stream; give it an --out of its own)",
    )
    add_common_options(genome)
    genome.set_defaults(build=_run_genome)


def _run_genome(args: argparse.Namespace) -> dict[str, Counts]:
    from data_pipeline.importers.visual_genome import GenomeFiles, build_visual_genome

    files = GenomeFiles(
        args.image_data, args.regions, args.objects, args.attributes, args.questions
    )
    options = common_options(args)
    return build_visual_genome(files, args.images, args.out, captions=args.captions, **options)


def _downloaded_parser(sources: Any) -> None:
    texts = {
        "sbu": "SBU captions, as downloaded by img2dataset",
        "cc3m": "Conceptual Captions 3M, as downloaded by img2dataset",
        "img2dataset": "any folder of img2dataset's tars",
    }
    for name, text in texts.items():
        source = sources.add_parser(
            name,
            help=text,
            epilog=f"example: espalier data build {name} --input {name} --out data/{name}",
        )
        source.add_argument(
            "--input", type=Path, required=True, metavar="DIR", help="folder of 00000.tar, ..."
        )
        source.add_argument(
            "--in-place",
            action="store_true",
            help="only index the tars: no copy, nothing is checked, scaled or left out",
        )
        if name == "img2dataset":
            source.add_argument(
                "--name", default=name, help="what its keys and image ids begin with"
            )
        source.add_argument(
            "--task", choices=("pretrain", "retrieval", "captioning"), default="pretrain"
        )
        add_common_options(source, out=False)
        source.set_defaults(build=_run_downloaded)


def _run_downloaded(args: argparse.Namespace) -> dict[str, Counts]:
    from data_pipeline.importers.img2dataset import build_img2dataset, index_in_place

    options = common_options(args) | {"source": args.source, "task": args.task}
    if not args.in_place:
        if args.out is None:
            raise ValueError("give --out DIR for the shards, or --in-place to index the tars only")
        name = getattr(args, "name", args.source)
        return build_img2dataset(args.input, args.out, prefix=name, **options)
    if args.out is not None or args.max_side or args.skip_bad:
        raise ValueError("--in-place writes no shards: leave --out, --max-side and --skip-bad away")
    kept = {name: options[name] for name in ("source", "task", "split", "processes")}
    return index_in_place(args.input, **kept)


def _add_images(parser: argparse.ArgumentParser, help_text: str) -> None:
    parser.add_argument(
        "--images", type=Path, nargs="+", required=True, metavar="DIR|ZIP", help=help_text
    )


def _vqa_parser(sources: Any) -> None:
    vqa = sources.add_parser(
        "vqa",
        help="VQA v2 questions and annotations",
        epilog="example: espalier data build vqa --out data/vqa2 --images train2014 val2014 "
        "--questions v2_OpenEnded_mscoco_train2014_questions.json "
        "v2_OpenEnded_mscoco_val2014_questions.json "
        "--annotations v2_mscoco_train2014_annotations.json v2_mscoco_val2014_annotations.json",
    )
    vqa.add_argument(
        "--questions", type=Path, nargs="+", required=True, metavar="FILE", help="one split"
    )
    vqa.add_argument(
        "--annotations",
        type=Path,
        nargs="+",
        default=[],
        metavar="FILE",
        help="of all these questions; none for hidden answers (test-dev, test-std)",
    )
    _add_images(vqa, "COCO train2014, val2014, test2015: folders or zips")
    listed = vqa.add_mutually_exclusive_group()
    listed.add_argument(
        "--answers", type=Path, metavar="FILE", help="candidates, such as X-VLM's answer_list.json"
    )
    listed.add_argument(
        "--min-count",
        type=int,
        metavar="N",
        help="candidates: most frequent answer of N questions (default for --split train: 9)",
    )
    add_common_options(vqa)
    vqa.set_defaults(build=_run_vqa)


def _run_vqa(args: argparse.Namespace) -> dict[str, Counts]:
    from data_pipeline.importers.vqa import build_vqa

    counts = build_vqa(
        args.questions,
        args.annotations,
        args.images,
        args.out,
        answers=args.answers,
        min_count=args.min_count,
        **common_options(args),
    )
    return {"vqa": counts}


def _nlvr2_parser(sources: Any) -> None:
    nlvr2 = sources.add_parser(
        "nlvr2",
        help="NLVR2 statements about pairs of pictures",
        epilog="example: espalier data build nlvr2 --statements dev.json --images images "
        "--split val --out data/nlvr2",
    )
    nlvr2.add_argument(
        "--statements",
        type=Path,
        nargs="+",
        required=True,
        metavar="FILE",
        help="train.json, dev.json or test1.json",
    )
    _add_images(nlvr2, "the folder with train/, dev/ and test1/, or zips")
    add_common_options(nlvr2)
    nlvr2.set_defaults(build=_run_nlvr2)


def _run_nlvr2(args: argparse.Namespace) -> dict[str, Counts]:
    from data_pipeline.importers.nlvr2 import build_nlvr2

    counts = build_nlvr2(args.statements, args.images, args.out, **common_options(args))
    return {"nlvr2": counts}


def _flickr30k_parser(sources: Any) -> None:
    flickr = sources.add_parser(
        "flickr30k",
        help="Flickr30k with Karpathy's splits",
        epilog="example: espalier data build flickr30k --karpathy dataset_flickr30k.json "
        "--images flickr30k-images --split test --out data/flickr30k",
    )
    flickr.add_argument(
        "--karpathy", type=Path, required=True, metavar="FILE", help="dataset_flickr30k.json"
    )
    _add_images(flickr, "folders or zips of the pictures")
    flickr.add_argument(
        "--tasks", type=names, default=("retrieval",), help="of retrieval,captioning,pretrain"
    )
    add_common_options(flickr)
    flickr.set_defaults(build=_run_flickr30k)


def _run_flickr30k(args: argparse.Namespace) -> dict[str, Counts]:
    from data_pipeline.importers.flickr30k import build_flickr30k

    return build_flickr30k(
        args.karpathy, args.images, args.out, tasks=args.tasks, **common_options(args)
    )


def _refcoco_parser(sources: Any) -> None:
    refcoco = sources.add_parser(
        "refcoco",
        help="RefCOCO, RefCOCO+, RefCOCOg: expressions and boxes",
        epilog="example: espalier data build refcoco --refs 'refcoco+/refs(unc).p' --instances "
        "refcoco+/instances.json --images train2014 --split testA --out data/refcoco+",
    )
    refcoco.add_argument(
        "--refs", type=Path, required=True, metavar="FILE", help="refs(unc).p or refs(umd).p"
    )
    refcoco.add_argument(
        "--instances", type=Path, required=True, metavar="FILE", help="instances.json beside it"
    )
    _add_images(refcoco, "COCO train2014: folder or zip")
    add_common_options(refcoco)
    refcoco.set_defaults(build=_run_refcoco)


def _run_refcoco(args: argparse.Namespace) -> dict[str, Counts]:
    from data_pipeline.importers.refcoco import build_refcoco

    counts = build_refcoco(args.refs, args.instances, args.images, args.out, **common_options(args))
    return {"grounding": counts}


# Each adds its parser, whose default `build` is a function: arguments -> {task: Counts}.
_PARSERS = (
    _coco_parser,
    _genome_parser,
    _downloaded_parser,
    _vqa_parser,
    _nlvr2_parser,
    _flickr30k_parser,
    _refcoco_parser,
)


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
            where = args.input if args.out is None else args.out / task / args.split
            print(f"{where}: {counts.line()}")
    return 0
