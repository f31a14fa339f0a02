"""Which checkpoint is resumed: the newest one that is complete, intact and of this run."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

from train.checkpoint import manifest, scan
from train.checkpoint.manifest import ManifestError
from train.checkpoint.peers import Peers
from train.config import UserError

__all__ = ["LATEST", "examine", "find_valid", "tags_of"]

_LOG = logging.getLogger(__name__)
LATEST = "latest"  # names the newest complete checkpoint, for people and other programs
_WAY_OUT = (
    "choose another checkpoint with --resume PATH, or start over with --resume none; to start from "
    "another run's weights, set model= or initialise.source= to that run's model folder"
)


def tags_of(folder: Path) -> list[str]:
    """Checkpoint folder names (step_NNNNNNNN) in `folder`, newest first, complete or not."""
    names = [path.name for path in folder.glob("step_*") if path.is_dir()]
    steps = {manifest.step_of(name): name for name in names}
    return [steps[step] for step in sorted((s for s in steps if s is not None), reverse=True)]


def find_valid(
    peers: Peers, folder: Path, which: str, run_id: str | None
) -> tuple[Path, dict[str, Any]] | None:
    """The newest valid checkpoint that `which` names, and its manifest. None when there is no
    checkpoint at all ("auto" only). Collective; every rank gets the same.

    Args:
        folder: where "auto" looks.
        which: "auto", or the path of a checkpoint, a checkpoints folder or a run directory.
        run_id: what a checkpoint must say; None accepts any.

    What is damaged or of another run is passed over with a warning that names the file. Raises
    UserError when nothing else is there, or when `which` names a damaged checkpoint.
    """
    folders, exact = peers.from_rank_0(lambda: _candidates(folder, which))
    problems = []
    for candidate in folders:
        values, problem = examine(peers, candidate)
        if problem is None and run_id is not None and values["run_id"] != run_id:
            problem = f"{candidate} belongs to another run ({values['run_id'][:64]})"
        if problem is None:
            return candidate, values
        if exact:
            raise UserError(f"{problem}; {_WAY_OUT}")
        if peers.rank == 0:
            _LOG.warning("checkpoint passed over: %s", problem)
        # A first save that was cut short is no loss; anything else that is lost must be said.
        if (candidate / manifest.MANIFEST).exists() or (candidate.parent / LATEST).exists():
            problems.append(problem)
    if not folders and (folder / LATEST).exists():
        problems.append(f"{folder / LATEST} is there, but no checkpoint is")
    if any(peers.gather(bool(problems))):
        raise UserError(
            f"{folder}: no checkpoint is intact and of this run ({'; '.join(problems)}); {_WAY_OUT}"
        )
    return None


def _candidates(folder: Path, which: str) -> tuple[list[Path], bool]:
    """Folders to look at, newest first; and whether it must be this one."""
    if which == "auto":
        return [folder / tag for tag in tags_of(folder)], False
    path = Path(which)
    if (path / manifest.MANIFEST).exists():
        return [path.resolve()], True
    for place in (path / "checkpoints", path):
        if tags := tags_of(place):
            return [place.resolve() / tag for tag in tags], False
    raise UserError(
        f"--resume {which}: no checkpoint there (a folder with {manifest.MANIFEST} is one)"
    )


def examine(peers: Peers, folder: Path) -> tuple[dict[str, Any], str | None]:
    """The manifest, and what is wrong with the checkpoint (None: nothing). Every rank compares and
    scans its share of the files. Collective; every rank gets the same.
    """

    def read() -> tuple[dict[str, Any], str | None]:
        try:
            return manifest.read(folder), None
        except ManifestError as error:
            return {}, str(error)

    values, problem = peers.from_rank_0(read)
    if problem is not None:
        return values, problem
    mine = None
    try:
        names = sorted(values["files"])[peers.rank :: peers.world]
        manifest.check_files(folder, values, names)
        for name in names:
            if name.endswith(".pt"):
                scan.scan(folder / name)
    except ManifestError as error:
        mine = str(error)
    return values, next((said for said in peers.gather(mine) if said is not None), None)
