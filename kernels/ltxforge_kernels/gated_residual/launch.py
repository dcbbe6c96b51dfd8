"""Launches of the gated residual: what is allocated, which blocks, and the torch.library ops.

Gradients of gates and table are ops of their own, which LoRA training never calls.
"""

from __future__ import annotations

import torch
import triton
from torch import Tensor

from ltxforge_kernels.adaln_rms_norm.launch import (
    FUSED,
    contiguous,
    launch_gate_gradient,
    row_of,
    stride_of,
    table_gradient_op,
)
from ltxforge_kernels.configurations import configuration
from ltxforge_kernels.gated_residual import kernel
from ltxforge_kernels.target import architecture, launching_on

Context = torch.autograd.function.FunctionCtx


def gated_residual(
    hidden: Tensor, branch: Tensor, gates: Tensor | None, gate_index: Tensor | None, gate: int | None
) -> Tensor:
    """The op on a GPU. A sum alone is PyTorch's own, which reads and writes no more than we would."""
    return hidden + branch if gates is None else residual_op(hidden, branch, gates, gate_index, gate)


def gated_residual_norm(
    hidden: Tensor,
    branch: Tensor,
    gates: Tensor | None,
    gate_index: Tensor | None,
    gate: int | None,
    table: Tensor | None,
    index: Tensor | None,
    shift: int | None,
    scale: int | None,
    eps: float = 1e-6,
) -> tuple[Tensor, Tensor]:
    """The op on a GPU."""
    return norm_op(hidden, branch, gates, gate_index, gate, table, index, shift, scale, None, None, eps)[:2]


def gated_residual_norm_twice(
    hidden: Tensor,
    branch: Tensor,
    gates: Tensor | None,
    gate_index: Tensor | None,
    gate: int | None,
    table: Tensor,
    index: Tensor | None,
    first: tuple[int, int],
    second: tuple[int, int],
    eps: float = 1e-6,
) -> tuple[Tensor, Tensor, Tensor]:
    """The op on a GPU."""
    return norm_op(hidden, branch, gates, gate_index, gate, table, index, *first, *second, eps)[:3]


def launch_residual(hidden: Tensor, branch: Tensor, gates: Tensor, gate_index: Tensor | None, gate: int) -> Tensor:
    """x' [B, T, D]."""
    hidden, branch = hidden.contiguous(), branch.contiguous()
    gates, gate_index = gates.contiguous(), contiguous(gate_index)
    output = torch.empty_like(hidden)
    if hidden.numel():
        options = {**token_options("residual_forward", hidden), "HAS_GATE_INDEX": gate_index is not None}
        with launching_on(hidden):
            kernel.residual_forward_kernel[grid_of(hidden)](
                hidden, branch, gates[:, gate], gate_index, output, hidden.shape[1], gates.stride(0), **options
            )
    return output


def launch_residual_backward(upstream: Tensor, gates: Tensor, gate_index: Tensor | None, gate: int) -> Tensor:
    """∂/∂branch [B, T, D]."""
    upstream, gates, gate_index = upstream.contiguous(), gates.contiguous(), contiguous(gate_index)
    output = torch.empty_like(upstream)
    if upstream.numel():
        options = {**token_options("residual_backward", upstream), "HAS_GATE_INDEX": gate_index is not None}
        with launching_on(upstream):
            kernel.residual_backward_kernel[grid_of(upstream)](
                upstream, gates[:, gate], gate_index, output, upstream.shape[1], gates.stride(0), **options
            )
    return output


def launch_norm(
    hidden: Tensor,
    branch: Tensor,
    gates: Tensor | None,
    gate_index: Tensor | None,
    gate: int | None,
    table: Tensor | None,
    index: Tensor | None,
    shift: int | None,
    scale: int | None,
    second_shift: int | None,
    second_scale: int | None,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """x', y and z [B, T, D], and rstd [B, T], float32; z is empty without a second pair of rows."""
    hidden, branch, gates, table = hidden.contiguous(), branch.contiguous(), contiguous(gates), contiguous(table)
    gate_index, index = contiguous(gate_index), contiguous(index)
    total, output = torch.empty_like(hidden), torch.empty_like(hidden)
    second_output = hidden.new_empty(0) if second_scale is None else torch.empty_like(hidden)
    reciprocal = hidden.new_empty(hidden.shape[:2], dtype=torch.float32)
    if hidden.numel():
        rows = [row_of(table, row) for row in (shift, scale, second_shift, second_scale)]
        inputs = (hidden, branch, row_of(gates, gate), gate_index, *rows, index)
        outputs = (total, output, second_output, reciprocal)
        numbers = (hidden.shape[1], stride_of(gates), stride_of(table), eps)
        options = {**token_options("norm_forward", hidden), **flags(gates, gate_index, table, second_scale, index)}
        with launching_on(hidden):
            kernel.norm_forward_kernel[grid_of(hidden)](*inputs, *outputs, *numbers, **options)
    return total, output, second_output, reciprocal


def launch_norm_backward(
    total_upstream: Tensor,
    upstream: Tensor,
    second_upstream: Tensor | None,
    total: Tensor,
    gates: Tensor | None,
    gate_index: Tensor | None,
    gate: int | None,
    table: Tensor | None,
    index: Tensor | None,
    scale: int | None,
    second_scale: int | None,
    reciprocal: Tensor,
) -> tuple[Tensor, Tensor]:
    """∂/∂hidden and ∂/∂branch [B, T, D]; the second is empty without gates, since both are then the same."""
    total, gates, table = total.contiguous(), contiguous(gates), contiguous(table)
    gate_index, index = contiguous(gate_index), contiguous(index)
    of_hidden = torch.empty_like(total)
    of_branch = total.new_empty(0) if gates is None else torch.empty_like(total)
    if total.numel():
        upstreams = (total_upstream.contiguous(), upstream.contiguous(), contiguous(second_upstream))
        gated = (row_of(gates, gate), gate_index)
        norm = (row_of(table, scale), row_of(table, second_scale), index, reciprocal)
        numbers = (total.shape[1], stride_of(gates), stride_of(table))
        options = {**token_options("norm_backward", total), **flags(gates, gate_index, table, second_scale, index)}
        with launching_on(total):
            kernel.norm_backward_kernel[grid_of(total)](
                *upstreams, total, *gated, *norm, of_hidden, of_branch, *numbers, **options
            )
    return of_hidden, of_branch


def grid_of(hidden: Tensor) -> tuple[int]:
    """One program per token."""
    return (hidden.shape[0] * hidden.shape[1],)


def token_options(name: str, hidden: Tensor) -> dict[str, int]:
    """Options that all kernels have."""
    width = hidden.shape[2]
    chosen = configuration(f"gated_residual.{name}", architecture(hidden), hidden.dtype, width).options()
    return {"D": width, "WIDTH": triton.next_power_of_2(width), **chosen, **FUSED}


def flags(
    gates: Tensor | None,
    gate_index: Tensor | None,
    table: Tensor | None,
    second_scale: int | None,
    index: Tensor | None,
) -> dict[str, bool]:
    given = {"HAS_GATE": gates, "HAS_GATE_INDEX": gate_index, "HAS_TABLE": table, "HAS_SECOND": second_scale}
    return {name: value is not None for name, value in {**given, "HAS_INDEX": index}.items()}


@torch.library.custom_op("ltxforge::gated_residual", mutates_args=())
def residual_op(hidden: Tensor, branch: Tensor, gates: Tensor, gate_index: Tensor | None, gate: int) -> Tensor:
    return launch_residual(hidden, branch, gates, gate_index, gate)


@residual_op.register_fake
def _(hidden: Tensor, branch: Tensor, gates: Tensor, gate_index: Tensor | None, gate: int) -> Tensor:
    return hidden.new_empty(hidden.shape)


@torch.library.custom_op("ltxforge::gated_residual_backward", mutates_args=())
def residual_backward_op(upstream: Tensor, gates: Tensor, gate_index: Tensor | None, gate: int) -> Tensor:
    return launch_residual_backward(upstream, gates, gate_index, gate)


@residual_backward_op.register_fake
def _(upstream: Tensor, gates: Tensor, gate_index: Tensor | None, gate: int) -> Tensor:
    return upstream.new_empty(upstream.shape)


@torch.library.custom_op("ltxforge::gated_residual_gates_gradient", mutates_args=())
def gates_gradient_op(upstream: Tensor, branch: Tensor, gates: Tensor, gate_index: Tensor | None, gate: int) -> Tensor:
    return launch_gate_gradient(upstream, branch, gates, gate_index, gate)


@gates_gradient_op.register_fake
def _(upstream: Tensor, branch: Tensor, gates: Tensor, gate_index: Tensor | None, gate: int) -> Tensor:
    return gates.new_empty(gates.shape)


@torch.library.custom_op("ltxforge::gated_residual_norm", mutates_args=())
def norm_op(
    hidden: Tensor,
    branch: Tensor,
    gates: Tensor | None,
    gate_index: Tensor | None,
    gate: int | None,
    table: Tensor | None,
    index: Tensor | None,
    shift: int | None,
    scale: int | None,
    second_shift: int | None,
    second_scale: int | None,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    norm = (table, index, shift, scale, second_shift, second_scale)
    return launch_norm(hidden, branch, gates, gate_index, gate, *norm, eps)


@norm_op.register_fake
def _(
    hidden: Tensor,
    branch: Tensor,
    gates: Tensor | None,
    gate_index: Tensor | None,
    gate: int | None,
    table: Tensor | None,
    index: Tensor | None,
    shift: int | None,
    scale: int | None,
    second_shift: int | None,
    second_scale: int | None,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return (
        hidden.new_empty(hidden.shape),
        hidden.new_empty(hidden.shape),
        hidden.new_empty(0 if second_scale is None else hidden.shape),
        hidden.new_empty(hidden.shape[:2], dtype=torch.float32),
    )


@torch.library.custom_op("ltxforge::gated_residual_norm_backward", mutates_args=())
def norm_backward_op(
    total_upstream: Tensor,
    upstream: Tensor,
    second_upstream: Tensor | None,
    total: Tensor,
    gates: Tensor | None,
    gate_index: Tensor | None,
    gate: int | None,
    table: Tensor | None,
    index: Tensor | None,
    scale: int | None,
    second_scale: int | None,
    reciprocal: Tensor,
) -> tuple[Tensor, Tensor]:
    upstreams = (total_upstream, upstream, second_upstream)
    norm = (table, index, scale, second_scale)
    return launch_norm_backward(*upstreams, total, gates, gate_index, gate, *norm, reciprocal)


@norm_backward_op.register_fake
def _(
    total_upstream: Tensor,
    upstream: Tensor,
    second_upstream: Tensor | None,
    total: Tensor,
    gates: Tensor | None,
    *_: object,
) -> tuple[Tensor, Tensor]:
    return total.new_empty(total.shape), total.new_empty(0 if gates is None else total.shape)


def keep_for_residual_gradient(ctx: Context, inputs: tuple, output: Tensor) -> None:
    _, branch, gates, gate_index, ctx.gate = inputs
    ctx.save_for_backward(branch if ctx.needs_input_grad[2] else None, gates, gate_index)


def residual_gradient(ctx: Context, upstream: Tensor) -> tuple[Tensor | None, ...]:
    branch, gates, gate_index = ctx.saved_tensors
    of_branch = of_gates = None
    if ctx.needs_input_grad[1]:
        of_branch = residual_backward_op(upstream, gates, gate_index, ctx.gate)
    if ctx.needs_input_grad[2]:
        of_gates = gates_gradient_op(upstream, branch, gates, gate_index, ctx.gate)
    return upstream, of_branch, of_gates, None, None


def keep_for_norm_gradient(ctx: Context, inputs: tuple, output: tuple) -> None:
    _, branch, gates, gate_index, ctx.gate, table, index, ctx.shift, ctx.scale, *ctx.second, _ = inputs
    total, _, _, reciprocal = output
    ctx.mark_non_differentiable(reciprocal)
    kept = branch if ctx.needs_input_grad[2] else None
    ctx.save_for_backward(kept, gates, gate_index, table, index, total, reciprocal)


def norm_gradient(
    ctx: Context, total_upstream: Tensor, upstream: Tensor, second_upstream: Tensor, _: None
) -> tuple[Tensor | None, ...]:
    branch, gates, gate_index, table, index, total, reciprocal = ctx.saved_tensors
    second_shift, second_scale = ctx.second
    upstreams = (total_upstream, upstream, None if second_scale is None else second_upstream)
    modulated = (gates, gate_index, ctx.gate, table, index, ctx.scale, second_scale)
    of_hidden, of_branch = norm_backward_op(*upstreams, total, *modulated, reciprocal)
    of_gates = of_table = None
    if ctx.needs_input_grad[2]:
        of_gates = gates_gradient_op(of_hidden, branch, gates, gate_index, ctx.gate)
    if ctx.needs_input_grad[5]:
        kept = (total, table, index, reciprocal)
        of_table = table_gradient_op(upstream, *kept, ctx.shift, ctx.scale)
        if second_scale is not None:
            of_table = of_table + table_gradient_op(second_upstream, *kept, second_shift, second_scale)
    of_branch = of_hidden if gates is None else of_branch
    return of_hidden, of_branch, of_gates, None, None, of_table, *(None,) * 6


residual_op.register_autograd(residual_gradient, setup_context=keep_for_residual_gradient)
norm_op.register_autograd(norm_gradient, setup_context=keep_for_norm_gradient)
