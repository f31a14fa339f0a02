"""fold_cast and compact: the reference against autograd and plain indexing, kernels against float64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from models.kernels import fold as family
from models.kernels import reference_fold as reference
from models.kernels.fold import Part, pack
from tests.emulation import emulation

CASTS = [
    (torch.float32, torch.float32),
    (torch.float32, torch.bfloat16),
    (torch.float32, torch.float16),
    (torch.bfloat16, torch.bfloat16),
    (torch.float16, torch.float16),
]
BOUND = {torch.float32: 1e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}
# (R, C), rows that take part, columns that do, gate on rows, gate on columns; None: all
KINDS = [
    ((24, 264), None, None, True, False),  # fc1 folded
    ((264, 24), None, None, False, True),  # fc2 folded
    ((40, 136), 16, None, True, False),  # fc1 compact
    ((40, 136), None, 64, False, True),  # fc2 compact
    ((40, 136), 16, None, False, False),  # query projection: rows are left out, no gate
    ((1, 100), None, 40, False, True),  # a bias
    ((33, 37), 5, 9, True, True),
    ((300, 3), None, None, True, True),
    ((4, 8), None, None, False, False),  # a cast alone
    ((4, 8), 0, None, True, False),
    ((0, 8), None, None, True, True),
    ((8, 0), None, None, True, True),
]


def make_part(
    shape: tuple[int, int],
    rows: int | None,
    columns: int | None,
    row_gate: bool,
    column_gate: bool,
    dtype: torch.dtype = torch.float32,
) -> Part:
    """Random weight; indices in order but for the last, as padding of a compacted layer; gates with
    zeros and ones."""
    weight = torch.randn(shape).to(dtype)
    picked = []
    for size, count in zip(shape, (rows, columns), strict=True):
        index = None
        if count is not None:
            index = torch.randperm(size)[:count].sort().values
            index = torch.cat([index[count // 2 :], index[: count // 2]])
        picked.append(index)
    gates = []
    for size, index, wanted in zip(shape, picked, (row_gate, column_gate), strict=True):
        gate = torch.rand(size if index is None else index.numel())
        gate[::3], gate[1::5] = 0.0, 1.0
        gates.append(gate if wanted else None)
    return Part(weight, *picked, *gates)


def run_kernels(
    parts: list[Part], dtype: torch.dtype, gradients: list[Tensor] | None = None, seed: int = 0
) -> tuple[list[Tensor], list[Tensor], list[list[Tensor | None]]]:
    """Operands, random gradients for them if none are given, and for each part dweight, drow_gate,
    dcolumn_gate."""
    weights, gates, indices, layout = pack(parts)
    with emulation(seed):
        operands = family.launch(weights, gates, indices, layout, dtype)
        gradients = gradients or [torch.randn(x.shape).to(dtype) for x in operands]
        dweights, dgates = family.launch_backward(gradients, weights, gates, indices, layout)
    found = [*dgates, None]
    places = [layout[start + 2 : start + 4] for start in range(0, len(layout), 4)]
    each = zip(dweights, places, strict=True)
    return operands, gradients, [[dweight, *(found[i] for i in two)] for dweight, two in each]


def truth(part: Part, gradient: Tensor) -> list[Tensor | None]:
    """Operand, dweight, drow_gate, dcolumn_gate in float64 by plain indexing and autograd."""
    weight = part.weight.double().requires_grad_()
    gates = [None if g is None else g.double().requires_grad_() for g in part[3:]]
    rows = torch.arange(weight.shape[0]) if part.rows is None else part.rows
    columns = torch.arange(weight.shape[1]) if part.columns is None else part.columns
    operand = weight[rows][:, columns]
    if gates[0] is not None:
        operand = operand * gates[0][:, None]
    if gates[1] is not None:
        operand = operand * gates[1][None, :]
    operand.backward(gradient.double())
    return [operand.detach(), weight.grad, *(None if g is None else g.grad for g in gates)]


def close(found: Tensor, expected: Tensor, bound: float) -> bool:
    scale = float(expected.norm()) if expected.numel() else 0.0
    return float((found.double() - expected).norm()) <= bound * scale + 1e-30


def compare(part: Part, operand: Tensor, gradient: Tensor, back: list[Tensor | None]) -> None:
    expected = truth(part, gradient)
    bounds = (BOUND[operand.dtype], BOUND[part.weight.dtype], 1e-5, 1e-5)
    for found, wanted, bound in zip([operand, *back], expected, bounds, strict=True):
        assert (found is None) == (wanted is None)
        if found is not None and wanted is not None:
            assert close(found, wanted, bound), (part.weight.shape, bound)


@pytest.mark.parametrize("weight_type, dtype", CASTS, ids=str)
def test_kernels_against_float64(weight_type: torch.dtype, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    parts = [make_part(*kind, dtype=weight_type) for kind in KINDS]
    for part, operand, gradient, back in zip(parts, *run_kernels(parts, dtype), strict=True):
        assert operand.dtype == dtype and back[0] is not None and back[0].dtype == weight_type
        compare(part, operand, gradient, back)


def test_one_and_many_weights_are_the_same() -> None:
    """More than one launch takes, each also alone: the same bits, in any order of threads."""
    torch.manual_seed(0)
    parts = [make_part(*KINDS[i % len(KINDS)]) for i in range(53)]
    operands, gradients, back = run_kernels(parts, torch.float32)
    for i, part in enumerate(parts):
        alone, _, (mine,) = run_kernels([part], torch.float32, [gradients[i]], seed=i)
        assert torch.equal(alone[0], operands[i])
        for a, b in zip(mine, back[i], strict=True):
            assert (a is None and b is None) or torch.equal(a, b)  # type: ignore[arg-type]


@pytest.mark.parametrize("shape, offset", [((9, 100), 1), ((9, 100), 4), ((9, 33), 0)])
def test_misaligned_weights(shape: tuple[int, int], offset: int) -> None:
    torch.manual_seed(0)
    rows, columns = shape
    weight = torch.randn(rows * columns + offset)[offset:].view(shape)
    part = Part(weight, column_gate=torch.rand(columns), row_gate=torch.rand(rows))
    (operand,), (gradient,), (back,) = run_kernels([part], torch.bfloat16)
    compare(part, operand, gradient, back)


def test_nan_stays_nan_under_a_closed_gate() -> None:
    weight = torch.randn(4, 8)
    weight[1, 2] = torch.nan
    part = Part(weight, column_gate=torch.zeros(8))
    (operand,), *_ = run_kernels([part], torch.float32)
    assert operand.isnan().sum() == 1 and operand[1, 2].isnan()


@pytest.mark.parametrize("kind", KINDS[2:8], ids=str)
def test_reference_gradients(kind: tuple) -> None:
    torch.manual_seed(0)
    part = make_part((6, 7), *(None if k is None else 3 for k in kind[1:3]), *kind[3:])
    part = Part(*(v if v is None or v.dtype == torch.int64 else v.double() for v in part))
    leaves = [v.requires_grad_() for v in (part.weight, *part[3:]) if v is not None]

    def run(weight: Tensor, *gates: Tensor) -> Tensor:
        queue = list(gates)
        each = [None if gate is None else queue.pop(0) for gate in part[3:]]
        return reference.compact(weight, part.rows, part.columns, *each, torch.float64)

    assert torch.autograd.gradcheck(run, leaves)
    gradient = torch.randn_like(run(*leaves))
    dweight, *dgates = reference.compact_backward(gradient, *part)
    found = [dweight, *(d for d, gate in zip(dgates, part[3:], strict=True) if gate is not None)]
    for a, b in zip(found, torch.autograd.grad(run(*leaves), leaves, gradient), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


def test_folded_masked_and_compact_are_one() -> None:
    """The identities that folding and compaction rest on, in float64, gradients too."""
    torch.manual_seed(0)
    z = torch.rand(16, dtype=torch.float64)
    z[::2] = 0.0
    kept = z.nonzero().flatten()
    x, w1, w2 = (torch.randn(s, dtype=torch.float64) for s in ((5, 4), (16, 4), (4, 16)))
    leaves = [t.requires_grad_() for t in (w1, w2, z)]

    def one(part: Part) -> Tensor:
        return reference.compact(*part, torch.float64)

    act = torch.nn.functional.gelu
    masked = (act(x @ w1.T) * z) @ w2.T
    folded = act(x @ w1.T) @ one(Part(w2, column_gate=z)).T
    compacted = act(x @ one(Part(w1, kept)).T) @ one(Part(w2, None, kept, None, z[kept])).T
    expected = torch.autograd.grad(masked.square().sum(), leaves)
    for other in (folded, compacted):
        torch.testing.assert_close(other, masked, rtol=1e-12, atol=1e-12)
        for number, (a, b) in enumerate(
            zip(torch.autograd.grad(other.square().sum(), leaves), expected, strict=True)
        ):
            if number == 2 and other is compacted:  # a closed gate's gradient ends at the clamp
                a, b = a[kept], b[kept]
            torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)


def test_op() -> None:
    torch.manual_seed(0)
    parts = [make_part((6, 7), 3, None, True, False), make_part((5, 9), None, 4, False, True)]
    for part in parts:
        part.weight.requires_grad_()
    torch.library.opcheck(torch.ops.espalier.compact, (*pack(parts), torch.float32))
    gate = parts[1].column_gate
    assert gate is not None
    leaves = [parts[0].weight, gate.requires_grad_()]
    found = torch.ops.espalier.compact(*pack(parts), torch.float32)
    plain = [reference.compact(*part, torch.float32) for part in parts]
    for chosen in ((0, 1), (1,), (0,)):  # also when an operand takes no part in the loss
        a, b = (
            torch.autograd.grad(
                sum(results[i].square().sum() for i in chosen),
                leaves,
                allow_unused=True,
                materialize_grads=True,
                retain_graph=True,
            )
            for results in (found, plain)
        )
        for mine, expected in zip(a, b, strict=True):
            torch.testing.assert_close(mine, expected)
    detached = [Part(*(None if t is None else t.detach() for t in part)) for part in parts]
    arguments = ([torch.randn(3, 7), torch.randn(5, 4)], *pack(detached))
    torch.library.opcheck(torch.ops.espalier.compact_backward, arguments)


def test_on_a_cpu_fold_is_the_reference() -> None:
    part = make_part((6, 7), 3, None, True, False)
    assert family.backend([part], torch.bfloat16) == "reference"
    (found,) = family.fold([part], torch.bfloat16)
    assert torch.equal(found, reference.compact(*part, torch.bfloat16))


def test_bad_input() -> None:
    with emulation():
        part = Part(torch.randn(4, 8), row_gate=torch.rand(3))
        with pytest.raises(ValueError, match="row gate of weight 0"):
            family.launch(*pack([part]), torch.float32)
        with pytest.raises(TypeError, match="does not cast"):
            half = Part(torch.randn(4, 8).half())
            family.launch(*pack([half]), torch.bfloat16)
