"""`espalier launch`: starts a stage on many processes and hands back its exit code.

    espalier launch -n 2 -- distill blocksworld-distill
    espalier launch --hostfile hosts -- distill efficientvlm-4m engine.config=zero2
    espalier launch --hostfile hosts --node-rank 1 -- distill efficientvlm-4m   # on machine 1, no ssh
    espalier launch --mpi --hostfile hosts -- distill efficientvlm-4m
    espalier launch --slurm -n 16 --per-node 8 -- distill efficientvlm-4m
    espalier launch --mpi -n 4 -- distill efficientvlm-4m
    espalier launch --array -n 2 -- distill one.yaml two.yaml three.yaml optim.lr=1e-4
    espalier launch --array -- prune vqa.yaml,prune.sparsity=0.25 vqa.yaml,prune.sparsity=0.35
    espalier launch --array --jobs jobs.txt --queue runs/five-tasks

Everything behind `--` is handed to `espalier` on every rank. Exit code 75 (stopped by a signal,
checkpoint saved) is passed through: run the same command again to go on.
"""

from __future__ import annotations

import argparse
import shlex
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from launchers import hostfile, local, mpi, slurm
from launchers.array import Job, Queue, read_jobs, run_local
from launchers.job import EXIT_USAGE, SHARED
from launchers.supervise import Plan, describe, supervise

__all__ = ["add_arguments", "run"]

VERBS = ("pretrain", "distill", "finetune", "prune", "trim", "eval", "bench", "doctor", "data")
# What `data` spreads over ranks; the others would do everything on each of them.
_SPREAD = ("index", "build")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the options and the command to start; the caller owns description and epilog."""
    _add_places(parser)
    _add_restarts(parser)
    parser.add_argument(
        "--launcher-option",
        action="append",
        default=[],
        metavar="OPTION",
        help="one more option for deepspeed, mpirun or srun: --launcher-option=--ssh_port=2222",
    )
    _add_array(parser)
    parser.add_argument(
        "--sbatch", action="append", default=[], metavar="OPTION", help="one more sbatch option"
    )
    parser.add_argument("--port", type=int, help="rendezvous port; default: a free one")
    parser.add_argument(
        "--dry-run", action="store_true", help="print the command and start nothing"
    )
    parser.add_argument(
        "command", nargs=argparse.REMAINDER, metavar="-- VERB ...", help="what every rank runs"
    )


def _add_places(parser: argparse.ArgumentParser) -> None:
    """On which machines, through what, and how many processes."""
    parser.add_argument(
        "--hostfile",
        metavar="FILE",
        help="machines, one `host slots=N` a line; through ssh and pdsh, or mpirun with --mpi",
    )
    parser.add_argument(
        "--node-rank",
        type=int,
        metavar="R",
        help="start only this machine of the hostfile (the R-th, from 0), without ssh; give the same "
        "command with each machine's number on all of them",
    )
    parser.add_argument(
        "--master-addr", metavar="ADDRESS", help="where the other machines find the first one"
    )
    where = parser.add_mutually_exclusive_group()
    where.add_argument(
        "--slurm", action="store_true", help="srun inside an allocation, sbatch outside"
    )
    where.add_argument(
        "--mpi", action="store_true", help="mpirun on this machine, its allocation or the hostfile"
    )
    parser.add_argument(
        "-n", "--processes", type=_positive, metavar="PROCS", help="processes in all"
    )
    parser.add_argument(
        "--per-node", type=_positive, metavar="K", help="processes per machine (Slurm, hostfile)"
    )


def _add_restarts(parser: argparse.ArgumentParser) -> None:
    """What happens after a crash."""
    parser.add_argument(
        "--max-restarts",
        type=int,
        default=0,
        metavar="K",
        help="start again after a crash, without machines that no longer answer; a stop that saved "
        "(exit code 75) is no crash",
    )
    parser.add_argument(
        "--min-nodes",
        type=_positive,
        default=1,
        metavar="N",
        help="give up rather than restart on fewer machines of the hostfile",
    )
    parser.add_argument(
        "--job-folder",
        metavar="DIR",
        help=f"where ranks report to the launcher; all machines must see it (default: {SHARED} in "
        "the current folder, used with several machines only)",
    )


def _add_array(parser: argparse.ArgumentParser) -> None:
    """Several jobs, one after the other."""
    parser.add_argument(
        "--array",
        action="store_true",
        help="a queue: VERB RECIPE RECIPE,a.b=c ... a.b=c; what is done is skipped, a table ends it",
    )
    parser.add_argument(
        "--jobs",
        metavar="FILE",
        help="with --array: a list of jobs, one line `VERB RECIPE a.b=c` each",
    )
    parser.add_argument(
        "--queue",
        metavar="DIR",
        default="runs/queue",
        help="with --array: the folder that remembers jobs and gets the table (default: %(default)s)",
    )


def run(arguments: Sequence[str] | argparse.Namespace) -> int:
    """Starts what the arguments (of `espalier launch`) ask for and returns its exit code."""
    try:
        options = arguments if isinstance(arguments, argparse.Namespace) else _parse(arguments)
        return _start(options, _jobs(options))
    except (ValueError, FileNotFoundError) as error:
        print(f"espalier launch: {error}", file=sys.stderr)
        return EXIT_USAGE


def _parse(arguments: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="espalier launch",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_arguments(parser)
    return parser.parse_args(list(arguments))


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"expected a number of at least 1, not {text}")
    return value


def _jobs(options: argparse.Namespace) -> list[Job]:
    """The commands to start: one, or with --array several."""
    command = list(options.command)
    if command[:1] == ["--"]:
        command = command[1:]
    if options.jobs is not None:
        if not options.array:
            raise ValueError("--jobs is a list of jobs for --array: add it")
        jobs = read_jobs(command, options.jobs, Path(options.queue))
    else:
        _check_verb(options, command)
        if not options.array:
            return [Job(shlex.join(command), tuple(command))]
        jobs = read_jobs(command, None, Path(options.queue))
    for job in jobs:
        _check_verb(options, list(job.command))
    return jobs


def _check_verb(options: argparse.Namespace, command: list[str]) -> None:
    words = shlex.join(command)
    if not command or command[0] not in VERBS:
        found = f"not {command[0]!r}" if command else "nothing follows"
        raise ValueError(
            f"expected a verb ({', '.join(VERBS)}) behind `--`, {found}; see espalier launch --help"
        )
    if command[0] != "data":
        return
    if not options.mpi or options.array:
        raise ValueError(f"`data` verbs spread through MPI: espalier launch --mpi -- {words}")
    if command[1:2] and command[1] not in _SPREAD:
        raise ValueError(
            f"`data {command[1]}` does not spread over ranks (only {', '.join(_SPREAD)} do); "
            f"run it alone: espalier {words}"
        )


def _start(options: argparse.Namespace, jobs: list[Job]) -> int:
    _check(options, jobs)
    if options.slurm:
        return slurm.run(options, jobs)
    if options.dry_run:
        for job in jobs:
            print(describe(_planner(options, list(job.command))(Path(SHARED, "JOB"))))
        return 0

    def run_one(job: Job) -> tuple[int, bool]:
        shared = options.mpi or (options.hostfile and options.node_rank is None)
        parent = Path(options.job_folder or SHARED).resolve() if shared else None
        told: list[int] = []
        make = _planner(options, list(job.command))
        code = supervise(make, restarts=options.max_restarts, jobs=parent, told=told)
        return code, bool(told)

    if options.array:
        return run_local(Queue(Path(options.queue)), jobs, run_one)
    return run_one(jobs[0])[0]


def _check(options: argparse.Namespace, jobs: list[Job]) -> None:
    if options.slurm and options.hostfile:
        raise ValueError("--slurm knows its machines: leave --hostfile out")
    if options.node_rank is None:
        return
    if not options.hostfile or options.mpi:
        raise ValueError(
            "--node-rank needs --hostfile, and no --mpi: it counts the file's machines"
        )
    if len(jobs) > 1 and not options.port:
        raise ValueError("--array with --node-rank needs a --port that all machines agree on")


def _planner(options: argparse.Namespace, job: list[str]) -> Callable[[Path], Plan]:
    """What makes the plan of each start; from the second on, without machines that are gone."""
    if options.mpi:
        return lambda folder: mpi.plan(options, job)
    if not options.hostfile:
        return lambda folder: local.plan(options, job)
    started = False

    def make(folder: Path) -> Plan:
        nonlocal started
        lost: frozenset[str] = frozenset()
        if started and options.node_rank is None:
            lost = _lost_hosts(options)
        started = True
        return hostfile.plan(options, job, folder, lost)

    return make


def _lost_hosts(options: argparse.Namespace) -> frozenset[str]:
    hosts = list(hostfile.read_hostfile(options.hostfile))
    alive = hostfile.answering(hosts)
    lost = frozenset(hosts) - alive
    if len(alive) < options.min_nodes:
        raise ValueError(
            f"only {len(alive)} of {len(hosts)} machines answer ({', '.join(sorted(lost))} do not), "
            f"--min-nodes is {options.min_nodes}: not starting again"
        )
    if lost:
        print(f"espalier launch: going on without {', '.join(sorted(lost))}", file=sys.stderr)
    return lost
