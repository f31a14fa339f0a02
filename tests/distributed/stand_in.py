"""A tiny stand-in for a run: model, task, loader, monitor. Enough to drive the engine, the loop and
checkpoints.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from data_pipeline.batches import Batch
from train.checkpoint.manager import CheckpointManager
from train.config import RunConfig
from train.runtime.distributed import Distributed
from train.runtime.engine import build_engine, parameter_groups
from train.runtime.step import EngineModule
from train.tasks.base import Losses, StepContext, Task

ROWS = 4


class Tied(nn.Linear):
    """A projection to the embedding table of another module, as an MLM head is."""

    def __init__(self, table: nn.Embedding) -> None:
        super().__init__(table.weight.shape[1], table.weight.shape[1])
        self._table = [table]  # in a list, so that it is not registered twice

    def external_parameters(self) -> list[tuple[nn.Module, nn.Parameter]]:
        return [(self, self._table[0].weight)]

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) @ self._table[0].weight.t()


class TinyModel(nn.Module):
    """A body, a head that every batch uses, a head that some batches do not, and a tied head."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(7, 8)
        self.body = nn.Linear(12, 8)
        self.norm = nn.LayerNorm(8)
        self.head = nn.Linear(8, 3)
        self.rare = nn.Linear(8, 5)
        self.tied = Tied(self.embedding)
        self.temperature = nn.Parameter(torch.full((1,), 0.5))

    def states(self, images: Tensor, words: Tensor) -> Tensor:
        """(N, 3, 2, 2) uint8 and (N,) word ids -> (N, 8)."""
        return self.norm(self.body(images.flatten(1).float() / 255) + self.embedding(words)).tanh()

    def save_pretrained(self, path: Path, tokenizer: Any = None) -> None:
        path.mkdir(parents=True, exist_ok=True)
        torch.save(self.state_dict(), path / "weights.pt")


class TinyTask(Task):
    """Region batches (keys "region") use `rare`; on general steps divisible by 3 it has nothing to
    do.
    """

    name = "pretrain"

    def losses(self, student: Any, teacher: Any, batch: Batch, context: StepContext) -> Losses:
        words = batch.image_index % 7
        x = student.states(batch.images, words)
        target = batch.images.float().mean(dim=(1, 2, 3)) / 255
        terms = {
            "head": (student.head(x).mean(1) / student.temperature - target).square().mean(),
            "tied": nn.functional.cross_entropy(student.tied(x), words),
        }
        rare = student.rare(x)
        touch = None
        if batch.keys[0] == "region" or context.step % 3:
            terms["rare"] = (rare.mean(1) - target).square().mean()
        else:
            touch = 0.0 * rare.sum()
        return Losses(
            terms, dict.fromkeys(terms, 1.0), {"rows": torch.tensor(float(batch.rows))}, touch
        )

    def evaluate(self, model: Any, batch: Batch) -> dict[str, Any]:
        return {}


class TinyLoader:
    """Endless batches, a pure function of (rank, position); `broken` positions hold a NaN source."""

    def __init__(self, rank: int, key: str = "general") -> None:
        self.rank, self.key, self.position = rank, key, 0
        self.faults = {"decode": 0}
        self.after: Any = None

    def state_dict(self) -> dict[str, Any]:
        return {"position": self.position}

    def load_state_dict(self, state: dict[str, Any], rebase: bool = False) -> None:
        self.position = state["position"]

    def __iter__(self) -> Iterator[Batch]:
        while True:
            generator = torch.Generator().manual_seed(
                self.position * 16 + self.rank + (self.key == "region") * 10**6
            )
            self.position += 1
            if self.after is not None:
                self.after(self.position)
            yield Batch(
                images=torch.randint(
                    0, 255, (ROWS, 3, 2, 2), generator=generator, dtype=torch.uint8
                ),
                image_index=torch.randint(0, 7, (ROWS,), generator=generator),
                valid=torch.ones(ROWS, dtype=torch.bool),
                keys=(self.key,) * ROWS,
            )


class ListMonitor:
    """Remembers records instead of writing them."""

    def __init__(self) -> None:
        self.records: list[dict[str, Any]] = []

    def step(self, step: int, samples: int, record: dict[str, Any]) -> None:
        self.records.append({"step": step, "samples": samples} | record)

    def histograms(self, step: int, values: dict[str, Tensor]) -> None: ...

    def flush(self) -> None: ...

    def finished(self) -> None: ...


def tiny_config(out: Path, **sections: Any) -> RunConfig:
    """A run file of 20 steps with region steps, fp32."""
    base: dict[str, Any] = {
        "stage": "pretrain",
        "task": "pretrain",
        "out": str(out),
        "data": {"train": "unused", "batch": ROWS, "region": {"probability": 0.3}},
        "model": "unused",
        "optim": {
            "lr": 1e-3,
            "steps": 20,
            "weight_decay": 0.1,
            "new_lr_multiplier": 2.0,
            "clip": 0.5,
        },
        "log": {"every": 5},
        "checkpoint": {"every": 10},
    }
    for name, values in sections.items():
        base[name] = base.get(name, {}) | values if isinstance(values, dict) else values
    return RunConfig(**base)


def tiny_run(config: RunConfig, dist: Distributed, task: Task | None = None) -> Any:
    """What `train.build` makes, with the stand-ins."""
    torch.manual_seed(config.seed)
    student = TinyModel()
    task = task or TinyTask()
    engine = build_engine(
        config, EngineModule(student, task), parameter_groups(student, {"head"}, config.optim)
    )
    directory = Path(config.out)
    run = SimpleNamespace(
        config=config,
        directory=directory,
        dist=dist,
        task=task,
        student=student,
        teacher=None,
        engine=engine,
        loader=TinyLoader(dist.rank),
        region_loader=TinyLoader(dist.rank, "region"),
        gates=None,
        cost=None,
        monitor=ListMonitor(),
        checkpoints=CheckpointManager.of(config, directory / "checkpoints"),
        tokenizer=None,
        validate=None,
        pictures=None,
    )
    run.open_monitor = lambda step: run.monitor
    return run


def with_changes(config: RunConfig, **sections: Any) -> RunConfig:
    """The configuration with keys of whole sections replaced: `with_changes(c, optim={"steps":
    3})`.
    """
    changed = {n: dataclasses.replace(getattr(config, n), **v) for n, v in sections.items()}
    return dataclasses.replace(config, **changed)
