"""A stand-in for pdsh: every "host" is a session on this machine, with the bare environment of sshd.

Called as pdsh is; `%n`, `%h`, `%%` are replaced as pdsh does. PDSH_FOLDER holds `HOST.pid` of what
runs, and a file `HOST.down` makes the host unreachable (exit code 255, as ssh says it). Standard
library only.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

_WITH_VALUE = ("-w", "-f", "-R", "-t", "-u")


def _parse(words: list[str]) -> tuple[list[str], str]:
    hosts: list[str] = []
    while words and words[0].startswith("-"):
        option = words.pop(0)
        if option in _WITH_VALUE:
            value = words.pop(0)
            hosts = value.split(",") if option == "-w" else hosts
    return hosts, " ".join(words)


def _on(host: str, number: int, command: str, folder: Path) -> subprocess.Popen[bytes] | None:
    if (folder / f"{host}.down").exists():
        print(f"{host}: ssh: connect to host {host} port 22: No route to host", file=sys.stderr)
        return None
    line = command.replace("%%", "\0").replace("%n", str(number)).replace("%h", host)
    process = subprocess.Popen(
        ["/bin/sh", "-c", line.replace("\0", "%")],
        env={"HOME": os.environ.get("HOME", "/"), "PATH": "/usr/bin:/bin"},
        start_new_session=True,
        stdin=subprocess.DEVNULL,
    )
    (folder / f"{host}.pid").write_text(str(process.pid))
    return process


def main() -> int:
    """The largest exit code of all hosts, as `pdsh -S` returns."""
    folder = Path(os.environ["PDSH_FOLDER"])
    with (folder / "calls.log").open("a") as log:
        log.write(" ".join(sys.argv[1:]) + "\n")
    hosts, command = _parse(sys.argv[1:])
    running = [_on(host, number, command, folder) for number, host in enumerate(hosts)]
    codes = [255 if process is None else process.wait() for process in running]
    return max(128 - code if code < 0 else code for code in codes)


if __name__ == "__main__":
    sys.exit(main())
