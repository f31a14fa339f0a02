"""A manifest accepts exactly what was written."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from train.checkpoint import manifest
from train.checkpoint.manifest import MANIFEST, HashingFile, ManifestError

VALUES = {"run_id": "r", "step": 3, "world_size": 1, "zero_stage": 0, "config": {"a.b": 1.5}}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    folder = tmp_path / "step_00000003"
    (folder / "part").mkdir(parents=True)
    (folder / "a.pt").write_bytes(b"weights")
    (folder / "part" / "b.pt").write_bytes(b"")
    names = ["a.pt", "part/b.pt"]
    entries = {name: manifest.describe(folder / name) for name in names}
    manifest.write(folder, VALUES | {"files": entries})
    return folder


def test_intact_folders_verify(folder: Path) -> None:
    values = manifest.verify(folder)
    assert {key: values[key] for key in VALUES} == VALUES
    assert values["files"]["a.pt"]["bytes"] == 7
    assert sorted(p.name for p in folder.iterdir()) == [MANIFEST, "a.pt", "part"]  # no temporary


def test_what_is_hashed_while_it_is_written_is_what_is_on_disk(tmp_path: Path) -> None:
    with HashingFile(tmp_path / "f") as file:
        for part in (b"", b"one", memoryview(b"two" * 10**6)):
            assert file.write(part) == len(part)
        written = file.synced()
    assert written == manifest.describe(tmp_path / "f")
    assert written["bytes"] == 3 + 3 * 10**6


def _rewrite(folder: Path, **changes: object) -> None:
    """A well-formed manifest that says something else."""
    values = manifest.read(folder) | changes
    del values["hash"]
    manifest.write(folder, values)


def _link(folder: Path) -> None:
    (folder / "a.pt").rename(folder.parent / "a.pt")
    (folder / "a.pt").symlink_to(folder.parent / "a.pt")


def _edit(folder: Path, old: str, new: str) -> None:
    text = (folder / MANIFEST).read_text()
    assert old in text
    (folder / MANIFEST).write_text(text.replace(old, new, 1))


ENTRY = {"bytes": 7, "xxh3": "0" * 32}


@pytest.mark.parametrize(
    ("damage", "part"),
    [
        (lambda f: (f / "a.pt").unlink(), "a.pt: missing"),
        (lambda f: (f / "a.pt").write_bytes(b"we"), "a.pt: 2 bytes, the manifest says 7"),
        (lambda f: (f / "a.pt").write_bytes(b"weightz"), "a.pt: its hash"),
        (_link, "a.pt: not a regular file"),
        (lambda f: (f / "c.pt").write_bytes(b""), "c.pt: the manifest does not name it"),
        (lambda f: (f / MANIFEST).unlink(), "not completed"),
        (lambda f: (f / MANIFEST).write_text("{"), "not readable"),
        (lambda f: (f / MANIFEST).write_text("[" * 10**5), "not readable"),
        (lambda f: (f / MANIFEST).write_bytes(b"\xff"), "not readable"),
        (lambda f: (f / MANIFEST).write_text(json.dumps({"version": 1})), "version 2"),
        (lambda f: (f / MANIFEST).write_text("[]"), "version 2"),
        (lambda f: _edit(f, '"step": 3', '"step": 4'), "its own hash"),
        (lambda f: _edit(f, '"step": 3', '"step":  3'), "its own hash"),  # the same values
        (lambda f: _rewrite(f, step=4), "of step 4, but the folder is step_00000003"),
        (lambda f: _rewrite(f, run_id=None), "run_id is missing or of the wrong type"),
        (lambda f: _rewrite(f, files={"../a.pt": ENTRY}), "not a name inside"),
        (lambda f: _rewrite(f, files={"/etc/passwd": ENTRY}), "not a name inside"),
        (lambda f: _rewrite(f, files={"a.pt": {"bytes": 7}}), "a.pt: no size and hash"),
    ],
)
def test_damage_is_named(folder: Path, damage: Callable[[Path], None], part: str) -> None:
    damage(folder)
    with pytest.raises(ManifestError, match=part):
        manifest.verify(folder)


def test_huge_manifests_are_not_read(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(manifest, "_LIMIT", 100)
    with pytest.raises(ManifestError, match="more than 100 bytes"):
        manifest.read(folder)


def test_the_hash_of_values_does_not_depend_on_their_order() -> None:
    assert manifest.hash_of({"a": 1, "b": [2]}) == manifest.hash_of({"b": [2], "a": 1})
    assert manifest.hash_of({"a": 1}) != manifest.hash_of({"a": 2})


@pytest.mark.parametrize(
    ("name", "step"),
    [
        ("step_00000007", 7),
        ("step_123456789", 123456789),
        ("step_7", None),
        ("step_00000007_x", None),
    ],
)
def test_folder_names(name: str, step: int | None) -> None:
    assert manifest.step_of(name) == step
    assert step is None or manifest.tag_of(step) == name


def test_replacing_leaves_the_new_text_only(tmp_path: Path) -> None:
    for text in ("one", "two"):
        manifest.replace_text(tmp_path / "latest", text)
    assert (tmp_path / "latest").read_text() == "two"
    assert [p.name for p in tmp_path.iterdir()] == ["latest"]
