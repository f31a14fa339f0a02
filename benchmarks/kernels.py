"""Does each kernel of models/kernels pay? Every op against what stands in for it, forward and backward.

    released   as the published code has it: mask in fp32 beside activations of lower precision
    eager      the reference with masks in the type of the activations
    folded     the gate in the weight, so that only the activation is left (bias in the product)
    compiled   the reference under torch.compile;   folded_compiled: the folded form under it
    liger      Liger's kernel, where it has the op and is installed
    kernel     ours

Inputs rotate through sets that together exceed the L2 cache four times, with random numbers. Each
variant is checked against the reference first. Time is the median of CUDA events, taken while the host
is ahead of the device, so that what Python takes to launch is not in it; that is told beside it as
"host_ms" (a variant that waits for the device waits for LEAD_CYCLES, too, and both its times have
that). Bandwidth counts the bytes that the op cannot avoid, over what a plain copy reaches in the same
process. Every variant is timed twice: how far the two differ is the noise. Without a GPU only --device
cpu runs, which shows that the script works and times nothing of the kernels.

    python benchmarks/kernels.py [--cases ffn_vit384 ...] [--json FILE]

Results go to benchmarks/results/kernels.json.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks.kernels_attention import attention_cases  # noqa: E402
from models.kernels import fold, library, reference, reference_fold, reference_gates  # noqa: E402
from train.evaluation.latency import device_name  # noqa: E402
from train.provenance import provenance  # noqa: E402

# Rows, units: batch 64 of the ViT at 384 and 480 pixels, and of texts of 40 and 128 tokens.
SHAPES = {"vit384": (64 * 577, 3072), "vit480": (64 * 901, 3072), "bert40": (64 * 40, 3072)}
GATES = 74088
OVER_CACHE = 4
LEAD_CYCLES = 4_000_000  # about 2 ms, which the device idles while the host launches a call

Inputs = tuple[Tensor, ...]
Step = Callable[..., Tensor | tuple[Tensor, ...] | list[Tensor]]


@dataclass
class Case:
    """One op at one size.

    Attributes:
        make: a set of inputs; those that require a gradient get one.
        variants: by name; each takes the inputs and returns the outputs.
        bytes: unavoidable traffic of forward and of backward.
        check: largest relative difference from the first variant that is let pass.
    """

    make: Callable[[], Inputs]
    variants: dict[str, Step]
    bytes: tuple[int, int]
    check: float = 0.02
    uncompared: set[str] = field(default_factory=set)


def ffn_case(shape: tuple[int, int], activation: str, mask_first: bool, device: str) -> Case:
    """bias + activation + mask in bf16; with its GEMMs left out."""
    rows, units = shape

    def make() -> Inputs:
        x = torch.randn(rows, units, device=device).bfloat16()
        vectors = (torch.randn(units, device=device), torch.rand(units, device=device))
        return x.requires_grad_(), *(v.requires_grad_() for v in vectors)

    function = reference.activation_function(activation)

    def released(x: Tensor, bias: Tensor, mask: Tensor) -> Tensor:
        h = x + bias.bfloat16()
        y = function(h * mask[None]) if mask_first else function(h) * mask[None]
        return y.bfloat16()

    def eager(x: Tensor, bias: Tensor, mask: Tensor) -> Tensor:
        return reference.ffn_act_mask(x, bias, mask, activation, mask_first)

    def folded(x: Tensor, bias: Tensor, mask: Tensor) -> Tensor:
        return function(x)

    def kernel(x: Tensor, bias: Tensor, mask: Tensor) -> Tensor:
        return torch.ops.espalier.ffn_act_mask(x, bias, mask, activation, mask_first)

    variants = {
        "eager": eager,
        "released": released,
        "folded": folded,
        "compiled": torch.compile(eager),
        "folded_compiled": torch.compile(folded),
        "kernel": kernel,
    }
    element = rows * units * 2
    # folded leaves the mask's work to the weights, so its output is another one
    return Case(
        make, variants, (2 * element, 3 * element), uncompared={"folded", "folded_compiled"}
    )


def liger_variant(case: Case) -> None:
    """Adds Liger's gated GELU where it is installed: the nearest op, without bias and mask grads."""
    if importlib.util.find_spec("liger_kernel") is None:
        return
    from liger_kernel.ops.geglu import LigerGELUMulFunction  # type: ignore[import-not-found]

    def liger(x: Tensor, bias: Tensor, mask: Tensor) -> Tensor:
        return LigerGELUMulFunction.apply(x, mask.bfloat16().expand_as(x).contiguous())

    case.variants["liger"] = liger
    case.uncompared.add("liger")


def gates_case(device: str) -> Case:
    """All gates of EfficientVLM's student: sample, expected size, and their gradient."""

    def make() -> Inputs:
        log_alpha = torch.randn(GATES, device=device, requires_grad=True)
        costs = torch.rand(GATES, dtype=torch.float64, device=device)
        return log_alpha, costs, torch.rand(GATES, dtype=torch.float64, device=device)

    def eager(log_alpha: Tensor, costs: Tensor, u: Tensor) -> tuple[Tensor, Tensor]:
        return reference_gates.hard_concrete(log_alpha, costs, u, None, 0, 0)

    def kernel(log_alpha: Tensor, costs: Tensor, u: Tensor) -> tuple[Tensor, Tensor]:
        return torch.ops.espalier.hard_concrete(log_alpha, costs, u, None, 0, 0)

    def drawn(log_alpha: Tensor, costs: Tensor, u: Tensor) -> tuple[Tensor, Tensor]:
        return torch.ops.espalier.hard_concrete(log_alpha, costs, None, None, 1, 0)

    def released(log_alpha: Tensor, costs: Tensor, u: Tensor) -> tuple[Tensor, Tensor]:
        """Noise on the host, copied each step, one tensor a layer."""
        noise = torch.rand(GATES).to(log_alpha.device).clamp(1e-6, 1 - 1e-6)
        parts = [
            reference_gates.hard_concrete(a, c, n.double(), None, 0, 0)
            for a, c, n in zip(*(t.chunk(24) for t in (log_alpha, costs, noise)), strict=True)
        ]
        return torch.cat([z for z, _ in parts]), torch.stack([size for _, size in parts]).sum()

    variants = {"eager": eager, "released": released, "compiled": torch.compile(eager)}
    variants |= {"kernel": kernel, "kernel_philox": drawn}
    uncompared = {"released", "kernel_philox"}
    return Case(make, variants, (20 * GATES, 20 * GATES), uncompared=uncompared)


def fold_case(device: str, share: float) -> Case:
    """fc2 of one layer, fp32 to bf16: folded (share 1), or its open units alone."""
    rows, columns = 768, 3072
    count = int(columns * share) // 64 * 64

    def make() -> Inputs:
        weight = torch.randn(rows, columns, device=device, requires_grad=True)
        kept = torch.randperm(columns, device=device)[:count].sort().values
        return weight, torch.rand(count, device=device, requires_grad=True), kept

    def index(kept: Tensor) -> Tensor | None:
        return kept if share < 1 else None

    def eager(weight: Tensor, z: Tensor, kept: Tensor) -> Tensor:
        return reference_fold.compact(weight, None, index(kept), None, z, torch.bfloat16)

    def kernel(weight: Tensor, z: Tensor, kept: Tensor) -> list[Tensor]:
        packed = fold.pack([fold.Part(weight, None, index(kept), None, z)])
        return torch.ops.espalier.compact(*packed, torch.bfloat16)

    variants = {"eager": eager, "compiled": torch.compile(eager), "kernel": kernel}
    inside, full = rows * count, rows * columns
    return Case(make, variants, (6 * inside, 6 * inside + 4 * full))


def cases(device: str, small: bool) -> dict[str, Callable[[], Case]]:
    """Makers of all cases by name; `small`: sizes that only show that the script runs."""
    shapes = {"small": (64, 256)} if small else SHAPES
    made: dict[str, Callable[[], Case]] = {}
    for name, shape in shapes.items():
        made[f"ffn_{name}"] = lambda s=shape: ffn_case(s, "quick_gelu", True, device)
        made[f"ffn_{name}_gelu"] = lambda s=shape: ffn_case(s, "gelu", False, device)
    made["hard_concrete"] = lambda: gates_case(device)
    made["fold_cast"] = lambda: fold_case(device, 1.0)
    made["compact"] = lambda: fold_case(device, 0.4)
    return made | attention_cases(Case, device, small)


def as_list(outputs: Any) -> list[Tensor]:
    """Outputs of a variant as a list."""
    return [outputs] if isinstance(outputs, Tensor) else list(outputs)


def run(step: Step, inputs: Inputs, gradients: list[Tensor]) -> list[Tensor]:
    """Outputs and the gradients of every input that takes part."""
    outputs = as_list(step(*inputs))
    leaves = [x for x in inputs if x.requires_grad]
    return outputs + [
        g
        for g in torch.autograd.grad(outputs, leaves, gradients, allow_unused=True)
        if g is not None
    ]


def difference(found: list[Tensor], expected: list[Tensor]) -> float:
    """Largest relative L2 difference of any output or gradient."""
    pairs = [
        (a.detach().double(), b.detach().double()) for a, b in zip(found, expected, strict=True)
    ]
    return max(float((a - b).norm() / b.norm()) for a, b in pairs)


class Spent(NamedTuple):
    """Median milliseconds of one call: on the device, and of the host to launch it."""

    device: float
    host: float


def milliseconds(calls: Iterator[Callable[[], Any]], device: str, repeats: int) -> Spent:
    """What one call takes."""
    times = []
    for number in range(repeats + 5):
        call = next(calls)
        if device == "cuda":
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            # The device is idle here. Without a lead `start` would pass at once, and the time until
            # the first kernel arrives, which is the host's, would count.
            torch.cuda._sleep(LEAD_CYCLES)
            start.record()
        begun = time.perf_counter()
        call()
        host = device_time = 1e3 * (time.perf_counter() - begun)
        if device == "cuda":
            end.record()
            end.synchronize()
            device_time = start.elapsed_time(end)
        if number >= 5:
            times.append((device_time, host))
    return Spent(*map(statistics.median, zip(*times, strict=True)))


def forever(calls: list[Callable[[], Any]]) -> Iterator[Callable[[], Any]]:
    """The calls in turns."""
    while True:
        yield from calls


def copy_bandwidth(device: str, repeats: int) -> float:
    """Bytes a second that a plain copy reads and writes."""
    count = 2**28 if device == "cuda" else 2**22
    source, target = torch.randn(2, count // 4, device=device)
    spent = milliseconds(forever([lambda: target.copy_(source)]), device, repeats).device
    return 2 * count / (spent / 1e3)


def input_sets(case: Case, device: str) -> list[Inputs]:
    """As many as exceed the L2 cache OVER_CACHE times, two at least."""
    first = case.make()
    size = sum(x.numel() * x.element_size() for x in first)
    cache = torch.cuda.get_device_properties(0).L2_cache_size if device == "cuda" else 2**20
    return [first, *(case.make() for _ in range(max(1, -(-OVER_CACHE * cache // size) - 1)))]


def peak_bytes(call: Callable[[], Any]) -> int:
    """Device memory that one call takes beyond what is held before it."""
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    call()
    return torch.cuda.max_memory_allocated() - before


def measure(case: Case, device: str, repeats: int, copied: float) -> dict[str, Any]:
    """Every variant: milliseconds forward and both ways, bandwidth over that of a copy, memory."""
    sets = input_sets(case, device)
    expected, result = None, {}
    gradients: list[Tensor] = []
    for name, step in case.variants.items():
        if name.startswith("kernel") and device == "cpu":
            continue
        if expected is None:
            gradients = [torch.randn_like(x) for x in as_list(step(*sets[0]))]
            expected = run(step, sets[0], gradients)
        elif name not in case.uncompared:
            gap = difference(run(step, sets[0], gradients), expected)
            if not gap <= case.check:
                raise SystemExit(f"{name} differs from the reference by {gap:.2g}")
        forward = [lambda s=s, step=step: step(*s) for s in sets]
        both = [lambda s=s, step=step, g=gradients: run(step, s, g) for s in sets]
        timed = [
            [milliseconds(forever(calls), device, repeats) for _ in range(2)]
            for calls in (forward, both)
        ]
        fastest = [min(pair) for pair in timed]
        row = {"forward_ms": fastest[0].device, "both_ms": fastest[1].device}
        row["noise"] = max(abs(a.device - b.device) / min(a, b).device for a, b in timed)
        row |= {"forward_host_ms": fastest[0].host, "both_host_ms": fastest[1].host}
        row["forward_of_copy"] = case.bytes[0] / (row["forward_ms"] / 1e3) / copied
        row["both_of_copy"] = sum(case.bytes) / (row["both_ms"] / 1e3) / copied
        if device == "cuda":
            row["peak_bytes"] = peak_bytes(both[0])
        result[name] = row
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--small", action="store_true", help="sizes that only show that it runs")
    parser.add_argument("--cases", nargs="+", help="some of the cases")
    parser.add_argument("--repeats", type=int, default=50)
    parser.add_argument("--json", type=Path, default=ROOT / "benchmarks/results/kernels.json")
    args = parser.parse_args()
    if args.device == "cuda" and library.unavailable():
        raise SystemExit(f"benchmarks/kernels.py: {library.unavailable()}; --device cpu --small")
    torch.manual_seed(0)
    copied = copy_bandwidth(args.device, args.repeats)
    print(f"copy {copied / 1e9:.0f} GB/s")
    known, results = cases(args.device, args.small), {}
    for name in args.cases or known:
        if name not in known:
            raise SystemExit(f"no case {name!r}; cases: {', '.join(known)}")
        # Cases share the code of their variants: each but the first would be compiled for any size.
        torch.compiler.reset()
        case = known[name]()
        if name.endswith("gelu"):
            liger_variant(case)
        results[name] = measure(case, args.device, args.repeats, copied)
        for variant, row in results[name].items():
            figures = "  ".join(f"{key} {value:.3g}" for key, value in row.items())
            print(f"{name:18} {variant:16} {figures}", flush=True)
    record = {
        "when": datetime.now(UTC).isoformat(timespec="seconds"),
        "device": device_name(torch.device(args.device)),
        "copy_bytes_per_second": copied,
        "settings": {"repeats": args.repeats, "small": args.small},
        "provenance": provenance(1),
        "cases": results,
    }
    args.json.parent.mkdir(parents=True, exist_ok=True)
    args.json.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
