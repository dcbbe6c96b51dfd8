"""Launches of flow matching: what is allocated, which blocks, and the torch.library ops with fakes and gradients.

The loss is two ops, with and without what its gradient needs, so that an evaluation keeps nothing.
"""

from __future__ import annotations

import torch
import triton
from torch import Tensor

from ltxforge_kernels.configurations import configuration
from ltxforge_kernels.flow_matching import kernel
from ltxforge_kernels.target import architecture, launching_on

# Products and sums round as PyTorch rounds them, so that noising has the same bits in every implementation.
EXACT = {"enable_fp_fusion": False}


def noise(latents: Tensor, draws: Tensor, sigma: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """The op's `noise` on a GPU."""
    return noise_op(latents, draws, sigma, latents.dtype if dtype is None else dtype)


def velocity_loss(prediction: Tensor, latents: Tensor, draws: Tensor, weight: Tensor) -> Tensor:
    """The op's `velocity_loss` on a GPU; what the gradient needs is made where there will be one."""
    if torch.is_grad_enabled() and prediction.requires_grad:
        return loss_and_residual_op(prediction, latents, draws, weight)[0]
    return loss_op(prediction, latents, draws, weight)


def launch_noise(latents: Tensor, draws: Tensor, sigma: Tensor, dtype: torch.dtype) -> Tensor:
    """Noised tokens [B, T, C]."""
    output = torch.empty(latents.shape, dtype=dtype, device=latents.device)
    if output.numel() == 0:
        return output
    sigma, *strides = per_token(sigma, latents)
    grid, options = grid_and_options("noise", latents)
    with launching_on(latents):
        kernel.noise_kernel[grid](
            latents.contiguous(), draws.contiguous(), sigma, output, latents.shape[1], *strides, **options
        )
    return output


def launch_loss(
    prediction: Tensor, latents: Tensor, draws: Tensor, weight: Tensor, keep: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Loss [B], w·r [B, T, C] (empty without `keep`) and the scale [B], all float32."""
    batch, tokens, channels = prediction.shape
    residual = prediction.new_empty(prediction.shape if keep else (0,), dtype=torch.float32)
    if prediction.numel() == 0:
        zero = prediction.new_zeros(batch, dtype=torch.float32)
        return zero, residual, zero.clone()
    weight, *strides = per_token(weight, prediction)
    grid, options = grid_and_options("residual", prediction)
    parts = grid[0]
    sums, weights = prediction.new_empty((2, batch, parts), dtype=torch.float32)
    # Two allocations: results of a torch.library op must not share memory.
    loss, scale = (prediction.new_empty(batch, dtype=torch.float32) for _ in range(2))
    finish = configuration("flow_matching.finish", architecture(prediction), torch.float32, channels).options()
    inputs = (prediction.contiguous(), latents.contiguous(), draws.contiguous(), weight)
    with launching_on(prediction):
        kernel.residual_kernel[grid](*inputs, residual, sums, weights, tokens, *strides, KEEP=keep, **options)
        kernel.finish_kernel[(batch,)](sums, weights, loss, scale, parts, C=channels, **finish, **EXACT)
    return loss, residual, scale


def launch_gradient(residual: Tensor, scale: Tensor, upstream: Tensor, dtype: torch.dtype) -> Tensor:
    """∂/∂prediction [B, T, C], from what the forward kept and the gradient [B] of the loss."""
    output = torch.empty(residual.shape, dtype=dtype, device=residual.device)
    if output.numel() == 0:
        return output
    grid, options = grid_and_options("gradient", output)
    with launching_on(residual):
        kernel.gradient_kernel[grid](residual, scale, upstream.contiguous(), output, residual.shape[1], **options)
    return output


def per_token(values: Tensor, tokens: Tensor) -> tuple[Tensor, int, int]:
    """[B], [B, 1] or [B, T] in float32, and its strides by sample and token: 0 where a sample has one value."""
    values = values.to(torch.float32)
    wide = (values[:, None] if values.ndim == 1 else values).expand(tokens.shape[:2])
    return values, wide.stride(0), wide.stride(1)


def grid_and_options(name: str, tokens: Tensor) -> tuple[tuple[int, int], dict[str, int]]:
    """The grid and the options of the kernels whose programs hold whole tokens, for [B, T, C] that is not empty."""
    batch, count, channels = tokens.shape
    chosen = configuration(f"flow_matching.{name}", architecture(tokens), tokens.dtype, channels).options()
    grid = (triton.cdiv(count, chosen["TOKENS"]), batch)
    return grid, {"C": channels, "WIDTH": triton.next_power_of_2(channels), **chosen, **EXACT}


@torch.library.custom_op("ltxforge::flow_matching_noise", mutates_args=())
def noise_op(latents: Tensor, draws: Tensor, sigma: Tensor, dtype: torch.dtype) -> Tensor:
    return launch_noise(latents, draws, sigma, dtype)


@noise_op.register_fake
def _(latents: Tensor, draws: Tensor, sigma: Tensor, dtype: torch.dtype) -> Tensor:
    return torch.empty(latents.shape, dtype=dtype, device=latents.device)


@torch.library.custom_op("ltxforge::flow_matching_loss", mutates_args=())
def loss_op(prediction: Tensor, latents: Tensor, draws: Tensor, weight: Tensor) -> Tensor:
    return launch_loss(prediction, latents, draws, weight, keep=False)[0]


@loss_op.register_fake
def _(prediction: Tensor, latents: Tensor, draws: Tensor, weight: Tensor) -> Tensor:
    return prediction.new_empty(prediction.shape[:1], dtype=torch.float32)


@torch.library.custom_op("ltxforge::flow_matching_loss_and_residual", mutates_args=())
def loss_and_residual_op(
    prediction: Tensor, latents: Tensor, draws: Tensor, weight: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    return launch_loss(prediction, latents, draws, weight, keep=True)


@loss_and_residual_op.register_fake
def _(prediction: Tensor, latents: Tensor, draws: Tensor, weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    loss = prediction.new_empty(prediction.shape[:1], dtype=torch.float32)
    return loss, prediction.new_empty(prediction.shape, dtype=torch.float32), torch.empty_like(loss)


@torch.library.custom_op("ltxforge::flow_matching_gradient", mutates_args=())
def gradient_op(residual: Tensor, scale: Tensor, upstream: Tensor, dtype: torch.dtype) -> Tensor:
    return launch_gradient(residual, scale, upstream, dtype)


@gradient_op.register_fake
def _(residual: Tensor, scale: Tensor, upstream: Tensor, dtype: torch.dtype) -> Tensor:
    return torch.empty(residual.shape, dtype=dtype, device=residual.device)


def keep_for_gradient(ctx: torch.autograd.function.FunctionCtx, inputs: tuple, output: tuple) -> None:
    """Only the prediction is differentiated; latents and draws are data."""
    _, residual, scale = output
    ctx.mark_non_differentiable(residual, scale)
    ctx.save_for_backward(residual, scale)
    ctx.dtype = inputs[0].dtype


def loss_gradient(ctx: torch.autograd.function.FunctionCtx, upstream: Tensor, *_: None) -> tuple[Tensor | None, ...]:
    return gradient_op(*ctx.saved_tensors, upstream, ctx.dtype), None, None, None


loss_and_residual_op.register_autograd(loss_gradient, setup_context=keep_for_gradient)
