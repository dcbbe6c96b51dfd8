"""The harness itself catches what it is for: kernels with each mistake, written for it."""

from __future__ import annotations

import pytest
import torch
import triton
import triton.language as tl
from closeness import BF16_ROUNDING, relative_error

pytestmark = pytest.mark.skipif(not triton.knobs.runtime.interpret, reason="about the interpreter")


@triton.jit
def add_one(source, output, count, LOAD_MASKED: tl.constexpr, STORE_ALL: tl.constexpr, BLOCK: tl.constexpr):
    index = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    values = tl.load(source + index, mask=index < count) if LOAD_MASKED else tl.load(source + index)
    written = index < count if STORE_ALL else index < count - 1
    tl.store(output + index, (values.to(tl.float32) + 1).to(output.dtype.element_ty), mask=written)


@triton.jit
def add_in_bf16(source, output, BLOCK: tl.constexpr):
    index = tl.arange(0, BLOCK)
    tl.store(output + index, tl.load(source + index) + tl.load(source + index))


@triton.jit
def multiply(a, b, output, SIZE: tl.constexpr):
    row, column = tl.arange(0, SIZE)[:, None], tl.arange(0, SIZE)[None, :]
    product = tl.dot(tl.load(a + row * SIZE + column), tl.load(b + row * SIZE + column))
    tl.store(output + row * SIZE + column, product.to(output.dtype.element_ty))


def run(source, **flags):
    output = torch.empty_like(source)
    add_one[(1,)](source, output, source.numel(), BLOCK=128, **flags)
    return output


def test_a_right_kernel_passes():
    source = torch.randn(100)
    assert torch.equal(run(source, LOAD_MASKED=True, STORE_ALL=True), source + 1)


def test_a_missing_mask_is_found():
    with pytest.raises(Exception, match=r"load: 28 lanes out of bounds, the first \+0 bytes from the end"):
        run(torch.randn(100), LOAD_MASKED=False, STORE_ALL=True)


def test_an_element_that_nobody_writes_is_nan():
    output = run(torch.randn(100), LOAD_MASKED=True, STORE_ALL=False)
    assert output.isnan().tolist() == [False] * 99 + [True]
    assert not relative_error(output, torch.ones(100)) < 1


def test_bf16_casts_round_as_torch_does():
    source = torch.randn(128).to(torch.bfloat16)
    assert torch.equal(run(source, LOAD_MASKED=True, STORE_ALL=True), (source.float() + 1).to(torch.bfloat16))


def test_bf16_arithmetic_is_refused():
    source = torch.randn(64).to(torch.bfloat16)
    with pytest.raises(Exception, match="bf16 arithmetic in a kernel"):
        add_in_bf16[(1,)](source, torch.empty_like(source), BLOCK=64)


def test_bf16_products_are_right():
    a, b = (torch.randn(64, 64).to(torch.bfloat16) for _ in range(2))
    output = torch.empty_like(a)
    multiply[(1,)](a, b, output, SIZE=64)
    assert relative_error(output, a.double() @ b.double()) <= BF16_ROUNDING
