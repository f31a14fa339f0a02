"""`espalier launch --array`: one job after the other on this machine, or a Slurm job array.

A job is a recipe, RECIPE,a.b=c,... (the same recipe with its own overrides), or a line of a list file.
The queue is a folder: what each job was and how it ended. A job that ended well is not started again;
one that stopped with a checkpoint (75) goes on; one that failed does not keep the others from running.

    python -m launchers.array table QUEUE      the table of a queue as it stands
    python -m launchers.array done QUEUE N     exit code 0 when job N has ended well  (Slurm's script)
    python -m launchers.array ended QUEUE N C  job N ended with code C               (Slurm's script)
"""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
import time
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from launchers.job import EXIT_STOPPED
from launchers.local import MODULE, base_environment
from launchers.results import write_table

__all__ = ["STAGES", "Job", "Queue", "read_jobs", "run_local"]

STAGES = ("pretrain", "distill", "finetune", "prune", "trim")
_LIST = "jobs.json"
# A comma in front of the next a.b=c; other commas belong to a value.
_OVERRIDE = re.compile(r",(?=[A-Za-z_][\w.]*=)")
_RESUMES = 20  # of a job that keeps stopping though nobody tells it to
_LONGEST_NAME = 100


@dataclass(frozen=True)
class Job:
    """One command, by the name under which the queue knows it.

    Attributes:
        out: its run directory, where it is known.
    """

    name: str
    command: tuple[str, ...]
    out: str | None = None


def read_jobs(command: Sequence[str], listed: str | None, queue: Path) -> list[Job]:
    """The jobs of `VERB JOB JOB ... a.b=c`, or of the lines of a list file.

    Overrides behind the jobs are everybody's. A job with overrides of its own and no out= writes to
    QUEUE/NAME.

    Raises:
        ValueError: no job, the same one twice, or two with one run directory.
        FileNotFoundError: no such list.
    """
    everything = list(command)
    commands = _expand(everything, queue) if listed is None else _lines(Path(listed), everything)
    jobs: dict[str, Job] = {}
    for words in commands:
        name = _name(words)
        if name in jobs and jobs[name].command != tuple(words):  # they differ in out=, or far back
            name = f"{name}-{zlib.crc32(shlex.join(words).encode()):08x}"
        if name in jobs:
            raise ValueError(f"--array: {shlex.join(words)} is listed twice")
        jobs[name] = Job(name, tuple(words), _own_out(words))
    _check_outs(list(jobs.values()))
    return list(jobs.values())


def _expand(command: list[str], queue: Path) -> list[list[str]]:
    end = 1
    while (
        end < len(command) and not command[end].startswith("-") and not _is_override(command[end])
    ):
        end += 1
    parts, rest = command[1:end], command[end:]
    if not parts:
        raise ValueError(
            f"--array needs recipes right behind the verb: -- {command[0]} ONE.yaml TWO.yaml "
            "THREE.yaml,a.b=c [a.b=c ...]"
        )
    commands = []
    for part in parts:
        recipe, *own = _OVERRIDE.split(part)
        words = [command[0], recipe, *rest, *own]
        if own and command[0] in STAGES and _own_out(words) is None:
            words.append(f"out={queue / _name([command[0], recipe, *own])}")
        commands.append(words)
    return commands


def _is_override(word: str) -> bool:
    return re.match(r"[A-Za-z_][\w.]*=", word) is not None


def _lines(path: Path, common: list[str]) -> list[list[str]]:
    """The commands of a list file, one a line as behind `--`; # begins a comment."""
    if not path.is_file():
        raise FileNotFoundError(f"--jobs {path}: no such file; one line `VERB RECIPE a.b=c` a job")
    commands = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        try:
            words = shlex.split(line, comments=True)
        except ValueError as error:
            raise ValueError(f"{path}:{number}: {error}") from error
        if words:
            commands.append(words + common)
    if not commands:
        raise ValueError(f"--jobs {path}: no job in it; one line `VERB RECIPE a.b=c` each")
    return commands


def _name(words: Sequence[str]) -> str:
    """verb-recipe and its overrides, as a file name; out= says where, not what."""
    verb, *rest = words
    parts = [Path(rest[0]).name.removesuffix(".yaml") if rest else "", *rest[1:]]
    kept = [part for part in parts if part and not part.startswith("out=")]
    return re.sub(r"[^\w.=+-]+", "_", "-".join([verb, *kept]))[:_LONGEST_NAME]


def _own_out(words: Sequence[str]) -> str | None:
    found = [word.removeprefix("out=") for word in words if word.startswith("out=")]
    return found[-1] if found else None


def _check_outs(jobs: Sequence[Job]) -> None:
    """Stages must not write over each other."""
    where: dict[str, Job] = {}
    for job in jobs:
        if job.out is None or job.command[0] not in STAGES:
            continue
        other = where.setdefault(os.path.abspath(job.out), job)
        if other is not job:
            raise ValueError(
                f"{shlex.join(other.command)} and {shlex.join(job.command)} both write to {job.out}: "
                "give one of them another out="
            )


def resolved(job: Job) -> Job:
    """The job with its run directory, as its recipe says. Raises ValueError on a wrong recipe."""
    if job.command[0] not in STAGES:
        return job
    words = [word for word in job.command[2:] if _is_override(word)]
    argv = [sys.executable, "-m", MODULE, "config", "show", job.command[1], *words]
    environment = os.environ | base_environment()
    done = subprocess.run(argv, capture_output=True, text=True, env=environment, check=False)
    if done.returncode:
        raise ValueError(f"{shlex.join(job.command)}: {done.stderr.strip()}")
    rows = [line.split(maxsplit=1) for line in done.stdout.splitlines() if line.startswith("out ")]
    out = json.JSONDecoder().raw_decode(rows[0][1])[0] if rows else None
    return Job(job.name, job.command, out)


class Queue:
    """A folder that remembers jobs."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def prepare(self, jobs: Sequence[Job]) -> list[Job]:
        """Writes the list down, with run directories; all recipes are read before a job starts.

        Raises:
            ValueError: a recipe is wrong, or two jobs write to one place.
        """
        known = [self._remembered(job) or resolved(job) for job in jobs]
        _check_outs(known)
        self.folder.mkdir(parents=True, exist_ok=True)
        listed = [{"name": j.name, "command": list(j.command), "out": j.out} for j in known]
        _write(self.folder / _LIST, listed)
        return known

    def jobs(self) -> list[Job]:
        """As they were listed. Raises FileNotFoundError where there is no queue."""
        path = self.folder / _LIST
        if not path.is_file():
            raise FileNotFoundError(f"{path}: no such queue; espalier launch --array makes one")
        listed = json.loads(path.read_text(encoding="utf-8"))
        return [Job(one["name"], tuple(one["command"]), one["out"]) for one in listed]

    def state(self, job: Job) -> dict[str, object]:
        """How the job ended last: "code", "seconds", "starts"; empty before its first end.

        What another command of the same name did is not this job's.
        """
        path = self.folder / "ended" / f"{job.name}.json"
        found = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
        return found if found.get("command") == list(job.command) else {}

    def done(self, job: Job) -> bool:
        """Whether it ended well, and what it made is still there."""
        if self.state(job).get("code") != 0:
            return False
        made = job.out is None or Path(job.out, "model", "config.json").is_file()
        return made or job.command[0] not in STAGES

    def ended(self, job: Job, code: int, seconds: float = 0.0) -> None:
        """Notes the end of a start."""
        before = self.state(job)
        self.folder.joinpath("ended").mkdir(parents=True, exist_ok=True)
        values = {
            "command": list(job.command),
            "out": job.out,
            "code": code,
            "starts": int(str(before.get("starts", 0))) + 1,
            "seconds": float(str(before.get("seconds", 0.0))) + seconds,
        }
        _write(self.folder / "ended" / f"{job.name}.json", values)

    def table(self) -> str:
        """Writes table.txt, table.csv and table.json, and returns the text."""
        return write_table(self.folder, [(job, self.state(job)) for job in self.jobs()])

    def _remembered(self, job: Job) -> Job | None:
        found = self.state(job)
        out = found.get("out")
        return Job(job.name, job.command, str(out) if out else None) if found else None


def _write(path: Path, values: object) -> None:
    partial = path.with_name(f".{path.name}.partial")
    partial.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")
    os.replace(partial, path)


def run_local(queue: Queue, jobs: Sequence[Job], start: Callable[[Job], tuple[int, bool]]) -> int:
    """One job after the other; returns 0, the first failure's code, or 75 when we were told to stop.

    Args:
        start: runs a job to its end: its exit code, and whether a signal told us to stop.
    """
    jobs, worst = queue.prepare(jobs), 0
    for number, job in enumerate(jobs, start=1):
        if queue.done(job):
            _say(f"job {number} of {len(jobs)} is done already: {job.name}")
            continue
        for _ in range(_RESUMES):
            _say(f"job {number} of {len(jobs)}: {shlex.join(job.command)}")
            begin = time.monotonic()
            code, told = start(job)
            queue.ended(job, code, time.monotonic() - begin)
            if told and code == EXIT_STOPPED:
                _say("stopped; the same command goes on with this job")
                return code
            if code != EXIT_STOPPED:
                break
        if told:
            _say("told to stop; the same command goes on with the next job")
            return code or worst or EXIT_STOPPED
        worst = worst or code
    print(queue.table())
    return worst


def _say(text: str) -> None:
    print(f"espalier launch: {text}", file=sys.stderr, flush=True)


def _main(argv: Sequence[str]) -> int:
    what, folder, *rest = argv
    queue = Queue(Path(folder))
    if what == "table":
        print(queue.table())
        return 0
    job = queue.jobs()[int(rest[0])]
    if what == "done":
        return 0 if queue.done(job) else 1
    queue.ended(job, int(rest[1]), float(rest[2]) if len(rest) > 2 else 0.0)
    return 0


if __name__ == "__main__":
    try:
        sys.exit(_main(sys.argv[1:]))
    except (ValueError, FileNotFoundError) as error:
        print(f"launchers.array: {error}", file=sys.stderr)
        sys.exit(2)
