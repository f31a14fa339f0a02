"""Graphs to ship: ONNX files for onnxruntime, or torch.export programs, checked where they will run.

A folder holds one file for each graph (`graphs.graphs_of`), graphs.json that says what goes in and
comes out, the tokenizer, the answer list, config.json and the model card. Each graph is run again by
a fresh process that cannot see this package, on inputs of three sizes, and compared with the model.
"""

from __future__ import annotations

import copy
import inspect
import json
import logging
import os
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

from train.export import check
from train.export.graphs import graphs_of
from train.export.ports import Graph, limits
from train.export.safetensors import copy_companions

if TYPE_CHECKING:
    from models.xvlm import XVLM
    from train.export.card import Facts

__all__ = ["DESCRIPTION", "FORMATS", "TOLERANCE", "export_graphs"]

FORMATS = {"onnx": ".onnx", "torch": ".pt2"}
DESCRIPTION = "graphs.json"
TOLERANCE = 1e-4
_NEEDED = ("onnx", "onnxscript", "onnxruntime")
_OPSET = 18
# An .onnx file is a protocol buffer, which ends at 2 GB: weights above this lie in a file beside it.
_INSIDE = 1_500_000_000
# Traced with the first; no two sizes are equal, so that none is taken for another. All are checked.
_TRACED = {"batch": 4, "tokens": 7, "answers": 3, "answer_tokens": 5, "past": 6}
_OTHERS = (
    {"batch": 1, "tokens": 2, "answers": 2, "answer_tokens": 3, "past": 2},
    {"batch": 3, "tokens": 12, "answers": 5, "answer_tokens": 4, "past": 9},
)


def export_graphs(
    source: Path, out: Path, kind: str, facts: Facts | None = None, tokenizer: Path | None = None
) -> dict[str, Any]:
    """Writes the graphs of a model folder to `out`, and checks them.

    Args:
        kind: "onnx" or "torch".
        facts: what the card tells besides the shape; None reads the run directory around `source`.
        tokenizer: folder to take tokenizer files from where `source` has none.

    Returns:
        what graphs.json says.

    Raises:
        ValueError: on an unknown kind, a missing ONNX package, a model that reads too few tokens, or
            `out` being the source.
        FileNotFoundError, ValueError: `source` is no model folder.
        RuntimeError: a graph disagrees with the model, or cannot be loaded; the files stay for a
            look, without a model card.
    """
    from models import from_pretrained
    from train.export.card import Facts, card

    _check_request(source, out, kind)
    model = from_pretrained(source)
    graphs = graphs_of(model)
    sizes = [_within(sizes, model) for sizes in (_TRACED, *_OTHERS)]
    out.mkdir(parents=True, exist_ok=True)
    (out / "README.md").unlink(missing_ok=True)  # of an earlier export
    files = {}
    with tempfile.TemporaryDirectory(prefix="espalier-export-") as cases:
        for graph in tqdm(graphs, desc=f"export {kind}", unit="graph", disable=None):
            files[graph.name] = _write(graph, out, kind, sizes[0], limits(model.config))
            _keep_cases(graph, sizes, Path(cases))
        model.config.save(out / "config.json")
        copy_companions(out, tokenizer, source)
        described = _described(model, graphs, kind, files)
        (out / DESCRIPTION).write_text(json.dumps(described, indent=2) + "\n", encoding="utf-8")
        found = _checked(out, Path(cases))
    described["check"] = found
    (out / DESCRIPTION).write_text(json.dumps(described, indent=2) + "\n", encoding="utf-8")
    _judge(out, found)
    size = sum(graph["bytes"] for graph in described["graphs"].values())
    text = card(model, facts or Facts.of_run(source), "fp32", size, described)
    (out / "README.md").write_text(text, encoding="utf-8")
    return described


def _check_request(source: Path, out: Path, kind: str) -> None:
    if kind not in FORMATS:
        raise ValueError(f"format {kind!r}: expected one of {', '.join(FORMATS)}")
    if out.resolve() == source.resolve():
        raise ValueError(f"--out {out}: is the model itself; name another folder")
    missing = [name for name in _NEEDED if find_spec(name) is None] if kind == "onnx" else []
    if missing:
        raise ValueError(
            f"--format onnx needs {', '.join(missing)}: pip install 'espalier[onnx]'; "
            "--format torch needs nothing"
        )


def _within(sizes: Mapping[str, int], model: XVLM) -> dict[str, int]:
    """Sizes that the model can read. Raises ValueError where it reads fewer than are traced with."""
    most = model.config.text.max_positions
    if most < max(_TRACED.values()) + 1:
        raise ValueError(
            f"text.max_positions is {most}: graphs are traced with {max(_TRACED.values()) + 1} tokens"
        )
    return dict(sizes) | {
        "tokens": min(sizes["tokens"], most),
        "past": min(sizes["past"], most - 1),
    }


# --- one graph ------------------------------------------------------------------------------------


def _write(
    graph: Graph,
    out: Path,
    kind: str,
    sizes: Mapping[str, int],
    bounds: Mapping[str, tuple[int, int | None]],
) -> Path:
    inputs = tuple(graph.example(sizes).values())
    module = _lean(graph.module, inputs)
    dims = _dims(graph, bounds)
    path = out / f"{graph.name}{FORMATS[kind]}"
    with torch.no_grad(), _quiet():
        program = torch.export.export(module, inputs, dynamic_shapes=dims)
        if kind == "torch":
            torch.export.save(program, path)
        else:
            _save_onnx(program, graph, path)
    return path


def _dims(graph: Graph, bounds: Mapping[str, tuple[int, int | None]]) -> Any:
    """torch's names of the sizes that may change, for each input."""
    names = {
        str(part).partition("+")[0]
        for port in graph.inputs
        for part in port.shape
        if isinstance(part, str)
    }
    known = {
        name: torch.export.Dim(name, min=bounds[name][0], max=bounds[name][1]) for name in names
    }

    def dim(part: str) -> Any:
        name, _, more = part.partition("+")
        return known[name] + int(more) if more else known[name]

    free = [
        {axis: dim(part) for axis, part in enumerate(port.shape) if isinstance(part, str)}
        for port in graph.inputs
    ]
    # Inputs behind a star are one argument, a tuple, to torch.
    plain = [name for name, star in _arguments(graph.module) if not star]
    starred = any(star for _, star in _arguments(graph.module))
    return (*free[: len(plain)], tuple(free[len(plain) :])) if starred else tuple(free)


def _arguments(module: nn.Module) -> list[tuple[str, bool]]:
    """Parameters of forward, and whether each is a star."""
    found = inspect.signature(module.forward).parameters.values()
    return [(one.name, one.kind is inspect.Parameter.VAR_POSITIONAL) for one in found]


def _save_onnx(program: torch.export.ExportedProgram, graph: Graph, path: Path) -> None:
    path.with_name(path.name + ".data").unlink(missing_ok=True)  # of an earlier export
    made = torch.onnx.export(
        program,
        dynamo=True,
        opset_version=_OPSET,
        input_names=[port.name for port in graph.inputs],
        output_names=list(graph.outputs),
        verbose=False,
    )
    assert made is not None  # without a path, the program comes back
    size = sum(value.numel() * value.element_size() for value in program.state_dict.values())
    made.save(path, external_data=size > _INSIDE)


def _lean(module: nn.Module, inputs: Sequence[Tensor]) -> nn.Module:
    """The module without the weights of parts that a run of it does not enter; tensors are shared.

    torch.export keeps every parameter of a module, used or not.
    """
    entered: set[str] = set()
    hooks = [
        part.register_forward_pre_hook(lambda *_, name=name: entered.add(name))
        for name, part in module.named_modules()
    ]
    try:
        with torch.no_grad():
            module(*inputs)
    finally:
        for hook in hooks:
            hook.remove()
    tensors = {id(value): value for value in (*module.parameters(), *module.buffers())}
    lean = copy.deepcopy(module, tensors)
    for name, part in lean.named_modules():
        if name not in entered:
            part._parameters.clear()
            part._buffers.clear()
    return lean


@contextmanager
def _quiet() -> Iterator[None]:
    """Exporters talk about their own versions and inner workings; errors are raised, not told."""
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "onnxscript", "onnx_ir")]
    before = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, before, strict=True):
            logger.setLevel(level)


# --- the check ------------------------------------------------------------------------------------


def _keep_cases(graph: Graph, sizes: Sequence[Mapping[str, int]], folder: Path) -> None:
    """GRAPH.N.npz for each set of sizes: inputs, and what the model itself makes of them."""
    for number, one in enumerate(sizes):
        inputs = graph.example(one, seed=number)
        with torch.no_grad():
            outputs = graph.module(*inputs.values())
        held = {f"in_{name}": value.numpy() for name, value in inputs.items()}
        held |= {
            f"out_{name}": value.numpy() for name, value in zip(graph.outputs, outputs, strict=True)
        }
        np.savez(folder / f"{graph.name}.{number}.npz", allow_pickle=False, **held)


def _checked(out: Path, cases: Path) -> dict[str, Any]:
    """What the fresh process found. Raises RuntimeError with its words when it fails."""
    program = [sys.executable, "-I", str(Path(check.__file__).resolve()), str(out), str(cases)]
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    done = subprocess.run(program, capture_output=True, text=True, env=environment, check=False)
    if done.returncode:
        raise RuntimeError(
            f"{out}: the exported graphs do not run in a fresh process:\n{done.stderr.strip()}"
        )
    found = json.loads(done.stdout.strip().splitlines()[-1])
    return {"tolerance": TOLERANCE, "cases": 1 + len(_OTHERS)} | found


def _judge(out: Path, found: Mapping[str, Any]) -> None:
    wrong = [
        f"{graph}.{output} is {value:.2g} away"
        for graph, outputs in found["graphs"].items()
        for output, value in outputs.items()
        if not value <= TOLERANCE
    ]
    if wrong:
        raise RuntimeError(
            f"{out}: {found['runtime']} disagrees with the model by more than {TOLERANCE:g}: "
            f"{'; '.join(wrong)}"
        )


# --- graphs.json ----------------------------------------------------------------------------------


def _described(
    model: XVLM, graphs: Sequence[Graph], kind: str, files: Mapping[str, Path]
) -> dict[str, Any]:
    config = model.config
    used = {
        str(part).partition("+")[0]
        for graph in graphs
        for port in graph.inputs
        for part in port.shape
        if isinstance(part, str)
    }
    bounds = {name: list(bound) for name, bound in limits(config).items() if name in used}
    values: dict[str, Any] = {
        "format": kind,
        "name": config.name,
        "form": config.form,
        "parameters": sum(value.numel() for value in model.parameters()),
        "graphs": {graph.name: _one(graph, files[graph.name]) for graph in graphs},
        "sizes": bounds,
        "image": _image(model),
        "text": {
            "tokenizer": "tokenizer.json",
            "max_tokens": config.text.max_positions,
            "pad_id": config.text.pad_id,
            "layout": "[CLS] words [SEP], padded on the right; the mask is true on real tokens",
        },
    }
    if config.form in ("retrieval", "pretrain"):
        values["temperature"] = float(model.temperature().detach())
    return values


def _one(graph: Graph, file: Path) -> dict[str, Any]:
    data = file.with_name(file.name + ".data")
    beside = data.stat().st_size if data.is_file() else 0
    return {
        "file": file.name,
        "bytes": file.stat().st_size + beside,
        "inputs": [
            {"name": port.name, "dtype": port.dtype, "shape": list(port.shape)}
            for port in graph.inputs
        ],
        "outputs": [{"name": name} for name in graph.outputs],
        "meaning": " ".join((graph.module.__doc__ or "").split()),
    }


def _image(model: XVLM) -> dict[str, Any]:
    config = model.config
    return {
        "size": config.vision.image_size,
        "layout": "NCHW, RGB, uint8 0 to 255",
        "resize": "the whole picture to size x size, bicubic with antialias; nothing is cropped",
        "normalisation": "inside image_encoder",
        "mean": list(config.image_mean),
        "std": list(config.image_std),
    }
