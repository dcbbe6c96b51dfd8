"""Triton kernels of NF4: packing, unpacking, and the product with few tokens that unpacks as it goes.

Codes are looked up in a table of 16, by pointer or by `tl.gather`: a constexpr of the configuration. In the product it
is always the gather: of lookups by pointer in a loop the pipeliner makes asynchronous copies of 4 bytes. To be launched
without fused multiply-adds: bitsandbytes rounds product and sum of a nested scale apart.
"""

import triton
import triton.language as tl


@triton.jit
def pack_kernel(
    weight,
    bounds,
    packed,
    absmax,
    elements,
    codes,
    BLOCKSIZE: tl.constexpr,
    ENDS_FULL: tl.constexpr,
    BLOCKS: tl.constexpr,
    SMALLEST: tl.constexpr,
):
    """BLOCKS blocks: their largest values, and the bytes of codes, which are how many of the 15 bounds are exceeded."""
    block = tl.program_id(0).to(tl.int64) * BLOCKS + tl.arange(0, BLOCKS)
    element = block[:, None] * BLOCKSIZE + tl.arange(0, BLOCKSIZE)[None, :]
    x = tl.load(weight + element, mask=element < elements, other=0.0).to(tl.float32)
    largest = tl.max(tl.abs(x), 1)
    # Smaller than the smallest normal number, and as a plain constant it would be float64.
    divisor = tl.maximum(largest, tl.full((BLOCKS,), SMALLEST, tl.float32))
    reciprocal = tl.div_rn(tl.full((BLOCKS,), 1.0, tl.float32), divisor)
    scaled = x * reciprocal[:, None]
    if not ENDS_FULL:
        # bitsandbytes divides in a last block that is not full, and keeps its largest value from 0.
        full = (block + 1) * BLOCKSIZE <= elements
        divided = tl.div_rn(x, tl.broadcast_to(divisor[:, None], (BLOCKS, BLOCKSIZE)))
        scaled = tl.where(full[:, None], scaled, divided)
        largest = tl.where(full, largest, divisor)
    code = tl.zeros((BLOCKS, BLOCKSIZE), tl.int32)
    for bound in tl.static_range(15):
        code += (scaled > tl.load(bounds + bound)).to(tl.int32)
    high, low = tl.split(tl.reshape(code, (BLOCKS, BLOCKSIZE // 2, 2)))
    byte = block[:, None] * (BLOCKSIZE // 2) + tl.arange(0, BLOCKSIZE // 2)[None, :]
    tl.store(packed + byte, (high << 4 | low).to(tl.uint8), mask=byte < codes)
    tl.store(absmax + block, largest, mask=block * BLOCKSIZE < elements)


@triton.jit
def look_up(table, code, SIZE: tl.constexpr, GATHER: tl.constexpr):
    """The table's entries at codes [n]."""
    if GATHER:
        entry = tl.gather(tl.load(table + tl.arange(0, SIZE)), code.to(tl.int32), 0)
    else:
        entry = tl.load(table + code.to(tl.int32))
    return entry


@triton.jit
def scales_of(
    absmax,
    nested_absmax,
    nested_map,
    nested_offset,
    block,
    inside,
    DOUBLE: tl.constexpr,
    NESTED_BLOCKSIZE: tl.constexpr,
    GATHER: tl.constexpr,
):
    """What blocks [n] are scaled by, float32; product and sum of a nested one each rounded."""
    if DOUBLE:
        code = tl.load(absmax + block, mask=inside, other=0)
        largest = tl.load(nested_absmax + block // NESTED_BLOCKSIZE, mask=inside, other=0.0)
        scale = look_up(nested_map, code, 256, GATHER) * largest + tl.load(nested_offset)
    else:
        scale = tl.load(absmax + block, mask=inside, other=0.0)
    return scale


@triton.jit
def unpack_kernel(
    packed,
    absmax,
    quant_map,
    nested_absmax,
    nested_map,
    nested_offset,
    output,
    elements,
    codes,
    BLOCKSIZE: tl.constexpr,
    DOUBLE: tl.constexpr,
    NESTED_BLOCKSIZE: tl.constexpr,
    GATHER: tl.constexpr,
    BYTES: tl.constexpr,
):
    """BYTES of codes, which are whole blocks, as values of the output's dtype."""
    BLOCKS: tl.constexpr = 2 * BYTES // BLOCKSIZE
    program = tl.program_id(0).to(tl.int64)
    byte = program * BYTES + tl.arange(0, BYTES)
    pair = tl.load(packed + byte, mask=byte < codes, other=0, eviction_policy="evict_first")
    value = tl.interleave(look_up(quant_map, pair >> 4, 16, GATHER), look_up(quant_map, pair & 15, 16, GATHER))
    block = program * BLOCKS + tl.arange(0, BLOCKS)
    inside = block * BLOCKSIZE < elements
    nested = (nested_absmax, nested_map, nested_offset)
    scale = scales_of(absmax, *nested, block, inside, DOUBLE, NESTED_BLOCKSIZE, GATHER)
    value = tl.reshape(tl.reshape(value, (BLOCKS, BLOCKSIZE)) * scale[:, None], (2 * BYTES,))
    element = program * (2 * BYTES) + tl.arange(0, 2 * BYTES)
    tl.store(output + element, value.to(output.dtype.element_ty), mask=element < elements)


@triton.jit(do_not_specialize=["tokens"])
def small_product_kernel(
    x,
    packed,
    absmax,
    quant_map,
    nested_absmax,
    nested_map,
    nested_offset,
    bias,
    output,
    tokens,
    N,
    K,
    BLOCKSIZE: tl.constexpr,
    DOUBLE: tl.constexpr,
    NESTED_BLOCKSIZE: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    ROWS: tl.constexpr,
    TOKENS: tl.constexpr,
    DEPTH: tl.constexpr,
):
    """ROWS rows of W times TOKENS of x, W being the first operand so that it may stay in registers.

    Blocks end where rows do: K is a multiple of BLOCKSIZE, and DEPTH one or a divisor of it. The weight is rounded to
    x's dtype, as where it is unpacked first.
    """
    GROUPS: tl.constexpr = DEPTH // BLOCKSIZE if DEPTH > BLOCKSIZE else 1
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    token = tl.program_id(1) * TOKENS + tl.arange(0, TOKENS)
    half = tl.arange(0, DEPTH // 2)
    depth = tl.arange(0, DEPTH)
    # Of rows and tokens that are not there the first is read, and nothing written.
    byte = tl.where(row < N, row, 0).to(tl.int64)[:, None] * (K // 2) + half[None, :]
    group = tl.arange(0, ROWS * GROUPS)
    group_row = tl.program_id(0) * ROWS + group // GROUPS
    first_block = tl.where(group_row < N, group_row, 0).to(tl.int64) * (K // BLOCKSIZE) + group % GROUPS
    source = tl.where(token < tokens, token, 0).to(tl.int64)[None, :] * K + depth[:, None]
    table = tl.load(quant_map + tl.arange(0, 16))
    nested = (nested_absmax, nested_map, nested_offset)
    total = tl.zeros((ROWS, TOKENS), tl.float32)
    for start in range(0, K, DEPTH):
        pair = tl.reshape(tl.load(packed + byte + start // 2), (ROWS * DEPTH // 2,)).to(tl.int32)
        value = tl.interleave(tl.gather(table, pair >> 4, 0), tl.gather(table, pair & 15, 0))
        block = first_block + start // BLOCKSIZE
        scale = scales_of(absmax, *nested, block, block >= 0, DOUBLE, NESTED_BLOCKSIZE, True)
        value = tl.reshape(value, (ROWS * GROUPS, DEPTH // GROUPS)) * scale[:, None]
        part = tl.load(x + source + start)
        total = tl.dot(tl.reshape(value, (ROWS, DEPTH)).to(part.dtype), part, total)
    if HAS_BIAS:
        total += tl.load(bias + row, mask=row < N, other=0.0).to(tl.float32)[:, None]
    target = token[None, :].to(tl.int64) * N + row[:, None]
    written = (row < N)[:, None] & (token < tokens)[None, :]
    tl.store(output + target, total.to(output.dtype.element_ty), mask=written)
