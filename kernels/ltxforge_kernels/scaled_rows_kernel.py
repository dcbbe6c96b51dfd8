"""What quantising kernels share: a row stretched over the range of a number format, as `scaled_rows.py` defines it."""

import triton
import triton.language as tl


@triton.jit
def scaled_row(x, factor, K, LARGEST: tl.constexpr, HAS_FACTOR: tl.constexpr, WIDTH: tl.constexpr):
    """The program's row·factor, stretched so that its largest magnitude is LARGEST, and what undoes the stretching.

    Exactly rounded divisions and no fused multiply-add, so that codes are those of the reference to the bit.
    """
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, WIDTH)
    inside = column < K
    values = tl.load(x + row * K + column, mask=inside, other=0.0).to(tl.float32)
    if HAS_FACTOR:
        values = values * tl.load(factor + column, mask=inside, other=0.0)
    # As integers magnitudes have the same order, and NaN is the largest: tl.max alone would drop it.
    magnitude = values.to(tl.int32, bitcast=True) & 0x7FFFFFFF
    largest = tl.max(magnitude, 0).to(tl.float32, bitcast=True)
    # Below 2^-100 the stretch would overflow: such a row is 0.
    small = largest <= 7.888609052210118e-31
    stretch = tl.where(small, 0.0, tl.div_rn(LARGEST, tl.where(small, 1.0, largest)))
    return row * K + column, inside, values * stretch, tl.div_rn(largest, LARGEST)
