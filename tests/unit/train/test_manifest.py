"""A manifest accepts exactly what was written."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from train.checkpoint import manifest
from train.checkpoint.manifest import MANIFEST, ManifestError


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "part").mkdir()
    (tmp_path / "a.pt").write_bytes(b"weights")
    (tmp_path / "part" / "b.pt").write_bytes(b"")
    names = ["a.pt", "part/b.pt"]
    manifest.write(
        tmp_path, {"step": 3, "files": {n: manifest.describe(tmp_path / n) for n in names}}
    )
    return tmp_path


def test_intact_folders_verify(folder: Path) -> None:
    assert manifest.verify(folder)["step"] == 3
    assert manifest.verify(folder)["files"]["a.pt"]["bytes"] == 7
    assert sorted(p.name for p in folder.iterdir()) == [MANIFEST, "a.pt", "part"]  # no temporary


def _flip(path: Path) -> None:
    path.write_bytes(b"weightz")


@pytest.mark.parametrize(
    ("damage", "part"),
    [
        (lambda f: (f / "a.pt").unlink(), "missing"),
        (lambda f: (f / "a.pt").write_bytes(b"we"), "2 bytes, the manifest says 7"),
        (lambda f: _flip(f / "a.pt"), "sha256"),
        (lambda f: (f / MANIFEST).unlink(), "not completed"),
        (lambda f: (f / MANIFEST).write_text("{"), "not readable"),
        (lambda f: (f / MANIFEST).write_text(json.dumps({"version": 9, "files": {}})), "version 1"),
        (lambda f: (f / MANIFEST).write_text("[]"), "version 1"),
    ],
)
def test_damage_is_named(folder: Path, damage: Callable[[Path], None], part: str) -> None:
    damage(folder)
    with pytest.raises(ManifestError, match=part):
        manifest.verify(folder)


def test_replacing_leaves_the_new_text_only(tmp_path: Path) -> None:
    for text in ("one", "two"):
        manifest.replace_text(tmp_path / "latest", text)
    assert (tmp_path / "latest").read_text() == "two"
    assert [p.name for p in tmp_path.iterdir()] == ["latest"]
