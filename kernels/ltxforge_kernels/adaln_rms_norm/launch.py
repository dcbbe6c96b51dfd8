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
    hidden: Tensor,
    table: Tensor | None,
    index: Tensor | None,
    shift: int | None,
    scale: int | None,
    eps: float = 1e-6,
) -> Tensor:
    """The op on a GPU."""
    return forward_op(hidden, table, index, shift, scale, eps)[0]


def launch_forward(
    hidden: Tensor, table: Tensor | None, index: Tensor | None, shift: int | None, scale: int | None, eps: float
) -> tuple[Tensor, Tensor]:
    """y [B, T, D] and rstd [B, T], float32."""
    hidden, table, index = contiguous(hidden), contiguous(table), contiguous(index)
    output = torch.empty_like(hidden)
    reciprocal = hidden.new_empty(hidden.shape[:2], dtype=torch.float32)
    if hidden.numel() == 0:
        return output, reciprocal
    inputs = (hidden, row_of(table, shift), row_of(table, scale), index)
    with launching_on(hidden):
        kernel.forward_kernel[(reciprocal.numel(),)](
            *inputs,
            output,
            reciprocal,
            hidden.shape[1],
            stride_of(table),
            eps,
            **token_options("forward", hidden, table, index),
        )
    return output, reciprocal


def launch_backward(
    upstream: Tensor,
    hidden: Tensor,
    table: Tensor | None,
    index: Tensor | None,
    reciprocal: Tensor,
    scale: int | None,
) -> Tensor:
    """∂/∂hidden [B, T, D]."""
    hidden, table, index = contiguous(hidden), contiguous(table), contiguous(index)
    output = torch.empty_like(hidden)
    if hidden.numel() == 0:
        return output
    inputs = (upstream.contiguous(), hidden, row_of(table, scale), index, reciprocal)
    with launching_on(hidden):
        kernel.backward_kernel[(reciprocal.numel(),)](
            *inputs,
            output,
            hidden.shape[1],
            stride_of(table),
            **token_options("backward", hidden, table, index),
        )
    return output


def launch_table_gradient(
    upstream: Tensor, hidden: Tensor, table: Tensor, index: Tensor | None, reciprocal: Tensor, shift: int, scale: int
) -> Tensor:
    """∂/∂table [U, K, D], 0 in all rows but shift and scale; both at once, where they are the same row."""
    gradients = table.new_zeros((2, *table.shape), dtype=torch.float32)
    launch_sums(upstream, hidden, index, reciprocal, gradients[0, :, shift], gradients[1, :, scale])
    return gradients.sum(dim=0).to(table.dtype)


def launch_gate_gradient(upstream: Tensor, branch: Tensor, table: Tensor, index: Tensor | None, gate: int) -> Tensor:
    """∂/∂table [U, K, D] where one row of it multiplied `branch`; `upstream` is the product's gradient."""
    gradient = table.new_zeros(table.shape, dtype=torch.float32)
    launch_sums(upstream, branch, index, None, None, gradient[:, gate])
    return gradient.to(table.dtype)


def launch_sums(
    upstream: Tensor,
    hidden: Tensor,
    index: Tensor | None,
    reciprocal: Tensor | None,
    sums: Tensor | None,
    products: Tensor,
) -> None:
    """Write each timestep's sums into rows [U, D] of two float32 tables of one shape; see `table_kernel`."""
    upstream, hidden, index = contiguous(upstream), contiguous(hidden), contiguous(index)
    timesteps, width = products.shape
    if hidden.numel() == 0 or timesteps == 0:
        return
    chosen = configuration("adaln_rms_norm.table", architecture(hidden), hidden.dtype, width).options()
    grid = (triton.cdiv(width, chosen["COLUMNS"]), timesteps)
    counts = (hidden.shape[1], hidden.shape[0] * hidden.shape[1], products.stride(0))
    flags = {"HAS_INDEX": index is not None, "NORMED": reciprocal is not None}
    with launching_on(hidden):
        kernel.table_kernel[grid](
            upstream, hidden, index, reciprocal, sums, products, *counts, D=width, **flags, **chosen, **FUSED
        )


def contiguous(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.contiguous()


def row_of(table: Tensor | None, row: int | None) -> Tensor | None:
    """A row of every timestep, [U, D], `stride_of(table)` apart; None where there is no such row."""
    return None if table is None or row is None else table[:, row]


def stride_of(table: Tensor | None) -> int:
    return 0 if table is None else table.stride(0)


def token_options(name: str, hidden: Tensor, table: Tensor | None, index: Tensor | None) -> dict[str, int]:
    """Options of the kernels whose programs hold one token."""
    width = hidden.shape[2]
    chosen = configuration(f"adaln_rms_norm.{name}", architecture(hidden), hidden.dtype, width).options()
    flags = {"HAS_TABLE": table is not None, "HAS_INDEX": index is not None}
    return {"D": width, "WIDTH": triton.next_power_of_2(width), **flags, **chosen, **FUSED}


@torch.library.custom_op("ltxforge::adaln_rms_norm", mutates_args=())
def forward_op(
    hidden: Tensor, table: Tensor | None, index: Tensor | None, shift: int | None, scale: int | None, eps: float
) -> tuple[Tensor, Tensor]:
    return launch_forward(hidden, table, index, shift, scale, eps)


@forward_op.register_fake
def _(
    hidden: Tensor, table: Tensor | None, index: Tensor | None, shift: int | None, scale: int | None, eps: float
) -> tuple[Tensor, Tensor]:
    return hidden.new_empty(hidden.shape), hidden.new_empty(hidden.shape[:2], dtype=torch.float32)


@torch.library.custom_op("ltxforge::adaln_rms_norm_backward", mutates_args=())
def backward_op(
    upstream: Tensor,
    hidden: Tensor,
    table: Tensor | None,
    index: Tensor | None,
    reciprocal: Tensor,
    scale: int | None,
) -> Tensor:
    return launch_backward(upstream, hidden, table, index, reciprocal, scale)


@backward_op.register_fake
def _(
    upstream: Tensor,
    hidden: Tensor,
    table: Tensor | None,
    index: Tensor | None,
    reciprocal: Tensor,
    scale: int | None,
) -> Tensor:
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
