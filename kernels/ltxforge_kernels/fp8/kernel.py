"""Triton kernels of fp8: quantising rows, where a chip has fp8 (sm_89 and later), and dequantising, everywhere."""

import triton
import triton.language as tl

from ltxforge_kernels.scaled_rows_kernel import scaled_row


@triton.jit
def quantise_kernel(x, factor, codes, scale, K, HAS_FACTOR: tl.constexpr, WIDTH: tl.constexpr):
    """One row of x [M, K], times factor [K] if there is one, to fp8 and its scale."""
    offset, inside, stretched, undo = scaled_row(x, factor, K, 448.0, HAS_FACTOR, WIDTH)
    tl.store(codes + offset, stretched.to(codes.dtype.element_ty), mask=inside)
    tl.store(scale + tl.program_id(0), undo)


@triton.jit
def dequantise_kernel(bits, scale, output, N, K, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """values [N, K]·scale [N], rounded once; `bits` are the fp8 values as uint8."""
    row = tl.program_id(1).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    inside = (row < N)[:, None] & (column < K)[None, :]
    offset = row[:, None] * K + column[None, :]
    # Chips before sm_89 cannot convert fp8. Its bits, moved up, are a float16 whose exponent is 8 too small.
    bits = tl.load(bits + offset, mask=inside, other=0).to(tl.int16)
    half = ((bits & 0x80) << 8) | ((bits & 0x7F) << 7)
    values = half.to(tl.float16, bitcast=True).to(tl.float32) * 256.0
    factor = tl.load(scale + row, mask=row < N, other=0.0)
    tl.store(output + offset, (values * factor[:, None]).to(output.dtype.element_ty), mask=inside)
