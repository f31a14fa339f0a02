"""What `espalier doctor --hostfile` asks of every machine, and how it compares the answers.

`python -m train.host_check PROBE FIRST` runs on each machine over ssh and prints one line of JSON.
Nothing heavy is imported: the answer comes in a second.
"""

from __future__ import annotations

import glob
import hashlib
import importlib.metadata
import json
import os
import platform
import shlex
import socket
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

__all__ = ["Answer", "ask_all", "compare"]

PROJECT = Path(__file__).resolve().parents[1]
# Versions that must be the same everywhere: they decide what is computed and what is sent.
DISTRIBUTIONS = ("torch", "torchvision", "deepspeed", "timm", "transformers", "webdataset", "numpy")
SECONDS = 60
_CLOCK_SECONDS = 30.0

Answer = dict[str, Any]
Line = tuple[bool, str]  # good, text


def answer(probe: Path, first: str) -> Answer:
    """This machine, for comparison. `probe`: the file whose text all machines must read; `first`:
    the host that all must find.
    """
    try:
        address = socket.gethostbyname(first.rpartition("@")[2])
    except OSError as error:
        address = f"unknown ({error})"
    return {
        "name": socket.gethostname(),
        "python": platform.python_version(),
        "versions": {name: _version(name) for name in DISTRIBUTIONS},
        "code": code_hash(),
        "gpus": len(glob.glob("/dev/nvidia[0-9]*")),
        "first": address,
        "probe": probe.read_text() if probe.is_file() else "",
        "time": time.time(),
    }


def _version(name: str) -> str:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return "missing"


def code_hash() -> str:
    """A hash of our Python files: machines with different code train different models."""
    digest = hashlib.sha256()
    for package in ("data_pipeline", "launchers", "models", "train"):
        for path in sorted((PROJECT / package).rglob("*.py")):
            digest.update(str(path.relative_to(PROJECT)).encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()[:12]


def ask(ssh: str, host: str, probe: Path, first: str) -> Answer | str:
    """The machine's answer, or why there is none."""
    words = [sys.executable, "-m", "train.host_check", str(probe), first]
    line = f"cd {shlex.quote(os.getcwd())} && PYTHONPATH={shlex.quote(str(PROJECT))} "
    command = [ssh, "-o", "BatchMode=yes", "-o", "ConnectTimeout=5", host, line + shlex.join(words)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=SECONDS, check=False)
    except subprocess.TimeoutExpired:
        return f"no answer in {SECONDS} s"
    reason = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
    if done.returncode == 255:
        return f"not reachable without a password: {reason}"
    if done.returncode != 0:
        return (
            f"reachable, but cannot run {sys.executable} in {os.getcwd()} ({reason}): the "
            "environment and this folder must lie at the same path on all machines"
        )
    try:
        return dict(json.loads(done.stdout.strip().splitlines()[-1]))
    except (ValueError, IndexError):
        return f"answers nonsense: {done.stdout[:80]!r}; does a login script print something?"


def ask_all(ssh: str, hosts: list[str], folder: Path) -> tuple[str, dict[str, Answer | str]]:
    """The probe's text, and what each machine answers; all are asked at once.

    Args:
        folder: lies on what all machines should share; the probe is written there for a moment.
    """
    text = os.urandom(8).hex()
    probe = folder / f".espalier-probe-{os.getpid()}"
    probe.write_text(text)
    try:
        with ThreadPoolExecutor(min(32, len(hosts))) as pool:
            answers = pool.map(lambda host: ask(ssh, host, probe, hosts[0]), hosts)
            return text, dict(zip(hosts, answers, strict=True))
    finally:
        probe.unlink(missing_ok=True)


def compare(
    probe: str, hosts: dict[str, int], answers: dict[str, Answer | str], folder: Path
) -> list[tuple[str, Line]]:
    """One or more lines a machine; versions and code are compared with this machine's."""
    here, lines = answer(folder / "no such file", "localhost"), []
    several = len(hosts) > 1
    for number, (host, slots) in enumerate(hosts.items()):
        there = answers[host]
        if isinstance(there, str):
            lines.append((host, (False, there)))
            continue
        wrong = _differences(here, there)
        if there["probe"] != probe:
            wrong.append(
                f"does not see {folder}: data, checkpoints and the run folder must be on a file "
                "system that all machines share"
            )
        if several and number > 0 and there["first"].startswith(("127.", "unknown")):
            wrong.append(
                f"finds {next(iter(hosts))} at {there['first']}: fix its DNS or /etc/hosts, or use "
                "--master-addr"
            )
        if 0 < there["gpus"] < slots:
            wrong.append(f"has {there['gpus']} GPUs but {slots} slots in the hostfile")
        summary = f"{slots} slots, {there['gpus']} GPUs, answers as {there['name']}"
        lines += [(host, (False, text)) for text in wrong] or [(host, (True, summary))]
    return lines


def _differences(here: Answer, there: Answer) -> list[str]:
    wrong = []
    if there["python"] != here["python"]:
        wrong.append(f"Python is {there['python']}, here {here['python']}")
    for name, version in here["versions"].items():
        if there["versions"].get(name) != version:
            wrong.append(f"{name} is {there['versions'].get(name)}, here {version}")
    if there["code"] != here["code"]:
        wrong.append(f"the code differs ({there['code']}, here {here['code']}): copy it again")
    skew = there["time"] - here["time"]
    if abs(skew) > _CLOCK_SECONDS + SECONDS:
        wrong.append(f"its clock is off by {skew:.0f} s: logs of the machines will not line up")
    return wrong


if __name__ == "__main__":
    print(json.dumps(answer(Path(sys.argv[1]), sys.argv[2])))
