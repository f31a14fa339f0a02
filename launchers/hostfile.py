"""Several machines named in a hostfile, through the DeepSpeed launcher (pdsh over ssh)."""

from __future__ import annotations

import argparse
import os
import re
import shutil
import tempfile
from pathlib import Path

from launchers.local import MODULE, Plan, base_environment, deepspeed_command

__all__ = ["plan", "read_hostfile"]

_LINE = re.compile(r"^(?P<host>\S+)\s+slots\s*=\s*(?P<slots>[0-9]+)$")
# DeepSpeed carries PYTHON*, NCCL* and a few more to the other machines by itself; these it forgets.
CARRIED = (
    "DS_ACCELERATOR",
    "HF_HOME",
    "LD_LIBRARY_PATH",
    "OMP_NUM_THREADS",
    "TORCH_EXTENSIONS_DIR",
    "CUDA_HOME",
)


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


def plan(options: argparse.Namespace, job: list[str]) -> Plan:
    """The DeepSpeed command over the hostfile; -n limits the processes (a multiple of --per-node)."""
    hosts = read_hostfile(options.hostfile)
    argv = [*deepspeed_command(), "--hostfile", str(options.hostfile)]
    nodes, per_node = _shape(options, hosts)
    argv += ["--num_nodes", str(nodes), "--num_accelerators", str(per_node)]
    if nodes == 1:
        argv.append("--force_multi")  # the one machine need not be this one
    if options.port:
        argv += ["--master_port", str(options.port)]
    environment = base_environment()
    if not options.dry_run:
        if shutil.which("pdsh") is None:
            raise FileNotFoundError(
                "pdsh is not installed: needed for --hostfile (apt-get install pdsh)"
            )
        environment["DS_ENV_FILE"] = _environment_file(environment)
    return Plan([*argv, "--module", MODULE, *job], environment)


def _shape(options: argparse.Namespace, hosts: dict[str, int]) -> tuple[int, int]:
    slots = list(hosts.values())
    per_node = options.per_node or min(slots)
    total = options.processes or per_node * len(hosts)
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


def _environment_file(environment: dict[str, str]) -> str:
    """Writes KEY=VALUE lines for the other machines: the user's own file first, then what DeepSpeed
    forgets.
    """
    lines: dict[str, str] = {}
    users = (
        [os.environ["DS_ENV_FILE"]]
        if "DS_ENV_FILE" in os.environ
        else ["~/.deepspeed_env", ".deepspeed_env"]
    )
    merged = {name: os.environ[name] for name in CARRIED if name in os.environ} | environment
    for path in (Path(name).expanduser() for name in users):
        if path.is_file():
            for line in path.read_text(encoding="utf-8").splitlines():
                key, equals, value = line.partition("=")
                if equals and not key.lstrip().startswith("#"):
                    lines[key.strip()] = value
    lines = {name: value for name, value in merged.items() if name in CARRIED} | lines
    with tempfile.NamedTemporaryFile(
        "w", prefix="espalier-env-", delete=False, encoding="utf-8"
    ) as file:
        file.writelines(f"{key}={value}\n" for key, value in lines.items())
    return file.name
