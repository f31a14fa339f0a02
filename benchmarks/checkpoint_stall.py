"""How long does a save hold up training? Synchronous and asynchronous saves of a mid-size model.

Trains a stack of linear layers with AdamW at ZeRO 1 (one process), saves every few steps through the
checkpoint manager, and times every step with what it waits for. Run from the repository root:

    python benchmarks/checkpoint_stall.py --json benchmarks/results/checkpoint_stall.json

The stall is the time that `save` takes from the loop (a copy to host memory, and the wait for the
save before); what a step loses beside the writer is the median of the steps during which it wrote,
less the median of all others.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import sys
import tempfile
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))


def model(width: int, depth: int) -> Any:
    """`depth` square layers of `width`."""
    from torch import nn

    return nn.Sequential(*(nn.Linear(width, width) for _ in range(depth)))


def measure(args: argparse.Namespace, asynchronous: bool, folder: Path) -> dict[str, Any]:
    """Times of one run in seconds."""
    import deepspeed
    import torch

    from train.checkpoint.manager import CheckpointManager

    torch.manual_seed(0)
    module = model(args.width, args.depth)
    engine, *_ = deepspeed.initialize(
        model=module,
        optimizer=torch.optim.AdamW(module.parameters(), lr=1e-4),
        config={
            "train_micro_batch_size_per_gpu": args.batch,
            "gradient_clipping": 0.0,
            "zero_optimization": {"stage": 1},
            "zero_allow_untested_optimizer": True,
        },
    )
    manager = CheckpointManager(folder, 1, run_id="stall", asynchronous=asynchronous)
    steps: list[float] = []
    beside: list[float] = []
    stalls: list[float] = []
    x = torch.randn(args.batch, args.width).to(engine.device)
    for step in range(1, args.steps + 1):
        started = time.perf_counter()
        engine.backward(engine(x).square().mean())
        engine.step()
        seconds = time.perf_counter() - started
        writing = manager._writer is not None and manager._writer.is_alive()
        (beside if writing else steps).append(seconds)
        if step % args.every == 0:
            started = time.perf_counter()
            manager.save(engine, step, {"step": step}, wait=False)
            stalls.append(time.perf_counter() - started)
    manager.wait()
    size = sum(path.stat().st_size for path in folder.rglob("*.pt"))
    return {
        "step_median_s": statistics.median(steps),
        "stall_median_s": statistics.median(stalls),
        "stall_max_s": max(stalls),
        "stall_in_steps": statistics.median(stalls) / statistics.median(steps),
        "step_beside_the_writer_median_s": statistics.median(beside) if beside else None,
        "steps_beside_the_writer": len(beside),
        "saves": len(stalls),
        "checkpoint_mb": size / 1e6,
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--width", type=int, default=1024)
    parser.add_argument("--depth", type=int, default=24)
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument("--steps", type=int, default=24)
    parser.add_argument("--every", type=int, default=6)
    parser.add_argument("--folder", type=Path, default=None, help="where checkpoints go")
    parser.add_argument("--json", type=Path, default=None)
    args = parser.parse_args()
    import torch

    from train.provenance import provenance
    from train.runtime.distributed import choose_accelerator, finish, start
    from train.runtime.ranks import free_port

    choose_accelerator()
    os.environ |= {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1"}
    os.environ["MASTER_PORT"] = str(free_port())
    start()
    work = Path(tempfile.mkdtemp(prefix="stall-", dir=args.folder))
    try:
        measured = {
            name: measure(args, asynchronous, work / name)
            for name, asynchronous in (("synchronous", False), ("asynchronous", True))
        }
    finally:
        shutil.rmtree(work)
    result = {
        "what": "seconds that a checkpoint takes from training, one process",
        "command": " ".join(["python", *sys.argv]),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
        "parameters": args.depth * (args.width + 1) * args.width,
        **measured,
        "provenance": provenance(1),
    }
    print(json.dumps(result, indent=1))
    if args.json is not None:
        args.json.write_text(json.dumps(result, indent=1) + "\n")
    finish()
    return 0


if __name__ == "__main__":
    sys.exit(main())
