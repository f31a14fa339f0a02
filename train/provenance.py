"""What a run was made with: commit, versions, world size."""

from __future__ import annotations

import platform
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

__all__ = ["git_commit", "provenance"]

_PACKAGES = ("torch", "deepspeed", "transformers", "timm", "webdataset", "tensorboard")


def git_commit() -> str | None:
    """The commit of this checkout ("-dirty" with uncommitted changes); None outside a checkout."""
    root = Path(__file__).resolve().parent.parent
    try:
        return subprocess.run(
            ["git", "-C", str(root), "describe", "--always", "--dirty", "--abbrev=40"],
            capture_output=True,
            text=True,
            check=True,
            timeout=10,
        ).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None


def provenance(world_size: int) -> dict[str, Any]:
    """Commit, Python and package versions, world size: the `provenance` block of run.yaml."""
    versions = {"python": platform.python_version()}
    for name in _PACKAGES:
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            versions[name] = "missing"
    return {"commit": git_commit(), "versions": versions, "world_size": world_size}
