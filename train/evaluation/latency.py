"""How long one full forward of the task takes, fairly: the models take turns in one process."""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from tqdm import tqdm

from data_pipeline.batches import VqaBatch

if TYPE_CHECKING:
    from models.xvlm import XVLM
    from train.evaluation.vqa import AnswerList

__all__ = [
    "bench",
    "device_name",
    "interleave",
    "measure",
    "summarise",
    "synthetic_answers",
    "synthetic_batch",
]


def interleave(
    calls: Sequence[tuple[str, Callable[[], object]]],
    repeats: int,
    warm_up: int = 3,
    synchronise: Callable[[], object] = lambda: None,
    clock: Callable[[], float] = time.perf_counter,
    progress: bool = False,
) -> dict[str, list[float]]:
    """Seconds of each call, `repeats` of them, taken in turns.

    Each round runs every call once and starts with another one, so that a busy moment of the
    machine, its temperature or a neighbour's caches hit all of them alike.
    """
    for _, call in calls:
        for _ in range(warm_up):
            call()
    seconds: dict[str, list[float]] = {name: [] for name, _ in calls}
    for turn in tqdm(
        range(repeats), desc="bench", unit="round", disable=None if progress else True
    ):
        shift = turn % len(calls)
        for name, call in (*calls[shift:], *calls[:shift]):
            synchronise()
            begin = clock()
            call()
            synchronise()
            seconds[name].append(clock() - begin)
    return seconds


def summarise(seconds: Sequence[float]) -> dict[str, float]:
    """Median and quartiles in milliseconds. Raises ValueError on fewer than two values."""
    if len(seconds) < 2:
        raise ValueError("at least two repeats are needed for quartiles")
    low, middle, high = statistics.quantiles(seconds, n=4, method="inclusive")
    return {
        "median": middle * 1e3,
        "q1": low * 1e3,
        "q3": high * 1e3,
        "repeats": float(len(seconds)),
    }


def synthetic_answers(count: int, vocabulary: int) -> AnswerList:
    """`count` answers of one token each between two marks; time does not depend on which tokens
    they are.
    """
    from train.evaluation.vqa import AnswerList

    ids = torch.stack(
        [torch.tensor([0, index % vocabulary, 1 % vocabulary]) for index in range(count)]
    )
    return AnswerList(
        tuple(str(i) for i in range(count)), ids, torch.ones_like(ids, dtype=torch.bool)
    )


def synthetic_batch(
    batch: int,
    image_size: int,
    text_tokens: int,
    answers: AnswerList,
    seed: int = 0,
    vocabulary: int = 1000,
) -> VqaBatch:
    """`batch` random pictures with one question of `text_tokens` tokens each; time does not depend
    on the values.
    """
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, vocabulary, (batch, text_tokens), generator=generator)
    ids[:, 0] = answers.ids[0, 0]
    return VqaBatch(
        images=torch.randint(
            0, 256, (batch, 3, image_size, image_size), generator=generator, dtype=torch.uint8
        ),
        image_index=torch.arange(batch),
        valid=torch.ones(batch, dtype=torch.bool),
        keys=tuple(str(row) for row in range(batch)),
        question_ids=ids,
        question_mask=torch.ones(batch, text_tokens, dtype=torch.bool),
        answer_ids=answers.ids[:1].expand(batch, -1),
        answer_mask=answers.mask[:1].expand(batch, -1),
        answer_row=torch.arange(batch),
        answer_weight=torch.ones(batch),
        answers=tuple({answers.strings[0]: 1.0} for _ in range(batch)),
        questions=("",) * batch,
        question_types=("",) * batch,
    )


@contextmanager
def _threads(count: int | None) -> Iterator[None]:
    before = torch.get_num_threads()
    if count is not None:
        torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def measure(
    models: Sequence[tuple[str, XVLM]],
    answers: AnswerList,
    batch_sizes: Sequence[int] = (1, 32),
    threads: int | None = None,
    repeats: int = 30,
    text_tokens: int = 16,
    top_k: int = 128,
    warm_up: int = 3,
    device: torch.device | str = "cpu",
    progress: bool = False,
) -> dict[str, dict[str, dict[str, Any]]]:
    """Latency of image and question in, answer out, in the models' own dtype (fp32 on the CPU).

    Returns:
        name -> batch size as a string -> {"median", "q1", "q3" in ms, "repeats", "rows_per_s",
        "seconds": [...]}.
    Raises ValueError where two models have one name.
    """
    from train.evaluation.vqa import rank_answers

    names = [name for name, _ in models]
    if len(set(names)) != len(names):
        raise ValueError(f"two models have the same name among {', '.join(names)}; rename one")
    device = torch.device(device)
    synchronise = torch.cuda.synchronize if device.type == "cuda" else (lambda: None)
    placed, result = answers.to(device), {name: {} for name in names}

    def call(model: XVLM, batch: VqaBatch) -> Callable[[], object]:
        # .tolist() brings the answer out, so that a queue on an accelerator is not mistaken for an
        # answer.
        return lambda: rank_answers(model, batch, placed, top_k).tolist()

    with _threads(threads), torch.inference_mode():
        for size in batch_sizes:
            calls = []
            for name, model in models:
                model.to(device).eval()
                vision, text = model.config.vision, model.config.text
                batch = synthetic_batch(
                    size, vision.image_size, text_tokens, answers, vocabulary=text.vocab_size
                )
                calls.append((name, call(model, batch.to(device))))
            seconds = interleave(calls, repeats, warm_up, synchronise, progress=progress)
            for name, values in seconds.items():
                summary = summarise(values)
                rate = size / summary["median"] * 1e3
                result[name][str(size)] = summary | {"rows_per_s": rate, "seconds": values}
    return result


def bench(
    folders: Mapping[str, Path],
    batch_sizes: tuple[int, ...] = (1, 32),
    *,
    repeats: int = 40,
    warm_up: int = 3,
    text_tokens: int = 16,
    answers: int = 128,
    top_k: int = 128,
    threads: int | None = None,
    device: str = "cpu",
) -> dict[str, Any]:
    """Latency, parameters, MACs and memory of model folders by name.

    Returns:
        {"models": {name: {"latency", "parameters", "macs", "weights_bytes"}}, "device", "threads",
        ...}.
    """
    from models import from_pretrained
    from train.evaluation import macs
    from train.evaluation.accuracy import require_form

    models = {name: from_pretrained(folder) for name, folder in folders.items()}
    for name, model in models.items():
        require_form(model, "vqa", folders[name])
    listed = synthetic_answers(answers, min(m.config.text.vocab_size for m in models.values()))
    kept = min(top_k, answers)
    timing = measure(
        list(models.items()),
        listed,
        batch_sizes,
        threads,
        repeats,
        text_tokens,
        kept,
        warm_up,
        device,
        progress=True,
    )
    result = {
        name: {
            "latency": timing[name],
            "parameters": macs.parameters(model),
            "macs": macs.count_macs(
                model.config,
                text_tokens=text_tokens,
                answer_tokens=listed.ids.shape[1] - 1,
                top_k=kept,
            ),
            "weights_bytes": sum(p.numel() * p.element_size() for p in model.parameters()),
        }
        for name, model in models.items()
    }
    return {
        "models": result,
        "device": device_name(torch.device(device)),
        "threads": threads or torch.get_num_threads(),
        "repeats": repeats,
        "text_tokens": text_tokens,
        "top_k": kept,
    }


def device_name(device: torch.device) -> str:
    """The processor's or accelerator's name, as a person knows it."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    info = Path("/proc/cpuinfo")
    rows = info.read_text(errors="replace").splitlines() if info.is_file() else []
    names = [row.partition(":")[2].strip() for row in rows if row.startswith("model name")]
    return f"{names[0] if names else 'CPU'}, {os.cpu_count()} logical cores"
