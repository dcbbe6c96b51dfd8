"""Triton kernels of RMSNorm with modulation: forward, the gradient of x, and that of the table.

One program holds one token of forward and backward; WIDTH is the power of two at or above D. x, y and their gradients
are contiguous; shift and scale point at the first timestep's row, `stride` apart from the next one's, or are absent for
the norm alone. Without an index a token's row is its sample's. Counts of tokens are never specialised on.
"""

import triton
import triton.language as tl


@triton.jit
def timestep_of(token, index, tokens, HAS_INDEX: tl.constexpr):
    """Which timestep a token has, int64."""
    return tl.load(index + token).to(tl.int64) if HAS_INDEX else token // tokens


@triton.jit
def norm_and_modulate(x, shift, scale, row, inside, eps, D: tl.constexpr, HAS_TABLE: tl.constexpr):
    """y of one token's x, and 1 / sqrt(mean x² + eps)."""
    rstd = tl.rsqrt(tl.sum(x * x, 0) / D + eps)
    y = x * rstd
    if HAS_TABLE:
        y = modulate(y, shift, scale, row, inside)
    return y, rstd


@triton.jit
def modulate(normed, shift, scale, row, inside):
    """n·(1 + scale) + shift."""
    added = tl.load(shift + row, mask=inside, other=0.0).to(tl.float32)
    return stretch(normed, scale, row, inside) + added


@triton.jit
def stretch(values, scale, row, inside):
    """values·(1 + scale): half of modulation, and its gradient."""
    return values * (1 + tl.load(scale + row, mask=inside, other=0.0).to(tl.float32))


@triton.jit
def norm_gradient(arriving, x, rstd, D: tl.constexpr):
    """With n = x·rstd and n's gradient g, which arrives: ∂/∂x = rstd·(g − n·mean(g·n))."""
    normed = x * rstd
    return rstd * (arriving - normed * (tl.sum(arriving * normed, 0) / D))


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
    HAS_TABLE: tl.constexpr,
    HAS_INDEX: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """y, and 1 / sqrt(mean x² + eps) of the token."""
    token = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, WIDTH)
    inside = column < D
    row = timestep_of(token, index, tokens, HAS_INDEX) * stride + column
    x = tl.load(hidden + token * D + column, mask=inside, other=0.0).to(tl.float32)
    y, rstd = norm_and_modulate(x, shift, scale, row, inside, eps, D, HAS_TABLE)
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
    HAS_TABLE: tl.constexpr,
    HAS_INDEX: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """∂/∂x: back through the modulation, and as `norm_gradient` says."""
    token = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, WIDTH)
    inside = column < D
    row = timestep_of(token, index, tokens, HAS_INDEX) * stride + column
    x = tl.load(hidden + token * D + column, mask=inside, other=0.0).to(tl.float32)
    arriving = tl.load(upstream + token * D + column, mask=inside, other=0.0).to(tl.float32)
    if HAS_TABLE:
        arriving = stretch(arriving, scale, row, inside)
    leaving = norm_gradient(arriving, x, tl.load(reciprocal + token), D)
    tl.store(output + token * D + column, leaving.to(output.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["tokens", "batch_tokens"])
def table_kernel(
    upstream,
    hidden,
    index,
    reciprocal,
    sum_gradient,
    product_gradient,
    tokens,
    batch_tokens,
    stride,
    D: tl.constexpr,
    HAS_INDEX: tl.constexpr,
    NORMED: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Sums over one timestep's tokens, COLUMNS wide, in a fixed order.

    NORMED: ∂/∂shift = Σ upstream and ∂/∂scale = Σ upstream·n. Else the second alone with n = `hidden` itself, which is
    the gradient of a gate.
    """
    timestep = tl.program_id(1).to(tl.int64)
    column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    sums = tl.zeros((COLUMNS,), tl.float32)
    products = tl.zeros((COLUMNS,), tl.float32)
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
        product = arriving * tl.load(hidden + offset, mask=inside, other=0.0).to(tl.float32)
        if NORMED:
            product *= tl.load(reciprocal + token, mask=mine, other=0.0)[:, None]
            sums += tl.sum(arriving, 0)
        products += tl.sum(product, 0)
    row = timestep * stride + column
    tl.store(product_gradient + row, products, mask=column < D)
    if NORMED:
        tl.store(sum_gradient + row, sums, mask=column < D)
