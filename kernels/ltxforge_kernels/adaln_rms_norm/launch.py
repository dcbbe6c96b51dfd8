"""Launches of RMSNorm with modulation: what is allocated, which blocks, and the torch.library ops.

The table's gradient is an op of its own, which LoRA training never calls.
"""

from __future__ import annotations

import torch
import triton
from torch import Tensor

from ltxforge_kernels.adaln_rms_norm import kernel
from ltxforge_kernels.configurations import configuration
from ltxforge_kernels.target import architecture, launching_on

# Triton 3.10 changes the default.
FUSED = {"enable_fp_fusion": True}


def adaln_rms_norm(
    hidden: Tensor, table: Tensor, index: Tensor | None, shift: int, scale: int, eps: float = 1e-6
) -> Tensor:
    """The op on a GPU."""
    return forward_op(hidden, table, index, shift, scale, eps)[0]


def launch_forward(
    hidden: Tensor, table: Tensor, index: Tensor | None, shift: int, scale: int, eps: float
) -> tuple[Tensor, Tensor]:
    """y [B, T, D] and rstd [B, T], float32."""
    hidden, table, index = contiguous(hidden, table, index)
    output = torch.empty_like(hidden)
    reciprocal = hidden.new_empty(hidden.shape[:2], dtype=torch.float32)
    if hidden.numel() == 0:
        return output, reciprocal
    inputs = (hidden, table[:, shift], table[:, scale], index)
    with launching_on(hidden):
        kernel.forward_kernel[(reciprocal.numel(),)](
            *inputs,
            output,
            reciprocal,
            hidden.shape[1],
            table.stride(0),
            eps,
            **token_options("forward", hidden, index),
        )
    return output, reciprocal


def launch_backward(
    upstream: Tensor, hidden: Tensor, table: Tensor, index: Tensor | None, reciprocal: Tensor, scale: int
) -> Tensor:
    """∂/∂hidden [B, T, D]."""
    hidden, table, index = contiguous(hidden, table, index)
    output = torch.empty_like(hidden)
    if hidden.numel() == 0:
        return output
    inputs = (upstream.contiguous(), hidden, table[:, scale], index, reciprocal)
    with launching_on(hidden):
        kernel.backward_kernel[(reciprocal.numel(),)](
            *inputs, output, hidden.shape[1], table.stride(0), **token_options("backward", hidden, index)
        )
    return output


def launch_table_gradient(
    upstream: Tensor, hidden: Tensor, table: Tensor, index: Tensor | None, reciprocal: Tensor, shift: int, scale: int
) -> Tensor:
    """∂/∂table [U, K, D], 0 in all rows but shift and scale; both at once, where they are the same row."""
    hidden, table, index = contiguous(hidden, table, index)
    timesteps, _, width = table.shape
    gradients = table.new_zeros((2, *table.shape), dtype=torch.float32)
    if hidden.numel() and timesteps:
        chosen = configuration("adaln_rms_norm.table", architecture(hidden), hidden.dtype, width).options()
        grid = (triton.cdiv(width, chosen["COLUMNS"]), timesteps)
        inputs = (upstream.contiguous(), hidden, index, reciprocal, gradients[0, :, shift], gradients[1, :, scale])
        counts = (hidden.shape[1], reciprocal.numel(), table.stride(0))
        with launching_on(hidden):
            kernel.table_kernel[grid](*inputs, *counts, D=width, HAS_INDEX=index is not None, **chosen, **FUSED)
    return gradients.sum(dim=0).to(table.dtype)


def contiguous(hidden: Tensor, table: Tensor, index: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
    return hidden.contiguous(), table.contiguous(), None if index is None else index.contiguous()


def token_options(name: str, hidden: Tensor, index: Tensor | None) -> dict[str, int]:
    """Options of the kernels whose programs hold one token."""
    width = hidden.shape[2]
    chosen = configuration(f"adaln_rms_norm.{name}", architecture(hidden), hidden.dtype, width).options()
    return {"D": width, "WIDTH": triton.next_power_of_2(width), "HAS_INDEX": index is not None, **chosen, **FUSED}


@torch.library.custom_op("ltxforge::adaln_rms_norm", mutates_args=())
def forward_op(
    hidden: Tensor, table: Tensor, index: Tensor | None, shift: int, scale: int, eps: float
) -> tuple[Tensor, Tensor]:
    return launch_forward(hidden, table, index, shift, scale, eps)


@forward_op.register_fake
def _(hidden: Tensor, table: Tensor, index: Tensor | None, shift: int, scale: int, eps: float) -> tuple[Tensor, Tensor]:
    return hidden.new_empty(hidden.shape), hidden.new_empty(hidden.shape[:2], dtype=torch.float32)


@torch.library.custom_op("ltxforge::adaln_rms_norm_backward", mutates_args=())
def backward_op(
    upstream: Tensor, hidden: Tensor, table: Tensor, index: Tensor | None, reciprocal: Tensor, scale: int
) -> Tensor:
    return launch_backward(upstream, hidden, table, index, reciprocal, scale)


@backward_op.register_fake
def _(upstream: Tensor, hidden: Tensor, table: Tensor, index: Tensor | None, reciprocal: Tensor, scale: int) -> Tensor:
    return hidden.new_empty(hidden.shape)


@torch.library.custom_op("ltxforge::adaln_rms_norm_table_gradient", mutates_args=())
def table_gradient_op(
    upstream: Tensor, hidden: Tensor, table: Tensor, index: Tensor | None, reciprocal: Tensor, shift: int, scale: int
) -> Tensor:
    return launch_table_gradient(upstream, hidden, table, index, reciprocal, shift, scale)


@table_gradient_op.register_fake
def _(
    upstream: Tensor, hidden: Tensor, table: Tensor, index: Tensor | None, reciprocal: Tensor, shift: int, scale: int
) -> Tensor:
    return table.new_empty(table.shape)


def keep_for_gradient(ctx: torch.autograd.function.FunctionCtx, inputs: tuple, output: tuple) -> None:
    hidden, table, index, ctx.shift, ctx.scale, _ = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(hidden, table, index, output[1])


def gradient(ctx: torch.autograd.function.FunctionCtx, upstream: Tensor, _: None) -> tuple[Tensor | None, ...]:
    hidden, table, index, reciprocal = ctx.saved_tensors
    of_hidden = of_table = None
    if ctx.needs_input_grad[0]:
        of_hidden = backward_op(upstream, hidden, table, index, reciprocal, ctx.scale)
    if ctx.needs_input_grad[1]:
        of_table = table_gradient_op(upstream, hidden, table, index, reciprocal, ctx.shift, ctx.scale)
    return of_hidden, of_table, None, None, None, None


forward_op.register_autograd(gradient, setup_context=keep_for_gradient)
