"""What a sample costs: CPU seconds of this loader, webdataset, Energon and Hugging Face datasets.

    python -m venv RIVALS
    .venv/bin/python -c 'import site; print(site.getsitepackages()[0])' \\
        > RIVALS/lib/python3.11/site-packages/project.pth
    RIVALS/bin/pip install megatron-energon datasets
    RIVALS/bin/python benchmarks/loader.py            about 8 minutes on two cores
    RIVALS/bin/python benchmarks/loader.py --resume   a million samples: resume and memory

The rivals live in an environment of their own, which sees the project's packages; one that is not
installed is reported as missing. All read the same shards, from the page cache, one thread each, with
the same allocator settings, and must deliver the same keys. Each measurement is a process of its own
(forked after the imports), repeats go round all contestants in turn. CPU time is that of the process
and of its workers, from making the loader to the last batch.

A  each rival's canonical recipe, against ours: at most a third of canonical webdataset
B  the same decoding and crop for all: ours at most 0.9 of the best rival, decoding at least 85 % of it
C  the whole pre-training transform
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import platform
import resource
import statistics
import sys
import tempfile
import time
import traceback
from collections import Counter
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
# Set before numpy and torch are loaded (inside functions, below): one thread for everybody.
for _name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
    os.environ[_name] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ["HF_DATASETS_OFFLINE"] = os.environ["HF_HUB_OFFLINE"] = "1"

WORKERS = (0, 1, 2)
WARM_UP = 128
# What a contestant needs, and the package whose version is recorded.
NEEDS = {"energon": ("megatron.energon", "megatron-energon"), "datasets": ("datasets", "datasets")}


def cpu_seconds() -> float:
    """User and system time of this process and of its finished children."""
    usages = (resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return sum(usage.ru_utime + usage.ru_stime for usage in usages)


def missing(contestant: str) -> str | None:
    """Name of the package that a contestant lacks."""
    module, package = NEEDS.get(contestant, (None, None))
    if module is None:
        return None
    try:
        return None if importlib.util.find_spec(module) else package
    except ModuleNotFoundError:
        return package


def one_pass(part: str, contestant: str, folder: Path, workers: int) -> dict[str, Any]:
    """Runs one contestant over the whole folder, in this process.

    Before that over a small one, uncounted: what is imported or prepared once a process is not a
    cost of samples.
    """
    import gc

    from benchmarks.loading.contestants import CONTESTANTS

    run = CONTESTANTS[part, contestant]
    for _ in run(warm_up_folder(folder), 0):
        pass
    gc.collect()
    keys: Counter[str] = Counter()
    stream = run(folder, workers)
    if contestant == "decode only":
        next(stream)
    cpu, wall = cpu_seconds(), time.perf_counter()
    for batch in stream:
        keys.update(batch)
    # Workers count when they have been waited for.
    del stream
    gc.collect()
    samples = sum(keys.values())
    return {
        "cpu_ms": 1e3 * (cpu_seconds() - cpu) / samples,
        "wall_ms": 1e3 * (time.perf_counter() - wall) / samples,
        "keys": dict(keys),
    }


def warm_up_folder(folder: Path) -> Path:
    """The small folder beside a profile's folder."""
    profile, _, seed = folder.name.split("-")
    return folder.with_name(f"{profile}-{WARM_UP}-{seed}")


def in_process(*arguments: Any) -> dict[str, Any]:
    """`one_pass` in a forked process, which inherits the imports and the allocator's settings.

    Raises:
        RuntimeError: it failed; its traceback was printed.
    """
    receiver, sender = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(receiver)
        status = 1
        try:
            with os.fdopen(sender, "w") as pipe:
                json.dump(one_pass(*arguments), pipe)
            status = 0
        except BaseException:  # noqa: BLE001 - a forked process must end here
            traceback.print_exc()
        finally:
            sys.stderr.flush()
            os._exit(status)
    os.close(sender)
    with os.fdopen(receiver) as pipe:
        answer = pipe.read()
    if os.waitpid(child, 0)[1] != 0:
        raise RuntimeError(f"{arguments}: the measurement failed")
    return json.loads(answer)


def spread(values: list[float]) -> dict[str, Any]:
    return {
        "median": round(statistics.median(values), 4),
        "min": round(min(values), 4),
        "max": round(max(values), 4),
        "runs": len(values),
    }


def measure(folder: Path, parts: str, workers: tuple[int, ...], repeats: int) -> list[dict]:
    """All contestants of `parts` on one folder: rows with spreads, keys compared.

    Raises:
        RuntimeError: a contestant failed, or did not deliver every sample exactly once.
    """
    from benchmarks.loading.contestants import CONTESTANTS

    wanted = {
        f"{n:08d}": 1 for n in range(json.loads((folder / "manifest.json").read_text())["samples"])
    }
    rows: dict[tuple, dict] = {}
    for repeat in range(repeats):
        for count in workers:
            for part, contestant in CONTESTANTS:
                name = (part, contestant, count)
                floor = contestant == "decode only"
                if part not in parts or (floor and count) or missing(contestant):
                    continue
                result = in_process(part, contestant, folder, count)
                if result["keys"] != wanted:
                    raise RuntimeError(f"{name}: {len(result['keys'])} keys, not each sample once")
                row = rows.setdefault(name, {"cpu_ms": [], "wall_ms": [], "load": []})
                row["cpu_ms"].append(result["cpu_ms"])
                row["wall_ms"].append(result["wall_ms"])
                row["load"].append(round(os.getloadavg()[0], 2))
                print(f"  {repeat + 1}/{repeats} {part} {contestant:20s} workers {count} "
                      f"{result['cpu_ms']:.3f} ms", file=sys.stderr, flush=True)  # fmt: skip
    return [
        {"part": part, "contestant": contestant, "workers": count, "cpu_ms": spread(row["cpu_ms"]),
         "wall_ms": spread(row["wall_ms"]), "load": row["load"]}
        for (part, contestant, count), row in rows.items()
    ]  # fmt: skip


def verdicts(rows: list[dict]) -> list[dict[str, Any]]:
    """The issue's ratios, of medians, for each number of workers."""
    cost = {(r["part"], r["contestant"], r["workers"]): r["cpu_ms"]["median"] for r in rows}
    found = []
    for count in sorted({row["workers"] for row in rows}):
        ours = cost.get(("B", "ours", count))
        rivals = {n: v for (p, n, w), v in cost.items()
                  if (p, w) == ("B", count) and n not in ("ours", "decode only")}  # fmt: skip
        if ours is None or not rivals:
            continue
        best = min(rivals, key=rivals.__getitem__)
        verdict = {"workers": count, "best_rival": best, "B_ratio": round(ours / rivals[best], 3)}
        canonical = cost.get(("A", "webdataset", count))
        if canonical:
            verdict["A_ratio"] = round(ours / canonical, 3)
        if (floor := cost.get(("B", "decode only", 0))) is not None:
            verdict["decode_share"] = round(floor / ours, 3)
        if ("C", "ours", count) in cost and ("C", "webdataset canonical", count) in cost:
            verdict["C_ratio"] = round(
                cost["C", "ours", count] / cost["C", "webdataset canonical", count], 3
            )
        found.append(verdict)
    return found


def table(profile: str, rows: list[dict], ratios: list[dict]) -> str:
    """What was found, for people: CPU ms per sample, median (min-max)."""
    counts = sorted({row["workers"] for row in rows})
    lines = [f"{profile} px, CPU ms per sample: median (min-max)"]
    lines.append(f"{'':26s}" + "".join(f"{f'workers {count}':>24s}" for count in counts))
    for part, contestant in dict.fromkeys((row["part"], row["contestant"]) for row in rows):
        cells = ""
        for count in counts:
            row = next((r for r in rows if (r["part"], r["contestant"], r["workers"])
                        == (part, contestant, count)), None)  # fmt: skip
            text = ""
            if row:
                cpu = row["cpu_ms"]
                text = f"{cpu['median']:.2f} ({cpu['min']:.2f}-{cpu['max']:.2f})"
            cells += f"{text:>24s}"
        lines.append(f"{part}  {contestant:23s}" + cells)
    lines += [", ".join(f"{name} {value}" for name, value in ratio.items()) for ratio in ratios]
    return "\n".join(lines)


def environment() -> dict[str, Any]:
    """Versions and machine."""
    found = {}
    for package in ("torch", "torchvision", "pillow", "simplejpeg", "timm", "tokenizers", "webdataset",
                    "megatron-energon", "datasets"):  # fmt: skip
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = None
    model = next((line.split(":", 1)[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines()
                  if line.startswith("model name")), platform.processor())  # fmt: skip
    return {"versions": found, "cpu": model, "cores": len(os.sched_getaffinity(0)),
            "python": platform.python_version()}  # fmt: skip


def compare(args: argparse.Namespace) -> dict[str, Any]:
    """Parts A, B and C on both profiles."""
    import torch

    from benchmarks.loading import shards
    from data_pipeline.worker import keep_memory

    torch.set_num_threads(1)
    absent = sorted({package for name in NEEDS if (package := missing(name))})
    result: dict[str, Any] = {"missing": absent, "load_before": os.getloadavg(), "profiles": {}}
    folders = {}
    for profile in args.profiles:
        for samples in (WARM_UP, args.samples):
            folders[profile] = shards.write_profile(args.data, profile, samples, args.seed)
            if not missing("energon"):
                energon = Path(sys.executable).with_name("energon")
                shards.energon_copy(folders[profile], energon)
    # The costly imports once, here: the forked processes inherit them.
    import torchvision.transforms  # noqa: F401
    import webdataset  # noqa: F401
    from timm.data import auto_augment  # noqa: F401

    for name, (module, _) in NEEDS.items():
        if not missing(name):
            importlib.import_module(module)
    import benchmarks.loading.contestants  # noqa: F401

    result["malloc_settings"] = keep_memory()
    for profile, folder in folders.items():
        size = shards.warm(folder)
        rows = measure(folder, args.parts, args.workers, args.repeats)
        ratios = verdicts(rows)
        result["profiles"][profile] = {"samples": args.samples, "shard_bytes": size,
                                       "rows": rows, "ratios": ratios}  # fmt: skip
        print(table(profile, rows, ratios), flush=True)
    result["load_after"] = os.getloadavg()
    return result


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="256 samples, one repeat")
    parser.add_argument(
        "--resume", action="store_true", help="a million samples instead: resume, memory"
    )
    parser.add_argument(
        "--samples", type=int, help="of each profile (default 768; with --resume 1000000)"
    )
    parser.add_argument("--repeats", type=int, help="(default 3)")
    parser.add_argument("--parts", default="ABC")
    parser.add_argument("--profiles", type=lambda text: text.split(","), default=["384", "640"])
    parser.add_argument(
        "--workers", type=lambda text: tuple(map(int, text.split(","))), default=WORKERS
    )
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument(
        "--data", type=Path, default=Path(tempfile.gettempdir()) / "espalier-loader-benchmark",
        help="where the shards are made and kept",
    )  # fmt: skip
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    args.repeats = args.repeats or (1 if args.quick else 3)
    if args.resume:
        from benchmarks.loading.resume import resume

        args.samples = args.samples or (100_000 if args.quick else 1_000_000)
        name, content = "loader_resume", resume(args.data, args.samples)
        print(json.dumps(content, indent=1))
    else:
        args.samples = args.samples or (256 if args.quick else 768)
        name, content = "loader", compare(args)
    result = {
        "command": " ".join(["python", *sys.argv]),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "seed": args.seed,
        "environment": environment(),
        **content,
    }
    target = args.json or (None if args.quick else ROOT / f"benchmarks/results/{name}.json")
    if target:
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(json.dumps(result, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
