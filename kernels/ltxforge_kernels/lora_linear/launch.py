"""Launches of LoRA layers: what is allocated, which blocks, the matrix products, and the torch.library ops.

Kept for backward: x as it came, the mask, and h of [rows, R]; act(x) and the packed [x | h] are workspaces of one
call. Two layouts of the frozen weight: alone, or with B behind it (`augmented.py`), told apart by a flag.
"""

from __future__ import annotations

import torch
import triton
from torch import Tensor
from torch.nn import functional

from ltxforge_kernels.configurations import configuration
from ltxforge_kernels.lora_linear import kernel
from ltxforge_kernels.target import architecture, launching_on

# Triton 3.10 changes the default.
FUSED = {"enable_fp_fusion": True}
# The smallest side of a tensor core's tile.
NARROWEST = 16


def lora_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    a: Tensor,
    b: Tensor,
    scale: float,
    kept: Tensor | None,
    keep: float,
    activation: str,
    augmented: Tensor | None,
) -> Tensor:
    """The op on a GPU."""
    stored = weight if augmented is None else augmented
    return linear_op(x, stored, bias, a, b, scale, kept, keep, activation, augmented is not None)[0]


def lora_branch(
    x: Tensor, base: Tensor, a: Tensor, b: Tensor, scale: float, kept: Tensor | None, keep: float
) -> Tensor:
    """The op on a GPU."""
    return branch_op(x, base, a, b, scale, kept, keep)[0]


def launch_linear(
    x: Tensor,
    stored: Tensor,
    bias: Tensor | None,
    a: Tensor,
    b: Tensor,
    scale: float,
    kept: Tensor | None,
    keep: float,
    activation: str,
    augmented: bool,
) -> tuple[Tensor, Tensor]:
    """y [..., N] and h [rows, RANK], of which R columns are not 0; `stored` is W [N, K] or Wc [N, K + tail]."""
    rows = as_rows(x)
    packed = None
    if augmented or activation == "gelu":
        packed = rows.new_empty(rows.shape[0], stored.shape[1])
    branch = launch_branch(rows, a, kept, factor_of(scale, kept, keep), activation, packed)
    output = functional.linear(rows if packed is None else packed, stored, bias)
    if not augmented:
        output.addmm_(branch[:, : a.shape[0]], b.to(x.dtype).t())
    return output.view(*x.shape[:-1], stored.shape[0]), branch


def launch_onto(
    x: Tensor, base: Tensor, a: Tensor, b: Tensor, scale: float, kept: Tensor | None, keep: float
) -> tuple[Tensor, Tensor]:
    """base + the LoRA branch [..., N], and h as above."""
    branch = launch_branch(as_rows(x), a, kept, factor_of(scale, kept, keep), "none", None)
    output = torch.addmm(as_rows(base), branch[:, : a.shape[0]], b.to(x.dtype).t())
    return output.view(base.shape), branch


def launch_branch(
    rows: Tensor, a: Tensor, kept: Tensor | None, factor: float, activation: str, packed: Tensor | None
) -> Tensor:
    """h [rows, RANK]; fills `packed` [rows, K + tail] (tail may be 0) with [act(x) | h | 0] where there is one."""
    count, width = rows.shape
    rank = a.shape[0]
    padded = padded_rank(rank)
    branch = rows.new_empty(count, padded)
    if count == 0:
        return branch
    options = {
        "K": width,
        "R": rank,
        "TAIL": 0 if packed is None else packed.shape[1] - width,
        "GELU": activation == "gelu",
        "HAS_KEPT": kept is not None,
        "PACK": packed is not None,
        "RANK": padded,
        **configuration("lora_linear.forward", architecture(rows), rows.dtype, padded).options(),
        **FUSED,
    }
    stride = 0 if packed is None else packed.stride(0)
    inputs = (rows, a.to(rows.dtype).contiguous(), as_bytes(kept), packed, branch, count, stride, factor)
    with launching_on(rows):
        kernel.forward_kernel[(triton.cdiv(count, options["ROWS"]),)](*inputs, **options)
    return branch


def launch_linear_gradients(
    upstream: Tensor,
    x: Tensor,
    stored: Tensor,
    a: Tensor,
    b: Tensor,
    branch: Tensor,
    scale: float,
    kept: Tensor | None,
    keep: float,
    activation: str,
    augmented: bool,
    of_x: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """∂/∂x [..., K] (empty unless `of_x`), ∂/∂a [R, K] and ∂/∂b [N, R]."""
    arriving, width = as_rows(upstream), x.shape[-1]
    base = None
    if augmented and of_x:
        both = arriving @ stored
        base, inner = both[:, :width], both[:, width:]
    elif augmented:
        inner = arriving @ stored[:, width:]
    else:
        inner = arriving @ b.to(x.dtype)
        base = arriving @ stored if of_x else None
    of_x, of_a = launch_gradients(x, inner, a, kept, factor_of(scale, kept, keep), activation, base, of_x)
    return of_x, of_a, launch_b_gradient(arriving, branch, b)


def launch_onto_gradients(
    upstream: Tensor,
    x: Tensor,
    a: Tensor,
    b: Tensor,
    branch: Tensor,
    scale: float,
    kept: Tensor | None,
    keep: float,
    of_x: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """As above, of the branch alone; the base's gradient is `upstream`."""
    arriving = as_rows(upstream)
    inner = arriving @ b.to(x.dtype)
    of_x, of_a = launch_gradients(x, inner, a, kept, factor_of(scale, kept, keep), "none", None, of_x)
    return of_x, of_a, launch_b_gradient(arriving, branch, b)


def launch_gradients(
    x: Tensor,
    inner: Tensor,
    a: Tensor,
    kept: Tensor | None,
    factor: float,
    activation: str,
    base: Tensor | None,
    of_x: bool,
) -> tuple[Tensor, Tensor]:
    """∂/∂x and ∂/∂a from ∂/∂h [rows, at least R] and what the frozen product adds to ∂/∂act(x)."""
    rows = as_rows(x)
    output = rows.new_empty(x.shape if of_x else (0,))
    sums = reduce_rows(
        rows,
        inner,
        a.shape[0],
        factor,
        a=a.to(x.dtype).contiguous(),
        kept=kept,
        base=base,
        output=output if of_x else None,
        gelu=activation == "gelu",
    )
    return output, sums.to(a.dtype)


def launch_b_gradient(arriving: Tensor, branch: Tensor, b: Tensor) -> Tensor:
    """∂/∂b [N, R] = arrivingᵀ·h, by the kernel that makes ∂/∂a."""
    return reduce_rows(arriving, branch, b.shape[1], 1.0).t().to(b.dtype).contiguous()


def reduce_rows(
    rows: Tensor,
    inner: Tensor,
    rank: int,
    factor: float,
    *,
    a: Tensor | None = None,
    kept: Tensor | None = None,
    base: Tensor | None = None,
    output: Tensor | None = None,
    gelu: bool = False,
) -> Tensor:
    """factor·innerᵀ·(kept ⊙ act(rows)) [R, K] in float32, filling `output` on the way where there is one."""
    count, width = rows.shape
    if count == 0:
        return rows.new_zeros((rank, width), dtype=torch.float32)
    options = {
        "K": width,
        "R": rank,
        "GELU": gelu,
        "HAS_KEPT": kept is not None,
        "HAS_BASE": base is not None,
        "OF_X": output is not None,
        "OF_A": True,
        "RANK": padded_rank(rank),
        **configuration("lora_linear.backward", architecture(rows), rows.dtype, padded_rank(rank)).options(),
        **FUSED,
    }
    grid = (triton.cdiv(width, options["COLUMNS"]), triton.cdiv(count, options["CHUNK"]))
    sums = rows.new_empty((grid[1], rank, width), dtype=torch.float32)
    inputs = (rows, inner, a, as_bytes(kept), base, output, sums, count)
    strides = (inner.stride(0), 0 if base is None else base.stride(0))
    with launching_on(rows):
        kernel.backward_kernel[grid](*inputs, *strides, factor, **options)
    return sums.sum(dim=0)


def as_rows(tensor: Tensor) -> Tensor:
    """[..., D] as contiguous [rows, D]."""
    return tensor.reshape(-1, tensor.shape[-1]).contiguous()


def as_bytes(kept: Tensor | None) -> Tensor | None:
    """A mask as bytes that are 0 or 1: what a kernel can load."""
    return None if kept is None else kept.contiguous().view(torch.uint8)


def factor_of(scale: float, kept: Tensor | None, keep: float) -> float:
    """The branch's scale, and what dropout makes up for."""
    return scale if kept is None else scale / keep


def padded_rank(rank: int) -> int:
    return max(NARROWEST, triton.next_power_of_2(rank))


@torch.library.custom_op("ltxforge::lora_linear", mutates_args=())
def linear_op(
    x: Tensor,
    stored: Tensor,
    bias: Tensor | None,
    a: Tensor,
    b: Tensor,
    scale: float,
    kept: Tensor | None,
    keep: float,
    activation: str,
    augmented: bool,
) -> tuple[Tensor, Tensor]:
    return launch_linear(x, stored, bias, a, b, scale, kept, keep, activation, augmented)


@linear_op.register_fake
def _(
    x: Tensor,
    stored: Tensor,
    bias: Tensor | None,
    a: Tensor,
    b: Tensor,
    scale: float,
    kept: Tensor | None,
    keep: float,
    activation: str,
    augmented: bool,
) -> tuple[Tensor, Tensor]:
    return x.new_empty((*x.shape[:-1], stored.shape[0])), empty_branch(x, a)


@torch.library.custom_op("ltxforge::lora_linear_backward", mutates_args=())
def linear_gradients_op(
    upstream: Tensor,
    x: Tensor,
    stored: Tensor,
    a: Tensor,
    b: Tensor,
    branch: Tensor,
    scale: float,
    kept: Tensor | None,
    keep: float,
    activation: str,
    augmented: bool,
    of_x: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    return launch_linear_gradients(upstream, x, stored, a, b, branch, scale, kept, keep, activation, augmented, of_x)


@linear_gradients_op.register_fake
def _(
    upstream: Tensor,
    x: Tensor,
    stored: Tensor,
    a: Tensor,
    b: Tensor,
    branch: Tensor,
    scale: float,
    kept: Tensor | None,
    keep: float,
    activation: str,
    augmented: bool,
    of_x: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    return empty_gradients(x, a, b, of_x)


@torch.library.custom_op("ltxforge::lora_branch", mutates_args=())
def branch_op(
    x: Tensor, base: Tensor, a: Tensor, b: Tensor, scale: float, kept: Tensor | None, keep: float
) -> tuple[Tensor, Tensor]:
    return launch_onto(x, base, a, b, scale, kept, keep)


@branch_op.register_fake
def _(
    x: Tensor, base: Tensor, a: Tensor, b: Tensor, scale: float, kept: Tensor | None, keep: float
) -> tuple[Tensor, Tensor]:
    return base.new_empty(base.shape), empty_branch(x, a)


@torch.library.custom_op("ltxforge::lora_branch_backward", mutates_args=())
def branch_gradients_op(
    upstream: Tensor,
    x: Tensor,
    a: Tensor,
    b: Tensor,
    branch: Tensor,
    scale: float,
    kept: Tensor | None,
    keep: float,
    of_x: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    return launch_onto_gradients(upstream, x, a, b, branch, scale, kept, keep, of_x)


@branch_gradients_op.register_fake
def _(
    upstream: Tensor,
    x: Tensor,
    a: Tensor,
    b: Tensor,
    branch: Tensor,
    scale: float,
    kept: Tensor | None,
    keep: float,
    of_x: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    return empty_gradients(x, a, b, of_x)


def empty_branch(x: Tensor, a: Tensor) -> Tensor:
    return x.new_empty((x.shape[:-1].numel(), padded_rank(a.shape[0])))


def empty_gradients(x: Tensor, a: Tensor, b: Tensor, of_x: bool) -> tuple[Tensor, Tensor, Tensor]:
    return x.new_empty(x.shape if of_x else (0,)), a.new_empty(a.shape), b.new_empty(b.shape)


def keep_for_linear(ctx: torch.autograd.function.FunctionCtx, inputs: tuple, output: tuple) -> None:
    """x as it came: before the activation, and shared with whoever else keeps it."""
    x, stored, _, a, b, ctx.scale, kept, ctx.keep, ctx.activation, ctx.augmented = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(x, stored, a, b, output[1], kept)


def linear_gradients(ctx: torch.autograd.function.FunctionCtx, upstream: Tensor, _: None) -> tuple[Tensor | None, ...]:
    *tensors, kept = ctx.saved_tensors
    needed = ctx.needs_input_grad[0]
    of_x, of_a, of_b = linear_gradients_op(
        upstream, *tensors, ctx.scale, kept, ctx.keep, ctx.activation, ctx.augmented, needed
    )
    return of_x if needed else None, None, None, of_a, of_b, None, None, None, None, None


def keep_for_branch(ctx: torch.autograd.function.FunctionCtx, inputs: tuple, output: tuple) -> None:
    x, _, a, b, ctx.scale, kept, ctx.keep = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(x, a, b, output[1], kept)


def branch_gradients(ctx: torch.autograd.function.FunctionCtx, upstream: Tensor, _: None) -> tuple[Tensor | None, ...]:
    *tensors, kept = ctx.saved_tensors
    needed = ctx.needs_input_grad[0]
    of_x, of_a, of_b = branch_gradients_op(upstream, *tensors, ctx.scale, kept, ctx.keep, needed)
    of_base = upstream if ctx.needs_input_grad[1] else None
    return of_x if needed else None, of_base, of_a, of_b, None, None, None


linear_op.register_autograd(linear_gradients, setup_context=keep_for_linear)
branch_op.register_autograd(branch_gradients, setup_context=keep_for_branch)
