"""The verbs `espalier eval`, `espalier bench` and `espalier predict`."""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from train.evaluation.predictor import Predictor
    from train.evaluation.workload import Workload

__all__ = ["add_parsers", "run"]

_EXAMPLES = {
    "eval": "espalier eval runs/demo/pruned --task vqa --data data/blocksworld --json accuracy.json",
    "bench": "espalier bench TEACHER STUDENT PRUNED --batch 1,8,32,128 --json latency.json; espalier "
    "bench TRIMMED --modes --data data/blocksworld --write-mode 1",
    "predict": (
        "espalier predict runs/demo/pruned --task vqa --image photo.png --text 'how many circles "
        "are there?'"
    ),
}


def _sizes(text: str) -> tuple[int, ...]:
    try:
        sizes = tuple(int(part) for part in text.split(","))
    except ValueError:
        sizes = ()
    if not sizes or min(sizes) < 1:
        raise argparse.ArgumentTypeError(
            f"{text!r}: expected positive numbers with commas, as 1,32"
        )
    return sizes


def _shared(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--top-k",
        type=int,
        default=128,
        help="candidates ranked in full: answers (vqa), or the other side (retrieval)",
    )
    parser.add_argument(
        "--device", default=None, help="cpu or cuda; default: cuda where there is one"
    )
    parser.add_argument("--threads", type=int, default=None, help="CPU threads; default: torch's")


def _captions(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("captioning")
    group.add_argument("--prompt", default="a picture of", help="what captions start with")
    group.add_argument("--beams", type=int, default=3, help="of the search; 1 is greedy")
    group.add_argument("--max-length", type=int, default=20, help="tokens, with [CLS] and prompt")
    group.add_argument(
        "--java", action="store_true", help="METEOR too, all scores by pycocoevalcap and Java"
    )
    group.add_argument(
        "--spice",
        action="store_true",
        help="SPICE too; needs Stanford CoreNLP beside pycocoevalcap",
    )


def _modes(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("modes of one trimmed model (docs/trimming.md)")
    group.add_argument(
        "--modes", action="store_true", help="time the modes of a trimmed model against each other"
    )
    group.add_argument(
        "--data", type=Path, default=None, help="data folder for real inputs; default: random ones"
    )
    group.add_argument("--split", default="val", help="of --data")
    group.add_argument(
        "--steps",
        type=int,
        metavar="BATCH",
        default=None,
        help="first move the counts of mode bucket to the ends of the latency's steps at this batch",
    )
    group.add_argument(
        "--write-mode",
        type=int,
        metavar="BATCH",
        default=None,
        help="store the fastest mode at this batch (one of --batch) in the model's config.json",
    )


def add_parsers(subparsers: Any) -> None:
    """Add the three verbs to `argparse` subparsers."""

    def new(name: str, text: str) -> argparse.ArgumentParser:
        parser = subparsers.add_parser(
            name, help=text, description=text, epilog=f"example: {_EXAMPLES[name]}"
        )
        parser.set_defaults(evaluation_verb=name)
        return parser

    _eval_arguments(
        new("eval", "Accuracy of a model on a task, with the language-only baseline beside it.")
    )
    _bench_arguments(
        new(
            "bench",
            "Latency, throughput, memory, parameters and MACs of models of one form, whole and by "
            "part; they take turns, and the first is what the others are compared with.",
        )
    )
    _predict_arguments(
        new("predict", "What a model says of a picture: answer, caption, match, truth or box.")
    )


def _eval_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", type=Path, help="model folder")
    parser.add_argument("--task", choices=list(_SAID), required=True)
    parser.add_argument("--data", type=Path, required=True, help="data folder (holds TASK/SPLIT)")
    parser.add_argument("--split", default="test")
    parser.add_argument("--batch", type=int, default=64, help="pictures per batch")
    parser.add_argument("--max-tokens", type=int, default=40, help="text tokens after padding")
    parser.add_argument("--limit", type=int, default=0, help="samples (pictures) to use; 0: all")
    parser.add_argument(
        "--published", action="store_true", help="count the first token twice, as the paper"
    )
    parser.add_argument(
        "--annotators", type=int, default=None, help="10: the official VQA score min(n/3, 1)"
    )
    parser.add_argument(
        "--no-blind", action="store_true", help="leave the language-only baseline out"
    )
    parser.add_argument(
        "--answers-out",
        type=Path,
        metavar="FILE",
        help="vqa: also write the answer to every question of the split, as the evaluation server "
        "takes them; the split's own answers may be hidden (test-dev, test-std)",
    )
    _captions(parser)
    parser.add_argument("--json", type=Path, default=None, help="also write the numbers here")
    _shared(parser)


def _bench_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("models", type=Path, nargs="+", metavar="MODEL", help="model folders")
    parser.add_argument("--names", default=None, help="names with commas; default: the folders'")
    parser.add_argument(
        "--batch", type=_sizes, default=(1, 8, 32, 128), help="batch sizes with commas"
    )
    parser.add_argument(
        "--repeats", type=int, default=40, help="timed rounds, at least 30 to publish"
    )
    parser.add_argument("--warm-up", type=int, default=3, help="rounds before the timed ones")
    parser.add_argument("--text-tokens", type=int, default=16, help="length of a text")
    parser.add_argument("--dtype", choices=["fp32", "fp16", "bf16"], default="fp32")
    parser.add_argument("--no-parts", action="store_true", help="time the whole models only")
    parser.add_argument("--beams", type=int, default=3, help="of captions")
    parser.add_argument("--max-length", type=int, default=20, help="tokens of a caption")
    parser.add_argument(
        "--answers", type=int, default=128, help="length of the synthetic answer list"
    )
    parser.add_argument("--json", type=Path, default=None, help="also write the numbers here")
    _modes(parser)
    _shared(parser)


def _predict_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", type=Path, help="model folder with its tokenizer")
    parser.add_argument("--task", choices=list(_SAID), required=True)
    parser.add_argument(
        "--image",
        type=Path,
        action="append",
        required=True,
        help="picture; nlvr2 takes two, left and right: --image A --image B",
    )
    parser.add_argument(
        "--text", help="question, caption, statement or expression; captioning: how to begin"
    )
    parser.add_argument(
        "--answers", type=Path, default=None, help="answer list (vqa); default: the model's"
    )
    parser.add_argument(
        "--out", type=Path, default=None, help="PNG: the picture with its box (grounding)"
    )
    parser.add_argument("--json", action="store_true", help="print JSON, with all numbers")
    _shared(parser)


def run(args: argparse.Namespace) -> int:
    """Run the verb that `args` names. Returns the exit code; bad input raises
    ValueError/FileNotFoundError.
    """
    import torch

    if args.threads is not None:
        if args.threads < 1:
            raise ValueError(f"--threads {args.threads}: must be at least 1")
        torch.set_num_threads(args.threads)
    if args.top_k < 1:
        raise ValueError(f"--top-k {args.top_k}: must be at least 1")
    args.device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    verbs = {"eval": _eval, "bench": _bench, "predict": _predict}
    return verbs[args.evaluation_verb](args)


def _write(path: Path | None, values: Mapping[str, Any]) -> None:
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")


def _eval_downstream(args: argparse.Namespace) -> int:
    from train.evaluation.downstream import evaluate_task, table

    result = evaluate_task(
        args.model, args.task, args.data, args.split,
        batch=args.batch, max_tokens=args.max_tokens, limit=args.limit, top_k=args.top_k,
        prompt=args.prompt, beams=args.beams, max_length=args.max_length, java=args.java, spice=args.spice,
        blind=not args.no_blind, device=args.device,
    )  # fmt: skip
    _write(args.json, {"model": str(args.model), "task": args.task, "split": args.split} | result)
    print(f"{args.model}: {args.task} {args.split}\n{table(result)}")
    return 0


def _eval(args: argparse.Namespace) -> int:
    if args.task != "vqa":
        if args.answers_out is not None:
            raise ValueError(f"--answers-out is for --task vqa, not {args.task}")
        return _eval_downstream(args)
    from train.evaluation.accuracy import evaluate_model, table

    result = evaluate_model(
        args.model,
        args.data,
        args.split,
        batch=args.batch,
        max_tokens=args.max_tokens,
        limit=args.limit,
        top_k=args.top_k,
        published=args.published,
        annotators=args.annotators,
        blind=not args.no_blind,
        device=args.device,
        answers_out=args.answers_out,
    )
    scored = "accuracy" in result
    about = {"model": str(args.model), "task": args.task, "split": args.split}
    if args.answers_out is not None:
        about |= {"answers_out": str(args.answers_out), "answers": "known" if scored else "hidden"}
    _write(args.json, about | result)
    counted = result.get("accuracy_count", result.get("answered_count", 0))
    print(
        f"{args.model}: {args.task} {args.split}, {counted:.0f} questions\n{table(result)}".rstrip()
    )
    if args.answers_out is not None:
        beside = "" if scored else "; the split hides its own, so there is no score"
        print(f"{result['answered_count']:.0f} answers in {args.answers_out}{beside}")
    return 0


def _bench(args: argparse.Namespace) -> int:
    from train.evaluation.bench import bench, table
    from train.evaluation.workload import Workload

    if args.repeats < 2:
        raise ValueError(f"--repeats {args.repeats}: at least 2 are needed for quartiles")
    work = Workload(args.text_tokens, args.answers, args.top_k, args.beams, args.max_length)
    if args.modes:
        return _bench_modes(args, work)
    names = (
        args.names.split(",") if args.names else [folder.resolve().name for folder in args.models]
    )
    if len(names) != len(args.models) or len(set(names)) != len(names):
        raise ValueError(
            f"{len(args.models)} models need as many different names, got {', '.join(names)}; use "
            "--names A,B"
        )
    for option in ("data", "steps", "write_mode"):
        if getattr(args, option) is not None:
            raise ValueError(f"--{option.replace('_', '-')} belongs to --modes")
    result = bench(
        dict(zip(names, args.models, strict=True)),
        args.batch,
        work,
        repeats=args.repeats,
        warm_up=args.warm_up,
        threads=args.threads,
        device=args.device,
        dtype=args.dtype,
        parts=not args.no_parts,
    )
    _write(args.json, result)
    print(table(result))
    return 0


def _bench_modes(args: argparse.Namespace, work: Workload) -> int:
    from train.evaluation.trim_bench import bench_modes, mode_table, write_mode
    from train.evaluation.trim_steps import round_counts

    if len(args.models) != 1:
        raise ValueError(f"--modes compares those of one model, not of {len(args.models)}")
    if args.write_mode is not None and args.write_mode not in args.batch:
        raise ValueError(f"--write-mode {args.write_mode}: is not timed, add it to --batch")
    (folder,) = args.models
    steps = None
    if args.steps is not None:
        steps = round_counts(folder, args.steps, repeats=args.repeats, device=args.device,
                             dtype=args.dtype, threads=args.threads)  # fmt: skip
        print(f"counts of bucket {steps['before']} moved to {steps['after']}, in {folder}")
    result = bench_modes(
        folder,
        args.batch,
        work,
        data=args.data,
        split=args.split,
        repeats=args.repeats,
        warm_up=args.warm_up,
        threads=args.threads,
        device=args.device,
        dtype=args.dtype,
    )
    _write(args.json, result if steps is None else result | {"steps": steps})
    print(mode_table(result))
    if args.write_mode is not None:
        size = str(args.write_mode)
        if size not in result["best"]:
            raise ValueError(f"--write-mode {size}: that batch does not fit into the memory")
        write_mode(folder, result["best"][size])
        print(f"{folder}/config.json: mode {result['best'][size]}")
    return 0


def _predict(args: argparse.Namespace) -> int:
    from train.evaluation.predictor import Predictor

    wanted = 2 if args.task == "nlvr2" else 1
    if len(args.image) != wanted:
        raise ValueError(
            f"--task {args.task} takes {wanted} picture(s), got {len(args.image)}: --image A"
            + (" --image B" if wanted == 2 else "")
        )
    if args.text is None and args.task != "captioning":
        raise ValueError(f"--task {args.task} needs --text")
    if args.out is not None and args.task != "grounding":
        raise ValueError(f"--out is the picture with its box: --task grounding, not {args.task}")
    predictor = Predictor(args.model, device=args.device, answers=args.answers, top_k=args.top_k)
    values, sentence = _SAID[args.task](predictor, args)
    print(json.dumps(values) if args.json else sentence)
    return 0


def _answer(predictor: Predictor, args: argparse.Namespace) -> tuple[dict[str, Any], str]:
    said = predictor.answer(args.image[0], args.text)
    return {"answer": said}, said


def _caption(predictor: Predictor, args: argparse.Namespace) -> tuple[dict[str, Any], str]:
    prompt = {} if args.text is None else {"prompt": args.text}
    said = predictor.caption(args.image[0], **prompt)
    return {"caption": said}, said


def _match(predictor: Predictor, args: argparse.Namespace) -> tuple[dict[str, Any], str]:
    found = predictor.match(args.image[0], args.text)
    sentence = f"similarity {found.similarity:.3f}   probability {100 * found.probability:.1f} %"
    return found._asdict(), sentence


def _truth(predictor: Predictor, args: argparse.Namespace) -> tuple[dict[str, Any], str]:
    found = predictor.truth(args.image[0], args.image[1], args.text)
    return found._asdict(), f"{found.true!s:5s}   probability {100 * found.probability:.1f} %"


def _box(predictor: Predictor, args: argparse.Namespace) -> tuple[dict[str, Any], str]:
    from train.evaluation.predictor import draw_box

    box = predictor.locate(args.image[0], args.text)
    if args.out is not None:
        draw_box(args.image[0], box, args.out)
    sentence = f"x {box.x:.1f}  y {box.y:.1f}  width {box.width:.1f}  height {box.height:.1f} px"
    return {"box": list(box)}, sentence


# Task -> what is asked, and how it is said: the numbers, and a line for people.
_SAID = {
    "vqa": _answer,
    "captioning": _caption,
    "retrieval": _match,
    "nlvr2": _truth,
    "grounding": _box,
}
