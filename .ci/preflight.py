"""What `make` needs before anything can be installed. Standard library, any Python from 3.6 on."""

import importlib.util
import os
import shutil
import sys
import sysconfig

MINIMUM = (3, 11)
FREE_GB = 12  # torch with its CUDA packages, wheels and the pip cache


def problems():
    """Everything that is missing, each with its remedy."""
    found = []
    version = f"{sys.version_info[0]}.{sys.version_info[1]}"
    if sys.version_info < MINIMUM:
        wanted = f"{MINIMUM[0]}.{MINIMUM[1]}"
        found.append(
            f"Python {version} is too old, {wanted} or newer is needed: make PYTHON=python{wanted} "
            "..."
        )
    # Debian ships venv without ensurepip and fails half-way through.
    if any(importlib.util.find_spec(name) is None for name in ("venv", "ensurepip")):
        found.append(
            f"the venv module of {sys.executable} is missing: apt-get install python{version}-venv"
        )
    if shutil.which(os.environ.get("CXX", "g++").split()[0]) is None:
        found.append("no C++ compiler (DeepSpeed builds its CPU helpers): apt-get install g++")
    header = os.path.join(sysconfig.get_paths()["include"], "Python.h")
    if not os.path.isfile(header):
        found.append(f"{header} is missing: apt-get install python{version}-dev")
    free = shutil.disk_usage(os.getcwd()).free / 1e9
    if free < FREE_GB and not os.path.isdir(".venv"):
        found.append(f"{free:.0f} GB free in {os.getcwd()}, {FREE_GB} GB are needed")
    return found


def main():
    """Prints what is missing; exit code 2 when something is."""
    found = problems()
    for problem in found:
        print("make: " + problem, file=sys.stderr)
    return 2 if found else 0


if __name__ == "__main__":
    sys.exit(main())
