"""Checkpoints that are either complete or not there.

DeepSpeed 0.19 writes `latest` before other ranks have finished, without fsync or checksums. So it
only says here what belongs into its files (staging.py). Every rank writes, hashes and syncs its own;
when all have done so, rank 0 writes MANIFEST.json, and after a barrier `latest` is replaced. Loading
verifies, and walks back to the last valid checkpoint. The folder must be shared by all ranks.
"""

from __future__ import annotations

import functools
import logging
import os
import shutil
import threading
import time
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from train.checkpoint import manifest, reshard, scan
from train.checkpoint.find import LATEST, examine, find_valid, tags_of
from train.checkpoint.manifest import ManifestError
from train.checkpoint.peers import Peers
from train.checkpoint.retention import Best, Retention, stays
from train.checkpoint.selection import first_judged
from train.config import RunConfig, UserError
from train.provenance import provenance

if TYPE_CHECKING:
    from deepspeed import DeepSpeedEngine

__all__ = ["CheckpointManager", "SaveError"]

_LOG = logging.getLogger(__name__)
_RUN_ID = "run_id"
_SUPERSEDED = "superseded"


class SaveError(RuntimeError):
    """A checkpoint could not be written on some rank; the message names rank and file. Earlier
    checkpoints are as they were.
    """


class CheckpointManager:
    """Saves to and loads from `folder` (`runs/NAME/checkpoints`).

    Args:
        keep: how many complete checkpoints stay.
        run_id: identity of the run; None keeps one in the folder, made at the first save.
        keep_every: a checkpoint at a multiple of this many steps stays for good; 0 is none.
        best: validation metric whose best checkpoint stays, too.   first: step from which on its
            values count.
        asynchronous: write in a thread, while training goes on; a save then only copies. The next
            save waits for the one before.
    All methods are collective, and are called by the main thread.
    """

    def __init__(
        self,
        folder: Path,
        keep: int = 2,
        run_id: str | None = None,
        *,
        keep_every: int = 0,
        best: str | None = None,
        first: int = 0,
        asynchronous: bool = False,
    ) -> None:
        self.folder = Path(folder)
        self.rule = Retention(keep, keep_every, best)
        self.best = Best(best, first)
        self.asynchronous = asynchronous
        self._given_id = run_id
        self._peers = Peers()
        self._writer: threading.Thread | None = None
        self._failure: Exception | None = None
        self._position = -1  # step that was loaded or saved last

    @classmethod
    def of(cls, config: RunConfig, folder: Path, run_id: str | None = None) -> CheckpointManager:
        """The manager that a run file asks for."""
        asked = config.checkpoint
        return cls(
            folder,
            asked.keep,
            run_id,
            keep_every=asked.keep_every,
            best=asked.best,
            first=first_judged(config),
            asynchronous=asked.asynchronous,
        )

    # Saving

    def save(
        self, engine: DeepSpeedEngine, step: int, state: dict[str, Any], wait: bool = True
    ) -> Path:
        """Writes `step_NNNNNNNN`, commits it and removes those that need not stay. `state` is of
        this rank.

        Args:
            wait: return when the checkpoint is complete, also when saving asynchronously.
        Raises SaveError when it could not be written. An asynchronous save that fails is logged at
        once and tried again by the next save, which then waits.
        """
        failed = self._settle()
        if failed is not None:
            _LOG.warning("the last save failed (%s); this one is waited for", failed)
        tag = manifest.tag_of(step)
        target = self.folder / tag
        self._peers.from_rank_0(lambda: self._prepare(target))
        run_id = self._run_id(create=True)
        files = self._stage(engine, tag, state)
        values = {
            "run_id": run_id,
            "step": step,
            "world_size": self._peers.world,
            "zero_stage": engine.zero_optimization_stage(),
            "layout": reshard.layout_of(engine),
            "config": state.get("config", {}),
            "config_hash": manifest.hash_of(state.get("config", {})),
            "score": self.best.score_at(step),
        }
        self._position = step
        if wait or failed is not None or not self.asynchronous:
            self._write(target, files, values)
            return target
        self._writer = threading.Thread(
            target=self._write_quietly, args=(target, files, values), name=f"save {tag}",
            daemon=True,  # a run that fails ends without waiting for it: no manifest, no checkpoint
        )  # fmt: skip
        self._writer.start()
        return target

    def wait(self) -> None:
        """Returns when the save under way is complete; raises SaveError when it failed."""
        failed = self._settle()
        if failed is not None:
            raise failed

    def note_score(self, step: int) -> None:
        """Writes the score of `step` into the manifest of the checkpoint that was loaded, when it
        is of that step: its validation was made up for, and only its score keeps a best one from
        being removed. Raises SaveError.
        """
        score = self.best.score_at(step)
        if score is not None and step == self._position:
            folder = self.folder / manifest.tag_of(step)
            self._peers.from_rank_0(lambda: self._rescore(folder, score))

    @staticmethod
    def _rescore(folder: Path, score: dict[str, Any]) -> None:
        try:
            values = manifest.read(folder)
            del values["hash"]  # of the manifest without the score
            manifest.write(folder, values | {"score": score})
        except (OSError, ManifestError) as error:
            raise SaveError(f"{folder.name} keeps no score: {error}") from error

    def _settle(self) -> Exception | None:
        """Waits for the writer; its failure, which every rank has alike."""
        if self._writer is not None:
            self._writer.join()
            self._writer = None
        failed, self._failure = self._failure, None
        return failed

    def _prepare(self, target: Path) -> None:
        """An empty folder, and nothing in the way: what is newer than where this run stands was
        walked past or comes from an abandoned attempt, and must not be taken for a continuation.
        The target may be one of those.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        for tag in tags_of(self.folder):
            folder = self.folder / tag
            complete = (folder / manifest.MANIFEST).exists()
            if complete and int(manifest.step_of(tag) or 0) > self._position:
                self._supersede(folder)
            elif folder == target or not complete:
                self._remove(folder)  # it is written again, or its save was not completed
        target.mkdir()

    def _supersede(self, old: Path) -> None:
        number = 1
        while (aside := self.folder / _SUPERSEDED / f"{old.name}-{number}").exists():
            number += 1
        aside.parent.mkdir(exist_ok=True)
        os.replace(old, aside)
        _LOG.warning("%s is not what this run went on from: it is now %s", old, aside)

    def _stage(self, engine: DeepSpeedEngine, tag: str, state: dict[str, Any]) -> dict[Path, Any]:
        """This rank's files, in host memory."""
        from train.checkpoint.staging import host_copy, staging_engine

        staging = staging_engine(engine)
        engine.save_checkpoint(str(self.folder), tag=tag, save_latest=False)
        files = staging.take()
        files[self.folder / tag / _state_name(self._peers.rank)] = host_copy(state)
        self._peers.connect()  # here, because the writer must not make a group
        return files

    def _write_quietly(self, *args: Any) -> None:
        try:
            self._write(*args)
        except Exception as error:
            self._failure = error
            _LOG.error("the checkpoint was not saved, training goes on: %s", error)

    def _write(self, target: Path, files: dict[Path, Any], values: dict[str, Any]) -> None:
        """Writes this rank's files and, when all ranks have, commits. Raises SaveError on all."""
        from train.checkpoint.staging import write_files

        started = time.perf_counter()
        try:
            share, problem = write_files(files, target), None
        except Exception as error:
            share, problem = {}, f"rank {self._peers.rank}: {error}"
        gathered = self._peers.gather((share, problem))
        problems = [problem for _, problem in gathered if problem is not None]
        entries = {name: entry for share, _ in gathered for name, entry in share.items()}
        self._peers.from_rank_0(lambda: self._commit(target, values | {"files": entries}, problems))
        self._peers.from_rank_0(lambda: self._publish(target.name))
        size = sum(entry["bytes"] for entry in entries.values()) / 1e6
        seconds = time.perf_counter() - started
        _LOG.info("checkpoint %s: %.1f MB in %.1f s", target.name, size, seconds)

    def _commit(self, target: Path, values: dict[str, Any], problems: list[str]) -> None:
        if not problems:
            try:
                for path in sorted(p for p in target.rglob("*") if p.is_file()):
                    name = path.relative_to(target).as_posix()
                    if name not in values["files"]:  # DeepSpeed copies NVMe offload files by itself
                        values["files"][name] = manifest.describe(path)
                about = {"provenance": _provenance(values["world_size"]), "written": time.time()}
                manifest.sync_folder(self.folder)
                manifest.write(target, values | about)
            except OSError as error:
                problems = [str(error)]
        if problems:
            shutil.rmtree(target, ignore_errors=True)  # gives a full disk its room back
            raise SaveError(f"{target.name} was not saved: {'; '.join(problems)}")

    def _publish(self, tag: str) -> None:
        try:
            manifest.replace_text(self.folder / LATEST, tag + "\n")
            scores = self._scores()
            for step in scores.keys() - stays(scores, self.rule):
                self._remove(self.folder / manifest.tag_of(step))
        except OSError as error:
            raise SaveError(
                f"{tag} is saved, but older checkpoints could not be tidied up: {error}"
            ) from error

    def _scores(self) -> dict[int, float | None]:
        complete = []
        for name in tags_of(self.folder):
            try:
                complete.append(manifest.read(self.folder / name))
            except ManifestError as error:
                # Neither counted nor removed: the next start says what is wrong with it.
                _LOG.warning("checkpoint not counted: %s", error)
        return self.best.scores_of(complete)

    @staticmethod
    def _remove(folder: Path) -> None:
        """Without its manifest first: a crash half-way must leave nothing that looks complete."""
        (folder / manifest.MANIFEST).unlink(missing_ok=True)
        shutil.rmtree(folder)

    def _run_id(self, create: bool) -> str | None:
        return self._given_id or self._peers.from_rank_0(lambda: self._stored_id(create))

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
        A checkpoint that another number of ranks or another ZeRO stage has written is put together
        anew (reshard.py). Raises UserError when no checkpoint is valid, it belongs to another run,
        or its model is another. Nothing is loaded then.
        """
        self.wait()
        if which == "none":
            self._peers.from_rank_0(self._set_aside)
            return None
        found = self.find(which)
        if found is None:
            return None
        target, values = found
        self._check_run(target, values)
        if check is not None:
            check(values)
        self._load_engine(engine, target, values)
        if target.parent.resolve() == self.folder.resolve():
            self._position = values["step"]
        return self._load_state(target, values)

    def scores(self) -> dict[int, float | None]:
        """Step of each complete checkpoint -> its value of `best`; None where none counts."""
        return self._peers.from_rank_0(self._scores)

    def load_weights(self, engine: DeepSpeedEngine, step: int) -> str | None:
        """Puts what the engine held after `step` into it, and changes nothing else of where the run
        stands. Returns what is wrong when that checkpoint is damaged; nothing is loaded then.
        """
        folder = self.folder / manifest.tag_of(step)
        values, problem = examine(self._peers, folder)
        run_id = self._run_id(create=False)
        if problem is None and values["run_id"] != run_id:
            problem = f"{folder} belongs to another run ({values['run_id'][:64]})"
        if problem is None:
            self._load_engine(engine, folder, values)
        return problem

    def _load_engine(self, engine: DeepSpeedEngine, target: Path, values: dict[str, Any]) -> None:
        from train.checkpoint.staging import staging_engine

        staging_engine(engine)
        if values.get("layout") != reshard.layout_of(engine):
            reshard.load(engine, target, values, self._peers)
            return
        loaded, _ = engine.load_checkpoint(
            str(target.parent),
            tag=target.name,
            load_optimizer_states=True,
            load_lr_scheduler_states=False,
        )
        if loaded is None:
            raise UserError(f"{target}: DeepSpeed could not load it")

    def find(self, which: str = "auto") -> tuple[Path, dict[str, Any]] | None:
        """`find_valid` for this run: the newest valid checkpoint and its manifest."""
        return find_valid(self._peers, self.folder, which, self._run_id(create=False))

    def _check_run(self, target: Path, values: dict[str, Any]) -> None:
        if self._run_id(create=False) is None and target.parent.resolve() != self.folder.resolve():
            raise UserError(
                f"{target} belongs to another run ({values['run_id'][:64]}); to start from its "
                "weights, set model= or initialise.source= to that run's model folder"
            )

    def _load_state(self, target: Path, values: dict[str, Any]) -> dict[str, Any]:
        rank = self._peers.rank
        own = rank < values["world_size"]
        state = scan.load(target / _state_name(rank if own else 0))
        if not own:  # a rank that did not exist then keeps its own random state
            state["rng"] = None
        return state

    def _set_aside(self) -> None:
        """Starting over keeps the old checkpoints, in a folder of their own, so that a slip costs
        nothing.
        """
        if not tags_of(self.folder) and not (self.folder / _RUN_ID).exists():
            return
        number = 1
        while (aside := self.folder.with_name(f"{self.folder.name}-before-{number}")).exists():
            number += 1
        os.replace(self.folder, aside)
        _LOG.warning("starting over: the earlier checkpoints are in %s", aside)


def _state_name(rank: int) -> str:
    return f"state_rank_{rank:04d}.pt"


_provenance = functools.cache(provenance)
