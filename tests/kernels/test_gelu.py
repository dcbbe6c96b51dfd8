"""GELU against float64, against the activation of the models, and inside PyTorch's machinery."""

from __future__ import annotations

import math
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from closeness import DTYPES, FLOAT32, relative_error, require_close
from diffusers.models.activations import GELU
from ltxforge_kernels.cases import AWKWARD, FEED_FORWARD, Filler, TokenShape
from ltxforge_kernels.gelu import gelu, launch
from ltxforge_kernels.gelu.inputs import inputs
from torch._inductor import metrics
from torch.utils.checkpoint import checkpoint

from ltxforge.hardware import detect

# Real widths, few rows.
SHAPES = [*(TokenShape(f"width {width}", 1, 6, width) for width in sorted({s.width for s in FEED_FORWARD})), *AWKWARD]
SMALL = TokenShape("small", 2, 12, 16)


def by_the_formula(x: torch.Tensor) -> torch.Tensor:
    """The paper's own, in whatever dtype comes in."""
    return 0.5 * x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


def everything(x: torch.Tensor, upstream: torch.Tensor, activation) -> tuple[torch.Tensor, torch.Tensor]:
    """y and the gradient of x."""
    x = x.detach().requires_grad_()
    y = activation(x)
    y.backward(upstream)
    return y.detach(), x.grad


def ours(x: torch.Tensor) -> torch.Tensor:
    return gelu(x, implementation="triton")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_forward_and_gradient(shape, dtype, device):
    given = inputs(shape, Filler(device), dtype)
    results = everything(given.x, given.upstream, ours)
    truths = everything(given.x.double(), given.upstream.double(), by_the_formula)
    eager = everything(given.x, given.upstream, lambda x: F.gelu(x, approximate="tanh"))
    for name, result, truth, rival in zip(("y", "x"), results, truths, eager, strict=True):
        assert result.dtype == dtype
        require_close(result, truth, name)
        if dtype == torch.bfloat16:
            assert relative_error(result, truth) <= 1.1 * relative_error(rival, truth), name


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_eager_is_what_the_models_compute(dtype):
    """The very bits of diffusers' activation, behind a linear layer that changes nothing."""
    activation = GELU(16, 16, approximate="tanh", bias=False).to(dtype)
    with torch.no_grad():
        activation.proj.weight.copy_(torch.eye(16))
    given = inputs(SMALL, Filler(), dtype)
    assert torch.equal(gelu(given.x, implementation="eager"), activation(given.x))


def test_far_out_it_is_x_or_nothing(device):
    x = torch.tensor([-1e12, -300.0, -20.0, 0.0, 20.0, 300.0, 1e12], device=device)
    y, gradient = everything(x, torch.ones_like(x), ours)
    assert y.tolist() == x.clamp(min=0).tolist()
    assert gradient.tolist() == [0, 0, 0, 0.5, 1, 1, 1]


def test_small_tails_keep_their_digits(device):
    """Far below zero, 1 + tanh u would cancel. Relative to each value, not to the largest."""
    x = torch.linspace(-6, -3, 64, device=device)
    for result, truth in zip(
        everything(x, torch.ones_like(x), ours), everything(x.double(), x.double() * 0 + 1, by_the_formula), strict=True
    ):
        assert ((result - truth) / truth).abs().max() <= 2e-5


def test_layouts_and_ranks_do_not_matter(device):
    given = inputs(SMALL, Filler(device))
    plain = everything(given.x, given.upstream, ours)
    viewed = [tensor.mT.contiguous().mT for tensor in (given.x, given.upstream)]
    assert not any(tensor.is_contiguous() for tensor in viewed)
    flat = [tensor.flatten() for tensor in (given.x, given.upstream)]
    for other in (everything(*viewed, ours), everything(*flat, ours)):
        assert all(torch.equal(one.flatten(), two.flatten()) for one, two in zip(plain, other, strict=True))
    assert torch.equal(ours(given.x[0, 0, 0]), plain[0][0, 0, 0])


def test_the_same_bits_twenty_times(device):
    given = inputs(SMALL, Filler(device), torch.bfloat16)
    first = everything(given.x, given.upstream, ours)
    for _ in range(19):
        again = everything(given.x, given.upstream, ours)
        assert all(torch.equal(one, other) for one, other in zip(first, again, strict=True))


def test_the_pre_activation_alone_is_kept(device):
    given = inputs(SMALL, Filler(device))
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor):
        ours(given.x.requires_grad_())
    assert [tensor.data_ptr() for tensor in kept] == [given.x.data_ptr()]


def test_torch_s_own_checks(device):
    given = inputs(TokenShape("", 2, 3, 8), Filler(device))
    torch.library.opcheck(launch.forward_op, (given.x.detach().requires_grad_(),))
    torch.library.opcheck(launch.backward_op, (given.upstream, given.x))


def model(weights: torch.Tensor, x: torch.Tensor, implementation: str = "triton") -> torch.Tensor:
    """Two activations around a linear layer."""
    return gelu(gelu(x, implementation=implementation) @ weights, implementation=implementation).square().mean()


@pytest.fixture
def step(device):
    x = inputs(SMALL, Filler(device)).x
    weights = Filler(device, 5).normal(16, 16).requires_grad_()
    loss = model(weights, x)
    return x, weights, loss.detach(), torch.autograd.grad(loss, weights)[0]


def test_without_breaks_under_compile(step):
    x, weights, loss, gradient = step
    torch._dynamo.reset()
    again = torch.compile(model, fullgraph=True, backend="aot_eager")(weights, x)
    again.backward()
    assert torch.equal(again.detach(), loss)
    assert torch.equal(weights.grad, gradient)


def test_recomputed_under_checkpointing(step):
    x, weights, loss, gradient = step
    again = checkpoint(model, weights, x, use_reentrant=False)
    again.backward()
    assert torch.equal(again.detach(), loss)
    assert torch.equal(weights.grad, gradient)


@pytest.mark.skipif(bool(detect().compile_lacks), reason="torch.compile finds no C++ compiler")
@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
def test_through_inductor(step):
    """Our op inside of its code, and the reference as its code: the one op for which that is not left to the sweeps."""
    x, weights, loss, gradient = step
    torch._dynamo.reset()
    for compute in (torch.compile(model, fullgraph=True), partial(model, implementation="compile")):
        metrics.reset()
        again = compute(weights, x)
        (learned,) = torch.autograd.grad(again, weights)
        assert metrics.generated_kernel_count > 0, "Inductor made nothing"
        assert relative_error(again.detach(), loss) <= 1e-5
        assert relative_error(learned, gradient) <= 1e-5


def test_float64_is_the_truth():
    x = inputs(SMALL, Filler()).x.double()
    assert relative_error(gelu(x, implementation="eager"), by_the_formula(x)) <= FLOAT32**2
