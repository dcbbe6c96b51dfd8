"""Flow matching's kernels against float64, against the trainer's own objective, and inside PyTorch's machinery."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from closeness import DTYPES, FLOAT32, relative_error, require_close
from ltxforge_kernels import flow_matching
from ltxforge_kernels.cases import AWKWARD, FEW_LATENTS, Filler, TokenShape
from ltxforge_kernels.flow_matching import launch, reference
from ltxforge_kernels.flow_matching.inputs import Inputs, inputs
from torch.utils.checkpoint import checkpoint

from ltxforge import flow_matching as objective

SHAPES = [*FEW_LATENTS, *AWKWARD]
SMALL = TokenShape("small", 2, 12, 8)


def in_float64(given: Inputs) -> Inputs:
    fields = {field.name: getattr(given, field.name).double() for field in dataclasses.fields(given)}
    return Inputs(**fields)


def loss_of(given: Inputs, implementation: str = "triton") -> torch.Tensor:
    return flow_matching.velocity_loss(
        given.prediction, given.latents, given.draws, given.weight, implementation=implementation
    )


def loss_and_gradient(given: Inputs, implementation: str, upstream: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    given = dataclasses.replace(given, prediction=given.prediction.detach().requires_grad_())
    loss = loss_of(given, implementation)
    loss.backward(upstream.to(loss.dtype))
    return loss.detach(), given.prediction.grad


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_noising(shape, dtype, device):
    given = inputs(shape, Filler(device), dtype)
    noised = flow_matching.noise(given.latents, given.draws, given.sigma, dtype, implementation="triton")
    truth = in_float64(given)
    assert noised.dtype == dtype
    require_close(noised, reference.noise(truth.latents, truth.draws, truth.sigma))
    # Not merely near: the same bits as eager.
    assert torch.equal(noised, reference.noise(given.latents, given.draws, given.sigma, dtype))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_loss_and_gradient(shape, dtype, device):
    given = inputs(shape, Filler(device), dtype)
    upstream = Filler(device, seed=1).normal(shape.batch)
    loss, gradient = loss_and_gradient(given, "triton", upstream)
    true_loss, true_gradient = loss_and_gradient(in_float64(given), "eager", upstream)
    assert loss.dtype == torch.float32 and gradient.dtype == dtype
    require_close(loss, true_loss)
    require_close(gradient, true_gradient)
    assert torch.equal(loss_of(given), loss), "an evaluation sees another loss"


def test_many_parts_are_added(device):
    """More parts than one pass of the second stage holds."""
    given = inputs(TokenShape("long", 2, 3000, 3), Filler(device))
    assert relative_error(loss_of(given), loss_of(in_float64(given), "eager")) <= FLOAT32


@pytest.mark.parametrize("shape", [TokenShape("a batch", 2, 24, 128), TokenShape("one frame", 1, 6, 4)], ids=str)
def test_it_is_the_trainer_s_objective(shape, device):
    """`mix` to the bit and `loss_by_sample` to rounding, conditioning tokens and a sample of nothing else included."""
    given = inputs(shape, Filler(device))
    sigma = [0.3, 0.9375][: shape.batch]
    clean = given.weight == 0
    clean[-1] = True
    batch = objective.mix(given.latents, given.draws, sigma, clean.cpu())
    drawn = torch.tensor(sigma, dtype=torch.float64)[:, None].expand(clean.shape)
    level = drawn.masked_fill(clean.cpu(), 0).float().to(device)
    noised = flow_matching.noise(given.latents, given.draws, level, implementation="triton")
    assert torch.equal(noised, batch.tokens)
    given = dataclasses.replace(given, weight=batch.mask)
    loss, gradient = loss_and_gradient(given, "triton", torch.ones(shape.batch, device=device))
    theirs = given.prediction.detach().requires_grad_()
    objective.loss_by_sample(theirs, batch).sum().backward()
    assert relative_error(loss, objective.loss_by_sample(given.prediction, batch)) <= FLOAT32
    assert relative_error(gradient, theirs.grad) <= FLOAT32
    assert loss[-1] == 0 and not gradient[-1].any()


@pytest.mark.parametrize("sigma_shape", [(2,), (2, 1)])
def test_one_sigma_per_sample(sigma_shape, device):
    given = inputs(SMALL, Filler(device))
    sigma = Filler(device, 3).uniform(*sigma_shape)
    whole = sigma.reshape(2, 1).expand(2, SMALL.tokens)
    for implementation in ("triton", "eager"):
        one, all_tokens = (
            flow_matching.noise(given.latents, given.draws, level, implementation=implementation)
            for level in (sigma, whole)
        )
        assert torch.equal(one, all_tokens)
    assert torch.equal(one, (1 - whole[..., None]) * given.latents + whole[..., None] * given.draws)


def test_layouts_do_not_matter(device):
    """Tokens as a view of [B, C, F, Y, X], sigma and weight as columns of something wider."""
    plain = inputs(TokenShape("", 2, 24, 5), Filler(device))
    viewed = {name: getattr(plain, name).mT.contiguous().mT for name in ("latents", "draws", "prediction")}
    wide = {name: torch.stack([getattr(plain, name)] * 3, dim=-1)[..., 1] for name in ("sigma", "weight")}
    given = Inputs(**viewed, **wide)
    assert not given.latents.is_contiguous() and not given.sigma.is_contiguous()
    for one, other in zip(
        (*loss_and_gradient(given, "triton", torch.ones(2, device=device)), noised(given)),
        (*loss_and_gradient(plain, "triton", torch.ones(2, device=device)), noised(plain)),
        strict=True,
    ):
        assert torch.equal(one, other)


def noised(given: Inputs) -> torch.Tensor:
    return flow_matching.noise(given.latents, given.draws, given.sigma, implementation="triton")


def test_the_same_bits_twenty_times(device):
    given = inputs(TokenShape("", 2, 70, 16), Filler(device))
    upstream = torch.tensor([0.3, 0.7], device=device)
    first = (*loss_and_gradient(given, "triton", upstream), noised(given))
    for _ in range(19):
        again = (*loss_and_gradient(given, "triton", upstream), noised(given))
        assert all(torch.equal(one, other) for one, other in zip(first, again, strict=True))


def test_torch_s_own_checks(device):
    given = inputs(TokenShape("", 2, 5, 4), Filler(device))
    loss_inputs = (given.latents, given.draws, given.weight)
    learning = given.prediction.detach().requires_grad_()
    torch.library.opcheck(launch.noise_op, (given.latents, given.draws, given.sigma, torch.bfloat16))
    torch.library.opcheck(launch.loss_op, (given.prediction, *loss_inputs))
    torch.library.opcheck(launch.loss_and_residual_op, (learning, *loss_inputs))
    _, residual, scale = launch.loss_and_residual_op(given.prediction, *loss_inputs)
    torch.library.opcheck(launch.gradient_op, (residual, scale, torch.ones(2, device=device), torch.bfloat16))


def model_and_loss(weights: torch.Tensor, given: Inputs, implementation: str = "triton") -> torch.Tensor:
    """A step in small: noise, a linear model, the loss."""
    noised = flow_matching.noise(given.latents, given.draws, given.sigma, implementation=implementation)
    prediction = torch.tanh(noised @ weights)
    loss = flow_matching.velocity_loss(
        prediction, given.latents, given.draws, given.weight, implementation=implementation
    )
    return loss.mean()


@pytest.fixture
def step(device):
    given = inputs(SMALL, Filler(device))
    weights = Filler(device, 5).normal(8, 8).requires_grad_()
    loss = model_and_loss(weights, given)
    return given, weights, loss.detach(), torch.autograd.grad(loss, weights)[0]


def test_without_breaks_under_compile(step):
    given, weights, loss, gradient = step
    torch._dynamo.reset()
    compiled = torch.compile(model_and_loss, fullgraph=True, backend="aot_eager")
    again = compiled(weights, given)
    again.backward()
    assert torch.equal(again.detach(), loss)
    assert torch.equal(weights.grad, gradient)


def test_recomputed_under_checkpointing(step):
    given, weights, loss, gradient = step
    again = checkpoint(model_and_loss, weights, given, use_reentrant=False)
    again.backward()
    assert torch.equal(again.detach(), loss)
    assert torch.equal(weights.grad, gradient)


def test_compile_is_the_reference(step):
    """Its dispatch; what Inductor makes of it takes a C++ compiler half a minute, in the sweeps."""
    given, weights, loss, _ = step
    with torch.compiler.set_stance("force_eager"):
        assert relative_error(model_and_loss(weights, given, "compile"), loss) <= FLOAT32


@pytest.mark.sweep
@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
def test_the_compiled_reference(step):
    given, weights, loss, gradient = step
    again = model_and_loss(weights, given, "compile")
    again.backward()
    assert relative_error(again, loss) <= FLOAT32
    assert relative_error(weights.grad, gradient) <= FLOAT32


def test_latents_and_draws_are_data(device):
    """A gradient that nobody computes is refused, not dropped."""
    given = inputs(SMALL, Filler(device))
    noised = flow_matching.noise(given.latents.requires_grad_(), given.draws, given.sigma, implementation="triton")
    with pytest.raises(RuntimeError, match="no autograd formula"):
        noised.sum().backward()


def test_wrong_shapes_are_refused():
    given = inputs(SMALL, Filler())
    for wrong in (
        dataclasses.replace(given, draws=given.draws[:, :1]),
        dataclasses.replace(given, weight=given.weight[:, :3]),
        dataclasses.replace(given, prediction=given.prediction[0]),
    ):
        with pytest.raises(ValueError, match="not"):
            loss_of(wrong, "eager")
    with pytest.raises(ValueError, match="sigma"):
        flow_matching.noise(given.latents, given.draws, given.sigma[:1], implementation="eager")
