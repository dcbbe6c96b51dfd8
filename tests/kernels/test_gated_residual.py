"""Gated residual, alone and with the next norm: against float64, against the blocks, and inside PyTorch's machinery."""

from __future__ import annotations

from dataclasses import fields, replace

import pytest
import torch
from closeness import BF16_ROUNDING, DTYPES, FLOAT32, relative_error, require_close
from diffusers.models.normalization import RMSNorm
from ltxforge_kernels.cases import AWKWARD, FEW_HIDDEN, Filler, TokenShape
from ltxforge_kernels.gated_residual import gated_residual, gated_residual_norm, launch
from ltxforge_kernels.gated_residual.inputs import Inputs, inputs
from torch.utils.checkpoint import checkpoint

from ltxforge.models.blocks import Modulation

SHAPES = [*FEW_HIDDEN, *(shape for shape in AWKWARD if shape.width > 1 and shape.tokens < 67)]
SMALL = TokenShape("small", 2, 6, 16)
GATE, SHIFT, SCALE = 2, 3, 4
LEARNING = ("hidden", "branch", "gates", "table")
# Sums over tokens of what was rounded before, x' or its gradient, rounded once more.
BF16_TABLE = 2**0.5 * BF16_ROUNDING


def in_dtype(given: Inputs, dtype: torch.dtype) -> Inputs:
    tensors = {field.name: getattr(given, field.name) for field in fields(given)}
    floating = {name: tensor.to(dtype) for name, tensor in tensors.items() if name in LEARNING or "upstream" in name}
    return replace(given, **floating)


def gate_of(given: Inputs, gated: bool) -> tuple:
    return (given.gates, given.gate_index, GATE) if gated else (None, None, None)


def norm_of(given: Inputs, modulated: bool) -> tuple:
    return (given.table, given.index, SHIFT, SCALE) if modulated else (None, None, None, None)


def ours(given: Inputs, gated: bool = True, modulated: bool = True, implementation: str = "triton") -> tuple:
    rows = (*gate_of(given, gated), *norm_of(given, modulated))
    return gated_residual_norm(given.hidden, given.branch, *rows, implementation=implementation)


def as_the_blocks_do(given: Inputs, gated: bool = True, modulated: bool = True) -> tuple:
    """diffusers' order of operations over our `Modulation`, in whatever dtype comes in."""

    def rows(table: torch.Tensor, index: torch.Tensor | None) -> list[torch.Tensor]:
        return Modulation(table, None if index is None else index.long()).rows(torch.zeros_like(table[0]))

    added = given.branch * rows(given.gates, given.gate_index)[GATE] if gated else given.branch
    total = given.hidden + added
    if total.dtype == torch.float64:  # diffusers' norm squares in float32
        normed = torch.nn.functional.rms_norm(total, total.shape[-1:], eps=1e-6)
    else:
        normed = RMSNorm(total.shape[-1], eps=1e-6, elementwise_affine=False)(total)
    if modulated:
        table = rows(given.table, given.index)
        normed = normed * (1 + table[SCALE]) + table[SHIFT]
    return total, normed


def everything(given: Inputs, compute, *flags: bool) -> dict[str, torch.Tensor]:
    """x', y, and every gradient that there is."""
    learning = {name: getattr(given, name).detach().requires_grad_() for name in LEARNING}
    total, normed = compute(replace(given, **learning), *flags)
    torch.autograd.backward([total, normed], [given.total_upstream, given.upstream])
    gradients = {name: tensor.grad for name, tensor in learning.items() if tensor.grad is not None}
    return {"total": total.detach(), "normed": normed.detach(), **gradients}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_forward_and_every_gradient(shape, dtype, device):
    given = inputs(shape, Filler(device), dtype)
    results = everything(given, ours)
    truths = everything(in_dtype(given, torch.float64), as_the_blocks_do)
    eager = everything(given, as_the_blocks_do)
    assert results.keys() == truths.keys() == {"total", "normed", *LEARNING}
    for name, truth in truths.items():
        assert results[name].dtype == dtype
        if dtype == torch.bfloat16 and name in ("gates", "table"):
            assert relative_error(results[name], truth) <= BF16_TABLE, name
        else:
            require_close(results[name], truth, name)
        if dtype == torch.bfloat16:
            assert relative_error(results[name], truth) <= 1.1 * relative_error(eager[name], truth), name


@pytest.mark.parametrize("distinct", [2, None], ids=["an index", "per sample"])
@pytest.mark.parametrize(("gated", "modulated"), [(True, False), (False, True), (False, False), (True, True)])
def test_with_and_without_tables(gated, modulated, distinct, device):
    given = inputs(SMALL, Filler(device), distinct=distinct)
    results = everything(given, ours, gated, modulated)
    truths = everything(in_dtype(given, torch.float64), as_the_blocks_do, gated, modulated)
    assert results.keys() == truths.keys()
    for name, truth in truths.items():
        assert relative_error(results[name], truth) <= FLOAT32, name


@pytest.mark.parametrize("gated", [True, False])
def test_without_the_norm(gated, device):
    """The same x' and gradients as where y gets none."""
    given = inputs(SMALL, Filler(device))
    hidden, branch, gates = (getattr(given, name).detach().requires_grad_() for name in ("hidden", "branch", "gates"))
    learning = replace(given, hidden=hidden, branch=branch, gates=gates)
    total = gated_residual(hidden, branch, *gate_of(learning, gated), implementation="triton")
    total.backward(given.total_upstream)
    silent = replace(in_dtype(given, torch.float64), upstream=torch.zeros_like(given.upstream).double())
    truths = everything(silent, as_the_blocks_do, gated)
    for name, result in (("total", total), ("hidden", hidden.grad), ("branch", branch.grad), ("gates", gates.grad)):
        assert (result is None) == (name not in truths)
        assert result is None or relative_error(result, truths[name]) <= FLOAT32, name


@pytest.mark.parametrize(("gated", "modulated"), [(True, True), (False, False)])
def test_eager_has_the_bits_of_the_blocks(gated, modulated):
    given = inputs(SMALL, Filler())
    expected = as_the_blocks_do(given, gated, modulated)
    for result, truth in zip(ours(given, gated, modulated, "eager"), expected, strict=True):
        assert torch.equal(result, truth)
    alone = gated_residual(given.hidden, given.branch, *gate_of(given, gated), implementation="eager")
    assert torch.equal(alone, expected[0])


def test_layouts_do_not_matter(device):
    plain = inputs(SMALL, Filler(device))
    given = Inputs(*(getattr(plain, field.name).mT.contiguous().mT for field in fields(plain)))
    assert not any(getattr(given, field.name).is_contiguous() for field in fields(given))
    one, other = everything(given, ours), everything(plain, ours)
    assert all(torch.equal(one[name], other[name]) for name in one)
    rows = [
        gated_residual(each.hidden, each.branch, *gate_of(each, True), implementation="triton")
        for each in (given, plain)
    ]
    assert torch.equal(*rows)


def test_tables_cost_nothing_where_they_learn_nothing(device, monkeypatch):
    """LoRA training: neither table's kernel is launched, and the branch is not kept."""
    given = inputs(SMALL, Filler(device))
    monkeypatch.setattr(launch, "table_gradient_op", None)
    monkeypatch.setattr(launch, "gates_gradient_op", None)
    hidden, branch = given.hidden.detach().requires_grad_(), given.branch.detach().requires_grad_()
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor):
        total, normed = ours(replace(given, hidden=hidden, branch=branch))
    assert branch.data_ptr() not in [tensor.data_ptr() for tensor in kept]
    assert total.data_ptr() in [tensor.data_ptr() for tensor in kept]
    torch.autograd.backward([total, normed], [given.total_upstream, given.upstream])
    truths = everything(in_dtype(given, torch.float64), as_the_blocks_do)
    assert relative_error(hidden.grad, truths["hidden"]) <= FLOAT32
    assert relative_error(branch.grad, truths["branch"]) <= FLOAT32


def test_the_same_bits_twenty_times(device):
    given = inputs(TokenShape("", 1, 5, 16), Filler(device), torch.bfloat16)
    first = everything(given, ours)
    for _ in range(19):
        again = everything(given, ours)
        assert all(torch.equal(first[name], again[name]) for name in first)


@pytest.mark.parametrize("distinct", [2, None])
def test_torch_s_own_checks(distinct, device):
    given = inputs(TokenShape("", 2, 2, 8), Filler(device), distinct=distinct)
    learning = replace(given, **{name: getattr(given, name).detach().requires_grad_() for name in LEARNING})
    gated, still = gate_of(learning, True), gate_of(given, True)
    torch.library.opcheck(launch.residual_op, (learning.hidden, learning.branch, *gated))
    torch.library.opcheck(launch.residual_backward_op, (given.total_upstream, *still))
    torch.library.opcheck(launch.gates_gradient_op, (given.total_upstream, given.branch, *still))
    for gated, modulated in ((True, True), (False, False)):
        rows = (*gate_of(learning, gated), *norm_of(learning, modulated))
        torch.library.opcheck(launch.norm_op, (learning.hidden, learning.branch, *rows, 1e-6))
        rows = (*gate_of(given, gated), *norm_of(given, modulated))
        total, _, reciprocal = launch.norm_op(given.hidden, given.branch, *rows, 1e-6)
        kept = (given.total_upstream, given.upstream, total, *rows[:5], rows[6], reciprocal)
        torch.library.opcheck(launch.norm_backward_op, kept)


def model(weights: torch.Tensor, given: Inputs, implementation: str = "triton") -> torch.Tensor:
    """Half a block: two branches, of which the second has no gate."""
    total, normed = ours(given, True, True, implementation)
    total, normed = ours(replace(given, hidden=total, branch=normed @ weights), False, False, implementation)
    gated = gated_residual(total, normed @ weights, *gate_of(given, True), implementation=implementation)
    return (gated * given.upstream).mean()


@pytest.fixture
def step(device):
    given = inputs(SMALL, Filler(device))
    weights = Filler(device, 5).normal(16, 16).requires_grad_()
    loss = model(weights, given)
    return given, weights, loss.detach(), torch.autograd.grad(loss, weights)[0]


def test_without_breaks_under_compile(step):
    given, weights, loss, gradient = step
    torch._dynamo.reset()
    again = torch.compile(model, fullgraph=True, backend="aot_eager")(weights, given)
    again.backward()
    assert relative_error(again, loss) <= FLOAT32
    assert relative_error(weights.grad, gradient) <= FLOAT32


def test_recomputed_under_checkpointing(step):
    given, weights, loss, gradient = step
    again = checkpoint(model, weights, given, use_reentrant=False)
    again.backward()
    assert torch.equal(again.detach(), loss)
    assert torch.equal(weights.grad, gradient)


def test_compile_is_the_reference(step):
    """Its dispatch; what Inductor makes of it is in the sweeps."""
    given, weights, loss, _ = step
    with torch.compiler.set_stance("force_eager"):
        assert relative_error(model(weights, given, "compile"), loss) <= 1e-5


@pytest.mark.sweep
@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
def test_the_compiled_reference(step):
    given, weights, loss, gradient = step
    again = model(weights, given, "compile")
    again.backward()
    assert relative_error(again, loss) <= 1e-5
    assert relative_error(weights.grad, gradient) <= 1e-5


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"branch": torch.zeros(2, 1, 16)}, r"branch is \[2, 1, 16\]"),
        ({"branch": torch.zeros(2, 6, 16, dtype=torch.bfloat16)}, "bfloat16, not .*float32 as hidden"),
        ({"gates": torch.zeros(3, 6, 15)}, r"gates is \[3, 6, 15\], not \[U, K, 16\]"),
        ({"gates": None}, r"without a gates"),
        ({"gate_index": torch.zeros(2, 5, dtype=torch.int32)}, r"into gates is \[2, 5\], not \[2, 6\]"),
        ({"table": torch.zeros(2, 4, 16)}, r"rows \(3, 4\)"),
        ({"hidden": torch.zeros(6, 16)}, r"hidden is \[B, T, D\]"),
    ],
)
def test_wrong_shapes_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        ours(replace(inputs(SMALL, Filler()), **change), implementation="eager")
