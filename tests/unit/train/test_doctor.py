"""The doctor finds what is there and what is wrong."""

import sys
from argparse import Namespace
from pathlib import Path

import pytest

from train import doctor


def by_name(findings: list[doctor.Finding]) -> dict[str, doctor.Finding]:
    return {finding.name: finding for finding in findings}


def test_imports_are_ours() -> None:
    found = by_name(list(doctor._shadowing()))
    assert {finding.level for finding in found.values()} == {"ok"}
    assert found["import models"].text == str(doctor.PROJECT / "models")


def test_another_models_package_is_bad(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "models").mkdir()
    (tmp_path / "models" / "__init__.py").touch()
    for name in [name for name in sys.modules if name.partition(".")[0] == "models"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.syspath_prepend(tmp_path)
    finding = by_name(list(doctor._shadowing()))["import models"]
    assert finding.level == "BAD"
    assert str(tmp_path) in finding.text


def test_a_check_that_breaks_is_a_finding(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def broken() -> list[doctor.Finding]:
        raise OSError("no such thing")

    for name in ("_system", "_versions", "_gpu", "_compilers", "_mpi", "_shadowing"):
        monkeypatch.setattr(doctor, name, lambda: iter(()))
    monkeypatch.setattr(doctor, "_disk", broken)
    assert doctor.run(Namespace(hostfile=None)) == 1
    assert "OSError: no such thing" in capsys.readouterr().out


def test_versions_name_what_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "DISTRIBUTIONS", ("torch", "no-such-distribution"))
    levels = {name: finding.level for name, finding in by_name(list(doctor._versions())).items()}
    assert levels == {"torch": "ok", "no-such-distribution": "BAD"}


def test_missing_hostfile_is_wrong_usage(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("_system", "_versions", "_gpu", "_compilers", "_mpi", "_shadowing", "_disk"):
        monkeypatch.setattr(doctor, name, lambda: iter(()))
    assert doctor.main(["--hostfile", "/nowhere/hosts"]) == 2
    assert "/nowhere/hosts does not exist" in capsys.readouterr().err
