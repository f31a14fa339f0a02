"""The verbs `espalier eval`, `espalier bench` and `espalier predict`."""

from __future__ import annotations

import argparse
import json
import os
import tarfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

    from models.xvlm import XVLM
    from train.evaluation.vqa import AnswerList

__all__ = [
    "add_parsers",
    "bench",
    "blind_scores",
    "evaluate_model",
    "find_split",
    "predict",
    "questions_of",
    "run",
    "vqa_loader",
]

_EXAMPLES = {
    "eval": "espalier eval runs/demo/pruned --task vqa --data data/blocksworld --json accuracy.json",
    "bench": "espalier bench TEACHER STUDENT PRUNED --batch 1,32 --repeats 40 --json latency.json",
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
    parser.add_argument("--top-k", type=int, default=128, help="answers kept after the first token")
    parser.add_argument(
        "--device", default=None, help="cpu or cuda; default: cuda where there is one"
    )
    parser.add_argument("--threads", type=int, default=None, help="CPU threads; default: torch's")


def add_parsers(subparsers: Any) -> None:
    """Add the three verbs to `argparse` subparsers."""

    def new(name: str, text: str) -> argparse.ArgumentParser:
        parser = subparsers.add_parser(
            name, help=text, description=text, epilog=f"example: {_EXAMPLES[name]}"
        )
        parser.set_defaults(evaluation_verb=name)
        return parser

    parser = new(
        "eval", "Accuracy of a model on a task, with the language-only baseline beside it."
    )
    parser.add_argument("model", type=Path, help="model folder")
    parser.add_argument("--task", choices=["vqa"], required=True)
    parser.add_argument("--data", type=Path, required=True, help="data folder (holds vqa/SPLIT)")
    parser.add_argument("--split", default="test")
    parser.add_argument("--batch", type=int, default=64, help="pictures per batch")
    parser.add_argument("--max-tokens", type=int, default=40, help="question tokens after padding")
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
    parser.add_argument("--json", type=Path, default=None, help="also write the numbers here")
    _shared(parser)

    parser = new("bench", "Latency, throughput, memory, parameters and MACs; models take turns.")
    parser.add_argument("models", type=Path, nargs="+", metavar="MODEL", help="model folders")
    parser.add_argument("--names", default=None, help="names with commas; default: the folders'")
    parser.add_argument("--batch", type=_sizes, default=(1, 32), help="batch sizes with commas")
    parser.add_argument(
        "--repeats", type=int, default=40, help="timed rounds, at least 30 to publish"
    )
    parser.add_argument("--warm-up", type=int, default=3, help="rounds before the timed ones")
    parser.add_argument("--text-tokens", type=int, default=16, help="question length")
    parser.add_argument(
        "--answers", type=int, default=128, help="length of the synthetic answer list"
    )
    parser.add_argument("--json", type=Path, default=None, help="also write the numbers here")
    _shared(parser)

    parser = new("predict", "One answer, matching score or box for one picture.")
    parser.add_argument("model", type=Path, help="model folder")
    parser.add_argument("--task", choices=["vqa", "retrieval", "grounding"], required=True)
    parser.add_argument("--image", type=Path, required=True)
    parser.add_argument("--text", required=True, help="question, caption or expression")
    parser.add_argument(
        "--answers", type=Path, default=None, help="answer list (vqa); default: the model's"
    )
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


def find_split(data: Path, task: str, split: str) -> Path:
    """Folder of one split: DATA/TASK/SPLIT, DATA/SPLIT, or DATA itself if it is a split.
    FileNotFoundError.
    """
    for folder in (data / task / split, data / split):
        if (folder / "manifest.json").is_file():
            return folder
    if (data / "manifest.json").is_file() and data.name == split:
        return data
    raise FileNotFoundError(
        f"{data}: no {task}/{split}/manifest.json below it; make it with espalier data, or name "
        "another --split"
    )


def _tokenizer(model: Path, split: Path) -> Any:
    """The model's own tokenizer, or the data folder's where the model came without one."""
    from data_pipeline.text import load_tokenizer

    for folder in (model, split.parent.parent / "tokenizer"):
        if (folder / "tokenizer.json").is_file():
            return load_tokenizer(folder)
    raise FileNotFoundError(
        f"{model}: no tokenizer.json in it, nor in {split.parent.parent / 'tokenizer'}"
    )


def questions_of(folder: Path, limit: int = 0) -> Iterator[tuple[str, str, dict[str, float]]]:
    """(question, type, answers) of a VQA split, read from its shards without decoding a picture.

    `limit` samples (pictures) in manifest order; 0 reads all.
    """
    from data_pipeline.records import parse_record

    manifest = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
    samples = 0
    for shard in manifest["shards"]:
        with tarfile.open(folder / shard["name"]) as tar:
            for member in tar:
                if not member.name.endswith(".json") or (file := tar.extractfile(member)) is None:
                    continue
                key = member.name.removesuffix(".json")
                record: Any = parse_record("vqa", file.read(), str(folder / shard["name"]), key)
                for question in record.questions:
                    yield question.question, question.kind, question.answers
                samples += 1
                if samples == limit:
                    return


def blind_scores(
    train: Path, test: Path, limit: int = 0, annotators: int | None = None
) -> dict[str, float]:
    """The language-only baseline fitted on split folder `train` and scored on `test`."""
    from data_pipeline.blocksworld.questions import normalise
    from train.evaluation.vqa import BlindBaseline

    # On other data sets these templates only merge colours, shapes and sizes.
    baseline = BlindBaseline(normalise)
    for question, kind, answers in questions_of(train):
        baseline.add(question, kind, answers)
    scores = baseline.score(questions_of(test, limit), annotators)
    return {name: value for name, value in scores.items() if name != "questions"}


def evaluate_model(
    folder: Path,
    data: Path,
    split: str = "test",
    *,
    batch: int = 64,
    max_tokens: int = 40,
    limit: int = 0,
    top_k: int = 128,
    published: bool = False,
    annotators: int | None = None,
    blind: bool = True,
    device: str = "cpu",
) -> dict[str, float]:
    """VQA accuracy of a model folder, overall and per type, and the blind baseline's."""
    from models import from_pretrained
    from train.evaluation.runner import evaluate
    from train.evaluation.vqa import AnswerList, VqaEvaluator

    where = find_split(data, "vqa", split)
    model = from_pretrained(folder, device=device)
    _require(model, "vqa", folder)
    tokenizer = _tokenizer(folder, where)
    task = VqaEvaluator(AnswerList.load(where, tokenizer).to(device), top_k, published, annotators)
    loader = vqa_loader(where, tokenizer, model, batch, max_tokens, limit)
    result = evaluate(model, task, loader, progress=True)
    if blind:
        train = find_split(where.parent.parent, "vqa", "train")
        result |= blind_scores(train, where, limit, annotators)
    return result


def vqa_loader(
    folder: Path, tokenizer: Any, model: XVLM, batch: int, max_tokens: int, limit: int
) -> Any:
    from data_pipeline.loader import build_loader

    vision = model.config.vision
    return build_loader(
        "vqa",
        folder,
        tokenizer=tokenizer,
        batch=batch,
        train=False,
        image_size=vision.image_size,
        patch_size=vision.patch_size,
        max_tokens=max_tokens,
        limit=limit,
    )


def _require(model: XVLM, form: str, folder: Path) -> None:
    if model.config.form != form:
        raise ValueError(
            f"{folder}: a model of form {model.config.form!r}, this needs {form!r} "
            "(make one with espalier finetune)"
            if form == "vqa"
            else f"{folder}: a model of form {model.config.form!r}, this needs a pre-trained one"
        )


def _eval(args: argparse.Namespace) -> int:
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
    )
    _write(args.json, {"model": str(args.model), "task": args.task, "split": args.split} | result)
    print(f"{args.model}: {args.task} {args.split}, {result['accuracy_count']:.0f} questions")
    for name in sorted(key for key in result if not key.endswith("_count") and "blind" not in key):
        blind = result.get(f"blind_{name}")
        beside = "" if blind is None else f"   blind {100 * blind:6.2f} %"
        print(f"  {name:28s} {100 * result[name]:6.2f} %{beside}")
    return 0


def bench(
    folders: Mapping[str, Path],
    batch_sizes: tuple[int, ...] = (1, 32),
    *,
    repeats: int = 40,
    warm_up: int = 3,
    text_tokens: int = 16,
    answers: int = 128,
    top_k: int = 128,
    threads: int | None = None,
    device: str = "cpu",
) -> dict[str, Any]:
    """Latency, parameters, MACs and memory of model folders by name.

    Returns:
        {"models": {name: {"latency", "parameters", "macs", "weights_bytes"}}, "device", "threads",
        ...}.
    """
    import torch

    from models import from_pretrained
    from train.evaluation import latency, macs

    models = {name: from_pretrained(folder) for name, folder in folders.items()}
    for name, model in models.items():
        _require(model, "vqa", folders[name])
    listed = latency.synthetic_answers(
        answers, min(m.config.text.vocab_size for m in models.values())
    )
    kept = min(top_k, answers)
    timing = latency.measure(
        list(models.items()),
        listed,
        batch_sizes,
        threads,
        repeats,
        text_tokens,
        kept,
        warm_up,
        device,
        progress=True,
    )
    result = {
        name: {
            "latency": timing[name],
            "parameters": macs.parameters(model),
            "macs": macs.count_macs(
                model.config,
                text_tokens=text_tokens,
                answer_tokens=listed.ids.shape[1] - 1,
                top_k=kept,
            ),
            "weights_bytes": sum(p.numel() * p.element_size() for p in model.parameters()),
        }
        for name, model in models.items()
    }
    return {
        "models": result,
        "device": device_name(torch.device(device)),
        "threads": threads or torch.get_num_threads(),
        "repeats": repeats,
        "text_tokens": text_tokens,
        "top_k": kept,
    }


def device_name(device: torch.device) -> str:
    """The processor's or accelerator's name, as a person knows it."""
    import torch

    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    info = Path("/proc/cpuinfo")
    rows = info.read_text(errors="replace").splitlines() if info.is_file() else []
    names = [row.partition(":")[2].strip() for row in rows if row.startswith("model name")]
    return f"{names[0] if names else 'CPU'}, {os.cpu_count()} logical cores"


def _bench(args: argparse.Namespace) -> int:
    names = (
        args.names.split(",") if args.names else [folder.resolve().name for folder in args.models]
    )
    if len(names) != len(args.models) or len(set(names)) != len(names):
        raise ValueError(
            f"{len(args.models)} models need as many different names, got {', '.join(names)}; use "
            "--names A,B"
        )
    if args.repeats < 2:
        raise ValueError(f"--repeats {args.repeats}: at least 2 are needed for quartiles")
    result = bench(
        dict(zip(names, args.models, strict=True)),
        args.batch,
        repeats=args.repeats,
        warm_up=args.warm_up,
        text_tokens=args.text_tokens,
        answers=args.answers,
        top_k=args.top_k,
        threads=args.threads,
        device=args.device,
    )
    _write(args.json, result)
    print(
        f"{result['device']}, {result['threads']} threads, {result['repeats']} interleaved repeats"
    )
    for name, model in result["models"].items():
        counts = "  ".join(f"{part} {value:,}" for part, value in model["parameters"].items())
        print(f"{name}\n  parameters  {counts}")
        print(
            "  MACs        "
            + "  ".join(f"{part} {value:,}" for part, value in model["macs"].items())
        )
        for batch, row in model["latency"].items():
            print(
                f"  batch {batch:>4s}  {row['median']:9.2f} ms  (quartiles {row['q1']:.2f} to "
                f"{row['q3']:.2f})  {row['rows_per_s']:9.1f} questions/s"
            )
    return 0


def predict(
    folder: Path,
    task: str,
    image: Path,
    text: str,
    answers: Path | None = None,
    top_k: int = 128,
    device: str = "cpu",
) -> dict[str, Any]:
    """vqa: {"answer"}; retrieval: {"score"} in 0..1; grounding: {"box": [x, y, w, h]} in pixels of
    the file.
    """
    import torch

    from data_pipeline.text import clean_text, load_tokenizer
    from models import from_pretrained

    model = from_pretrained(folder, device=device)
    _require(model, "vqa" if task == "vqa" else "pretrain", folder)
    tokenizer = load_tokenizer(folder)
    pixels, width, height = _read_image(image, model.config.vision.image_size)
    limit = model.config.text.max_positions
    cleaned = clean_text(text, limit)
    encoded = tokenizer([cleaned], return_tensors="pt", truncation=True, max_length=limit)
    ids, mask = encoded["input_ids"].to(device), encoded["attention_mask"].bool().to(device)
    with torch.inference_mode():
        if task == "vqa":
            listed = _answers(folder, answers, tokenizer).to(device)
            return {"answer": _answer(model, pixels.to(device), ids, mask, listed, top_k)}
        fused = model.multimodal(ids, mask, model.encode_image(pixels.to(device)).last, None).last
        if task == "retrieval":
            return {"score": float(model.match_logits(fused).float().softmax(-1)[0, 1])}
        cx, cy, w, h = model.predict_box(fused)[0].tolist()
        return {"box": [(cx - w / 2) * width, (cy - h / 2) * height, w * width, h * height]}


def _answers(folder: Path, source: Path | None, tokenizer: Any) -> AnswerList:
    from train.evaluation.vqa import AnswerList

    if source is None and not (folder / "answers.json").is_file():
        raise FileNotFoundError(
            f"{folder}: no answers.json in it; give the answer list with --answers FILE"
        )
    return AnswerList.load(folder / "answers.json" if source is None else source, tokenizer)


def _answer(
    model: XVLM,
    pixels: torch.Tensor,
    ids: torch.Tensor,
    mask: torch.Tensor,
    answers: AnswerList,
    top_k: int,
) -> str:
    import dataclasses

    from train.evaluation.latency import synthetic_batch
    from train.evaluation.vqa import rank_answers

    batch = synthetic_batch(1, pixels.shape[-1], ids.shape[1], answers.to("cpu")).to(pixels.device)
    batch = dataclasses.replace(batch, images=pixels, question_ids=ids, question_mask=mask)
    return answers.strings[int(rank_answers(model, batch, answers, top_k)[0])]


def _read_image(path: Path, size: int) -> tuple[torch.Tensor, int, int]:
    """(1, 3, size, size) uint8 and the file's width and height."""
    import torch
    from PIL import Image, UnidentifiedImageError

    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such picture")
    try:
        with Image.open(path) as opened:
            picture = opened.convert("RGB")
    except (UnidentifiedImageError, OSError) as error:
        raise ValueError(f"{path}: cannot be read as a picture ({error})") from error
    width, height = picture.size
    scaled = picture.resize((size, size), Image.Resampling.BICUBIC)
    data = torch.frombuffer(bytearray(scaled.tobytes()), dtype=torch.uint8)
    return data.view(size, size, 3).permute(2, 0, 1).unsqueeze(0).contiguous(), width, height


def _predict(args: argparse.Namespace) -> int:
    result = predict(
        args.model, args.task, args.image, args.text, args.answers, args.top_k, args.device
    )
    print(json.dumps(result))
    return 0
