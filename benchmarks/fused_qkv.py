"""Does one product for queries, keys and values pay in the ViT? Three ways, full-size layer.

    three    three products with their own weights (what models/attention.py does)
    joined   weights joined at every call, one product
    fused    one stored weight, one product (what a fused layer could reach at best)

Each is a whole self-attention of ViT-B/16 at 224 px without its output projection. The three take
turns; processor time of one thread on a CPU, the wall clock on a GPU. Run from the repository root:

    python benchmarks/fused_qkv.py

Results go to benchmarks/results/fused_qkv.json.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks.model_step import spread  # noqa: E402
from train.evaluation.latency import device_name, interleave  # noqa: E402
from train.provenance import provenance  # noqa: E402

WIDTH, HEADS, TOKENS = 768, 12, 197


def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """(B, N, D) each -> (B, N, D)."""
    q, k, v = (x.unflatten(-1, (HEADS, -1)).transpose(1, 2) for x in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)


def ways(batch: int, dtype: torch.dtype, device: str, train: bool) -> dict[str, Callable[[], Any]]:
    """The three calls on the same numbers; with `train` each ends in a backward."""
    torch.manual_seed(0)
    place: dict[str, Any] = {"dtype": dtype, "device": device}
    weights = [0.02 * torch.randn(WIDTH, WIDTH, **place) for _ in range(3)]
    biases = [torch.randn(WIDTH, **place) for _ in range(3)]
    weight, bias = torch.cat(weights), torch.cat(biases)
    x = torch.randn(batch, TOKENS, WIDTH, **place)
    for tensor in (*weights, *biases, weight, bias, x):
        tensor.requires_grad_(train)

    def three() -> Tensor:
        q, k, v = (F.linear(x, w, b) for w, b in zip(weights, biases, strict=True))
        return attention(q, k, v)

    def joined() -> Tensor:
        q, k, v = F.linear(x, torch.cat(weights), torch.cat(biases)).chunk(3, -1)
        return attention(q, k, v)

    def fused() -> Tensor:
        q, k, v = F.linear(x, weight, bias).chunk(3, -1)
        return attention(q, k, v)

    calls: dict[str, Callable[[], Any]] = {"three": three, "joined": joined, "fused": fused}
    for name, call in calls.items():
        torch.testing.assert_close(call(), three(), atol=2e-2, rtol=2e-2, msg=name)
    if not train:
        return calls
    return {name: lambda call=call: call().sum().backward() for name, call in calls.items()}


def main() -> int:
    cuda = torch.cuda.is_available()
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 8, 64] if cuda else [1, 8])
    parser.add_argument("--repeats", type=int, default=200 if cuda else 31)
    parser.add_argument("--json", type=Path, default=ROOT / "benchmarks/results/fused_qkv.json")
    args = parser.parse_args()
    device = "cuda" if cuda else "cpu"
    torch.set_num_threads(1)
    load, rows = os.getloadavg(), []
    for dtype in (torch.float32, torch.bfloat16):
        for batch in args.batch:
            for train in (False, True):
                with torch.set_grad_enabled(train):
                    seconds = interleave(
                        list(ways(batch, dtype, device, train).items()),
                        args.repeats,
                        synchronise=torch.cuda.synchronize if cuda else lambda: None,
                        clock=time.perf_counter if cuda else time.process_time,
                    )
                row: dict[str, Any] = {"dtype": str(dtype), "batch": batch, "backward": train}
                for name, values in seconds.items():
                    row[name] = {"seconds": spread(values)}
                    pairs = zip(seconds["three"], values, strict=True)
                    row[name]["speedup"] = spread([own / value for own, value in pairs])
                rows.append(row)
                print({name: round(row[name]["speedup"]["median"], 3) for name in seconds}, row)
    result = {
        "what": "self-attention of one ViT-B/16 layer; speedup over three products, same round",
        "command": " ".join(["python", *sys.argv]),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "device": device_name(torch.device(device)),
        "clock": "wall" if cuda else "processor time, one thread",
        "repeats": args.repeats,
        "rows": rows,
        "load_average": {"before": load, "after": os.getloadavg()},
        "provenance": provenance(1),
    }
    args.json.parent.mkdir(parents=True, exist_ok=True)
    args.json.write_text(json.dumps(result, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
