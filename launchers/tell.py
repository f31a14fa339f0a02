"""`python -m launchers.tell FOLDER SIGNAL`: sends a signal to the ranks of a job on this machine.

The launcher runs it on every machine through pdsh. DeepSpeed would end the ssh sessions and search
for its processes by their command line; the ranks would lose their output while they save.
"""

from __future__ import annotations

import signal
import sys
from collections.abc import Sequence

from launchers.processes import ranks_of, send

__all__ = ["main"]


def main(arguments: Sequence[str]) -> int:
    """0 when there was a rank to tell, 1 when there was none."""
    folder, name = arguments
    ranks = ranks_of(folder)
    send(ranks, signal.Signals[name])
    return 0 if ranks else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
