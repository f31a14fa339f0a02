"""The doctor's comparison of machines, with a stand-in ssh that runs the question here."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from train import host_check


def ssh(folder: Path, text: str) -> str:
    path = folder / "ssh"
    path.write_text(f'#!/bin/sh\nfor word; do last="$word"; done\n{text}\n')
    path.chmod(0o755)
    return str(path)


def lines_for(folder: Path, text: str, **changes: Any) -> list[tuple[str, host_check.Line]]:
    hosts = {"a": 1, "b": 1}
    probe, answers = host_check.ask_all(ssh(folder, text), ["localhost", "b"], folder)
    found = dict(zip(hosts, answers.values(), strict=True))
    for there in found.values():
        if isinstance(there, dict):
            there |= {"first": "10.0.0.1", "gpus": 0} | changes
    return host_check.compare(probe, hosts, found, folder)


def test_machines_like_this_one_are_good(tmp_path: Path) -> None:
    lines = lines_for(tmp_path, 'exec sh -c "$last"')
    assert [(host, good) for host, (good, _) in lines] == [("a", True), ("b", True)]
    assert not list(tmp_path.glob(".espalier-probe-*"))


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"python": "3.9.0"}, "Python is 3.9.0"),
        ({"versions": {}}, "deepspeed is None"),
        ({"code": "other"}, "the code differs"),
        ({"probe": "stale"}, "does not see"),
        ({"gpus": 0, "first": "127.0.1.1"}, "finds a at 127.0.1.1"),
        ({"time": 0.0}, "clock is off"),
    ],
)
def test_differences_are_told(tmp_path: Path, change: dict[str, Any], complaint: str) -> None:
    lines = lines_for(tmp_path, 'exec sh -c "$last"', **change)
    assert any(complaint in text for host, (good, text) in lines if host == "b" and not good)


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("echo 'Permission denied (publickey).' >&2; exit 255", "not reachable without a password"),
        ("echo 'no such file' >&2; exit 127", "must lie at the same path"),
        ("echo welcome", "answers nonsense"),
    ],
)
def test_a_machine_that_cannot_answer(tmp_path: Path, text: str, complaint: str) -> None:
    for _, (good, told) in lines_for(tmp_path, text):
        assert not good
        assert complaint in told
