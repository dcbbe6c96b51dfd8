"""Triton kernels beside the two large matrix products of a LoRA layer, which are cuBLAS's: x is read once each way.

Tensors [rows, K] are contiguous unless they come with a stride. RANK is the power of two at or above R, at least the
16 of a tensor core's tile; what lies behind R is 0. Counts of rows are never specialised on. Products accumulate in
float32 and take operands of x's dtype; the 1/keep of dropout is part of `factor`.
"""

import triton
import triton.language as tl

from ltxforge_kernels.gelu.kernel import gelu, gelu_slope


@triton.jit(do_not_specialize=["rows"])
def forward_kernel(
    x,
    a,
    kept,
    packed,
    branch,
    rows,
    packed_stride,
    factor,
    K: tl.constexpr,
    R: tl.constexpr,
    TAIL: tl.constexpr,
    GELU: tl.constexpr,
    HAS_KEPT: tl.constexpr,
    PACK: tl.constexpr,
    RANK: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """h = factor·(kept ⊙ act(x))·Aᵀ of ROWS rows; with PACK also act(x), and behind it h and zeros in TAIL columns."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    rank = tl.arange(0, RANK)
    exists = (row < rows)[:, None]
    total = tl.zeros((ROWS, RANK), tl.float32)
    for first in range(0, K, COLUMNS):
        column = first + tl.arange(0, COLUMNS)
        inside = exists & (column < K)[None, :]
        offset = row[:, None] * K + column[None, :]
        values = tl.load(x + offset, mask=inside, other=0.0)
        if GELU:
            values = gelu(values.to(tl.float32)).to(x.dtype.element_ty)
        if PACK:
            tl.store(packed + row[:, None] * packed_stride + column[None, :], values, mask=inside)
        if HAS_KEPT:
            values = tl.where(tl.load(kept + offset, mask=inside, other=0) != 0, values, 0.0)
        learned = (rank < R)[None, :] & (column < K)[:, None]
        weights = tl.load(a + rank[None, :] * K + column[:, None], mask=learned, other=0.0)
        total = tl.dot(values, weights, total, input_precision="ieee")
    narrow = (total * factor).to(branch.dtype.element_ty)
    tl.store(branch + row[:, None] * RANK + rank[None, :], narrow, mask=exists)
    if PACK:
        behind = packed + row[:, None] * packed_stride + K + rank[None, :]
        tl.store(behind, narrow, mask=exists & (rank < TAIL)[None, :])
        for block in tl.static_range(1, TAIL // RANK):
            tl.store(behind + block * RANK, tl.zeros_like(narrow), mask=exists)


@triton.jit(do_not_specialize=["rows"])
def backward_kernel(
    x,
    inner,
    a,
    kept,
    base,
    output,
    sums,
    rows,
    inner_stride,
    base_stride,
    factor,
    K: tl.constexpr,
    R: tl.constexpr,
    GELU: tl.constexpr,
    HAS_KEPT: tl.constexpr,
    HAS_BASE: tl.constexpr,
    OF_X: tl.constexpr,
    OF_A: tl.constexpr,
    RANK: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """Of `inner` = ∂/∂h, for COLUMNS of K over CHUNK rows: ∂/∂x = act′(x)·(base + kept ⊙ factor·inner·A) and, summed
    over the chunk in a fixed order, ∂/∂A = factor·innerᵀ·(kept ⊙ act(x)), [chunks, R, K] in float32."""
    column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    chunk = tl.program_id(1).to(tl.int64)
    rank = tl.arange(0, RANK)
    learned = (rank < R)[:, None] & (column < K)[None, :]
    if OF_X:
        weights = tl.load(a + rank[:, None] * K + column[None, :], mask=learned, other=0.0)
    total = tl.zeros((RANK, COLUMNS), tl.float32)
    for first in range(0, CHUNK, ROWS):
        row = chunk * CHUNK + first + tl.arange(0, ROWS)
        exists = (row < rows)[:, None]
        inside = exists & (column < K)[None, :]
        offset = row[:, None] * K + column[None, :]
        gradient = tl.load(
            inner + row[:, None] * inner_stride + rank[None, :], mask=exists & (rank < R)[None, :], other=0.0
        )
        if HAS_KEPT:
            alive = tl.load(kept + offset, mask=inside, other=0) != 0
        if OF_A or GELU:
            values = tl.load(x + offset, mask=inside, other=0.0)
        if OF_X:
            leaving = tl.dot(gradient, weights, input_precision="ieee") * factor
            if HAS_KEPT:
                leaving = tl.where(alive, leaving, 0.0)
            if HAS_BASE:
                frozen = base + row[:, None] * base_stride + column[None, :]
                leaving += tl.load(frozen, mask=inside, other=0.0).to(tl.float32)
            if GELU:
                leaving *= gelu_slope(values.to(tl.float32))
            tl.store(output + offset, leaving.to(output.dtype.element_ty), mask=inside)
        if OF_A:
            if GELU:
                values = gelu(values.to(tl.float32)).to(x.dtype.element_ty)
            if HAS_KEPT:
                values = tl.where(alive, values, 0.0)
            total = tl.dot(tl.trans(gradient), values, total, input_precision="ieee")
    if OF_A:
        part = (chunk * R + rank)[:, None] * K + column[None, :]
        tl.store(sums + part, total * factor, mask=learned)
