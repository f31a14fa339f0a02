"""Are the emulated kernel tests able to fail? Breaks csrc/ in one place at a time and runs them.

    python -m tests.mutation.kernels [NAME ...]      (make kernels-mutants)

Each mutant is a small, plausible mistake: a barrier that is missing, a bound that is off by one, a
gradient that forgets a factor. One that no test notices is printed and makes the exit code 1. The
sources themselves are not touched: a changed copy is compiled in their place.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

from models.kernels.build import CSRC
from tests.mutation.attention_kernels import MISTAKES

ROOT = Path(__file__).resolve().parents[2]
TESTS = ROOT / "tests" / "unit" / "models" / "kernels"


class Mutant(NamedTuple):
    """A mistake: `old` occurs in csrc/`file` exactly once and becomes `new`. The name begins with
    the family whose tests must notice."""

    name: str
    file: str
    old: str
    new: str

    @property
    def test(self) -> Path:
        """The tests that must notice."""
        return TESTS / f"test_{self.name.partition(':')[0]}.py"


FFN, GATES, FOLD = "ffn_act_mask.cuh", "hard_concrete.cuh", "fold.cuh"
MUTANTS = [
    Mutant(
        "ffn_act_mask: no barrier before the block's sums",
        FFN,
        "  __syncthreads();\n  // Warp w adds",
        "  // Warp w adds",
    ),
    Mutant(
        "ffn_act_mask: no barrier in the second stage",
        FFN,
        "  __syncthreads();\n  if (warp != 0",
        "  if (warp != 0",
    ),
    Mutant(
        "ffn_act_mask: last column left out",
        FFN,
        "if (column >= shape.columns) return;",
        "if (column + V >= shape.columns) return;",
    ),
    Mutant(
        "ffn_act_mask: one column too many",
        FFN,
        "bool inside = column < shape.columns;",
        "bool inside = column <= shape.columns;",
    ),
    Mutant(
        "ffn_act_mask: last row left out of the gradients",
        FFN,
        "+ warp; row < shape.rows;",
        "+ warp; row + 1 < shape.rows;",
    ),
    Mutant(
        "ffn_act_mask: the bias gradient forgets the mask",
        FFN,
        "dbias[i] += down;",
        "dbias[i] += up * f.slope;",
    ),
    Mutant(
        "ffn_act_mask: a closed mask hides NaN",
        FFN,
        "out.value[i] = from_float<T>(result);",
        "out.value[i] = from_float<T>(mask[i] == 0.0f ? 0.0f : result);",
    ),
    Mutant(
        "ffn_act_mask: sums rounded to the activations' type",
        FFN,
        "dbias[i] += down;",
        "dbias[i] += to_float(from_float<T>(down));",
    ),
    Mutant(
        "ffn_act_mask: erf off in its last coefficient",
        FFN,
        "fmaf(t, 1.061405429f, -1.453152027f)",
        "fmaf(t, 1.0614f, -1.4531f)",
    ),
    Mutant(
        "ffn_act_mask: alignment of x not asked for",
        "ffn_act_mask.cu",
        "return rows_aligned(x, x_stride, sizeof(T), width) && rows_aligned(y, columns, sizeof(T), width);",
        "return rows_aligned(y, columns, sizeof(T), width);",
    ),
    Mutant(
        "ffn_act_mask: strides of x and the gradient swapped",
        "ffn_act_mask.cu",
        "FfnShape shape{rows, columns, x_stride, gradient_stride};",
        "FfnShape shape{rows, columns, gradient_stride, x_stride};",
    ),
    Mutant("hard_concrete: no barrier before the block's sum", GATES, "  __syncthreads();\n", ""),
    Mutant("hard_concrete: one gate too many", GATES, "if (i < gates) {", "if (i <= gates) {"),
    Mutant("hard_concrete: nine rounds of Philox", GATES, "round < 10;", "round < 9;"),
    Mutant(
        "hard_concrete: the state's offset is not read",
        GATES,
        "    offset = load<1>(noise.state + 1).value[0];\n",
        "",
    ),
    Mutant(
        "hard_concrete: clipped gates keep a slope",
        GATES,
        "value <= 0.0f || value >= 1.0f",
        "value < 0.0f || value > 1.0f",
    ),
    Mutant(
        "fold: no barrier before the block's sums",
        FOLD,
        "  __syncthreads();\n  for (int i = warp;",
        "  for (int i = warp;",
    ),
    Mutant(
        "fold: row indices not used in the backward",
        FOLD,
        "int64_t start = pick(item.rows, row) * item.stride;",
        "int64_t start = row * item.stride;",
    ),
    Mutant(
        "fold: the row gate's sum forgets the column gate",
        FOLD,
        "fmaf(product, gate[i], by_row)",
        "by_row + product",
    ),
    Mutant(
        "fold: a weight finds its neighbour's blocks",
        FOLD,
        "block >= table.item[i + 1].first_block",
        "block > table.item[i + 1].first_block",
    ),
    Mutant(
        "fold: vectors in spite of column indices",
        "fold.cu",
        "bool vectors = item.columns == nullptr &&",
        "bool vectors =",
    ),
    Mutant(
        "fold: partial sums of neighbours overlap",
        "fold.cu",
        "workspace + item.tiles * item.n_rows;",
        "workspace;",
    ),
    *(Mutant(*mistake) for mistake in MISTAKES),
]


def survives(mutant: Mutant) -> bool:
    """Whether the tests pass with this mistake in."""
    source = (CSRC / mutant.file).read_text()
    if source.count(mutant.old) != 1:
        found = source.count(mutant.old)
        raise SystemExit(f"{mutant.name}: {mutant.file} has {found} of {mutant.old!r}, not 1")
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder) / "csrc"
        shutil.copytree(CSRC, copy)
        (copy / mutant.file).write_text(source.replace(mutant.old, mutant.new))
        command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider"]
        environment = {**os.environ, "ESPALIER_EMULATION": str(copy)}
        done = subprocess.run(
            [*command, str(mutant.test)], cwd=ROOT, env=environment, capture_output=True, text=True
        )
    if done.returncode not in (0, 1) or "RuntimeError: g++" in done.stdout:
        raise SystemExit(f"{mutant.name}: the tests did not run\n{done.stdout}{done.stderr}")
    return done.returncode == 0


def main() -> int:
    """Exit code 1 when a mutant survived."""
    parser = argparse.ArgumentParser(prog="python -m tests.mutation.kernels", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("names", nargs="*", help="mutants whose name contains one of these")
    names = parser.parse_args().names
    chosen = [m for m in MUTANTS if not names or any(name in m.name for name in names)]
    survivors = []
    for number, mutant in enumerate(chosen, 1):
        alive = survives(mutant)
        verdict = "SURVIVED" if alive else "noticed"
        print(f"{number}/{len(chosen)}  {verdict:9} {mutant.name}", flush=True)
        survivors += [mutant.name] * alive
    print(f"{len(chosen) - len(survivors)} of {len(chosen)} noticed")
    return int(bool(survivors))


if __name__ == "__main__":
    sys.exit(main())
