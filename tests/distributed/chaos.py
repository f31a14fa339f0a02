"""Kills runs at random moments and compares what comes of them with a run that nobody disturbed.

    python -m tests.distributed.chaos --rounds 100 --json benchmarks/results/chaos.json

A round is a fresh run of one or two ranks that is killed (SIGKILL) once or twice, in training or
inside saving, resumed each time, and left to finish. Then the log of delivered batches and the hash
of all state (parameters, optimizer, gates, random generators, positions) must be the undisturbed
run's, bit for bit. Ranks are forks of this process, which has imported everything: a life costs
seconds. Nothing sleeps: a kill waits for a line of the run, and then a random few milliseconds.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import select
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from torch.distributed import TCPStore

from tests.distributed.chaos_life import EVERY, STEPS, live, make_inputs, state_hash
from tests.distributed.spawn import ROOT, _environment

SAVING = ("copy", "write", "manifest", "latest", "tidy")
PATIENCE_S = 240.0


@dataclass
class Plan:
    """Kill at the `occurrence`-th line that begins with `line`, `delay` seconds later; `victim` dies
    first (None: all at once).
    """

    line: str
    occurrence: int
    delay: float
    victim: int | None = None


@dataclass
class Death:
    """Where a kill hit: phase as rank 0 told it last, and whether a checkpoint was complete."""

    phase: str
    after_first_checkpoint: bool
    planned: str


@dataclass
class Round:
    """What happened in a round; `problem` is empty when all is equal."""

    ranks: int
    deaths: list[Death] = field(default_factory=list)
    lives: int = 0
    problem: str = ""


class Chaos:
    """Inputs, undisturbed runs by number of ranks, and rounds, below `work`."""

    def __init__(self, work: Path, seed: int) -> None:
        self.work, self.rng = work, random.Random(seed)
        self.inputs = work / "inputs"
        make_inputs(self.inputs)
        self._whole: dict[int, tuple[dict[int, list[str]], str]] = {}

    def whole(self, ranks: int) -> tuple[dict[int, list[str]], str]:
        """Deliveries by rank and state hash of the undisturbed run."""
        if ranks not in self._whole:
            out = self.work / f"whole-{ranks}"
            out.mkdir()
            if self.life(out, ranks, None) is not None:
                raise RuntimeError("the undisturbed run was killed")
            self._whole[ranks] = delivered(out, ranks), last_hash(out)
        return self._whole[ranks]

    def round(self, number: int, ranks: int, kills: int) -> Round:
        """One run, killed `kills` times."""
        expected = self.whole(ranks)
        out = self.work / f"round-{number}"
        out.mkdir()
        result = Round(ranks)
        try:
            for _ in range(kills):
                result.lives += 1
                death = self.life(out, ranks, self.plan(ranks))
                if death is None:  # it was through before the moment came
                    break
                result.deaths.append(death)
            else:
                result.lives += 1
                self.life(out, ranks, None)
            if delivered(out, ranks) != expected[0]:
                result.problem = "other samples were delivered"
            elif last_hash(out) != expected[1]:
                result.problem = "the final state differs"
        except (RuntimeError, ValueError) as error:
            result.problem = str(error)
        if not result.problem:
            shutil.rmtree(out)
        return result

    def plan(self, ranks: int) -> Plan:
        """A random moment: three of five inside saving."""
        rng = self.rng
        victim = rng.choice([None, *range(ranks)]) if ranks > 1 else None
        if rng.random() < 0.6:
            line = f"save {rng.choice(SAVING)}"
            return Plan(line, rng.randint(1, 2), rng.uniform(0.0, 0.01), victim)
        return Plan("train", rng.randint(1, STEPS), rng.uniform(0.0, 0.05), victim)

    def life(self, out: Path, ranks: int, plan: Plan | None) -> Death | None:
        """Runs until it ends or is killed. Raises RuntimeError when a rank fails by itself."""
        store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        reading, writing = os.pipe()
        pids = []
        for rank in range(ranks):
            environment = _environment(rank, ranks, store.port, {"DS_ACCELERATOR": "cpu"})
            pid = os.fork()
            if pid == 0:
                os.close(reading)
                live(self.inputs, out, writing, environment)
            pids.append(pid)
        os.close(writing)
        listener = _Listener(reading)
        try:
            killed = plan is not None and listener.until(plan)
            if plan is not None and killed:
                victims = range(ranks) if plan.victim is None else [plan.victim]
                for rank in victims:
                    os.kill(pids[rank], signal.SIGKILL)
            else:
                listener.until(None)
        finally:
            if plan is not None and plan.victim is not None:
                listener.pause(self.rng.uniform(0.0, 0.05))  # what the others do without it
            codes = _reap(pids, kill=plan is not None and killed)
            listener.drain()
            os.close(reading)
        if plan is not None and killed:
            before = (out / "run/checkpoints").glob("step_*/MANIFEST.json")
            return Death(listener.phase, any(before), plan.line)
        if any(codes):
            told = "".join(p.read_text()[-3000:] for p in sorted(out.glob("stderr_*.txt")))
            raise RuntimeError(f"ranks ended with {codes}: {told}")
        return None


class _Listener:
    """Reads the run's lines; `phase` is the last one that matters."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor, self._rest, self.phase = descriptor, b"", "start"
        self._saving = False

    def _lines(self, seconds: float) -> list[str] | None:
        """Lines that arrive within `seconds`; None at the end of the pipe."""
        if not select.select([self._descriptor], [], [], seconds)[0]:
            return []
        data = os.read(self._descriptor, 65536)
        if not data:
            return None
        *lines, self._rest = (self._rest + data).split(b"\n")
        found = [line.decode() for line in lines]
        for line in found:
            # Training goes on while a save is written: the save is what is told of.
            if line.startswith("save "):
                self._saving, self.phase = True, line
            elif line == "saved":
                self._saving, self.phase = False, "train"
            elif not self._saving:
                self.phase = "train"
        return found

    def until(self, plan: Plan | None) -> bool:
        """True when the plan's moment has come, False when the run ended before."""
        deadline, seen = time.monotonic() + PATIENCE_S, 0
        while time.monotonic() < deadline:
            lines = self._lines(1.0)
            if lines is None:
                return False
            if plan is None:
                continue
            seen += sum(line.startswith(plan.line) for line in lines)
            if seen >= plan.occurrence:
                self.pause(plan.delay)
                return True
        raise RuntimeError("the run hung")

    def pause(self, seconds: float) -> None:
        """Lets the run go on for so long."""
        deadline = time.monotonic() + seconds
        while (left := deadline - time.monotonic()) > 0 and self._lines(left) is not None:
            pass

    def drain(self) -> None:
        """What was told before the end."""
        while self._lines(5.0):
            pass


def _reap(pids: list[int], kill: bool) -> list[int]:
    codes = []
    for pid in pids:
        if kill:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        codes.append(os.waitpid(pid, 0)[1])
    return codes


def delivered(out: Path, ranks: int) -> dict[int, list[str]]:
    """rank -> one line a position, in order. Raises ValueError when a position that was delivered
    again was another batch.
    """
    found = {}
    for rank in range(ranks):
        lines: dict[int, str] = {}
        for line in (out / f"delivered_{rank}.log").read_text().splitlines():
            position, _, digest = line.partition(" ")
            if len(digest) != 16:
                continue  # the kill came while this line was written; its batch comes again
            if lines.setdefault(int(position), digest) != digest:
                raise ValueError(f"position {position} of rank {rank} came again and is another")
        found[rank] = [f"{position} {lines[position]}" for position in sorted(lines)]
    return found


def last_hash(out: Path) -> str:
    """Hash of the final checkpoint."""
    return state_hash(out / "run/checkpoints" / f"step_{STEPS:08d}")


def summary(rounds: list[Round]) -> dict[str, Any]:
    """Counts of rounds and of kills by phase."""
    deaths = [death for entry in rounds for death in entry.deaths]
    return {
        "rounds": len(rounds),
        "equal": sum(not entry.problem for entry in rounds),
        "kills": len(deaths),
        "kills_inside_saving": sum(death.phase.startswith("save") for death in deaths),
        "kills_after_the_first_checkpoint": sum(d.after_first_checkpoint for d in deaths),
        "kills_by_phase": dict(sorted(Counter(death.phase for death in deaths).items())),
        "rounds_by_ranks": dict(sorted(Counter(str(entry.ranks) for entry in rounds).items())),
        "problems": [entry.problem for entry in rounds if entry.problem],
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=float("inf"), help="begin no round later")
    parser.add_argument("--seed", type=int, default=None)
    parser.add_argument("--json", type=Path, default=None, help="rewritten after every round")
    args = parser.parse_args()
    seed = int.from_bytes(os.urandom(4), "big") if args.seed is None else args.seed
    about = {
        "what": f"{STEPS} steps, a checkpoint every {EVERY}, pruning with gates and KD, ZeRO 1, fp32",
        "command": " ".join(["python", "-m", "tests.distributed.chaos", *sys.argv[1:]]),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "seed": seed,
    }
    started, rounds = time.monotonic(), []
    with tempfile.TemporaryDirectory(prefix="chaos-") as name:
        chaos = Chaos(Path(name), seed)
        for number in range(args.rounds):
            if time.monotonic() - started > args.seconds:
                break
            kills = 2 if chaos.rng.random() < 1 / 3 else 1
            rounds.append(chaos.round(number, 1 + number % 2, kills))
            hits = ", ".join(death.phase for death in rounds[-1].deaths) or "not hit"
            print(f"round {number + 1}/{args.rounds}: {rounds[-1].ranks} ranks, killed in {hits}: "
                  f"{rounds[-1].problem or 'equal'}", flush=True)  # fmt: skip
            about["seconds"] = round(time.monotonic() - started, 1)
            if args.json is not None:
                write(args.json, summary(rounds) | about, rounds)
    print(json.dumps(summary(rounds) | about, indent=1))
    return 0 if rounds and not any(entry.problem for entry in rounds) else 1


def write(path: Path, result: dict[str, Any], rounds: list[Round]) -> None:
    """The record: summary, every round, versions."""
    from train.provenance import provenance

    detail = {"each": [asdict(entry) for entry in rounds], "provenance": provenance(2)}
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(result | detail, indent=1) + "\n")


if __name__ == "__main__":
    os.chdir(ROOT)
    sys.exit(main())
