"""Triton kernels of RMSNorm with modulation: forward, the gradient of x, and that of the table.

One program holds one token of forward and backward; WIDTH is the power of two at or above D. x, y and their gradients
are contiguous; shift and scale point at the first timestep's row, `stride` apart from the next one's. Without an index
a token's row is its sample's. Counts of tokens are never specialised on.
"""

import triton
import triton.language as tl


@triton.jit
def timestep_of(token, index, tokens, HAS_INDEX: tl.constexpr):
    """Which timestep a token has, int64."""
    return tl.load(index + token).to(tl.int64) if HAS_INDEX else token // tokens


@triton.jit(do_not_specialize=["tokens"])
def forward_kernel(
    hidden,
    shift,
    scale,
    index,
    output,
    reciprocal,
    tokens,
    stride,
    eps,
    D: tl.constexpr,
    HAS_INDEX: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """y, and 1 / sqrt(mean x² + eps) of the token."""
    token = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, WIDTH)
    inside = column < D
    x = tl.load(hidden + token * D + column, mask=inside, other=0.0).to(tl.float32)
    rstd = tl.rsqrt(tl.sum(x * x, 0) / D + eps)
    row = timestep_of(token, index, tokens, HAS_INDEX) * stride + column
    added = tl.load(shift + row, mask=inside, other=0.0).to(tl.float32)
    factor = 1 + tl.load(scale + row, mask=inside, other=0.0).to(tl.float32)
    y = x * rstd * factor + added
    tl.store(output + token * D + column, y.to(output.dtype.element_ty), mask=inside)
    tl.store(reciprocal + token, rstd)


@triton.jit(do_not_specialize=["tokens"])
def backward_kernel(
    upstream,
    hidden,
    scale,
    index,
    reciprocal,
    output,
    tokens,
    stride,
    D: tl.constexpr,
    HAS_INDEX: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """With n = x·rstd and g = upstream·(1 + scale): ∂/∂x = rstd·(g − n·mean(g·n))."""
    token = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, WIDTH)
    inside = column < D
    x = tl.load(hidden + token * D + column, mask=inside, other=0.0).to(tl.float32)
    arriving = tl.load(upstream + token * D + column, mask=inside, other=0.0).to(tl.float32)
    rstd = tl.load(reciprocal + token)
    row = timestep_of(token, index, tokens, HAS_INDEX) * stride + column
    gradient = arriving * (1 + tl.load(scale + row, mask=inside, other=0.0).to(tl.float32))
    normed = x * rstd
    leaving = rstd * (gradient - normed * (tl.sum(gradient * normed, 0) / D))
    tl.store(output + token * D + column, leaving.to(output.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["tokens", "batch_tokens"])
def table_kernel(
    upstream,
    hidden,
    index,
    reciprocal,
    shift_gradient,
    scale_gradient,
    tokens,
    batch_tokens,
    stride,
    D: tl.constexpr,
    HAS_INDEX: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """∂/∂shift = Σ upstream and ∂/∂scale = Σ upstream·n over one timestep's tokens, COLUMNS wide, in a fixed order."""
    timestep = tl.program_id(1).to(tl.int64)
    column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    shifts = tl.zeros((COLUMNS,), tl.float32)
    scales = tl.zeros((COLUMNS,), tl.float32)
    if HAS_INDEX:
        begin = timestep * 0
        end = begin + batch_tokens
    else:
        begin = timestep * tokens
        end = begin + tokens
    for first in range(begin, end, ROWS):
        token = first + tl.arange(0, ROWS).to(tl.int64)
        mine = token < end
        if HAS_INDEX:
            mine = mine & (tl.load(index + token, mask=mine, other=-1).to(tl.int64) == timestep)
        inside = mine[:, None] & (column < D)[None, :]
        offset = token[:, None] * D + column[None, :]
        arriving = tl.load(upstream + offset, mask=inside, other=0.0).to(tl.float32)
        x = tl.load(hidden + offset, mask=inside, other=0.0).to(tl.float32)
        rstd = tl.load(reciprocal + token, mask=mine, other=0.0)
        shifts += tl.sum(arriving, 0)
        scales += tl.sum(arriving * x * rstd[:, None], 0)
    row = timestep * stride + column
    tl.store(shift_gradient + row, shifts.to(shift_gradient.dtype.element_ty), mask=column < D)
    tl.store(scale_gradient + row, scales.to(scale_gradient.dtype.element_ty), mask=column < D)
