"""Builds a blocksworld data folder: shards, manifests, tokenizer, answers and dataset.json.

The work is cut into shards, and a shard depends on (seed, split, number) and the settings alone,
so the bytes are the same for any number of processes. `dataset.json` is written last: a folder
that has one is complete.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from data_pipeline.blocksworld import language
from data_pipeline.blocksworld.blind import Tally, blind_accuracy
from data_pipeline.blocksworld.questions import ANSWERS, DEFAULT_MIX, TYPES, questions
from data_pipeline.blocksworld.render import encode, render
from data_pipeline.blocksworld.scenes import COLOURS, SHAPES, SPLITS, Scene, draw_scene
from data_pipeline.blocksworld.vocabulary import vocabulary, write_tokenizer
from data_pipeline.manifest_writer import write_manifest
from data_pipeline.parallel import map_ordered, worker_pool
from data_pipeline.progress import progress
from data_pipeline.shards import clear_shards, dump_json, write_shard

__all__ = ["GRAMMAR_VERSION", "TASKS", "build_blocksworld", "load_digests"]

GRAMMAR_VERSION = 1
TASKS = ("pretrain", "vqa", "nlvr2", "retrieval", "captioning", "grounding")
_MAX_ATTEMPTS = 1000

Sample = tuple[str, dict[str, bytes]]


@dataclass(frozen=True)
class Settings:
    """What all shards of a data folder have in common."""

    out: Path
    seed: int
    image_size: int
    kind: str
    tasks: tuple[str, ...]
    mix: Mapping[str, float] = field(default_factory=lambda: dict(DEFAULT_MIX))
    questions_per_scene: int = 8


@dataclass(frozen=True)
class Unit:
    """One shard's work: the scenes of one range, and which of them need another attempt."""

    split: str
    number: int
    start: int
    stop: int
    attempts: Mapping[int, int] = field(default_factory=dict)

    @property
    def scenes(self) -> int:
        return self.stop - self.start


# -- one shard -----------------------------------------------------------------------------------


def _vqa_json(settings: Settings, scene: Scene, tally: Tally) -> dict[str, Any] | None:
    asked = questions(scene, settings.questions_per_scene, settings.mix)
    tally.update((item["type"], item["question"], item["answer"]) for item in asked)
    rows = [
        {
            "question_id": f"{scene.key}-q{place}",
            "question": item["question"],
            "answers": {item["answer"]: 1.0},
            "type": item["type"],
        }
        for place, item in enumerate(asked)
    ]
    return {"image_id": scene.key, "questions": rows} if rows else None


def _scene_json(settings: Settings, task: str, scene: Scene, tally: Tally) -> dict[str, Any] | None:
    """The JSON of one scene for a task; None where there is nothing to say."""
    size = settings.image_size
    if task == "vqa":
        return _vqa_json(settings, scene, tally)
    if task == "pretrain":
        return {
            "image_id": scene.key,
            "captions": language.captions(scene),
            "elems": language.elems(scene, size),
            "width": size,
            "height": size,
        }
    if task == "retrieval":
        return {"image_id": scene.key, "captions": language.retrieval_captions(scene)}
    if task == "captioning":
        return {"image_id": scene.key, "captions": language.captions(scene, 2)}
    if task == "grounding":
        said = language.expressions(scene, size)
        content = {"image_id": scene.key, "width": size, "height": size, "expressions": said}
        return content if said else None
    raise ValueError(f"unknown task {task!r}; the tasks are {', '.join(TASKS)}")


def _samples(
    settings: Settings, task: str, scenes: Sequence[Scene], pictures: Sequence[bytes], tally: Tally
) -> Iterator[Sample]:
    if task == "nlvr2":
        for at in range(0, len(scenes) - 1, 2):
            left, right = scenes[at], scenes[at + 1]
            said = language.statements(left, right)
            if said:
                content = {"image_ids": [left.key, right.key], "statements": said}
                yield (
                    f"{left.key}-pair",
                    {
                        f"0.{settings.kind}": pictures[at],
                        f"1.{settings.kind}": pictures[at + 1],
                        "json": dump_json(content),
                    },
                )
        return
    for scene, picture in zip(scenes, pictures, strict=True):
        content = _scene_json(settings, task, scene, tally)
        if content is not None:
            yield scene.key, {settings.kind: picture, "json": dump_json(content)}


def _write_unit(settings: Settings, unit: Unit) -> tuple[Unit, Tally]:
    """Write one shard for every task."""
    scenes = [
        draw_scene(settings.seed, unit.split, index, unit.attempts.get(index, 0))[0]
        for index in range(unit.start, unit.stop)
    ]
    pictures = [encode(render(scene, settings.image_size), settings.kind) for scene in scenes]
    tally: Tally = Counter()
    for task in settings.tasks:
        folder = settings.out / task / unit.split
        write_shard(folder, unit.number, _samples(settings, task, scenes, pictures, tally))
    return unit, tally


# -- which scenes --------------------------------------------------------------------------------


def _digests(seed: int, unit: Unit) -> np.ndarray:
    """(scenes,) uint64 digests at the first attempt."""
    found = (draw_scene(seed, unit.split, index)[1] for index in range(unit.start, unit.stop))
    return np.fromiter(found, np.uint64, unit.scenes)


def load_digests(path: Path) -> np.ndarray:
    """Sorted uint64 scene digests of an --exclude file (scenes-SPLIT.npy of a data folder).

    Raises: FileNotFoundError, or ValueError where the file is something else.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file of scene digests (--exclude)")
    try:
        digests = np.load(path, allow_pickle=False)
    except (ValueError, EOFError, OSError) as error:
        raise ValueError(
            f"{path}: not a scenes-SPLIT.npy file of a blocksworld data folder ({error})"
        ) from None
    if not isinstance(digests, np.ndarray) or digests.dtype != np.uint64 or digests.ndim != 1:
        raise ValueError(f"{path}: scene digests must be a one-dimensional uint64 array")
    return np.sort(digests)


def _settle(
    seed: int, split: str, digests: np.ndarray, excluded: np.ndarray
) -> tuple[np.ndarray, dict[int, int]]:
    """Redraw scenes that are excluded or occurred before: (sorted digests, {index: attempt})."""
    digests = digests.copy()
    fresh = np.zeros(len(digests), bool)
    fresh[np.unique(digests, return_index=True)[1]] = True
    fresh &= ~np.isin(digests, excluded)
    taken = set(digests[fresh].tolist())
    banned = set(excluded.tolist()) if not fresh.all() else set()
    attempts: dict[int, int] = {}
    for index in np.flatnonzero(~fresh).tolist():
        for attempt in range(1, _MAX_ATTEMPTS):
            digest = draw_scene(seed, split, index, attempt)[1]
            if digest not in taken and digest not in banned:
                break
        else:
            raise ValueError(f"found no new scene for {split} {index}: too many are excluded")
        taken.add(digest)
        attempts[index] = attempt
        digests[index] = digest
    return np.sort(digests), attempts


# -- the whole folder ----------------------------------------------------------------------------


def _units(split: str, scenes: int, per_shard: int) -> list[Unit]:
    starts = range(0, scenes, per_shard)
    return [Unit(split, n, at, min(at + per_shard, scenes)) for n, at in enumerate(starts)]


def _check(settings: Settings, scenes: Mapping[str, int], per_shard: int) -> None:
    unknown = set(settings.tasks) - set(TASKS)
    if unknown or not settings.tasks:
        raise ValueError(f"--tasks: unknown {sorted(unknown)}; choose from {', '.join(TASKS)}")
    if settings.kind not in ("jpg", "png"):
        raise ValueError(f"--format {settings.kind!r}: use jpg or png")
    if not 32 <= settings.image_size <= 2048:
        raise ValueError(f"--image-size {settings.image_size}: use 32 to 2048 pixels")
    if per_shard < 2 or any(count < 1 for count in scenes.values()):
        raise ValueError(
            "--scenes, --val and --test must be at least 1, scenes per shard at least 2"
        )
    wrong = set(settings.mix) - set(TYPES)
    if wrong or sum(settings.mix.values()) <= 0 or min(settings.mix.values()) < 0:
        raise ValueError(f"question mix {dict(settings.mix)}: shares >= 0 of {', '.join(TYPES)}")
    if (settings.out / "dataset.json").exists():
        raise ValueError(
            f"{settings.out} already holds a data set; give another --out or remove that folder"
        )
    if settings.out.exists() and not settings.out.is_dir():
        raise ValueError(f"{settings.out} is a file; give a folder as --out")


def build_blocksworld(
    out: Path,
    scenes: int,
    *,
    val: int | None = None,
    test: int | None = None,
    image_size: int = 64,
    seed: int = 0,
    tasks: Sequence[str] = TASKS,
    kind: str = "jpg",
    processes: int = 1,
    exclude: Sequence[Path] = (),
    mix: Mapping[str, float] | None = None,
    questions_per_scene: int = 8,
    per_shard: int = 500,
) -> dict[str, Any]:
    """Write the data set to `out` and return the content of its dataset.json.

    Args:
        scenes: training scenes.
        val, test: scenes of those splits (default scenes / 20, at least 200).
        tasks: some of TASKS.      kind: "jpg" or "png".
        exclude: digest files (scenes-SPLIT.npy) of scenes that must not occur here.
        mix: share of each question type (default DEFAULT_MIX).

    Raises: ValueError / FileNotFoundError for settings that cannot be met.
    """
    small = max(200, scenes // 20)
    wanted = {
        "train": scenes,
        "val": small if val is None else val,
        "test": small if test is None else test,
    }
    mix = dict(DEFAULT_MIX) if mix is None else dict(mix)
    ordered = tuple(task for task in TASKS if task in tasks) + tuple(
        sorted(set(tasks) - set(TASKS))
    )
    settings = Settings(Path(out), seed, image_size, kind, ordered, mix, questions_per_scene)
    _check(settings, wanted, per_shard)
    excluded = np.unique(np.concatenate([np.empty(0, np.uint64), *map(load_digests, exclude)]))
    for task in settings.tasks:
        for split in SPLITS:
            clear_shards(settings.out / task / split)
    settings.out.mkdir(parents=True, exist_ok=True)
    with worker_pool(processes, [__name__, "webdataset"]) as pool:
        units, digests = _plan_units(settings, wanted, excluded, per_shard, pool)
        tallies = {split: Counter() for split in SPLITS}
        done = map_ordered(pool, partial(_write_unit, settings), units)
        total = sum(wanted.values())
        for unit, tally in progress(
            done, total, "blocksworld", "scenes", lambda pair: pair[0].scenes
        ):
            tallies[unit.split].update(tally)
    return _finish(settings, digests, tallies)


def _plan_units(
    settings: Settings,
    wanted: Mapping[str, int],
    excluded: np.ndarray,
    per_shard: int,
    pool: Executor | None,
) -> tuple[list[Unit], dict[str, np.ndarray]]:
    """All shards' work, with no scene twice; and the sorted digests of each split."""
    units: list[Unit] = []
    digests: dict[str, np.ndarray] = {}
    for split, count in wanted.items():
        ranges = _units(split, count, per_shard)
        drawn = np.concatenate(list(map_ordered(pool, partial(_digests, settings.seed), ranges)))
        digests[split], again = _settle(settings.seed, split, drawn, excluded)
        for unit in ranges:
            mine = {i: attempt for i, attempt in again.items() if unit.start <= i < unit.stop}
            units.append(Unit(split, unit.number, unit.start, unit.stop, mine))
    return units, digests


def _finish(
    settings: Settings, digests: Mapping[str, np.ndarray], tallies: Mapping[str, Tally]
) -> dict[str, Any]:
    """Manifests, tokenizer, answers, digest files, and dataset.json last."""
    out = settings.out
    extra = {"image_size": settings.image_size}
    counts: dict[str, dict[str, int]] = {}
    for task in settings.tasks:
        manifests = {
            split: write_manifest(out / task / split, task, split, extra) for split in SPLITS
        }
        counts[task] = {split: manifest["samples"] for split, manifest in manifests.items()}
    write_tokenizer(out / "tokenizer")
    content: dict[str, Any] = {
        "version": 1,
        "name": "blocksworld",
        "grammar_version": GRAMMAR_VERSION,
        "vocabulary": hashlib.blake2b("\n".join(vocabulary()).encode(), digest_size=8).hexdigest(),
        "seed": settings.seed,
        "image_size": settings.image_size,
        "format": settings.kind,
        "colours": list(COLOURS),
        "shapes": list(SHAPES),
        "tasks": list(settings.tasks),
        "scenes": {split: len(found) for split, found in digests.items()},
        "samples": counts,
        "digests": {},
    }
    for split, found in digests.items():
        name = f"scenes-{split}.npy"
        np.save(out / name, found, allow_pickle=False)
        digest = hashlib.blake2b(found.astype("<u8").tobytes(), digest_size=16).hexdigest()
        content["digests"][split] = {"file": name, "count": len(found), "blake2b": digest}
    if "vqa" in settings.tasks:
        (out / "vqa" / "answers.json").write_bytes(dump_json(list(ANSWERS)) + b"\n")
        content |= _question_facts(settings, tallies)
    text = json.dumps(content, indent=1) + "\n"
    partial_file = out / "dataset.json.partial"
    partial_file.write_text(text, encoding="utf-8")
    partial_file.replace(out / "dataset.json")
    return content


def _question_facts(settings: Settings, tallies: Mapping[str, Tally]) -> dict[str, Any]:
    by_type: dict[str, dict[str, int]] = {}
    for split, tally in tallies.items():
        found: Counter[str] = Counter()
        for (kind, _, _), times in tally.items():
            found[kind] += times
        by_type[split] = {kind: found[kind] for kind in TYPES}
    blind = blind_accuracy(tallies["train"], tallies["test"])
    return {
        "question_mix": dict(settings.mix),
        "questions_per_scene": settings.questions_per_scene,
        "questions": by_type,
        "blind_accuracy": blind.pop("overall", 0.0),
        "blind_accuracy_by_type": blind,
    }
