"""Time and memory of the pre-training encoders against a plain version that writes attention maps.

The plain twin has the same weights and blocks, but its attention is written out: scores, softmax,
dropout and the mixture as separate tensors (heads x queries x keys each), as the published code has
it. "checkpointed" is ours with activation checkpointing, "compiled" (only where asked for) ours
under torch.compile. A step encodes images and texts and fuses them, forward only (evaluation mode,
no gradients) or forward and backward (training mode with the published dropout; on a CPU torch has
no fused attention with dropout, so the text layers write their maps in every variant there).

All variants take turns in one process; their outputs are compared first. Time is the processor time
of one thread on a CPU, where neighbours disturb it least, and the wall clock on a GPU. Memory is the
growth of resident memory in a process of its own on a CPU, and the allocator's peak on a GPU. Run
from the repository root:

    python benchmarks/model_step.py

Results go to benchmarks/results/model_step.json.
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from models import presets  # noqa: E402
from models.attention import Attention  # noqa: E402
from models.xvlm import XVLM  # noqa: E402
from train.evaluation.latency import device_name, interleave  # noqa: E402
from train.provenance import provenance  # noqa: E402

MODELS = {"teacher": "xvlm-clip-base", "student": "efficientvlm"}
STEPS = ("forward", "forward+backward")
SETTINGS = ("batch", "pixels", "tokens", "repeats", "dtype", "threads")
VARIANTS = ("plain", "ours", "checkpointed", "compiled")


class PlainAttention(Attention):
    """The same attention with its map written out."""

    def forward(self, x: Tensor, context: Any = None, key_mask: Any = None, *_: Any, **__: Any):
        """x (B, N, D), context (B, K, key_width) or None, key_mask (B, K) -> (B, N, D), None."""
        context = x if context is None else context
        q, k, v = (self._split(part) for part in (self.q(x), self.k(context), self.v(context)))
        scores = q @ k.transpose(-1, -2) * self.head_dim**-0.5  # (B, H, N, K)
        if key_mask is not None:
            scores = scores.masked_fill(~key_mask[:, None, None, :], torch.finfo(scores.dtype).min)
        weights = torch.nn.functional.dropout(scores.softmax(-1), self.dropout, self.training)
        return self.out((weights @ v).transpose(1, 2).flatten(2)), None


def variant(model: XVLM, name: str) -> XVLM:
    """The model itself, or a twin with the same parameters as a variant runs it."""
    if name == "ours":
        return model
    twin = copy.deepcopy(model, {id(parameter): parameter for parameter in model.parameters()})
    if name == "plain":
        for module in twin.modules():
            if type(module) is Attention:
                module.__class__ = PlainAttention
    twin.set_activation_checkpointing(name == "checkpointed")
    if name == "compiled":
        twin.compile_encoders()
    return twin


class Inputs:
    """One batch of pre-training: images, texts of which every second one is padded."""

    def __init__(self, model: XVLM, batch: int, tokens: int, device: str) -> None:
        generator = torch.Generator().manual_seed(0)
        vision, text = model.config.vision, model.config.text
        shape = (batch, 3, vision.image_size, vision.image_size)
        self.images = torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator)
        self.ids = torch.randint(1, text.vocab_size, (batch, tokens), generator=generator)
        self.mask = torch.ones(batch, tokens, dtype=torch.bool)
        self.mask[::2, tokens * 2 // 3 :] = False
        for name, value in vars(self).items():
            setattr(self, name, value.to(device))

    def fused(self, model: XVLM) -> Tensor:
        """(B, L, D) after all three encoders."""
        images = model.encode_image(self.images).last
        words = model.encode_text(self.ids, self.mask).last
        return model.fuse(words, self.mask, images).last


def step_of(model: XVLM, inputs: Inputs, step: str) -> Callable[[], object]:
    """One timed step."""

    def forward() -> None:
        with torch.no_grad():
            inputs.fused(model.eval())

    def both() -> None:
        inputs.fused(model.train()).float().square().mean().backward()

    return forward if step == "forward" else both


def build(role: str, args: argparse.Namespace) -> tuple[XVLM, Inputs]:
    """The full-size model with its freshly drawn weights, and its batch."""
    torch.manual_seed(0)
    model = presets.create(MODELS[role], **{"vision.image_size": args.pixels})
    model = model.to(args.device, getattr(torch, args.dtype))
    return model, Inputs(model, args.batch, args.tokens, args.device)


def compare(models: dict[str, XVLM], inputs: Inputs) -> float:
    """Largest difference of the variants' outputs from the plain ones, relative to their size."""
    with torch.no_grad():
        found = {name: inputs.fused(model.eval()).float() for name, model in models.items()}
    largest = float(found["plain"].abs().max())
    error = max(float((value - found["plain"]).abs().max()) for value in found.values()) / largest
    exact = next(models["plain"].parameters()).dtype == torch.float32
    if not error < (1e-4 if exact else 0.1):
        raise SystemExit(f"the variants do not compute the same: {error:.2e}")
    return error


def spread(values: list[float]) -> dict[str, float]:
    """Median, least and largest."""
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}


def timed(role: str, args: argparse.Namespace) -> dict[str, Any]:
    """Seconds of every variant and step, and ratios to the plain one round by round."""
    model, inputs = build(role, args)
    models = {name: variant(model, name) for name in args.variants}
    cuda = args.device == "cuda"
    result: dict[str, Any] = {"difference": compare(models, inputs)}
    for step in STEPS:
        names = [name for name in models if step != "forward" or name != "checkpointed"]
        seconds = interleave(
            [(name, step_of(models[name], inputs, step)) for name in names],
            args.repeats,
            warm_up=3 if cuda else 1,
            synchronise=torch.cuda.synchronize if cuda else lambda: None,
            clock=time.perf_counter if cuda else time.process_time,
            progress=True,
        )
        result[step] = {name: {"seconds": spread(values)} for name, values in seconds.items()}
        for name, values in seconds.items():
            pairs = zip(seconds["plain"], values, strict=True)
            result[step][name]["speedup"] = spread([plain / own for plain, own in pairs])
    return result


def status_bytes(key: str) -> int:
    """VmRSS or VmHWM of this process."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{key}:"):
            return int(line.split()[1]) * 1024
    raise SystemExit(f"/proc/self/status has no {key}: memory is measured on Linux only")


def peak(role: str, name: str, step: str, args: argparse.Namespace) -> int:
    """Bytes that one step needs beyond the model (and its gradients), in this process."""
    model, inputs = build(role, args)
    call = step_of(variant(model, name), inputs, step)
    call()  # makes the gradients, and what libraries set aside
    if args.device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    Path("/proc/self/clear_refs").write_text("5")  # forget the peak so far
    before = status_bytes("VmRSS")
    call()
    return status_bytes("VmHWM") - before


def peak_apart(role: str, name: str, step: str, args: argparse.Namespace) -> int:
    """The same in a process of its own. Large blocks go back to the system when they are freed."""
    mine = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "0"}
    options = ["--batch", args.batch, "--pixels", args.pixels, "--tokens", args.tokens]
    options += ["--device", args.device, "--dtype", args.dtype, "--threads", args.threads]
    command = [sys.executable, __file__, *map(str, options), "--peak", role, name, step]
    done = subprocess.run(
        command, env=os.environ | mine, stdout=subprocess.PIPE, text=True, check=True
    )
    return int(done.stdout.split()[-1])


def measured(role: str, args: argparse.Namespace) -> dict[str, Any]:
    """Everything about one model, by step."""
    result = timed(role, args)
    for step in STEPS:
        rows = result[step]
        for name, row in rows.items():
            row["peak_bytes"] = peak_apart(role, name, step, args)
        for row in rows.values():
            row["memory"] = row["peak_bytes"] / rows["plain"]["peak_bytes"]
        print(role, step, json.dumps(rows), flush=True)
    return result


def main() -> int:
    cuda = torch.cuda.is_available()
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("--models", nargs="+", choices=list(MODELS), default=list(MODELS))
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=list(VARIANTS[:3]))
    parser.add_argument("--batch", type=int, default=64 if cuda else 4)
    parser.add_argument("--pixels", type=int, default=224)
    parser.add_argument("--tokens", type=int, default=30)
    parser.add_argument("--repeats", type=int, default=30 if cuda else 7)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cuda" if cuda else "cpu")
    parser.add_argument("--dtype", default="bfloat16" if cuda else "float32")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads")
    parser.add_argument("--json", type=Path, default=ROOT / "benchmarks/results/model_step.json")
    parser.add_argument("--peak", nargs=3, metavar=("MODEL", "VARIANT", "STEP"), default=None)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    if args.peak is not None:
        role, name, step = args.peak
        print(peak(role, name, step, args))
        return 0
    if "plain" not in args.variants:
        parser.error("--variants: everything is compared with plain; keep it")
    settings: dict[str, Any] = {
        "what": "seconds and peak bytes of one step of the pre-training encoders; speedup and "
        "memory relative to attention with maps written out",
        "device": device_name(torch.device(args.device)),
        "clock": "wall" if args.device == "cuda" else "processor time of the process",
    } | {key: getattr(args, key) for key in SETTINGS}
    old = json.loads(args.json.read_text()) if args.json.is_file() else {}
    same = all(old.get(key) == value for key, value in settings.items())
    results: dict[str, Any] = old["results"] if same else {}  # models that are not asked for stay
    args.json.parent.mkdir(parents=True, exist_ok=True)
    for role in args.models:
        made = {
            "command": " ".join(["python", *sys.argv]),
            "date": datetime.now(UTC).isoformat(timespec="seconds"),
            "provenance": provenance(1),
            "load_before": os.getloadavg(),
        }
        made |= measured(role, args)
        results[role] = made | {"load_after": os.getloadavg()}
        args.json.write_text(json.dumps(settings | {"results": results}, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
