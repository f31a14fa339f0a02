"""On a GPU: every kernel against float64, determinism, other streams, graphs, and without waiting."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from models.kernels import dispatch, hard_concrete, library
from models.kernels import ffn_act_mask as ffn
from models.kernels import reference_gates as gates_reference
from models.kernels.fold import Part, pack
from tests.unit.models.kernels import test_ffn_act_mask as ffn_cases
from tests.unit.models.kernels import test_fold as fold_cases

pytestmark = pytest.mark.gpu
DEVICE = "cuda"


@pytest.fixture(autouse=True, scope="module")
def _kernels() -> None:
    if library.unavailable():
        pytest.skip(f"kernels: {library.unavailable()}")


def on_device(case: ffn_cases.Case) -> list[Tensor]:
    """y, dx, dmask, dbias of the op."""
    x, bias, mask, gradient = (
        None if t is None else t.to(DEVICE) for t in (case.x, case.bias, case.mask, case.gradient)
    )
    assert x is not None and bias is not None and mask is not None and gradient is not None
    leaves = [t.requires_grad_() for t in (x, mask, bias)]
    y = torch.ops.espalier.ffn_act_mask(x, bias, mask, case.activation, case.mask_first)
    return [y.detach(), *torch.autograd.grad(y, leaves, gradient)]


@pytest.mark.parametrize("dtype", ffn_cases.TOLERANCE, ids=str)
@pytest.mark.parametrize("activation, mask_first", ffn_cases.KINDS)
def test_ffn_act_mask(activation: str, mask_first: bool, dtype: torch.dtype) -> None:
    bound = ffn_cases.TOLERANCE[dtype]
    for shape in [*ffn_cases.SHAPES, (2309, 3072), (0, 264)]:
        case = ffn_cases.make(shape, dtype, activation, mask_first)
        found, expected = on_device(case), ffn_cases.truth(case)
        for a, b, most in zip(found, expected, (bound, bound, 1e-5, 1e-5), strict=True):
            assert b is not None and ffn_cases.error(a.cpu(), b) <= most


def test_not_worse_than_eager() -> None:
    """At most 1.5 times the error of the same steps in plain torch, in bf16."""
    case = ffn_cases.make((2309, 3072), torch.bfloat16, "gelu", False)
    y, *_ = ffn_cases.truth(case)
    moved = [t.to(DEVICE) for t in (case.x, case.bias, case.mask) if t is not None]
    eager = dispatch.call("reference", ffn.reference.ffn_act_mask, None, *moved, "gelu", False)  # type: ignore[arg-type]
    assert ffn_cases.error(on_device(case)[0].cpu(), y) <= 1.5 * ffn_cases.error(eager.cpu(), y)


@pytest.mark.parametrize("kind", ["row stride", "odd row stride", "misaligned base", "transposed"])
def test_ffn_layouts(kind: str) -> None:
    case = ffn_cases.make((37, 264), torch.bfloat16, "gelu", True)
    plain = on_device(case)[0]
    x = ffn_cases.strided(case.x.to(DEVICE), kind)
    assert case.bias is not None and case.mask is not None
    y = ffn.launch(x, case.bias.to(DEVICE), case.mask.to(DEVICE), "gelu", True)
    assert torch.equal(y, plain)


def test_more_elements_than_an_int_counts() -> None:
    rows, columns = 2**31 // 3072 + 9, 3072
    if torch.cuda.mem_get_info()[0] < 12 * 2**30:
        pytest.skip("needs 12 GB of free memory")
    x = torch.zeros(rows, columns, dtype=torch.bfloat16, device=DEVICE)
    x[-1] = 1.0
    y = ffn.launch(x, None, None, "gelu", False)
    assert torch.equal(y[-1], torch.nn.functional.gelu(x[-1])) and not y[:-1].any()


@pytest.mark.parametrize("seed, offset", [(0, 0), (2**62 + 12345, 2**33 + 5)])
def test_hard_concrete(seed: int, offset: int) -> None:
    log_alpha = torch.randn(74088) * 2
    costs = torch.rand(74088, dtype=torch.float64) * 1000
    results = []
    for device in ("cpu", DEVICE):
        leaf = log_alpha.to(device).requires_grad_()
        run = torch.ops.espalier.hard_concrete
        z, size = run(leaf, costs.to(device), None, None, seed, offset)
        weights = (torch.ones_like(z), torch.full_like(size, 0.3))
        results.append((z, size, *torch.autograd.grad((z, size), leaf, weights)))
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(b.cpu(), a, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("weight_type, dtype", fold_cases.CASTS, ids=str)
def test_fold(weight_type: torch.dtype, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    kinds = [*fold_cases.KINDS, ((3072, 768), None, None, True, False)]
    kinds.append(((768, 3072), None, 1216, False, True))
    parts = [fold_cases.make_part(*kind, dtype=weight_type) for kind in kinds]
    moved = [Part(*(None if t is None else t.to(DEVICE) for t in part)) for part in parts]
    leaves = [
        t.requires_grad_() for part in moved for t in (part.weight, *part[3:]) if t is not None
    ]
    operands = torch.ops.espalier.compact(*pack(moved), dtype)
    gradients = [torch.randn_like(x) for x in operands]
    back = iter(torch.autograd.grad(operands, leaves, gradients))
    for part, operand, gradient in zip(parts, operands, gradients, strict=True):
        mine = [next(back).cpu(), *(None if g is None else next(back).cpu() for g in part[3:])]
        fold_cases.compare(part, operand.detach().cpu(), gradient.cpu(), mine)


def calls() -> dict[str, Callable[[], list[Tensor]]]:
    """One call of each op, forward and backward, on fixed inputs."""
    case = ffn_cases.make((1000, 3072), torch.bfloat16, "quick_gelu", True)
    log_alpha = torch.randn(74088, device=DEVICE)
    costs = torch.ones(74088, dtype=torch.float64, device=DEVICE)
    part = fold_cases.make_part((768, 3072), None, 1216, False, True)
    moved = Part(*(None if t is None else t.to(DEVICE) for t in part))
    gradient = torch.randn(768, 1216, device=DEVICE)

    def fold() -> list[Tensor]:
        packed = pack([moved])
        (operand,) = torch.ops.espalier.compact(*packed, torch.float32)
        dweights, dgates = torch.ops.espalier.compact_backward([gradient], *packed)
        return [operand, *dweights, *dgates]

    def gates() -> list[Tensor]:
        z, size = torch.ops.espalier.hard_concrete(log_alpha, costs, None, None, 1, 0)
        back = torch.ops.espalier.hard_concrete_backward(z, size, z, log_alpha, costs)
        return [z, size, back]

    return {"ffn_act_mask": lambda: on_device(case), "hard_concrete": gates, "compact": fold}


@pytest.mark.parametrize("name", ["ffn_act_mask", "hard_concrete", "compact"])
def test_ten_runs_give_the_same_bits(name: str) -> None:
    call = calls()[name]
    first = call()
    for _ in range(9):
        assert all(torch.equal(a, b) for a, b in zip(call(), first, strict=True))


def test_on_another_stream() -> None:
    case = ffn_cases.make((500, 3072), torch.bfloat16, "gelu", False)
    expected = on_device(case)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        found = on_device(case)
    stream.synchronize()
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_nothing_waits() -> None:
    log_alpha = torch.randn(1000, device=DEVICE, requires_grad=True)
    costs = torch.ones(1000, dtype=torch.float64, device=DEVICE)
    x, mask = torch.randn(64, 256, device=DEVICE), torch.rand(256, device=DEVICE)
    ffn.launch(x, None, mask, "gelu", False)  # loaded
    torch.cuda.set_sync_debug_mode("error")
    try:
        z, size = torch.ops.espalier.hard_concrete(log_alpha, costs, None, None, 3, 0)
        (z.sum() + size).backward()
        ffn.launch_backward(x, x, None, mask, "gelu", False, True, False)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_each_replay_of_a_graph_draws_new_gates() -> None:
    log_alpha = torch.randn(1000, device=DEVICE)
    costs = torch.ones(1000, dtype=torch.float64, device=DEVICE)
    state = torch.tensor([7, 0], device=DEVICE)
    hard_concrete.launch(log_alpha, costs, None, state, 0, 0)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        z, _ = hard_concrete.launch(log_alpha, costs, None, state, 0, 0)
        hard_concrete.advance(state, 1000)
    for step in range(3):
        graph.replay()
        u = gates_reference.philox_uniforms(7, 250 * step, 1000)
        expected = gates_reference.sampled(log_alpha.cpu(), u)
        torch.testing.assert_close(z.cpu(), expected, rtol=1e-5, atol=1e-5)


def test_under_torch_compile() -> None:
    dispatch.configure("cuda")
    x = torch.randn(64, 256, device=DEVICE, requires_grad=True)
    mask = torch.rand(256, device=DEVICE, requires_grad=True)

    def run(x: Tensor, mask: Tensor) -> Tensor:
        return ffn.ffn_act_mask(x * 2, None, mask, "quick_gelu", True).sin()

    try:
        plain, compiled = run(x, mask), torch.compile(run, fullgraph=True)(x, mask)
        torch.testing.assert_close(compiled, plain)
        for a, b in zip(*(torch.autograd.grad(y.sum(), (x, mask)) for y in (compiled, plain))):  # noqa: B905
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)
    finally:
        dispatch.configure("auto")
