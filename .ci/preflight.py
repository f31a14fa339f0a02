"""What `make` needs before anything can be installed; standard library only, runs with any Python 3."""

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
    version = "%d.%d" % sys.version_info[:2]
    if sys.version_info < MINIMUM:
        found.append(
            "Python %s is too old, %d.%d or newer is needed: make PYTHON=python3.11 ..."
            % (version, MINIMUM[0], MINIMUM[1])
        )
    # Debian ships venv without ensurepip and fails half-way through.
    if any(importlib.util.find_spec(name) is None for name in ("venv", "ensurepip")):
        found.append(
            "the venv module of %s is missing: apt-get install python%s-venv"
            % (sys.executable, version)
        )
    if shutil.which(os.environ.get("CXX", "g++").split()[0]) is None:
        found.append("no C++ compiler (DeepSpeed builds its CPU helpers): apt-get install g++")
    header = os.path.join(sysconfig.get_paths()["include"], "Python.h")
    if not os.path.isfile(header):
        found.append("%s is missing: apt-get install python%s-dev" % (header, version))
    free = shutil.disk_usage(os.getcwd()).free / 1e9
    if free < FREE_GB and not os.path.isdir(".venv"):
        found.append("%.0f GB free in %s, %d GB are needed" % (free, os.getcwd(), FREE_GB))
    return found


def main():
    """Prints what is missing; exit code 2 when something is."""
    found = problems()
    for problem in found:
        print("make: " + problem, file=sys.stderr)
    return 2 if found else 0


if __name__ == "__main__":
    sys.exit(main())
