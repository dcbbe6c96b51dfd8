"""Triton kernels of int8 weights: quantising rows, dequantising, the W8A8 product, and the LoRA's skinny products.

Matrices are contiguous except where strides are named. M counts tokens and is never specialised on. Sums of int8
products are int32, hence exact; those of the LoRA are float32 over operands of the compute type. A dropout mask is
uint8, 1 where a value is kept.
"""

import triton
import triton.language as tl

from ltxforge_kernels.scaled_rows_kernel import scaled_row


@triton.jit
def quantise_kernel(x, factor, codes, scale, K, HAS_FACTOR: tl.constexpr, WIDTH: tl.constexpr):
    """One row of x [M, K], times factor [K] if there is one, to int8 and its scale."""
    offset, inside, stretched, undo = scaled_row(x, factor, K, 127.0, HAS_FACTOR, WIDTH)
    # Adding 1.5·2^23 leaves no bit for a fraction: rounding to nearest, ties to even.
    rounded = (stretched + 12582912.0) - 12582912.0
    # What is not finite shows in the scale alone.
    rounded = tl.where(rounded == rounded, rounded, 0.0)
    tl.store(codes + offset, rounded.to(tl.int32).to(tl.int8), mask=inside)
    tl.store(scale + tl.program_id(0), undo)


@triton.jit
def dequantise_kernel(codes, scale, output, N, K, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """codes [N, K]·scale [N], rounded once."""
    row = tl.program_id(1).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    inside = (row < N)[:, None] & (column < K)[None, :]
    offset = row[:, None] * K + column[None, :]
    values = tl.load(codes + offset, mask=inside, other=0).to(tl.float32)
    factor = tl.load(scale + row, mask=row < N, other=0.0)
    tl.store(output + offset, (values * factor[:, None]).to(output.dtype.element_ty), mask=inside)


@triton.jit
def tile_of(M, N, BM: tl.constexpr, BN: tl.constexpr, GROUP: tl.constexpr):
    """Which tile the program has: GROUP tiles of rows are walked together, so that they share columns in L2."""
    rows, columns = tl.cdiv(M, BM), tl.cdiv(N, BN)
    group = tl.program_id(0) // (GROUP * columns)
    first = group * GROUP
    size = tl.minimum(rows - first, GROUP)
    within = tl.program_id(0) % (GROUP * columns)
    return first + within % size, within // size


@triton.jit(do_not_specialize=["M"])
def product_kernel(
    x,
    w,
    row_scale,
    column_scale,
    bias,
    h,
    factor,
    kept,
    output,
    M,
    N,
    K,
    w_column_stride,
    w_inner_stride,
    factor_column_stride,
    factor_rank_stride,
    R: tl.constexpr,
    RANK: tl.constexpr,
    HAS_COLUMN_SCALE: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_LORA: tl.constexpr,
    HAS_KEPT: tl.constexpr,
    EVEN: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    GROUP: tl.constexpr,
):
    """output [M, N] = (x·w)·row_scale·column_scale + bias + kept·(h·factor): x [M, K] and w int8, h [M, R].

    Forward: w and factor are W and B as they lie, and column_scale is W's. Backward: both the other way round.
    """
    tile_row, tile_column = tile_of(M, N, BM, BN, GROUP)
    row = tile_row * BM + tl.arange(0, BM)
    column = tile_column * BN + tl.arange(0, BN)
    inner = tl.arange(0, BK)
    # Rows and columns behind the end read the first one's values and are not stored.
    safe_row = tl.where(row < M, row, 0).to(tl.int64)
    safe_column = tl.where(column < N, column, 0).to(tl.int64)
    left = x + safe_row[:, None] * K + inner[None, :]
    right = w + safe_column[None, :] * w_column_stride + inner[:, None].to(tl.int64) * w_inner_stride
    sums = tl.zeros((BM, BN), tl.int32)
    for begin in range(0, K, BK):
        if EVEN:
            a = tl.load(left)
            b = tl.load(right)
        else:
            a = tl.load(left, mask=(begin + inner < K)[None, :], other=0)
            b = tl.load(right, mask=(begin + inner < K)[:, None], other=0)
        sums = tl.dot(a, b, sums, out_dtype=tl.int32)
        left += BK
        right += BK * w_inner_stride
    result = sums.to(tl.float32) * tl.load(row_scale + safe_row)[:, None]
    if HAS_COLUMN_SCALE:
        result = result * tl.load(column_scale + safe_column)[None, :]
    place = row.to(tl.int64)[:, None] * N + column[None, :]
    inside = (row < M)[:, None] & (column < N)[None, :]
    if HAS_LORA:
        rank = tl.arange(0, RANK)
        hidden = tl.load(h + safe_row[:, None] * R + rank[None, :], mask=(rank < R)[None, :], other=0.0)
        across = safe_column[None, :] * factor_column_stride + rank[:, None] * factor_rank_stride
        lora = tl.load(factor + across, mask=(rank < R)[:, None], other=0.0)
        if HAS_KEPT:
            branch = tl.dot(hidden, lora, input_precision="ieee")
            keeping = tl.load(kept + place, mask=inside, other=0)
            result += tl.where(keeping != 0, branch, 0.0)
        else:
            result = tl.dot(hidden, lora, result, input_precision="ieee")
    if HAS_BIAS:
        result += tl.load(bias + safe_column).to(tl.float32)[None, :]
    tl.store(output + place, result.to(output.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["M"])
def project_kernel(
    x,
    row_scale,
    kept,
    factor,
    plain,
    scaled,
    scale,
    M,
    K,
    factor_inner_stride,
    factor_rank_stride,
    R: tl.constexpr,
    RANK: tl.constexpr,
    HAS_PLAIN: tl.constexpr,
    HAS_KEPT: tl.constexpr,
    BM: tl.constexpr,
    BK: tl.constexpr,
):
    """plain [M, R] = scale·((kept·x) @ factor), and scaled = plain·row_scale; x [M, K] codes or values, factor [K, R].

    Forward: x's codes and Aᵀ give h. Backward: ∂/∂y and B give what meets A, and scaled what meets x's codes.
    """
    row = tl.program_id(0) * BM + tl.arange(0, BM)
    safe_row = tl.where(row < M, row, 0).to(tl.int64)
    rank = tl.arange(0, RANK)
    sums = tl.zeros((BM, RANK), tl.float32)
    for begin in range(0, K, BK):
        inner = begin + tl.arange(0, BK)
        place = safe_row[:, None] * K + inner[None, :]
        there = (inner < K)[None, :]
        values = tl.load(x + place, mask=there, other=0)
        if HAS_KEPT:
            values = tl.where(tl.load(kept + place, mask=there, other=0) != 0, values, 0)
        across = inner[:, None].to(tl.int64) * factor_inner_stride + rank[None, :] * factor_rank_stride
        weights = tl.load(factor + across, mask=(inner < K)[:, None] & (rank < R)[None, :], other=0.0)
        sums = tl.dot(values.to(weights.dtype), weights, sums, input_precision="ieee")
    sums = sums * scale
    inside = (row < M)[:, None] & (rank < R)[None, :]
    place = row[:, None].to(tl.int64) * R + rank[None, :]
    if HAS_PLAIN:
        tl.store(plain + place, sums.to(plain.dtype.element_ty), mask=inside)
    sums = sums * tl.load(row_scale + safe_row)[:, None]
    tl.store(scaled + place, sums.to(scaled.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["M", "tokens"])
def over_tokens_kernel(
    h,
    x,
    kept,
    partial,
    M,
    tokens,
    K,
    R: tl.constexpr,
    RANK: tl.constexpr,
    HAS_KEPT: tl.constexpr,
    BM: tl.constexpr,
    BK: tl.constexpr,
):
    """partial [parts, R, K] = hᵀ @ (kept·x), x codes or values, each part over its `tokens` of the M."""
    part = tl.program_id(1)
    inner = tl.program_id(0) * BK + tl.arange(0, BK)
    rank = tl.arange(0, RANK)
    end = tl.minimum((part + 1) * tokens, M)
    sums = tl.zeros((RANK, BK), tl.float32)
    for begin in range(part * tokens, end, BM):
        row = begin + tl.arange(0, BM)
        wide_row = row.to(tl.int64)
        there = (row < end)[:, None] & (rank < R)[None, :]
        hidden = tl.load(h + wide_row[:, None] * R + rank[None, :], mask=there, other=0.0)
        place = wide_row[:, None] * K + inner[None, :]
        inside = (row < end)[:, None] & (inner < K)[None, :]
        values = tl.load(x + place, mask=inside, other=0)
        if HAS_KEPT:
            values = tl.where(tl.load(kept + place, mask=inside, other=0) != 0, values, 0)
        sums = tl.dot(tl.trans(hidden), values.to(hidden.dtype), sums, input_precision="ieee")
    place = (part * R + rank[:, None]).to(tl.int64) * K + inner[None, :]
    tl.store(partial + place, sums, mask=(rank < R)[:, None] & (inner < K)[None, :])
