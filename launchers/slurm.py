"""Slurm: srun inside an allocation, an sbatch script outside one.

srun starts the ranks itself, with no launcher in between: the ranks read their number from Slurm
(train/runtime/distributed.py), and Slurm's warning signal reaches all of them at once.
`--signal=TERM@300` has no `B:` because that would signal the batch shell instead of the ranks.
"""

from __future__ import annotations

import argparse
import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

from launchers.array import Job, Queue
from launchers.job import EXIT_STOPPED, SHARED
from launchers.local import MODULE, base_environment
from launchers.supervise import Plan, describe, supervise

__all__ = ["batch_script", "run", "srun_command"]

WARNING_SECONDS = 300
TEMPLATE = Path(__file__).with_name("templates") / "slurm.sh"


def srun_command(options: argparse.Namespace, job: list[str]) -> list[str]:
    """One task per rank; a task that dies takes the others with it instead of leaving them waiting."""
    # After `trim` the first rank measures when the others have left; a site may limit that wait.
    argv = ["srun", "--kill-on-bad-exit=1", "--wait=0", "--export=ALL"]
    if options.processes:
        argv += [f"--ntasks={options.processes}"]
    if options.per_node:
        argv += [f"--ntasks-per-node={options.per_node}"]
    argv += options.launcher_option
    return [*argv, sys.executable, "-u", "-m", MODULE, *job]


def batch_script(options: argparse.Namespace, jobs: list[Job]) -> str:
    """The sbatch script; with several jobs a job array that picks its own line."""
    header = [
        f"--job-name=espalier-{jobs[0].command[0]}",
        f"--signal=TERM@{WARNING_SECONDS}",
        "--output=slurm-%x-%j.out",
    ]
    if options.processes:
        header.append(f"--ntasks={options.processes}")
    if options.per_node:
        header.append(f"--ntasks-per-node={options.per_node}")
    if options.array:
        header.append(f"--array=0-{len(jobs) - 1}")
    header += ["--requeue", "--open-mode=append"]  # the log of a requeued job goes on
    header += options_of(options)
    cases = "\n".join(
        f"  {number}) {shlex.join(srun_command(options, list(job.command)))} ;;"
        for number, job in enumerate(jobs)
    )
    environment = "\n".join(
        f"export {key}={shlex.quote(value)}" for key, value in base_environment().items()
    )
    text = TEMPLATE.read_text(encoding="utf-8")
    fill = {
        "@HEADER@": "\n".join(f"#SBATCH {line}" for line in header),
        # The submitting machine often has no GPU: what the node has is decided on the node.
        "@ENVIRONMENT@": "\n".join(
            line
            for line in environment.splitlines()
            if not line.startswith("export DS_ACCELERATOR")
        ),
        "@FOLDER@": shlex.quote(os.getcwd()),
        "@CASES@": cases,
        "@RESTARTS@": str(options.max_restarts),
        "@STOPPED@": str(EXIT_STOPPED),
        "@BEFORE@": f'if {_ask(options, "done")} "$SLURM_ARRAY_TASK_ID"; then exit 0; fi'
        if options.array
        else "",
        "@AFTER@": f'{_ask(options, "ended")} "$SLURM_ARRAY_TASK_ID" "$code" "$SECONDS"'
        if options.array
        else "",
    }
    for mark, value in fill.items():
        text = text.replace(mark, value)
    return text


def _ask(options: argparse.Namespace, what: str) -> str:
    """A question to the queue, as the beginning of a shell command."""
    queue = str(Path(options.queue).resolve())
    return shlex.join([sys.executable, "-m", "launchers.array", what, queue])


def run(options: argparse.Namespace, jobs: list[Job]) -> int:
    """srun when we are inside an allocation already, sbatch otherwise; returns the exit code.

    A job array is followed by one short job that writes the queue's table.

    Raises:
        FileNotFoundError: srun or sbatch is missing.
    """
    inside = "SLURM_JOB_ID" in os.environ and not options.array
    plan = Plan(srun_command(options, list(jobs[0].command)), base_environment(), stop="leader")
    if options.dry_run:
        print(describe(plan) if inside else batch_script(options, jobs))
        return 0
    tool = "srun" if inside else "sbatch"
    if shutil.which(tool) is None:
        raise FileNotFoundError(f"{tool} is not on PATH: --slurm must be used on a Slurm machine")
    if inside:
        parent = Path(options.job_folder or SHARED)
        return supervise(lambda folder: plan, restarts=options.max_restarts, jobs=parent)
    if options.array:
        jobs = Queue(Path(options.queue)).prepare(jobs)
    script = batch_script(options, jobs)
    print(f"espalier launch: sbatch reads\n{script}", file=sys.stderr)
    done = _sbatch(script)
    if done.returncode or not options.array:
        return done.returncode
    number = done.stdout.strip().partition(";")[0]  # "123" or "123;cluster"
    follow = ["--ntasks=1", "--job-name=espalier-table", f"--dependency=afterany:{number}"]
    environment = base_environment() | {"DS_ACCELERATOR": ""}
    lines = [f"export {key}={shlex.quote(value)}" for key, value in environment.items() if value]
    table = "\n".join(
        ["#!/bin/bash", f"cd {shlex.quote(os.getcwd())}", *lines, _ask(options, "table")]
    )
    return _sbatch(table + "\n", *follow, *options_of(options)).returncode


def options_of(options: argparse.Namespace) -> list[str]:
    """--sbatch options as sbatch takes them."""
    return [option if option.startswith("-") else f"--{option}" for option in options.sbatch]


def _sbatch(script: str, *words: str) -> subprocess.CompletedProcess[str]:
    argv = ["sbatch", "--parsable", *words]
    done = subprocess.run(argv, input=script, stdout=subprocess.PIPE, text=True, check=False)
    if done.returncode == 0:
        print(f"espalier launch: Slurm job {done.stdout.strip()}", file=sys.stderr)
    return done
