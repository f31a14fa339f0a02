"""The pre-training distillation step against an eager one that materialises every attention map.

Full-size teacher (xvlm-clip-base, 12/6/6) and student (efficientvlm, 6/3/3), one general step:
forward of both models, all losses, backward, clipping, AdamW. Ours goes through the engine as the
recipe efficientvlm-4m sets it up; the other is `eager_step.py`. First both must give the same losses
(1e-4, fp32, without dropout); then each is timed in a process of its own, in turns. Run from the
repository root:

    python benchmarks/distill_step.py --device cuda --batch 128 --dtype bf16
    python benchmarks/distill_step.py --device cuda --batch 64 --image-size 384 --dtype bf16 \\
        --eager-dtype fp16 --set engine.compile=default

--dtype is of both, --eager-dtype of the eager one where it differs: "fp16" there is autocast with a
dynamic loss scale, what the published code trains in. Memory: CUDA's peak of allocated bytes; on a
CPU the growth of the resident set from before the models to its peak. "step" is what of it is
not weights, gradients, or optimizer states. On a CPU that others use, too, compare CPU seconds rather
than seconds, with OMP_NUM_THREADS=1. Results go to benchmarks/results/distill_step_DEVICE.json,
an entry for each setting.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks.distill_sides import compare, measure, model_sizes, settings  # noqa: E402

SIDES = ("ours", "eager")
TOLERANCE = 1e-4


# --- one side in its own process ------------------------------------------------------------------


def in_process(args: argparse.Namespace, worker: str) -> dict[str, Any]:
    """The worker's result; {"error": ...} where it ran out of memory."""
    run = [sys.executable, __file__, *sys.argv[1:], "--worker", worker]
    done = subprocess.run(run, cwd=ROOT, capture_output=True, text=True, check=False)
    if done.returncode == 0:
        return json.loads(done.stdout.splitlines()[-1])
    if "OutOfMemoryError" in done.stderr:
        return {"error": "out of memory"}
    sys.stderr.write(done.stdout + done.stderr)
    raise SystemExit(f"distill_step: the process of {worker!r} failed ({done.returncode})")


# --- what came of it ------------------------------------------------------------------------------


def state_bytes(args: argparse.Namespace, side: str) -> int:
    """Teacher in its precision; the student's weights, gradients and AdamW states in fp32 (and the
    fp16 weights of the engine's fp16 mode).
    """
    from models.summary import summarise

    student, teacher = (summarise(config).parameters["total"] for config in model_sizes(args))
    half = side == "ours" and args.dtype != "fp32"
    masters = 2 * student if side == "ours" and args.dtype == "fp16" else 0
    return 16 * student + (2 if half else 4) * teacher + masters


def peak_rate(args: argparse.Namespace, dtype: str) -> float | None:
    """FLOP/s the device could do: as given, or from the table of known devices."""
    import torch

    from train.monitor.flops import device_peak

    if args.peak_tflops:
        return args.peak_tflops * 1e12
    return device_peak(torch.device(args.device), dtype)


def side_result(args: argparse.Namespace, side: str, runs: list[dict[str, Any]]) -> dict[str, Any]:
    """Medians over all steps of all processes of one side."""
    from train.monitor.flops import step_cost

    dtype = args.dtype if side == "ours" else args.eager_dtype
    if any("error" in run for run in runs):
        return {"dtype": dtype, "error": "out of memory"}
    seconds, busy = ([v for run in runs for v in run[key]] for key in ("seconds", "cpu_seconds"))
    median = statistics.median(seconds)
    flops = step_cost(settings(args), *model_sizes(args)).general
    rate = peak_rate(args, dtype)
    peak = max(run["peak_bytes"] for run in runs)
    return {
        "dtype": dtype,
        "seconds": {"median": median, "min": min(seconds), "max": max(seconds), "all": seconds},
        "cpu_seconds": {"median": statistics.median(busy), "all": busy},
        "samples_per_s": args.batch / median,
        "tflops": flops / median / 1e12,
        "mfu": None if rate is None else flops / median / rate,
        "peak_bytes": peak,
        "step_bytes": peak - state_bytes(args, side),
        "last_total": runs[-1]["last_total"],
    }


def entry(args: argparse.Namespace, check: dict[str, Any]) -> dict[str, Any]:
    """Measures both sides in turns."""
    from train.provenance import provenance

    runs: dict[str, list[dict[str, Any]]] = {side: [] for side in SIDES}
    load = [os.getloadavg()[0]]
    for _ in range(args.rounds):
        for side in SIDES:
            runs[side].append(in_process(args, side))
            print(side, json.dumps(runs[side][-1]), flush=True)
            load.append(os.getloadavg()[0])
    sides = {side: side_result(args, side, runs[side]) for side in SIDES}
    ratios = {}
    if not any("error" in result for result in sides.values()):
        ours, eager = sides["ours"], sides["eager"]
        ratios = {
            "speedup": eager["seconds"]["median"] / ours["seconds"]["median"],
            "speedup_of_fastest_steps": eager["seconds"]["min"] / ours["seconds"]["min"],
            "speedup_in_cpu_time": eager["cpu_seconds"]["median"] / ours["cpu_seconds"]["median"],
            "peak_memory": ours["peak_bytes"] / eager["peak_bytes"],
            "step_memory": ours["step_bytes"] / eager["step_bytes"],
        }
    return {
        "command": " ".join(["python", "benchmarks/distill_step.py", *sys.argv[1:]]),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "device": device_name(args),
        "student": args.student,
        "teacher": args.teacher,
        "image_size": args.image_size,
        "batch": args.batch,
        "dropout": "as configured, both",
        "rounds": args.rounds,
        "steps_per_round": args.steps,
        "warmup_steps": args.warmup,
        **ratios,
        **sides,
        "same_losses": check,
        "load_average": {"before": load[0], "most": max(load), "cores": os.cpu_count()},
        "provenance": provenance(1),
    }


def device_name(args: argparse.Namespace) -> str:
    """Of the GPU, or the processor's model and the threads torch uses."""
    import torch

    if args.device == "cuda":
        return torch.cuda.get_device_name()
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    model = next((line.split(":")[1].strip() for line in lines if "model name" in line), "CPU")
    return f"{model}, {torch.get_num_threads()} threads"


def save(path: Path, found: dict[str, Any]) -> None:
    """Adds the entry, in place of one by the same command."""
    entries = json.loads(path.read_text())["entries"] if path.is_file() else []
    kept = [old for old in entries if old["command"] != found["command"]]
    path.parent.mkdir(parents=True, exist_ok=True)
    what = (
        "one general pre-training distillation step of the full-size models, ours against an eager "
        "step that materialises all attention maps"
    )
    path.write_text(json.dumps({"what": what, "entries": [*kept, found]}, indent=1) + "\n")


def parser() -> argparse.ArgumentParser:
    result = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    result.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    result.add_argument("--batch", type=int, default=2, help="image-text pairs")
    result.add_argument("--image-size", type=int, default=224)
    result.add_argument("--dtype", choices=("fp32", "bf16", "fp16"), default="fp32")
    result.add_argument("--eager-dtype", choices=("fp32", "bf16", "fp16"))
    result.add_argument("--steps", type=int, default=2, help="timed in each process")
    result.add_argument("--warmup", type=int, default=1)
    result.add_argument("--rounds", type=int, default=3, help="processes of each side, in turns")
    result.add_argument("--set", nargs="*", default=[], metavar="KEY=VALUE", help="of our run file")
    result.add_argument("--peak-tflops", type=float, help="of the device, for MFU")
    result.add_argument("--student", default="efficientvlm")
    result.add_argument("--teacher", default="xvlm-clip-base")
    result.add_argument("--json", type=Path)
    result.add_argument("--worker", choices=(*SIDES, "compare"), help=argparse.SUPPRESS)
    return result


def main() -> int:
    args = parser().parse_args()
    args.eager_dtype = args.eager_dtype or args.dtype
    if args.batch < 2:
        raise SystemExit("--batch: hard negatives need at least 2 pairs")
    if args.worker:
        found = compare(args) if args.worker == "compare" else measure(args)
        print(json.dumps(found))
        return 0
    check = in_process(args, "compare")
    print(json.dumps(check), flush=True)
    worst = check["largest_relative_difference"]
    if not worst <= TOLERANCE:
        raise SystemExit(f"distill_step: losses differ by {worst:.1e} (relative)")
    found = entry(args, check)
    save(args.json or ROOT / f"benchmarks/results/distill_step_{args.device}.json", found)
    shown = {key: value for key, value in found.items() if isinstance(value, float)}
    print(json.dumps(shown, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
