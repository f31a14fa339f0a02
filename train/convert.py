"""The verb `espalier convert`: foreign checkpoints into model folders, and back to X-VLM's names."""

from __future__ import annotations

import argparse
import json
import os
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from models.checkpoints.build import Conversion
    from models.xvlm import XVLM

__all__ = ["add_parsers", "run"]

BACK = "to-xvlm"
_LISTED = 3
# a whole configuration says these too, but they follow from FILE and --form
_NOT_SIZES = ("form", "decoder")
_TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.txt",
)
_EXAMPLES = """\
examples:
  espalier convert xvlm checkpoint.pth --out models/teacher
  espalier convert clip clip-vit-base-patch16/model.safetensors --out runs/initial
  espalier convert bert bert-base-uncased/model.safetensors --into runs/initial
  espalier convert to-xvlm runs/distill/model --out student.pth
"""


def add_parsers(subparsers: Any) -> None:
    """Add the verb to `argparse` subparsers."""
    text = "Weights of X-VLM, CLIP, BERT or timm into a model folder, or a model back to X-VLM."
    parser = subparsers.add_parser(
        "convert",
        help=text,
        description=f"{text} No code in the file is run. Every key is accounted for in "
        "conversion.json; a missing or unexpected one is an error unless allowed.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "kind",
        choices=["xvlm", "clip", "bert", "timm", BACK],
        help="whose names FILE has; clip and timm fill the vision encoder, bert the text and "
        f"fusion layers. {BACK}: FILE is a model folder, --out a file with X-VLM's names",
    )
    parser.add_argument(
        "file",
        type=Path,
        metavar="FILE",
        help=".safetensors, a torch file, an index of shards, or a folder with one of them",
    )
    parser.add_argument("--out", type=Path, help="folder to write (by default that of --into)")
    parser.add_argument(
        "--into",
        type=Path,
        metavar="DIR",
        help="model folder whose other parts stay; without it they are fresh",
    )
    parser.add_argument(
        "--config",
        metavar="JSON",
        help="file with (part of) a model configuration, or a preset's name, for sizes that are "
        "not in FILE: head_dim, activation, norm_eps, region_layers",
    )
    parser.add_argument("--form", help="start this task form from the pre-trained weights")
    parser.add_argument(
        "--image-size", type=int, metavar="S", help="resample the positions to images of S px"
    )
    parser.add_argument(
        "--layers",
        metavar="I,J,...",
        help="layer of FILE for each layer here (clip, bert); by default spread evenly: 1,3,5,... "
        "for half the depth; bert takes those of the text layers alone, too, and leaves fusion fresh",
    )
    for name, whose in (("missing", "here"), ("unexpected", "in FILE")):
        parser.add_argument(
            f"--allow-{name}",
            nargs="+",
            default=[],
            metavar="KEY",
            help=f"keys, modules or globs {whose} that may be {name}",
        )
    parser.add_argument("--tokenizer", type=Path, help="folder of a tokenizer to put beside")
    parser.add_argument("--seed", type=int, default=0, help="of the fresh weights")


def run(args: argparse.Namespace) -> int:
    """Run the verb. Bad input raises ValueError/FileNotFoundError."""
    if args.kind == BACK:
        return _back(args)
    import torch

    from models.checkpoints import build
    from models.checkpoints.files import read_checkpoint, weight_file

    out = args.out or args.into
    if out is None:
        raise ValueError("--out: name the folder to write")
    if args.tokenizer is not None and not args.tokenizer.is_dir():
        raise FileNotFoundError(f"--tokenizer {args.tokenizer}: no such folder")
    _check_free(out, args.into)
    base, base_fresh = _base(args.into)
    path = weight_file(args.file)
    weights = read_checkpoint(path)
    sizes, origins = _sizes(args, path, weights.config)
    options = build.Options(
        sizes=sizes,
        layer_map=_layers(args.layers),
        image_size=args.image_size,
        form=args.form,
        allow_missing=args.allow_missing,
        allow_unexpected=args.allow_unexpected,
    )
    torch.manual_seed(args.seed)
    made = build.build(
        args.kind, weights.state, options, base=base, base_fresh=base_fresh, where=str(path)
    )
    _write(out, args, made)
    facts = {
        "kind": args.kind,
        "file": path.name,
        "tensors": len(weights.state),
        "sizes_from": origins,
    }
    build.write_record(out, made, facts, before=args.into)
    print("\n".join(_summary(out, made, facts)))
    return 0


def _check_free(out: Path, into: Path | None) -> None:
    """Raises ValueError where `out` holds a model that this conversion does not start from."""
    same = into is not None and out.resolve() == into.resolve()
    if not same and (out / "model.safetensors").exists():
        raise ValueError(
            f"--out {out}: holds a model already; name another folder, delete it, or name it with "
            "--into to replace some of its parts"
        )


def _base(folder: Path | None) -> tuple[XVLM | None, set[str]]:
    if folder is None:
        return None, set()
    from models import from_pretrained
    from models.checkpoints.build import fresh_keys

    return from_pretrained(folder), fresh_keys(folder)


def _layers(text: str | None) -> tuple[int, ...] | None:
    if text is None:
        return None
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError:
        raise ValueError(f"--layers {text}: expected numbers with commas, as 1,3,5") from None


def _sizes(
    args: argparse.Namespace, path: Path, stored: dict[str, Any]
) -> tuple[dict[str, Any], list[str]]:
    """Sizes that the tensors do not show, and where they came from. --config wins over the
    configuration that to-xvlm stores, or a config.json beside the file.
    """
    from models.checkpoints.build import merged, sizes_beside
    from models.checkpoints.files import foreign_config

    sizes: dict[str, Any] = {}
    origins: list[str] = []
    beside = foreign_config(path)
    if args.kind == "xvlm" and isinstance(stored.get("vision"), dict):
        sizes = {key: value for key, value in stored.items() if key not in _NOT_SIZES}
        origins.append("the file itself")
    elif beside is not None:
        sizes = sizes_beside(args.kind, beside[1], beside[0])
        origins += [beside[0].name] if sizes else []
    if args.config is not None:
        sizes = merged(sizes, _config_values(args.config))
        origins.append(Path(args.config).name)
    return sizes, origins


def _config_values(text: str) -> dict[str, Any]:
    """(Part of) a model configuration, from a JSON file or a preset."""
    from models import presets

    path = Path(text)
    if not path.is_file():
        if text not in presets.names():
            raise FileNotFoundError(
                f"--config {text}: neither a file nor a preset ({', '.join(presets.names())})"
            )
        values = presets.config(text).to_dict()
    else:
        try:
            values = json.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise ValueError(f"--config {path}: not a readable JSON file: {error}") from error
        if not isinstance(values, dict) or not all(
            isinstance(values.get(section, {}), dict) for section in ("vision", "text")
        ):
            raise ValueError(f'--config {path}: expected a JSON object such as {{"vision": {{}}}}')
    return {key: value for key, value in values.items() if key not in _NOT_SIZES}


def _write(out: Path, args: argparse.Namespace, made: Conversion) -> None:
    """The model folder; tokenizer from --tokenizer, the --into folder, or beside BERT's file."""
    in_place = args.into is None or out.resolve() == args.into.resolve()
    made.model.save_pretrained(out, tokenizer=None if in_place else args.into)
    beside = args.file if args.file.is_dir() else args.file.parent
    source = args.tokenizer or (beside if args.kind == "bert" else None)
    for name in _TOKENIZER_FILES:
        if source is not None and (source / name).is_file():
            shutil.copyfile(source / name, out / name)


def _summary(out: Path, made: Conversion, facts: dict[str, Any]) -> list[str]:
    model, report = made.model, made.report
    parameters = sum(parameter.numel() for parameter in model.parameters())
    lines = [
        f"{facts['file']}: {facts['tensors']} tensors of kind {facts['kind']}"
        + (f", sizes from {' and '.join(facts['sizes_from'])}" if facts["sizes_from"] else ""),
        f"{out}: form {model.config.form}, {parameters:,} parameters, images of "
        f"{model.config.vision.image_size} px",
    ]
    for name in ("loaded", "renamed", "resized", "missing", "unexpected", "ignored"):
        lines.append(f"  {name:<10}  {_listed(list(getattr(report, name)), name)}")
    lines.append(f"  {'fresh':<10}  {_listed(made.fresh, 'fresh')}")
    lines += [f"  note: {note}" for note in report.notes]
    return [*lines, f"every key: {out / 'conversion.json'}"]


def _listed(keys: list[str], name: str) -> str:
    if not keys or name in ("loaded", "renamed"):
        return str(len(keys))
    more = f" and {len(keys) - _LISTED} more" if len(keys) > _LISTED else ""
    return f"{len(keys)}: {', '.join(keys[:_LISTED])}{more}"


def _back(args: argparse.Namespace) -> int:
    """A model folder as one file with X-VLM's names."""
    import torch
    from safetensors.torch import save_file

    from models import from_pretrained
    from models.checkpoints.xvlm import to_published

    if args.out is None or args.out.is_dir():
        raise ValueError(f"--out: name the file to write ({BACK} writes one file)")
    model = from_pretrained(args.file)
    state, config = to_published(model.state_dict()), model.config.to_dict()
    args.out.parent.mkdir(parents=True, exist_ok=True)
    partial = args.out.with_name(f".{args.out.name}.partial")
    if args.out.suffix == ".safetensors":  # has no shared tensors: tied copies are written twice
        metadata = {"format": "pt", "config": json.dumps(config)}
        save_file({key: value.clone() for key, value in state.items()}, partial, metadata)
    else:
        torch.save({"model": state, "config": config}, partial)
    os.replace(partial, args.out)
    print(f"{args.out}: form {model.config.form}, {len(state)} keys under X-VLM's names")
    return 0
