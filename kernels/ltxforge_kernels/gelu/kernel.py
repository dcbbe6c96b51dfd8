"""Triton kernels of GELU: forward and backward.

One program holds BLOCK columns of one row, so that a row's width alone decides what is compiled. x, y and their
gradients are contiguous [rows, K].
"""

import triton
import triton.language as tl

# 2·√(2/π). Numbers stand to the right of tensors: the interpreter multiplies a constexpr by nothing but numbers.
TWICE_ROOT = tl.constexpr(1.5957691216057308)
CUBIC = tl.constexpr(0.044715)


@triton.jit
def gates(x):
    """(1 + tanh u) / 2 and (1 − tanh u) / 2, as logistic functions of 2·u: nothing cancels, and no power overflows."""
    twice = x * (x * x * CUBIC + 1) * TWICE_ROOT
    power = tl.exp(-tl.abs(twice))
    larger = 1 / (1 + power)
    smaller = power * larger
    return tl.where(twice < 0, smaller, larger), tl.where(twice < 0, larger, smaller)


@triton.jit
def gelu(x):
    """y of x, float32."""
    opened, _ = gates(x)
    return x * opened


@triton.jit
def gelu_slope(x):
    """∂y/∂x, float32."""
    opened, closed = gates(x)
    return opened + x * opened * closed * ((x * x * (3 * CUBIC) + 1) * TWICE_ROOT)


@triton.jit
def columns_of_row(K: tl.constexpr, BLOCK: tl.constexpr):
    """Offsets of the program's columns, and which of them exist."""
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    return tl.program_id(0).to(tl.int64) * K + column, column < K


@triton.jit
def forward_kernel(x, output, K: tl.constexpr, BLOCK: tl.constexpr):
    """y."""
    offset, inside = columns_of_row(K, BLOCK)
    value = tl.load(x + offset, mask=inside, other=0.0).to(tl.float32)
    tl.store(output + offset, gelu(value).to(output.dtype.element_ty), mask=inside)


@triton.jit
def backward_kernel(upstream, x, output, K: tl.constexpr, BLOCK: tl.constexpr):
    """∂/∂x = upstream·∂y/∂x."""
    offset, inside = columns_of_row(K, BLOCK)
    arriving = tl.load(upstream + offset, mask=inside, other=0.0).to(tl.float32)
    value = tl.load(x + offset, mask=inside, other=0.0).to(tl.float32)
    tl.store(output + offset, (arriving * gelu_slope(value)).to(output.dtype.element_ty), mask=inside)
