"""Triton kernels of the gated residual: alone, and with the norm that comes next; forward and backward of each.

One program holds one token; WIDTH is the power of two at or above D. Tokens are contiguous; gate, shift and scale point
at the first timestep's row, a stride apart from the next one's, or are absent. A second shift and scale, of the same
table, modulate the same norm again. Counts of tokens are never specialised on. The tables' gradients are sums over
tokens: `adaln_rms_norm` has the kernel.
"""

import triton
import triton.language as tl

from ltxforge_kernels.adaln_rms_norm.kernel import (
    modulate,
    norm_and_modulate,
    norm_gradient,
    stretch,
    timestep_of,
)


@triton.jit(do_not_specialize=["tokens"])
def residual_forward_kernel(
    hidden,
    branch,
    gate,
    gate_index,
    output,
    tokens,
    gate_stride,
    D: tl.constexpr,
    HAS_GATE_INDEX: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """x' = x + a·gate."""
    token = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, WIDTH)
    inside = column < D
    row = timestep_of(token, gate_index, tokens, HAS_GATE_INDEX) * gate_stride + column
    x = tl.load(hidden + token * D + column, mask=inside, other=0.0).to(tl.float32)
    a = tl.load(branch + token * D + column, mask=inside, other=0.0).to(tl.float32)
    x += a * tl.load(gate + row, mask=inside, other=0.0).to(tl.float32)
    tl.store(output + token * D + column, x.to(output.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["tokens"])
def residual_backward_kernel(
    upstream,
    gate,
    gate_index,
    output,
    tokens,
    gate_stride,
    D: tl.constexpr,
    HAS_GATE_INDEX: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """∂/∂a = upstream·gate; that of x is `upstream` itself."""
    token = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, WIDTH)
    inside = column < D
    row = timestep_of(token, gate_index, tokens, HAS_GATE_INDEX) * gate_stride + column
    arriving = tl.load(upstream + token * D + column, mask=inside, other=0.0).to(tl.float32)
    leaving = arriving * tl.load(gate + row, mask=inside, other=0.0).to(tl.float32)
    tl.store(output + token * D + column, leaving.to(output.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["tokens"])
def norm_forward_kernel(
    hidden,
    branch,
    gate,
    gate_index,
    shift,
    scale,
    second_shift,
    second_scale,
    index,
    total,
    output,
    second_output,
    reciprocal,
    tokens,
    gate_stride,
    stride,
    eps,
    D: tl.constexpr,
    HAS_GATE: tl.constexpr,
    HAS_GATE_INDEX: tl.constexpr,
    HAS_TABLE: tl.constexpr,
    HAS_SECOND: tl.constexpr,
    HAS_INDEX: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """x', y, z where there is a second pair of rows, and 1 / sqrt(mean x'² + eps) of the token."""
    token = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, WIDTH)
    inside = column < D
    x = tl.load(hidden + token * D + column, mask=inside, other=0.0).to(tl.float32)
    a = tl.load(branch + token * D + column, mask=inside, other=0.0).to(tl.float32)
    if HAS_GATE:
        gate_row = timestep_of(token, gate_index, tokens, HAS_GATE_INDEX) * gate_stride + column
        a *= tl.load(gate + gate_row, mask=inside, other=0.0).to(tl.float32)
    x += a
    tl.store(total + token * D + column, x.to(total.dtype.element_ty), mask=inside)
    row = timestep_of(token, index, tokens, HAS_INDEX) * stride + column
    y, rstd = norm_and_modulate(x, shift, scale, row, inside, eps, D, HAS_TABLE)
    tl.store(output + token * D + column, y.to(output.dtype.element_ty), mask=inside)
    if HAS_SECOND:
        z = modulate(x * rstd, second_shift, second_scale, row, inside)
        tl.store(second_output + token * D + column, z.to(second_output.dtype.element_ty), mask=inside)
    tl.store(reciprocal + token, rstd)


@triton.jit(do_not_specialize=["tokens"])
def norm_backward_kernel(
    total_upstream,
    upstream,
    second_upstream,
    total,
    gate,
    gate_index,
    scale,
    second_scale,
    index,
    reciprocal,
    hidden_gradient,
    branch_gradient,
    tokens,
    gate_stride,
    stride,
    D: tl.constexpr,
    HAS_GATE: tl.constexpr,
    HAS_GATE_INDEX: tl.constexpr,
    HAS_TABLE: tl.constexpr,
    HAS_SECOND: tl.constexpr,
    HAS_INDEX: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """∂/∂x = x's own gradient + that through the norm; ∂/∂a = ∂/∂x·gate, written only where there are gates."""
    token = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, WIDTH)
    inside = column < D
    row = timestep_of(token, index, tokens, HAS_INDEX) * stride + column
    x = tl.load(total + token * D + column, mask=inside, other=0.0).to(tl.float32)
    arriving = tl.load(upstream + token * D + column, mask=inside, other=0.0).to(tl.float32)
    if HAS_TABLE:
        arriving = stretch(arriving, scale, row, inside)
    if HAS_SECOND:
        other = tl.load(second_upstream + token * D + column, mask=inside, other=0.0).to(tl.float32)
        arriving += stretch(other, second_scale, row, inside)
    leaving = norm_gradient(arriving, x, tl.load(reciprocal + token), D)
    leaving += tl.load(total_upstream + token * D + column, mask=inside, other=0.0).to(tl.float32)
    tl.store(hidden_gradient + token * D + column, leaving.to(hidden_gradient.dtype.element_ty), mask=inside)
    if HAS_GATE:
        gate_row = timestep_of(token, gate_index, tokens, HAS_GATE_INDEX) * gate_stride + column
        leaving *= tl.load(gate + gate_row, mask=inside, other=0.0).to(tl.float32)
        tl.store(branch_gradient + token * D + column, leaving.to(branch_gradient.dtype.element_ty), mask=inside)
