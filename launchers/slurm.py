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

from launchers.job import EXIT_STOPPED, SHARED
from launchers.local import MODULE, base_environment
from launchers.supervise import Plan, describe, supervise

__all__ = ["batch_script", "run", "srun_command"]

WARNING_SECONDS = 300
TEMPLATE = Path(__file__).with_name("templates") / "slurm.sh"


def srun_command(options: argparse.Namespace, job: list[str]) -> list[str]:
    """One task per rank; a task that dies takes the others with it instead of leaving them waiting."""
    argv = ["srun", "--kill-on-bad-exit=1", "--export=ALL"]
    if options.processes:
        argv += [f"--ntasks={options.processes}"]
    if options.per_node:
        argv += [f"--ntasks-per-node={options.per_node}"]
    argv += options.launcher_option
    return [*argv, sys.executable, "-u", "-m", MODULE, *job]


def batch_script(options: argparse.Namespace, jobs: list[list[str]]) -> str:
    """The sbatch script; with several jobs a job array that picks its own line."""
    header = [
        f"--job-name=espalier-{jobs[0][0]}",
        f"--signal=TERM@{WARNING_SECONDS}",
        "--output=slurm-%x-%j.out",
    ]
    if options.processes:
        header.append(f"--ntasks={options.processes}")
    if options.per_node:
        header.append(f"--ntasks-per-node={options.per_node}")
    if len(jobs) > 1:
        header.append(f"--array=0-{len(jobs) - 1}")
    header += ["--requeue", "--open-mode=append"]  # the log of a requeued job goes on
    header += [option if option.startswith("-") else f"--{option}" for option in options.sbatch]
    cases = "\n".join(
        f"  {number}) {shlex.join(srun_command(options, job))} ;;"
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
    }
    for mark, value in fill.items():
        text = text.replace(mark, value)
    return text


def run(options: argparse.Namespace, jobs: list[list[str]]) -> int:
    """srun when we are inside an allocation already, sbatch otherwise; returns the exit code.

    Raises:
        FileNotFoundError: srun or sbatch is missing.
    """
    inside = "SLURM_JOB_ID" in os.environ and len(jobs) == 1
    plan = Plan(srun_command(options, jobs[0]), base_environment(), stop="leader")
    if options.dry_run:
        print(describe(plan) if inside else batch_script(options, jobs))
        return 0
    tool = "srun" if inside else "sbatch"
    if shutil.which(tool) is None:
        raise FileNotFoundError(f"{tool} is not on PATH: --slurm must be used on a Slurm machine")
    if inside:
        parent = Path(options.job_folder or SHARED)
        return supervise(lambda folder: plan, restarts=options.max_restarts, jobs=parent)
    script = batch_script(options, jobs)
    print(f"espalier launch: sbatch reads\n{script}", file=sys.stderr)
    return subprocess.run(["sbatch"], input=script, text=True, check=False).returncode
