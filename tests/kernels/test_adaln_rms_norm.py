"""RMSNorm with modulation against float64, against the forward of the models, and inside PyTorch's machinery."""

from __future__ import annotations

import pytest
import torch
from closeness import DTYPES, FLOAT32, relative_error, require_close
from diffusers.models.normalization import RMSNorm
from ltxforge_kernels.adaln_rms_norm import adaln_rms_norm, launch
from ltxforge_kernels.adaln_rms_norm.inputs import Inputs, inputs
from ltxforge_kernels.cases import AWKWARD, FEW_HIDDEN, Filler, TokenShape
from torch.utils.checkpoint import checkpoint

from ltxforge.models.blocks import Modulation

# Over one channel a norm gives ±1, and its gradient is what rounding leaves of 1 − 1.
SHAPES = [*FEW_HIDDEN, *(shape for shape in AWKWARD if shape.width > 1)]
SMALL = TokenShape("small", 2, 12, 16)
# Rows of the second half of a block.
SHIFT, SCALE = 3, 4


def in_float64(given: Inputs) -> Inputs:
    return Inputs(given.hidden.double(), given.table.double(), given.index, given.upstream.double())


def run(given: Inputs, implementation: str = "triton", **rows: int) -> torch.Tensor:
    rows = rows or {"shift": SHIFT, "scale": SCALE}
    return adaln_rms_norm(given.hidden, given.table, given.index, **rows, implementation=implementation)


def everything(given: Inputs, implementation: str = "triton", **rows: int) -> tuple[torch.Tensor, ...]:
    """y, and the gradients of x and table."""
    hidden, table = (tensor.detach().requires_grad_() for tensor in (given.hidden, given.table))
    normed = run(Inputs(hidden, table, given.index, given.upstream), implementation, **rows)
    normed.backward(given.upstream)
    return normed.detach(), hidden.grad, table.grad


@pytest.mark.parametrize("distinct", [2, None], ids=["an index", "per sample"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_forward_and_every_gradient(shape, dtype, distinct, device):
    given = inputs(shape, Filler(device), dtype, distinct=distinct)
    results, truths = everything(given), everything(in_float64(given), "eager")
    for name, result, truth in zip(("y", "hidden", "table"), results, truths, strict=True):
        assert result.dtype == dtype
        require_close(result, truth, name)


def alone(hidden: torch.Tensor, implementation: str = "triton") -> torch.Tensor:
    return adaln_rms_norm(hidden, None, None, None, None, implementation=implementation)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [FEW_HIDDEN[0], SMALL, AWKWARD[-1]], ids=str)
def test_the_norm_alone(shape, dtype, device):
    """Against PyTorch's, which is float64 where that comes in."""
    given = inputs(shape, Filler(device), dtype)
    hidden, exact = given.hidden.requires_grad_(), given.hidden.detach().double().requires_grad_()
    normed = alone(hidden)
    normed.backward(given.upstream)
    truth = torch.nn.functional.rms_norm(exact, (shape.width,), eps=1e-6)
    truth.backward(given.upstream.double())
    require_close(normed, truth, "y")
    require_close(hidden.grad, exact.grad, "hidden")


def test_eager_alone_has_diffusers_bits():
    given = inputs(SMALL, Filler())
    assert torch.equal(
        alone(given.hidden, "eager"), RMSNorm(SMALL.width, eps=1e-6, elementwise_affine=False)(given.hidden)
    )


@pytest.mark.parametrize("distinct", [3, None])
def test_it_is_what_the_models_compute(distinct, device):
    """diffusers' norm and our `Modulation`, as the blocks of both families write them, in float64."""
    given = inputs(SMALL, Filler(device), distinct=distinct)
    exact = in_float64(given)
    modulation = Modulation(exact.table, None if given.index is None else given.index.long())
    rows = modulation.rows(torch.zeros(exact.table.shape[1:], dtype=torch.float64, device=device))
    norm = RMSNorm(SMALL.width, eps=1e-6, elementwise_affine=False)
    truth = norm(exact.hidden) * (1 + rows[SCALE]) + rows[SHIFT]
    # diffusers squares in float32 whatever comes in.
    assert relative_error(run(given), truth) <= FLOAT32


def test_one_row_for_both(device):
    """Gradients of shift and scale meet in the row, and rows that are neither have none."""
    given = inputs(SMALL, Filler(device))
    results = everything(given, shift=2, scale=2)
    for result, truth in zip(results, everything(in_float64(given), "eager", shift=2, scale=2), strict=True):
        assert relative_error(result, truth) <= FLOAT32
    assert results[2].any(dim=(0, 2)).tolist() == [False, False, True, False, False, False]


def test_a_row_of_zeros_stays_finite(device):
    given = inputs(SMALL, Filler(device))
    given.hidden[0, 3] = 0
    results = everything(given)
    assert all(result.isfinite().all() for result in results)
    assert torch.equal(results[0][0, 3], given.table[given.index[0, 3].long(), SHIFT])


def test_layouts_do_not_matter(device):
    plain = inputs(SMALL, Filler(device))
    viewed = [tensor.mT.contiguous().mT for tensor in (plain.hidden, plain.table, plain.index, plain.upstream)]
    given = Inputs(*viewed)
    assert not any(tensor.is_contiguous() for tensor in viewed)
    for one, other in zip(everything(given), everything(plain), strict=True):
        assert torch.equal(one, other)


def test_the_table_costs_nothing_where_it_learns_nothing(device, monkeypatch):
    """LoRA training: the table's kernel is never launched."""
    given = inputs(SMALL, Filler(device))
    monkeypatch.setattr(launch, "table_gradient_op", None)
    hidden = given.hidden.detach().requires_grad_()
    run(Inputs(hidden, given.table, given.index, given.upstream)).backward(given.upstream)
    assert relative_error(hidden.grad, everything(in_float64(given), "eager")[1]) <= FLOAT32


def test_the_same_bits_twenty_times(device):
    given = inputs(TokenShape("", 1, 9, 16), Filler(device), torch.bfloat16)
    first = everything(given)
    for _ in range(19):
        assert all(torch.equal(one, other) for one, other in zip(first, everything(given), strict=True))


@pytest.mark.parametrize("distinct", [2, None])
def test_torch_s_own_checks(distinct, device):
    given = inputs(TokenShape("", 2, 3, 8), Filler(device), distinct=distinct)
    learning = [tensor.detach().requires_grad_() for tensor in (given.hidden, given.table)]
    torch.library.opcheck(launch.forward_op, (*learning, given.index, 0, 1, 1e-6))
    _, reciprocal = launch.forward_op(given.hidden, given.table, given.index, 0, 1, 1e-6)
    kept = (given.upstream, given.hidden, given.table, given.index, reciprocal)
    torch.library.opcheck(launch.backward_op, (*kept, 1))
    torch.library.opcheck(launch.table_gradient_op, (*kept, 0, 1))
    torch.library.opcheck(launch.forward_op, (learning[0], None, None, None, None, 1e-6))
    torch.library.opcheck(launch.backward_op, (given.upstream, given.hidden, None, None, reciprocal, None))


def model(weights: torch.Tensor, given: Inputs, implementation: str = "triton") -> torch.Tensor:
    """Two norms around a linear layer: the second one's x needs a gradient."""
    hidden = run(given, implementation) @ weights
    return (run(Inputs(hidden, given.table, given.index, given.upstream), implementation) * given.upstream).mean()


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
    assert torch.equal(again.detach(), loss)
    assert torch.equal(weights.grad, gradient)


def test_recomputed_under_checkpointing(step):
    given, weights, loss, gradient = step
    again = checkpoint(model, weights, given, use_reentrant=False)
    again.backward()
    assert torch.equal(again.detach(), loss)
    assert torch.equal(weights.grad, gradient)


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
        ({"table": (2, 6, 15)}, r"not \[U, K, 16\]"),
        ({"hidden": (12, 16)}, r"hidden is \[B, T, D\]"),
        ({"index": (2, 11)}, r"not \[2, 12\]"),
        ({"table": (3, 6, 16), "index": None}, "one timestep per sample, 2, not 3"),
        ({"table": (2, 4, 16)}, r"rows \(3, 4\) are not all among the 4 of table"),
        ({"table": None}, r"without a table there are no rows \(3, 4\)"),
    ],
)
def test_wrong_shapes_are_refused(change, message):
    shapes = {"hidden": (2, 12, 16), "table": (2, 6, 16), "index": (2, 12), "upstream": (2, 12, 16), **change}
    tensors = {name: None if shape is None else torch.zeros(shape) for name, shape in shapes.items()}
    with pytest.raises(ValueError, match=message):
        run(Inputs(**tensors), "eager")
