"""The real DeepSpeed launcher under `espalier launch`'s supervision: a signal stops both ranks, 75
comes back.
"""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.distributed.spawn import ROOT

# On SIGTERM a rank tells that it "saved" and leaves as a stage does.
RANK = """
import os, signal, sys
signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
with open(os.path.join(sys.argv[-1], "ready"), "w") as pipe:
    pipe.write("x")
signal.sigwait({signal.SIGTERM})
open(os.path.join(sys.argv[-1], "saved" + os.environ["RANK"]), "w").close()
sys.exit(75)
"""
SUPERVISOR = """
import sys
from launchers.local import base_environment, deepspeed_command
from launchers.supervise import Plan, supervise
argv = [*deepspeed_command(), "--num_accelerators", "2", "--hostfile", "/dev/null", "--master_port", "29999"]
plan = Plan([*argv, *sys.argv[1:]], base_environment(), ranks_report=False)
sys.exit(supervise(lambda folder: plan))
"""


@pytest.mark.world_size(2)
def test_stop_saves_on_every_rank(tmp_path: Path) -> None:
    rank, ready = tmp_path / "rank.py", tmp_path / "ready"
    rank.write_text(RANK)
    os.mkfifo(ready)
    process = subprocess.Popen(
        [sys.executable, "-c", SUPERVISOR, str(rank), str(tmp_path)],
        cwd=ROOT,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    seen = ""
    while len(seen) < 2:  # both ranks listen
        seen += ready.read_text()
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=100) == 75
    assert (tmp_path / "saved0").exists()
    assert (tmp_path / "saved1").exists()
