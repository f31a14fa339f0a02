"""How long a run takes: steps, samples, epochs, work, and hours at a measured or given speed."""

from __future__ import annotations

import statistics
from dataclasses import dataclass
from pathlib import Path

import yaml

from data_pipeline.manifest import load_manifest
from train.config import RunConfig, UserError
from train.export.collect import read_metrics
from train.monitor.flops import StepCost

__all__ = ["Speed", "Work", "measured_speed", "samples_of_data", "work"]


@dataclass(frozen=True)
class Speed:
    """Samples a second of all ranks, and where the number is from."""

    samples_per_s: float
    source: str


@dataclass(frozen=True)
class Work:
    """What a whole run does.

    Attributes:
        samples: images of general steps.   rows: text rows of general and region steps, which
            samples_per_s counts.   epochs: None where the data are not there.
        flops: of all ranks.
    """

    steps: int
    global_batch: int
    samples: int
    rows: float
    epochs: float | None
    flops: float

    def hours(self, speed: Speed) -> float:
        """Wall time of training; validation, saving and start-up come on top."""
        return self.rows / speed.samples_per_s / 3600

    def flops_per_s(self, speed: Speed, ranks: int) -> float:
        """What each device must do for that speed."""
        return self.flops * speed.samples_per_s / self.rows / ranks


def work(config: RunConfig, cost: StepCost, ranks: int, data_samples: int | None) -> Work:
    """Totals of a run over `ranks`; `config.data` holds the sizes of a rank."""
    data, steps = config.data, config.optim.steps
    micro = ranks * config.engine.accumulate
    pretrains = config.task == "pretrain"
    probability = data.region.probability if pretrains else 0.0
    rows = data.batch * (1 if pretrains else data.rows_per_image)
    samples = steps * data.batch * micro
    return Work(
        steps=steps,
        global_batch=data.batch * micro,
        samples=samples,
        rows=steps * micro * (rows + probability * data.region.rows),
        epochs=None if not data_samples else samples / data_samples,
        flops=steps * micro * cost.expected(probability),
    )


def samples_of_data(config: RunConfig) -> int | None:
    """Images of the training data, or None while a folder is missing or behind a URL.

    Raises:
        ValueError: a manifest that is there is broken.
    """
    train = config.data.train
    folders = [train] if isinstance(train, str) else [source.path for source in train]
    total = 0
    for folder in folders:
        if "://" in folder or not (Path(folder) / "manifest.json").is_file():
            return None
        total += load_manifest(Path(folder)).samples
    return total


def measured_speed(run: Path, ranks: int) -> Speed:
    """The speed of an earlier run, for each rank as fast as there.

    The median of its records, without the first fifth (start-up, compiling).

    Raises:
        FileNotFoundError: no metrics.jsonl or run.yaml.
        UserError: no record of a speed, or no world size.
    """
    metrics, described = run / "metrics.jsonl", run / "run.yaml"
    for path in (metrics, described):
        if not path.is_file():
            raise FileNotFoundError(f"{path}: --like needs the directory of an earlier run")
    rates = [r["samples_per_s"] for r in read_metrics(metrics) if r.get("samples_per_s")]
    if not rates:
        raise UserError(f"{metrics}: no record has samples_per_s; give --samples-per-s instead")
    values = yaml.safe_load(described.read_text(encoding="utf-8"))
    world = ((values or {}).get("provenance") or {}).get("world_size")
    if not isinstance(world, int) or world < 1:
        raise UserError(f"{described}: no provenance.world_size; give --samples-per-s instead")
    rate = statistics.median(rates[len(rates) // 5 :])
    return Speed(
        rate / world * ranks,
        f"{run}: {rate:.1f} on {world} rank{'s' * (world > 1)}"
        + ("" if world == ranks else ", scaled evenly"),
    )
