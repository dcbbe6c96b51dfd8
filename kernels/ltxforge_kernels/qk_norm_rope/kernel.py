"""Triton kernels of norm and rotation, forward and backward, over queries and keys in one launch.

One program holds one token, as pairs of numbers: PAIRS is the power of two at or above D/2. HALF tells which numbers
are a pair: 0 for neighbours, else half a head. The first `queries` programs are the queries', the others the keys'.
Tokens are contiguous; counts of them are never specialised on. A rope is cos and sin [P, COLUMNS] with rows [T, AXES];
AXES 0 is no rope.
"""

import triton
import triton.language as tl


@triton.jit
def load_pairs(pointer, D: tl.constexpr, HALF: tl.constexpr, PAIRS: tl.constexpr):
    """A row as two tensors [PAIRS] in float32, 0 behind its end. Neighbours come in one wide load and are parted."""
    if HALF == 0:
        column = tl.arange(0, 2 * PAIRS)
        row = tl.load(pointer + column, mask=column < D, other=0.0).to(tl.float32)
        first, second = tl.split(tl.reshape(row, (PAIRS, 2)))
    else:
        pair = tl.arange(0, PAIRS)
        column = pair // HALF * (2 * HALF) + pair % HALF
        inside = pair < D // 2
        first = tl.load(pointer + column, mask=inside, other=0.0).to(tl.float32)
        second = tl.load(pointer + column + HALF, mask=inside, other=0.0).to(tl.float32)
    return first, second


@triton.jit
def store_pairs(pointer, first, second, D: tl.constexpr, HALF: tl.constexpr, PAIRS: tl.constexpr):
    """What `load_pairs` reads, rounded to the pointer's dtype."""
    if HALF == 0:
        column = tl.arange(0, 2 * PAIRS)
        row = tl.reshape(tl.join(first, second), (2 * PAIRS,))
        tl.store(pointer + column, row.to(pointer.dtype.element_ty), mask=column < D)
    else:
        pair = tl.arange(0, PAIRS)
        column = pair // HALF * (2 * HALF) + pair % HALF
        inside = pair < D // 2
        tl.store(pointer + column, first.to(pointer.dtype.element_ty), mask=inside)
        tl.store(pointer + column + HALF, second.to(pointer.dtype.element_ty), mask=inside)


@triton.jit
def load_angles(
    cos,
    sin,
    rows,
    place,
    AXES: tl.constexpr,
    COLUMNS: tl.constexpr,
    PADDING: tl.constexpr,
    PAIRS: tl.constexpr,
):
    """cos and sin of every pair of the token at this place of its sequence; 1 and 0 where nothing is turned."""
    turned = tl.arange(0, PAIRS) - PADDING
    row = tl.load(rows + place * AXES)
    if AXES > 1:
        axis = turned % AXES
        for number in tl.static_range(1, AXES):
            row = tl.where(axis == number, tl.load(rows + place * AXES + number), row)
    inside = (turned >= 0) & (turned < AXES * COLUMNS)
    offset = row * COLUMNS + turned // AXES
    return tl.load(cos + offset, mask=inside, other=1.0), tl.load(sin + offset, mask=inside, other=0.0)


@triton.jit
def forward_token(
    x,
    weight,
    cos,
    sin,
    rows,
    output,
    reciprocal,
    token,
    length,
    eps,
    AXES: tl.constexpr,
    COLUMNS: tl.constexpr,
    PADDING: tl.constexpr,
    HAS_WEIGHT: tl.constexpr,
    D: tl.constexpr,
    HALF: tl.constexpr,
    PAIRS: tl.constexpr,
):
    """One token of queries or keys: y, and 1 / sqrt(mean x² + eps)."""
    first, second = load_pairs(x + token * D, D, HALF, PAIRS)
    rstd = tl.rsqrt(tl.sum(first * first + second * second, 0) / D + eps)
    first *= rstd
    second *= rstd
    if HAS_WEIGHT:
        weight_first, weight_second = load_pairs(weight, D, HALF, PAIRS)
        first *= weight_first
        second *= weight_second
    if AXES:
        c, s = load_angles(cos, sin, rows, token % length, AXES, COLUMNS, PADDING, PAIRS)
        first, second = first * c - second * s, second * c + first * s
    store_pairs(output + token * D, first, second, D, HALF, PAIRS)
    tl.store(reciprocal + token, rstd)


@triton.jit
def backward_token(
    upstream,
    x,
    weight,
    cos,
    sin,
    rows,
    reciprocal,
    output,
    token,
    length,
    AXES: tl.constexpr,
    COLUMNS: tl.constexpr,
    PADDING: tl.constexpr,
    HAS_WEIGHT: tl.constexpr,
    D: tl.constexpr,
    HALF: tl.constexpr,
    PAIRS: tl.constexpr,
):
    """With n = x·rstd and g the upstream turned back, times the weight: ∂/∂x = rstd·(g − n·mean(g·n))."""
    first, second = load_pairs(upstream + token * D, D, HALF, PAIRS)
    if AXES:
        c, s = load_angles(cos, sin, rows, token % length, AXES, COLUMNS, PADDING, PAIRS)
        first, second = first * c + second * s, second * c - first * s
    if HAS_WEIGHT:
        weight_first, weight_second = load_pairs(weight, D, HALF, PAIRS)
        first *= weight_first
        second *= weight_second
    x_first, x_second = load_pairs(x + token * D, D, HALF, PAIRS)
    rstd = tl.load(reciprocal + token)
    # n·mean(g·n) = x·rstd²·mean(g·x)
    along = tl.sum(first * x_first + second * x_second, 0) / D * rstd * rstd
    store_pairs(
        output + token * D, rstd * (first - x_first * along), rstd * (second - x_second * along), D, HALF, PAIRS
    )


@triton.jit(do_not_specialize=["queries", "query_length", "key_length"])
def forward_kernel(
    query,
    query_weight,
    query_cos,
    query_sin,
    query_rows,
    query_output,
    query_reciprocal,
    key,
    key_weight,
    key_cos,
    key_sin,
    key_rows,
    key_output,
    key_reciprocal,
    queries,
    query_length,
    key_length,
    eps,
    QUERY_AXES: tl.constexpr,
    QUERY_COLUMNS: tl.constexpr,
    QUERY_PADDING: tl.constexpr,
    HAS_QUERY_WEIGHT: tl.constexpr,
    KEY_AXES: tl.constexpr,
    KEY_COLUMNS: tl.constexpr,
    KEY_PADDING: tl.constexpr,
    HAS_KEY_WEIGHT: tl.constexpr,
    D: tl.constexpr,
    HALF: tl.constexpr,
    PAIRS: tl.constexpr,
):
    """q and k, and the reciprocals of their norms."""
    program = tl.program_id(0).to(tl.int64)
    if program < queries:
        forward_token(
            query, query_weight, query_cos, query_sin, query_rows, query_output, query_reciprocal,
            program, query_length, eps,
            QUERY_AXES, QUERY_COLUMNS, QUERY_PADDING, HAS_QUERY_WEIGHT, D, HALF, PAIRS,
        )  # fmt: skip
    else:
        forward_token(
            key, key_weight, key_cos, key_sin, key_rows, key_output, key_reciprocal,
            program - queries, key_length, eps,
            KEY_AXES, KEY_COLUMNS, KEY_PADDING, HAS_KEY_WEIGHT, D, HALF, PAIRS,
        )  # fmt: skip


@triton.jit(do_not_specialize=["queries", "query_length", "key_length"])
def backward_kernel(
    query_upstream,
    query,
    query_weight,
    query_cos,
    query_sin,
    query_rows,
    query_reciprocal,
    query_gradient,
    key_upstream,
    key,
    key_weight,
    key_cos,
    key_sin,
    key_rows,
    key_reciprocal,
    key_gradient,
    queries,
    query_length,
    key_length,
    QUERY_AXES: tl.constexpr,
    QUERY_COLUMNS: tl.constexpr,
    QUERY_PADDING: tl.constexpr,
    HAS_QUERY_WEIGHT: tl.constexpr,
    KEY_AXES: tl.constexpr,
    KEY_COLUMNS: tl.constexpr,
    KEY_PADDING: tl.constexpr,
    HAS_KEY_WEIGHT: tl.constexpr,
    D: tl.constexpr,
    HALF: tl.constexpr,
    PAIRS: tl.constexpr,
):
    """∂/∂query and ∂/∂key."""
    program = tl.program_id(0).to(tl.int64)
    if program < queries:
        backward_token(
            query_upstream, query, query_weight, query_cos, query_sin, query_rows, query_reciprocal, query_gradient,
            program, query_length,
            QUERY_AXES, QUERY_COLUMNS, QUERY_PADDING, HAS_QUERY_WEIGHT, D, HALF, PAIRS,
        )  # fmt: skip
    else:
        backward_token(
            key_upstream, key, key_weight, key_cos, key_sin, key_rows, key_reciprocal, key_gradient,
            program - queries, key_length,
            KEY_AXES, KEY_COLUMNS, KEY_PADDING, HAS_KEY_WEIGHT, D, HALF, PAIRS,
        )  # fmt: skip
