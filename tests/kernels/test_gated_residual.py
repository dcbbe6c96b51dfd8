"""Gated residual, alone and with the next norm: against float64, against the blocks, and inside PyTorch's machinery."""

from __future__ import annotations

from dataclasses import fields, replace

import pytest
import torch
from closeness import BF16_ROUNDING, DTYPES, FLOAT32, relative_error, require_close
from diffusers.models.normalization import RMSNorm
from ltxforge_kernels.cases import AWKWARD, FEW_HIDDEN, Filler, TokenShape
from ltxforge_kernels.gated_residual import gated_residual, gated_residual_norm, gated_residual_norm_twice, launch
from ltxforge_kernels.gated_residual.inputs import Inputs, inputs
from torch.utils.checkpoint import checkpoint

from ltxforge.models.blocks import Modulation

SHAPES = [*FEW_HIDDEN, *(shape for shape in AWKWARD if shape.width > 1 and shape.tokens < 67)]
SMALL = TokenShape("small", 2, 6, 16)
GATE, SHIFT, SCALE = 2, 3, 4
SECOND_SHIFT, SECOND_SCALE = 1, 0
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


def ours_twice(given: Inputs, gated: bool = True, implementation: str = "triton") -> tuple:
    rows = (given.table, given.index, (SHIFT, SCALE), (SECOND_SHIFT, SECOND_SCALE))
    return gated_residual_norm_twice(
        given.hidden, given.branch, *gate_of(given, gated), *rows, implementation=implementation
    )


def as_the_blocks_do(given: Inputs, gated: bool = True, modulated: bool = True, twice: bool = False) -> tuple:
    """diffusers' order of operations over our `Modulation`, in whatever dtype comes in."""

    def rows(table: torch.Tensor, index: torch.Tensor | None) -> list[torch.Tensor]:
        return Modulation(table, None if index is None else index.long()).rows(torch.zeros_like(table[0]))

    added = given.branch * rows(given.gates, given.gate_index)[GATE] if gated else given.branch
    total = given.hidden + added
    if total.dtype == torch.float64:  # diffusers' norm squares in float32
        normed = torch.nn.functional.rms_norm(total, total.shape[-1:], eps=1e-6)
    else:
        normed = RMSNorm(total.shape[-1], eps=1e-6, elementwise_affine=False)(total)
    if not modulated:
        return total, normed
    table = rows(given.table, given.index)
    pairs = ((SHIFT, SCALE), (SECOND_SHIFT, SECOND_SCALE))[: 1 + twice]
    return total, *(normed * (1 + table[scale]) + table[shift] for shift, scale in pairs)


def as_the_blocks_do_twice(given: Inputs, gated: bool = True) -> tuple:
    return as_the_blocks_do(given, gated, twice=True)


def everything(given: Inputs, compute, *flags: bool) -> dict[str, torch.Tensor]:
    """x', y, z where there is one, and every gradient that there is."""
    learning = {name: getattr(given, name).detach().requires_grad_() for name in LEARNING}
    outputs = compute(replace(given, **learning), *flags)
    upstreams = [given.total_upstream, given.upstream, given.second_upstream]
    torch.autograd.backward(outputs, upstreams[: len(outputs)])
    gradients = {name: tensor.grad for name, tensor in learning.items() if tensor.grad is not None}
    results = dict(zip(("total", "normed", "second"), outputs, strict=False))
    return {**{name: tensor.detach() for name, tensor in results.items()}, **gradients}


def require_true(given: Inputs, compute, true_compute) -> None:
    """Every result and gradient is near its truth, and in bf16 hardly further from it than the blocks' own are."""
    results, eager = everything(given, compute), everything(given, true_compute)
    truths = everything(in_dtype(given, torch.float64), true_compute)
    assert results.keys() == truths.keys() and set(LEARNING) <= results.keys()
    for name, truth in truths.items():
        assert results[name].dtype == given.hidden.dtype
        if given.hidden.dtype == torch.bfloat16 and name in ("gates", "table"):
            assert relative_error(results[name], truth) <= BF16_TABLE, name
        else:
            require_close(results[name], truth, name)
        if given.hidden.dtype == torch.bfloat16:
            assert relative_error(results[name], truth) <= 1.1 * relative_error(eager[name], truth), name


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_forward_and_every_gradient(shape, dtype, device):
    require_true(inputs(shape, Filler(device), dtype), ours, as_the_blocks_do)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_modulated_twice(shape, dtype, device):
    require_true(inputs(shape, Filler(device), dtype), ours_twice, as_the_blocks_do_twice)


@pytest.mark.parametrize(("gated", "distinct"), [(True, None), (False, 2), (False, None)])
def test_modulated_twice_with_and_without_gates(gated, distinct, device):
    given = inputs(SMALL, Filler(device), distinct=distinct)
    results = everything(given, ours_twice, gated)
    truths = everything(in_dtype(given, torch.float64), as_the_blocks_do_twice, gated)
    assert results.keys() == truths.keys()
    for name, truth in truths.items():
        assert relative_error(results[name], truth) <= FLOAT32, name


@pytest.mark.parametrize("silent", [0, 1, 2])
def test_outputs_that_nothing_comes_back_from(silent, device):
    """x', y or z is used by nobody: its gradient is 0."""
    given = inputs(SMALL, Filler(device))
    hidden = given.hidden.detach().requires_grad_()
    outputs = list(ours_twice(replace(given, hidden=hidden)))
    names = ("total_upstream", "upstream", "second_upstream")
    arriving = [getattr(given, name) for name in names]
    del outputs[silent], arriving[silent]
    torch.autograd.backward(outputs, arriving)
    still = replace(given, **{names[silent]: torch.zeros_like(given.hidden)})
    truth = everything(in_dtype(still, torch.float64), as_the_blocks_do_twice)["hidden"]
    assert relative_error(hidden.grad, truth) <= FLOAT32


def test_both_modulations_by_the_same_rows(device):
    """They give the same, and the table's two gradients add up."""
    given = inputs(SMALL, Filler(device))
    rows, table = (SHIFT, SCALE), given.table.detach().requires_grad_()
    arguments = (given.hidden, given.branch, *gate_of(given, True), table, given.index, rows, rows)
    _, y, z = gated_residual_norm_twice(*arguments, implementation="triton")
    assert torch.equal(y, z)
    torch.autograd.backward([y, z], [given.upstream, given.second_upstream])
    once = replace(
        given, upstream=given.upstream.double() + given.second_upstream, total_upstream=0 * given.total_upstream
    )
    truth = everything(in_dtype(once, torch.float64), as_the_blocks_do)["table"]
    assert relative_error(table.grad, truth) <= FLOAT32


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


@pytest.mark.parametrize("gated", [True, False])
def test_eager_has_the_bits_of_the_blocks_twice(gated):
    """Gradients, too: those of y and z meet before they go through the norm."""
    given = inputs(SMALL, Filler())
    results = everything(given, lambda each: ours_twice(each, gated, "eager"))
    expected = everything(given, as_the_blocks_do_twice, gated)
    assert results.keys() == expected.keys()
    for name in {"total", "normed", "second", "hidden", "branch"}:
        assert torch.equal(results[name], expected[name]), name


def test_layouts_do_not_matter(device):
    plain = inputs(SMALL, Filler(device))
    given = Inputs(*(getattr(plain, field.name).mT.contiguous().mT for field in fields(plain)))
    assert not any(getattr(given, field.name).is_contiguous() for field in fields(given))
    for compute in (ours, ours_twice):
        one, other = everything(given, compute), everything(plain, compute)
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


@pytest.mark.parametrize("compute", [ours, ours_twice])
def test_the_same_bits_twenty_times(compute, device):
    given = inputs(TokenShape("", 1, 5, 16), Filler(device), torch.bfloat16)
    first = everything(given, compute)
    for _ in range(19):
        again = everything(given, compute)
        assert all(torch.equal(first[name], again[name]) for name in first)


@pytest.mark.parametrize("distinct", [2, None])
def test_torch_s_own_checks(distinct, device):
    given = inputs(TokenShape("", 2, 2, 8), Filler(device), distinct=distinct)
    learning = replace(given, **{name: getattr(given, name).detach().requires_grad_() for name in LEARNING})
    gated, still = gate_of(learning, True), gate_of(given, True)
    torch.library.opcheck(launch.residual_op, (learning.hidden, learning.branch, *gated))
    torch.library.opcheck(launch.residual_backward_op, (given.total_upstream, *still))
    torch.library.opcheck(launch.gates_gradient_op, (given.total_upstream, given.branch, *still))
    once, twice = (None, None), (SECOND_SHIFT, SECOND_SCALE)
    for gated, modulated, second in ((True, True, twice), (False, False, once)):
        rows = (*gate_of(learning, gated), *norm_of(learning, modulated), *second)
        torch.library.opcheck(launch.norm_op, (learning.hidden, learning.branch, *rows, 1e-6))
        rows = (*gate_of(given, gated), *norm_of(given, modulated), *second)
        total, _, _, reciprocal = launch.norm_op(given.hidden, given.branch, *rows, 1e-6)
        upstreams = (given.total_upstream, given.upstream, given.second_upstream if second is twice else None)
        kept = (*upstreams, total, *rows[:5], rows[6], rows[8], reciprocal)
        torch.library.opcheck(launch.norm_backward_op, kept)


def model(weights: torch.Tensor, given: Inputs, implementation: str = "triton") -> torch.Tensor:
    """Half a block: two branches, of which the second has no gate, and one that the norm's two results make."""
    total, normed = ours(given, True, True, implementation)
    total, normed = ours(replace(given, hidden=total, branch=normed @ weights), False, False, implementation)
    total, query, context = ours_twice(replace(given, hidden=total, branch=normed @ weights), True, implementation)
    normed = query * (context @ weights)
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
        ({"table": torch.zeros(2, 4, 16)}, r"rows \(3, 4"),
        ({"hidden": torch.zeros(6, 16)}, r"hidden is \[B, T, D\]"),
    ],
)
def test_wrong_shapes_are_refused(change, message):
    for compute in (ours, ours_twice):
        with pytest.raises(ValueError, match=message):
            compute(replace(inputs(SMALL, Filler()), **change), implementation="eager")


def test_a_second_modulation_needs_rows():
    given = inputs(SMALL, Filler())
    with pytest.raises(ValueError, match="without a table y and z are the same"):
        ours_twice(replace(given, table=None, index=None), implementation="eager")
    few = replace(given, table=given.table[:, SECOND_SHIFT:])
    with pytest.raises(ValueError, match=r"rows \(3, 4, 1, 5\) are not all among the 5 of table"):
        rows = (few.table, few.index, (SHIFT, SCALE), (1, 5))
        gated_residual_norm_twice(few.hidden, few.branch, *gate_of(few, True), *rows, implementation="eager")
