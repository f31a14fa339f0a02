"""Runs exported graphs on kept inputs and compares with kept outputs, in a process of its own.

    python check.py FOLDER CASES

Run as a file, so that nothing of this project is there to help: torch alone loads a .pt2, onnxruntime
alone an .onnx. The last line of its output is JSON: graph -> output -> largest difference, and the
runtime's version.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

__all__ = ["difference", "main"]

Arrays = dict[str, np.ndarray]


def difference(found: np.ndarray, expected: np.ndarray) -> float:
    """Largest absolute difference, in units of the largest expected magnitude where that is above 1.

    Another shape, or a number that is none, is infinitely far away.
    """
    if found.shape != expected.shape or not np.isfinite(found).all():
        return float("inf")
    if not expected.size:
        return 0.0
    apart = np.abs(found.astype(np.float64) - expected.astype(np.float64)).max()
    return float(apart / max(1.0, float(np.abs(expected).max())))


def _onnx(path: Path) -> Callable[[Arrays], list[np.ndarray]]:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    return lambda inputs: [np.asarray(value) for value in session.run(None, inputs)]


def _torch(path: Path) -> Callable[[Arrays], list[np.ndarray]]:
    import torch

    module = torch.export.load(path).module()

    def run(inputs: Arrays) -> list[np.ndarray]:
        with torch.no_grad():
            found = module(*(torch.from_numpy(value) for value in inputs.values()))
        return [value.numpy() for value in found]

    return run


def main(folder: Path, cases: Path) -> dict[str, Any]:
    """Compares every case CASES/GRAPH.N.npz (in_NAME, out_NAME arrays) with FOLDER's graph."""
    description = json.loads((folder / "graphs.json").read_text(encoding="utf-8"))
    load = {"onnx": _onnx, "torch": _torch}[description["format"]]
    result: dict[str, dict[str, float]] = {}
    for name, graph in description["graphs"].items():
        run = load(folder / graph["file"])
        wanted = [output["name"] for output in graph["outputs"]]
        worst = dict.fromkeys(wanted, 0.0)
        files = sorted(cases.glob(f"{name}.*.npz"))
        if not files:
            raise FileNotFoundError(f"{cases}: no case of graph {name}")
        for file in files:
            with np.load(file) as held:
                inputs = {port["name"]: held[f"in_{port['name']}"] for port in graph["inputs"]}
                expected = [held[f"out_{output}"] for output in wanted]
            for output, value, want in zip(wanted, run(inputs), expected, strict=True):
                worst[output] = max(worst[output], difference(np.asarray(value), want))
        result[name] = worst
    return {"graphs": result, "runtime": _runtime(description["format"])}


def _runtime(kind: str) -> str:
    if kind == "onnx":
        import onnxruntime

        return f"onnxruntime {onnxruntime.__version__}"
    import torch

    return f"torch {torch.__version__}"


if __name__ == "__main__":
    print(json.dumps(main(Path(sys.argv[1]), Path(sys.argv[2]))))
