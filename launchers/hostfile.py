"""Several machines named in a hostfile: through the DeepSpeed launcher and pdsh, or each machine
started by hand (`--node-rank`), without ssh.
"""

from __future__ import annotations

import argparse
import functools
import os
import re
import shlex
import shutil
import subprocess
import sys
import zlib
from pathlib import Path

from launchers.job import variables
from launchers.local import MODULE, base_environment, deepspeed_command
from launchers.supervise import Plan

__all__ = ["answering", "plan", "read_hostfile", "shape", "travelling"]

_LINE = re.compile(r"^(?P<host>[A-Za-z0-9][\w.:-]*)\s+slots\s*=\s*(?P<slots>[0-9]+)$")
# DeepSpeed carries PYTHON*, NCCL* (on GPUs), MLFLOW*, MV2* and UCX* to the other machines by itself,
# badly quoted; these it forgets.
CARRIED = (
    "CUDA_HOME",
    "DEEPSPEED_TIMEOUT",
    "DS_ACCELERATOR",
    "ESPALIER_",
    "GLOO_",
    "HF_",
    "LD_LIBRARY_PATH",
    "NCCL_",
    "OMP_NUM_THREADS",
    "PATH",
    "PYTHONPATH",
    "TOKENIZERS_PARALLELISM",
    "TORCH_",
    "WANDB_",
)
_PREFIXES = tuple(name for name in CARRIED if name.endswith("_"))
# DeepSpeed puts what travels into the command lines of pdsh and ssh, where every user of the machine
# can read it, and into its log.
_SECRET = re.compile(r"_(KEY|TOKEN)$|_SECRET|_PASSWORD", re.IGNORECASE)
# Below 32768, where Linux hands out ports by itself.
_FIRST_PORT, _PORTS = 20000, 12000
PROBE_SECONDS = 15.0


def read_hostfile(path: str | Path) -> dict[str, int]:
    """Machines and their slots, in the file's order.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: a line is malformed, a host is named twice, or there is no host; names file and
            line.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(
            f"hostfile {path} does not exist; write one line `host slots=N` per machine, or leave "
            "--hostfile out"
        )
    hosts: dict[str, int] = {}
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        text = line.partition("#")[0].strip()
        if not text:
            continue
        match = _LINE.match(text)
        if match is None or int(match["slots"]) < 1:
            raise ValueError(f"{path}:{number}: expected `host slots=N`, found {line.strip()!r}")
        if match["host"] in hosts:
            raise ValueError(f"{path}:{number}: host {match['host']} is named twice")
        hosts[match["host"]] = int(match["slots"])
    if not hosts:
        raise ValueError(f"{path}: no host in it; write one line `host slots=N` per machine")
    return hosts


def plan(
    options: argparse.Namespace, job: list[str], folder: Path, lost: frozenset[str] = frozenset()
) -> Plan:
    """The DeepSpeed command over the hostfile; -n limits the processes (a multiple of --per-node).

    Args:
        folder: the job folder; the hostfile of a restart and the environment file go into it.
        lost: machines to leave out.

    Raises:
        ValueError, FileNotFoundError: a wrong hostfile, sizes that do not fit, or pdsh is missing.
    """
    hosts = read_hostfile(options.hostfile)
    hosts = {host: slots for host, slots in hosts.items() if host not in lost}
    file = Path(options.hostfile)
    if lost:
        file = folder / "hosts"
        file.write_text("".join(f"{host} slots={slots}\n" for host, slots in hosts.items()))
    by_hand = options.node_rank is not None
    nodes, per_node = shape(options, hosts, shrunk=bool(lost))
    used = list(hosts)[:nodes]
    argv = [*deepspeed_command(), "--hostfile", str(file)]
    argv += ["--num_nodes", str(nodes), "--num_accelerators", str(per_node)]
    if by_hand:
        if not 0 <= options.node_rank < nodes:
            raise ValueError(
                f"--node-rank {options.node_rank}: {options.hostfile} has machines 0 to {nodes - 1}"
            )
        argv += ["--no_ssh", "--node_rank", str(options.node_rank)]
    elif nodes == 1:
        argv.append("--force_multi")  # the one machine need not be this one
    address = options.master_addr or (used[0] if by_hand else None)
    if address:
        argv += ["--master_addr", address]
        if not by_hand:
            argv.append("--no_ssh_check")  # DeepSpeed asks the first host over ssh for it only
    argv += ["--master_port", str(options.port or _port(options, folder, by_hand))]
    argv += options.launcher_option
    environment = base_environment()
    if by_hand:
        return Plan([*argv, "--module", MODULE, *job], environment)
    if not options.dry_run:
        if shutil.which("pdsh") is None:
            raise FileNotFoundError(
                "pdsh is not installed: needed for --hostfile (apt-get install pdsh), or start "
                "each machine with --node-rank"
            )
        environment["DS_ENV_FILE"] = _environment_file(environment, folder)
    words = [remote_word(word) for word in job]
    return Plan(
        [*argv, "--module", MODULE, *words],
        environment,
        stop_command=stop_command(used, folder),
    )


def shape(options: argparse.Namespace, hosts: dict[str, int], shrunk: bool) -> tuple[int, int]:
    """Machines used and processes on each.

    Args:
        shrunk: machines are missing after a crash: -n is what was wished, not what must be.
    """
    slots = list(hosts.values())
    per_node = options.per_node or min(slots)
    total = options.processes or per_node * len(hosts)
    if shrunk:
        total = min(total, per_node * len(hosts))
    nodes, rest = divmod(total, per_node)
    if rest or not 1 <= nodes <= len(hosts):
        raise ValueError(
            f"-n {total} does not fit {len(hosts)} machines with {per_node} processes each "
            f"({options.hostfile}); choose a multiple of --per-node, at most "
            f"{per_node * len(hosts)}"
        )
    if per_node > min(slots[:nodes]):
        raise ValueError(
            f"--per-node {per_node}: a machine in {options.hostfile} has only {min(slots[:nodes])} "
            "slots"
        )
    return nodes, per_node


def _port(options: argparse.Namespace, folder: Path, by_hand: bool) -> int:
    """By hand every machine must choose the same one; otherwise a new one for each start, because
    the last start may still hold its own.
    """
    return 29500 if by_hand else _FIRST_PORT + zlib.crc32(str(folder).encode()) % _PORTS


def remote_word(word: str) -> str:
    """A word of the command as DeepSpeed and pdsh must be given it, to arrive unchanged.

    DeepSpeed puts words with a space between double quotes (escaping only `"`) and leaves the
    others bare; pdsh replaces %h, %n and %u; then the other machine's shell reads the line.
    """
    quoted = re.sub(r"([\\$`])", r"\\\1", word) if " " in word else shlex.quote(word)
    return quoted.replace("%", "%%")


def stop_command(hosts: list[str], folder: Path) -> list[str]:
    """Sends SIGTERM to the job's ranks on all machines at once."""
    tell = [sys.executable, "-m", "launchers.tell", str(folder), "SIGTERM"]
    command = f"cd {shlex.quote(os.getcwd())} && {shlex.join(tell)}"
    project = shlex.quote(base_environment()["PYTHONPATH"])
    command = f"export PYTHONPATH={project}; {command}".replace("%", "%%")
    return ["pdsh", "-R", "ssh", "-S", "-w", ",".join(hosts), command]


def answering(hosts: list[str]) -> set[str]:
    """The machines that run a command within 15 s, asked through pdsh all at once."""
    commands = {host: ["pdsh", "-R", "ssh", "-S", "-t", "10", "-w", host, "true"] for host in hosts}
    running = {
        host: subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        for host, command in commands.items()
    }
    found = set()
    for host, process in running.items():
        try:
            if process.wait(PROBE_SECONDS) == 0:
                found.add(host)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
    return found


def travelling(environment: dict[str, str]) -> dict[str, str]:
    """The variables that other machines need, ours and those of this shell.

    Whether there is a GPU (DS_ACCELERATOR) each machine finds out for itself, unless the user says.
    """
    ours = os.environ | environment
    names = [name for name in sorted(ours) if name in CARRIED or name.startswith(_PREFIXES)]
    return {name: ours[name] for name in names if name != "DS_ACCELERATOR" or name in os.environ}


def _environment_file(environment: dict[str, str], folder: Path) -> str:
    """KEY=VALUE lines that DeepSpeed exports on the other machines: what it forgets, the job's own
    variables, and above all the user's own file. Secrets stay here.

    Raises:
        ValueError: a value has a line break, which the file cannot say.
    """
    lines = travelling(environment | variables(folder, watched=False)) | _users_file()
    secret = [name for name in lines if _SECRET.search(name)]
    _tell_secrets(tuple(secret))
    lines = {name: value for name, value in lines.items() if name not in secret}
    for name, value in lines.items():
        if "\n" in value:
            raise ValueError(
                f"{name} has a line break: it cannot travel to other machines; unset it"
            )
    path = folder / "deepspeed_env"
    path.write_text("".join(f"{name}={_env_value(value)}\n" for name, value in lines.items()))
    return str(path)


@functools.cache  # once, not at every start again
def _tell_secrets(names: tuple[str, ...]) -> None:
    if names:
        print(
            f"espalier launch: {', '.join(names)} not sent to the other machines, where command "
            "lines would show it: set it there (a login profile, or a file as `wandb login` and "
            "`hf auth login` write it)",
            file=sys.stderr,
            flush=True,
        )


def _env_value(value: str) -> str:
    """DeepSpeed puts a value with unusual characters between double quotes as it is."""
    return re.sub(r'([\\$`"])', r"\\\1", value).replace("%", "%%")


def _users_file() -> dict[str, str]:
    """DS_ENV_FILE, or ~/.deepspeed_env and ./.deepspeed_env; blank lines and comments, on which
    DeepSpeed stumbles, are allowed.
    """
    named = os.environ.get("DS_ENV_FILE")
    lines: dict[str, str] = {}
    for name in [named] if named else ["~/.deepspeed_env", ".deepspeed_env"]:
        path = Path(name).expanduser()
        if path.is_file():
            for line in path.read_text(encoding="utf-8").splitlines():
                key, equals, value = line.partition("=")
                if equals and not key.lstrip().startswith("#"):
                    lines[key.strip()] = value.strip()
    return lines
