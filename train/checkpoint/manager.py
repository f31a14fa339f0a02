"""Checkpoints that are either complete or not there.

DeepSpeed 0.19 writes `latest` before other ranks have finished, without fsync or checksums. So it
only writes its shards here; each file is then flushed and hashed, rank 0 writes MANIFEST.json, and
after a barrier `latest` is replaced. Loading verifies, and walks back to the last valid checkpoint.
The folder must be shared by all ranks.
"""

from __future__ import annotations

import logging
import os
import shutil
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist

from train.checkpoint import manifest
from train.checkpoint.manifest import ManifestError
from train.config import UserError

if TYPE_CHECKING:
    from deepspeed import DeepSpeedEngine

__all__ = ["CheckpointManager"]

_LOG = logging.getLogger(__name__)
_LATEST = "latest"
_RUN_ID = "run_id"


def _rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def _world() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def _barrier() -> None:
    if dist.is_initialized():
        dist.barrier()


def _from_rank_0(make: Callable[[], Any]) -> Any:
    """`make()` of rank 0 on every rank; an error there is raised on every rank, so none is left
    waiting.
    """
    box: list[Any] = [None, None]
    if _rank() == 0:
        try:
            box[0] = make()
        except (OSError, ValueError) as error:
            box[1] = error
    if dist.is_initialized():
        dist.broadcast_object_list(box, src=0)
    if box[1] is not None:
        raise box[1]
    return box[0]


class CheckpointManager:
    """Saves to and loads from `folder` (`runs/NAME/checkpoints`).

    Args:
        keep: how many complete checkpoints stay.
        run_id: identity of the run; None keeps one in the folder, made at the first save.
    All methods are collective.
    """

    def __init__(self, folder: Path, keep: int = 2, run_id: str | None = None) -> None:
        self.folder = Path(folder)
        self.keep = max(1, keep)
        self._given_id = run_id

    # Saving

    def save(self, engine: DeepSpeedEngine, step: int, state: dict[str, Any]) -> Path:
        """Writes `step_NNNNNNNN`, commits it and removes older ones. `state` is of this rank."""
        tag = f"step_{step:08d}"
        target = self.folder / tag
        _from_rank_0(lambda: self._prepare(target))
        engine.save_checkpoint(str(self.folder), tag=tag, save_latest=False)
        torch.save(state, target / _state_name(_rank()))
        _barrier()
        described = self._describe_share(target)
        run_id = self._run_id(create=True)
        _from_rank_0(
            lambda: manifest.write(
                target,
                {
                    "run_id": run_id,
                    "step": step,
                    "world_size": _world(),
                    "zero_stage": engine.zero_optimization_stage(),
                    "config": state.get("config", {}),
                    "files": described,
                },
            )
        )
        _from_rank_0(lambda: self._publish(tag))
        _LOG.info("checkpoint %s: %.1f MB", tag, sum(f["bytes"] for f in described.values()) / 1e6)
        return target

    def _prepare(self, target: Path) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        if target.exists():
            if (
                target / manifest.MANIFEST
            ).exists():  # it must not look complete while it is rewritten
                (target / manifest.MANIFEST).unlink()
            shutil.rmtree(target)
        target.mkdir()

    def _describe_share(self, target: Path) -> dict[str, dict[str, Any]]:
        """Size and hash of every file; each rank reads its share of them."""
        names = sorted(p.relative_to(target).as_posix() for p in target.rglob("*") if p.is_file())
        mine = {name: manifest.describe(target / name) for name in names[_rank() :: _world()]}
        if not dist.is_initialized():
            return mine
        shares: list[Any] = [None] * _world()
        dist.all_gather_object(shares, mine)
        return {name: values for share in shares for name, values in share.items()}

    def _publish(self, tag: str) -> None:
        manifest.replace_text(self.folder / _LATEST, tag + "\n")
        complete = [t for t in self._tags() if (self.folder / t / manifest.MANIFEST).exists()]
        kept = {tag, *complete[: self.keep]}
        for old in self._tags():
            if old not in kept:
                # Without its manifest first: a crash half-way must not leave something that looks
                # complete.
                (self.folder / old / manifest.MANIFEST).unlink(missing_ok=True)
                shutil.rmtree(self.folder / old, ignore_errors=True)

    def _run_id(self, create: bool) -> str | None:
        return self._given_id or _from_rank_0(lambda: self._stored_id(create))

    def _stored_id(self, create: bool) -> str | None:
        path = self.folder / _RUN_ID
        if path.exists():
            return path.read_text(encoding="utf-8").strip()
        if not create:
            return None
        self.folder.mkdir(parents=True, exist_ok=True)
        manifest.replace_text(path, uuid.uuid4().hex + "\n")
        return self._stored_id(create=False)

    # Loading

    def load(
        self,
        engine: DeepSpeedEngine,
        which: str = "auto",
        check: Callable[[dict[str, Any]], None] | None = None,
    ) -> dict[str, Any] | None:
        """Loads engine state and returns this rank's `state`, or None when there is nothing to
        resume.

        Args:
            which: "auto", "none", or the path of a checkpoint, a checkpoints folder or a run
                directory.
            check: called with the manifest before anything is loaded; raises when it does not fit.
        Raises UserError when no checkpoint is valid, or it belongs to another run, ZeRO stage or
        world size.
        """
        if which == "none":
            _from_rank_0(self._set_aside)
            return None
        found = _from_rank_0(lambda: self._find(which))
        if found is None:
            return None
        target, values = found
        self._check_fits(engine, target, values)
        if check is not None:
            check(values)
        loaded, _ = engine.load_checkpoint(
            str(target.parent),
            tag=target.name,
            load_optimizer_states=True,
            load_lr_scheduler_states=False,
        )
        if loaded is None:
            raise UserError(f"{target}: DeepSpeed could not load it")
        return self._load_state(target, values)

    def _find(self, which: str) -> tuple[Path, dict[str, Any]] | None:
        """The newest valid checkpoint that `which` names, verified."""
        if which != "auto":
            path = Path(which)
            if (path / manifest.MANIFEST).exists():
                return path, _verified(path)
            for folder in (path / "checkpoints", path):
                if (folder / _LATEST).exists():
                    return CheckpointManager(folder, self.keep, self._given_id)._find("auto")
            raise UserError(
                f"--resume {which}: no checkpoint there (a folder with {manifest.MANIFEST} is one)"
            )
        tags = self._tags()
        pointed = self._pointed()
        if pointed in tags:
            tags.remove(pointed)
            tags.insert(0, pointed)
        damaged = []
        for tag in tags:
            try:
                return self.folder / tag, manifest.verify(self.folder / tag)
            except ManifestError as error:
                _LOG.warning("checkpoint passed over: %s", error)
                if (self.folder / tag / manifest.MANIFEST).exists():
                    damaged.append(str(error))
        if damaged:
            raise UserError(
                f"{self.folder}: no checkpoint is intact ({'; '.join(damaged)}); "
                f"restore one, or start over with --resume none"
            )
        return None

    def _pointed(self) -> str | None:
        try:
            return (self.folder / _LATEST).read_text(encoding="utf-8").strip()
        except (OSError, UnicodeDecodeError):
            return None

    def _tags(self) -> list[str]:
        """Checkpoint folder names, newest first."""
        return sorted((p.name for p in self.folder.glob("step_*") if p.is_dir()), reverse=True)

    def _check_fits(self, engine: DeepSpeedEngine, target: Path, values: dict[str, Any]) -> None:
        ours = self._run_id(create=False)
        if (
            ours is not None
            and values["run_id"] != ours
            or ours is None
            and target.parent != self.folder
        ):
            raise UserError(
                f"{target} belongs to another run ({values['run_id'][:8]}); to start from its "
                "weights, set model= or initialise.source= to that run's model folder"
            )
        stage, world = engine.zero_optimization_stage(), _world()
        if values["zero_stage"] != stage:
            raise UserError(
                f"{target} was written at ZeRO stage {values['zero_stage']}, this run uses stage "
                f"{stage}: resume with the old engine.config"
            )
        if values["world_size"] != world and stage > 0:
            raise UserError(
                f"{target} was written by {values['world_size']} processes, this run has {world}: "
                f"resume with {values['world_size']} (only ZeRO stage 0 can change the number)"
            )

    def _load_state(self, target: Path, values: dict[str, Any]) -> dict[str, Any]:
        own = _rank() < values["world_size"]
        state = torch.load(
            target / _state_name(_rank() if own else 0), map_location="cpu", weights_only=True
        )
        if not own:  # a rank that did not exist then keeps its own random state
            state["rng"] = None
        return state

    def _set_aside(self) -> None:
        """Starting over keeps the old checkpoints, in a folder of their own, so that a slip costs
        nothing.
        """
        if not self._tags() and not (self.folder / _RUN_ID).exists():
            return
        number = 1
        while (aside := self.folder.with_name(f"{self.folder.name}-before-{number}")).exists():
            number += 1
        os.replace(self.folder, aside)
        _LOG.warning("starting over: the earlier checkpoints are in %s", aside)


def _verified(folder: Path) -> dict[str, Any]:
    try:
        return manifest.verify(folder)
    except ManifestError as error:
        raise UserError(f"{error}; choose another checkpoint, or --resume auto") from None


def _state_name(rank: int) -> str:
    return f"state_rank_{rank:04d}.pt"
