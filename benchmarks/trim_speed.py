"""Wall clock of trimming at full size: 384 px, CLIP ViT-B/16 and BERT-base widths, random weights.

Teacher (12 + 6 + 6 layers) and student (6 + 3 + 3); the student pruned to 35 % fewer units in every
layer, trimmed to half its multiply-accumulates (MACs), and both. Time does not depend on the weights,
and random trimmers choose nothing sensible, so counts decide how many tokens stay: mode "bucket", and
mode "gather" with the same counts. All models take turns in one process, each round starting with
another one; ratios are taken round by round. Run from the repository root:

    python benchmarks/trim_speed.py --batch 1 8
    python benchmarks/trim_speed.py --device cuda --dtype bf16 --batch 1 8 32 128
"""

from __future__ import annotations

import argparse
import gc
import os
import sys
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]

import torch  # noqa: E402
from cells import read_json, write_json  # noqa: E402
from torch.utils.flop_counter import FlopCounterMode  # noqa: E402
from trim_models import Asked, respond, timed  # noqa: E402

if TYPE_CHECKING:
    from models.config import ModelConfig
    from models.xvlm import XVLM
    from train.evaluation.vqa import AnswerList

GOALS = {"trimmed": ("student", 1.8), "pruned and trimmed": ("teacher", 5.0)}
PRUNED, SHARE = 0.35, 0.5
TOKENS, ANSWERS, TOP_K = 16, 128, 4
_DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


def uniform_widths(config: ModelConfig, pruned: float) -> ModelConfig:
    """`pruned` of the heads and of the feed-forward units gone from every layer of every encoder."""

    def fewer(counts: Sequence[int]) -> tuple[int, ...]:
        return tuple(max(1, round(count * (1 - pruned))) for count in counts)

    vision, text, decoder = config.vision, config.text, config.decoder
    return replace(
        config,
        vision=replace(vision, heads=fewer(vision.heads), ffn=fewer(vision.ffn)),
        text=replace(
            text, heads=fewer(text.heads), cross_heads=fewer(text.cross_heads), ffn=fewer(text.ffn)
        ),
        decoder=decoder
        and replace(
            decoder,
            heads=fewer(decoder.heads),
            cross_heads=fewer(decoder.cross_heads),
            ffn=fewer(decoder.ffn),
        ),
    )


def empty(config: ModelConfig) -> XVLM:
    """The model on tensors without memory, for counting; trimmers keep the configured counts."""
    from models.xvlm import XVLM

    with torch.device("meta"):
        model = XVLM(config).eval()
    if config.trimming is not None:
        model.set_trimming("bucket")
    return model


def macs_of(model: XVLM, answers: AnswerList) -> int:
    """MACs of one row, counted by torch. The model is `empty`."""
    asked = asked_of(model.config, 1, torch.device("meta"))
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        _until_fused(model, asked)
    return counter.get_total_flops() // 2 + decoder_macs_of(model.config, answers)


def _until_fused(model: XVLM, asked: Asked) -> None:
    """`respond` up to the decoder, whose ranking reads values, which meta tensors have not."""
    text = model.encode_text(asked.ids, asked.mask)
    guide = text.last[:, 0] if model.guided else None
    image = model.encode_image(asked.images.float(), guide=guide)
    model.fuse(text.last, asked.mask, image.last, image.mask)


def decoder_macs_of(config: ModelConfig, answers: AnswerList) -> int:
    """MACs of ranking answers of one token each, as `rank_states` does it."""
    from train.evaluation.macs import count_macs

    length = answers.ids.shape[1] - 1
    return count_macs(config, None, TOKENS, length, min(TOP_K, len(answers)))["decoder"]


def trimmed(config: ModelConfig, answers: AnswerList, share: float) -> ModelConfig:
    """The configuration with the default sites, each keeping the same share of what it sees, so that
    a row costs at most `share` of the MACs without trimmers.

    Raises:
        ValueError: what sites cannot save costs more than that.
    """
    from models.trimming import default_trimming
    from models.trimming.baselines import geometric

    goal = share * macs_of(empty(config), answers)
    patches, trimming = config.vision.patches, default_trimming(config)
    first, found = config.text.text_layers, None

    def keep(rate: int) -> dict[str, tuple[int, ...]]:
        counts = geometric(patches, rate / 1000, len(trimming.vision))
        return {"vision_keep": counts, "fusion_keep": (counts[-1],) * len(trimming.fusion)}

    model = empty(replace(config, trimming=replace(trimming, **keep(1000), mode="bucket")))
    vision, text = model.vision.trimmers, model.text.trimmers
    assert vision is not None and text is not None
    low, high = 1, 1000  # thousandths of the share kept at a site
    while low <= high:
        rate = (low + high) // 2
        counts = keep(rate)
        vision.keep = dict(zip(trimming.vision, counts["vision_keep"], strict=True))
        layers = [first + layer for layer in trimming.fusion]
        text.context_keep = dict(zip(layers, counts["fusion_keep"], strict=True))
        if macs_of(model, answers) <= goal:
            found, low = counts, rate + 1
        else:
            high = rate - 1
    if found is None:
        raise ValueError(
            f"no counts at {trimming.vision} bring the cost to {share:g} of the model's"
        )
    return replace(config, trimming=replace(trimming, **found, mode="bucket"))


def configurations(
    size: int, answers: AnswerList, presets_: Sequence[str]
) -> dict[str, ModelConfig]:
    """Name -> configuration of every model that is compared."""
    from models import presets

    pixels = {"image_size": size} if size else {}
    teacher, student = (presets.config(n, form="vqa", vision=pixels) for n in presets_)
    pruned = uniform_widths(student, PRUNED)
    return {
        "teacher": teacher,
        "student": student,
        "pruned": pruned,
        "trimmed": trimmed(student, answers, SHARE),
        "pruned and trimmed": trimmed(pruned, answers, SHARE),
    }


def asked_of(config: ModelConfig, batch: int, device: torch.device) -> Asked:
    """Random pictures and questions of `TOKENS` tokens, none of them padding."""
    random = torch.Generator().manual_seed(0)
    shape = (batch, 3, config.vision.image_size, config.vision.image_size)
    ids = torch.randint(2, config.text.vocab_size, (batch, TOKENS), generator=random)
    return Asked(
        torch.randint(0, 256, shape, generator=random, dtype=torch.uint8).to(device),
        ids.to(device),
        torch.ones_like(ids, dtype=torch.bool).to(device),
    )


def calls_of(
    configs: dict[str, ModelConfig], device: torch.device, dtype: torch.dtype
) -> dict[str, XVLM]:
    """Every model, and the trimmed ones in mode "gather" as well (the same weights)."""
    from models.xvlm import XVLM

    torch.manual_seed(0)
    models: dict[str, XVLM] = {}
    for name, config in configs.items():
        models[name] = XVLM(config).to(device=device, dtype=dtype).eval()
        if config.trimming is not None:
            models[name].set_trimming("bucket")
    return models


def measure(
    models: dict[str, XVLM], batch: int, rounds: int, device: torch.device
) -> dict[str, Any]:
    """Times of all models in turns, and how many times as fast as teacher and student they are."""
    from train.evaluation.latency import ratios
    from train.evaluation.workload import Workload

    config = models["teacher"].config
    asked = asked_of(config, batch, device)
    answers = Workload(answers=ANSWERS).answer_list(config.text.vocab_size, device)

    def call(model: XVLM, mode: str | None) -> list[Any]:
        if mode is not None:
            model.set_trimming(mode, fixed=True)
        return respond(model, asked, answers, TOP_K).tolist()

    calls = {}
    for name, model in models.items():
        if model.config.trimming is None:
            calls[name] = partial(call, model, None)
        else:
            calls[name] = partial(call, model, "bucket")
            calls[f"{name}, gather"] = partial(call, model, "gather")
    found = timed(calls, rounds, "teacher", device, warm_up=1)
    for row in found.values():
        for one, base in ((row, found["student"]), (row.get("cpu"), found["student"].get("cpu"))):
            if one is not None and base is not None:
                one["speedup_over_student"] = ratios(base["seconds"], one["seconds"])
                one["speedup_over_teacher"] = one.pop("speedup")
    return found


def verdicts(found: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Goal by goal: what was reached, by the clock on the wall, and whether."""
    told = {}
    for name, (than, goal) in GOALS.items():
        key = f"speedup_over_{than}"
        reached = found[name][key]["median"]
        told[f"{name} over {than}"] = {"goal": goal, "median": reached, "met": reached >= goal}
        if "cpu" in found[name]:
            told[f"{name} over {than}"]["cpu"] = found[name]["cpu"][key]["median"]
    return told


def _times(row: dict[str, Any]) -> str:
    said = [
        f"{one['speedup_over_teacher']['median']:.2f}x the teacher, "
        f"{one['speedup_over_student']['median']:.2f}x the student{by}"
        for by, one in (("", row), (" by processor time", row.get("cpu")))
        if one is not None
    ]
    return "; ".join(said)


def parser() -> argparse.ArgumentParser:
    result = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    result.add_argument("--batch", type=int, nargs="+", default=[1, 8])
    result.add_argument("--rounds", type=int, default=5)
    result.add_argument("--device", default="cpu")
    result.add_argument("--dtype", choices=list(_DTYPES), default="fp32")
    result.add_argument("--image-size", type=int, default=384)
    result.add_argument("--presets", nargs=2, default=["xvlm-clip-base", "efficientvlm"])
    result.add_argument("--json", type=Path, default=ROOT / "benchmarks/results/trim_speed.json")
    return result


def main(argv: Sequence[str] | None = None) -> int:
    from train.evaluation.latency import device_name
    from train.evaluation.workload import Workload
    from train.provenance import provenance

    args = parser().parse_args(argv)
    device = torch.device(args.device)
    answers = Workload(answers=ANSWERS).answer_list(256)
    configs = configurations(args.image_size, answers, args.presets)
    macs = {name: macs_of(empty(config), answers) for name, config in configs.items()}
    models, said = (
        calls_of(configs, device, _DTYPES[args.dtype]),
        sys.argv[1:] if argv is None else argv,
    )
    result = read_json(args.json)  # other batch sizes stay
    result |= {
        "what": "seconds of a VQA pass at full size with random weights; counts decide what is kept",
        "note": "all models in turns in one process on a machine that others used at the same time: "
        "ratios are taken round by round, and medians of them count, not the milliseconds",
        "command": " ".join(["python", "benchmarks/trim_speed.py", *said]),
        "device": device_name(device),
        "threads": torch.get_num_threads(),
        "dtype": args.dtype,
        "image_size": args.image_size,
        "macs": macs,
        "keep": {
            name: config.trimming.vision_keep for name, config in configs.items() if config.trimming
        },
        "provenance": provenance(1),
    }  # fmt: skip
    for batch in args.batch:
        try:
            found = measure(models, batch, args.rounds, device)
        except torch.OutOfMemoryError:
            result.setdefault("batches", {})[str(batch)] = {"out_of_memory": True}
            gc.collect()
            continue
        result.setdefault("batches", {})[str(batch)] = {
            "models": found, "goals": verdicts(found), "load_average": os.getloadavg(),
        }  # fmt: skip
        write_json(args.json, result)
        for name, row in found.items():
            cost = macs[name.split(",")[0]] / 1e9
            print(
                f"batch {batch:3d}  {name:28s} {cost:7.2f} GMACs {row['median']:9.1f} ms "
                f"({row['q1']:.1f} to {row['q3']:.1f})  {_times(row)}",
                flush=True,
            )
    return 0


if __name__ == "__main__":
    sys.exit(main())
