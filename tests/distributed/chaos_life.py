"""One life of a run that is going to be killed: the real loop on a micro model that is pruned while
it trains, which tells through a pipe what it is doing.

Lines of the pipe: `train N` before batch N is read, `save WHAT` inside saving (copy, write, manifest,
latest, tidy), `saved` when a save is over.
"""

from __future__ import annotations

import dataclasses
import hashlib
import os
import sys
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from data_pipeline.blocksworld.build import build_blocksworld
from models import presets
from train.build import build
from train.checkpoint import manager as manager_module
from train.checkpoint import manifest, scan, staging
from train.checkpoint.manager import CheckpointManager
from train.recipes_io import find_recipe, load_run_config
from train.runtime import loop
from train.runtime.distributed import finish, start

STEPS, EVERY = 12, 3
VOCABULARY = 80


def make_inputs(folder: Path) -> None:
    """Data, teacher and student."""
    build_blocksworld(
        folder / "data", scenes=48, val=4, test=4, image_size=48, seed=5, tasks=("vqa",),
        per_shard=24, processes=1,
    )  # fmt: skip
    torch.manual_seed(0)
    for role in ("teacher", "student"):
        model = presets.create(
            f"blocksworld-micro-{role}", form="vqa", text={"vocab_size": VOCABULARY}
        )
        model.save_pretrained(folder / role)


def run_config(folder: Path, out: Path) -> Any:
    """Gates, multipliers and their optimizer, KD, ZeRO 1, fp32; the structure freezes on the way."""
    overrides = [
        f"out={out}", f"teacher.path={folder / 'teacher'}", f"model={folder / 'student'}",
        f"data.train={folder / 'data/vqa/train'}", "data.val=null", "data.batch=4",
        "data.workers=0", f"optim.steps={STEPS}", "optim.warmup_steps=2", "prune.ramp_steps=6",
        "prune.freeze_step=10", "engine.config=zero1", "engine.precision=fp32", "log.every=4",
        "log.histograms_every=0", f"checkpoint.every={EVERY}", "checkpoint.keep=2",
        "checkpoint.asynchronous=true",
    ]  # fmt: skip
    return load_run_config(find_recipe("blocksworld-prune"), overrides)[0]


def _hash_into(digest: Any, value: Any) -> None:
    if isinstance(value, torch.Tensor):
        digest.update(f"{value.dtype}{tuple(value.shape)}".encode())
        digest.update(value.detach().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    elif isinstance(value, dict):
        for key in sorted(value, key=str):
            digest.update(str(key).encode())
            _hash_into(digest, value[key])
    elif isinstance(value, list | tuple):
        for item in value:
            _hash_into(digest, item)
    elif value is None or isinstance(value, bool | int | float | str):
        digest.update(repr(value).encode())
    else:  # DeepSpeed's loss scaler and slices
        _hash_into(digest, {"class": type(value).__name__} | vars(value))


def state_hash(checkpoint: Path) -> str:
    """Parameters, optimizer, gates, multipliers, random generators, positions: everything that the
    last checkpoint keeps but the configuration (which names folders).
    """
    digest = hashlib.blake2b(digest_size=16)
    for name in sorted(manifest.verify(checkpoint)["files"]):
        content = scan.load(checkpoint / name)
        for key in ("config", "ds_config"):
            content.pop(key, None)
        digest.update(name.encode())
        _hash_into(digest, content)
    return digest.hexdigest()


class Delivered:
    """A loader that logs what it delivers: position, keys and a hash of every tensor of the batch."""

    def __init__(self, loader: Any, path: Path, tell: Callable[[str], None]) -> None:
        self._loader, self._path, self._tell = loader, path, tell

    def __getattr__(self, name: str) -> Any:
        return getattr(self._loader, name)

    def __iter__(self) -> Iterator[Any]:
        batches = iter(self._loader)
        with self._path.open("a") as log:
            while True:
                position = self._loader.state_dict()["samples_consumed"]
                self._tell(f"train {position}")
                batch = next(batches)
                digest = hashlib.blake2b(digest_size=8)
                for item in dataclasses.fields(batch):
                    value = getattr(batch, item.name)
                    _hash_into(digest, value if isinstance(value, torch.Tensor) else str(value))
                log.write(f"{position} {digest.hexdigest()}\n")
                log.flush()
                yield batch


def _report_saving(tell: Callable[[str], None]) -> None:
    """Puts a line before each part of a save. Only in a process that is made for it."""

    def before(owner: Any, name: str, line: Callable[..., str | None], after: str = "") -> None:
        original = getattr(owner, name)

        def told(*args: Any, **options: Any) -> Any:
            said = line(*args)
            if said:
                tell(said)
            try:
                return original(*args, **options)
            finally:
                if after:
                    tell(after)

        setattr(owner, name, told)

    before(CheckpointManager, "_stage", lambda *_: "save copy")
    before(staging, "write_files", lambda *_: "save write")
    before(manifest, "write", lambda *_: "save manifest")
    before(
        manager_module.manifest, "replace_text",
        lambda path, _: "save latest" if path.name == "latest" else None,
    )  # fmt: skip
    remove = CheckpointManager._remove
    removing: Any = staticmethod(lambda folder: (tell("save tidy"), remove(folder)))
    CheckpointManager._remove = removing
    before(CheckpointManager, "_write", lambda *_: None, after="saved")


def live(folder: Path, out: Path, pipe: int, environment: dict[str, str]) -> None:
    """The body of a forked rank; does not return."""
    os.setsid()
    os.environ.update(environment)
    rank = int(environment["RANK"])
    log = os.open(out / f"stderr_{rank}.txt", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(log, 1)
    os.dup2(log, 2)
    torch.set_num_threads(1)

    def tell(line: str) -> None:
        os.write(pipe, f"{line}\n".encode())

    code = 1
    try:
        place = start()
        if rank == 0:
            _report_saving(tell)
        run: Any = build(run_config(folder, out / "run"), place)
        run.loader = Delivered(
            run.loader, out / f"delivered_{rank}.log", tell if rank == 0 else lambda _: None
        )
        code = loop.train(run)
        finish()
    except BaseException:
        traceback.print_exc()
    sys.stderr.flush()
    os._exit(code)
