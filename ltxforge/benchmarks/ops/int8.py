"""The bench's view of `int8`: converting, weight-only, and W8A8 with its LoRA. Peers: PyTorch's own products.

The peers of W8A8 quantise x as ours does and are compiled whole, so that what they lack is the epilogue alone: they
rescale apart. They have no backward pass.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from ltxforge_kernels.int8 import Int8Weight, dequantise, int8_linear, w8a8_lora_linear
from ltxforge_kernels.int8.inputs import LORA_SCALE, Inputs, inputs
from ltxforge_kernels.int8.weight import LARGEST, quantise
from torch import Tensor

from ltxforge.benchmarks.ceilings import FP8
from ltxforge.benchmarks.ops.linear import addmm_per_projection, base_alone, product_work
from ltxforge.benchmarks.subject import Bounds, Contender, Subject, Unquantised, Work, compiled
from ltxforge.hardware import torch_dtype
from ltxforge.suites.kernels import KernelCase


@dataclass(frozen=True)
class Stored:
    """An int8 weight alone."""

    values: Tensor
    scale: Tensor


@dataclass(frozen=True)
class LoraInputs(Inputs):
    """Also the LoRA's scale, where the hand-written peer looks for it."""

    scale: float = LORA_SCALE


def dequantise_subject(case: KernelCase, device: torch.device) -> Subject:  # noqa: ARG001
    """A weight [N, K] in bf16 again: a pure convert with a scale for each row."""
    dtype = torch_dtype(case.dtype)

    def ours(implementation: str) -> Contender:
        return Contender(
            lambda given: dequantise(Int8Weight(given.values, given.scale), dtype, implementation=implementation)
        )

    return Subject(
        inputs=lambda fill: Stored(*quantise(fill.normal(case.out, case.width, dtype=dtype))),
        ours=ours,
        work=Work(case.out * (case.width * (1 + dtype.itemsize) + 4)),
        bounds=Bounds(exact=True),
    )


def linear_subject(case: KernelCase, device: torch.device) -> Subject:  # noqa: ARG001
    """Weight-only: x·Wᵀ + bias with W made whole for the product."""

    def ours(implementation: str) -> Contender:
        return Contender(lambda given: int8_linear(given.x, given.quantised, given.bias, implementation=implementation))

    return Subject(
        inputs=lambda fill: _inputs(case, fill, rank=1),
        ours=ours,
        work=product_work(case, weight_bytes=case.width * case.out),
        leaves=("x",),
        peers={"base alone": lambda: Contender(base_alone, is_whole=False)},
        # The truth multiplies the weight that is stored, which bf16 products see rounded to bf16.
        bounds=Bounds(output=2.6e-3, gradient=2.6e-3),
    )


def w8a8_subject(case: KernelCase, device: torch.device) -> Subject:  # noqa: ARG001
    """Int8 products both ways, with scales, bias and LoRA in the epilogue; gradients of x, A and B."""

    def ours(implementation: str) -> Contender:
        def call(given: LoraInputs) -> Tensor:
            lora = (given.a, given.b, given.scale)
            return w8a8_lora_linear(given.x, given.quantised, given.bias, *lora, implementation=implementation)

        return Contender(call)

    return Subject(
        inputs=lambda fill: _inputs(case, fill, rank=case.rank),
        ours=ours,
        work=product_work(case, "int8 matmul", weight_bytes=case.width * case.out),
        leaves=("x", "a", "b"),
        peers={
            "base alone": lambda: Contender(base_alone, is_whole=False),
            "_int_mm and rescale": lambda: _forward_alone(Contender(rescaled_int_mm)),
            "_scaled_mm rowwise": lambda: compiled(
                Contender(scaled_fp8, weight_in_fp8, is_whole=False, has_backward=False)
            ),
            "addmm per projection": lambda: replace(addmm_per_projection(), is_whole=False),
        },
        # A gradient that is quantised falls on the other side of a rounding here and there.
        bounds=Bounds(gradient=6e-3),
        unquantised=Unquantised("w8a8", lambda given: base_alone(given) + _branch(given)),
    )


def _inputs(case: KernelCase, fill: object, rank: int) -> LoraInputs:
    """A and B hold what they are rounded to at use, so that the truth is of the same LoRA."""
    dtype = torch_dtype(case.dtype)
    made = inputs(case.batch * case.tokens, case.width, case.out, rank, fill, dtype)
    fields = {**vars(made), "a": made.a.to(dtype).float(), "b": made.b.to(dtype).float()}
    return LoraInputs(**fields)


def _forward_alone(contender: Contender) -> Contender:
    return compiled(replace(contender, has_backward=False))


def rescaled_int_mm(given: LoraInputs) -> Tensor:
    """x quantised per token, PyTorch's int8 product, int32 written out and rescaled, the LoRA beside it."""
    x, (values, column_scale) = given.x, given.quantised
    row_scale = x.float().abs().amax(1, keepdim=True) / LARGEST
    codes = (x.float() / row_scale).round().to(torch.int8)
    whole = torch._int_mm(codes, values.T).float() * row_scale * column_scale + given.bias
    return whole.to(x.dtype) + _branch(given)


def weight_in_fp8(given: LoraInputs) -> tuple[LoraInputs, Tensor, Tensor]:
    """Also W [N, K] in fp8 with a scale for each row, as it would be stored."""
    weight = given.weight.float()
    column_scale = weight.abs().amax(1, keepdim=True) / FP8
    return given, (weight / column_scale).to(torch.float8_e4m3fn), column_scale.T


def scaled_fp8(prepared: tuple[LoraInputs, Tensor, Tensor]) -> Tensor:
    """x quantised per token, PyTorch's fp8 product, which applies both scales itself; bias and LoRA beside it."""
    given, weight, column_scale = prepared
    x = given.x.float()
    row_scale = x.abs().amax(1, keepdim=True) / FP8
    codes = (x / row_scale).to(torch.float8_e4m3fn)
    whole = torch._scaled_mm(codes, weight.T, row_scale, column_scale, out_dtype=torch.bfloat16)
    return whole + given.bias + _branch(given)


def _branch(given: LoraInputs) -> Tensor:
    dtype = given.x.dtype
    return given.scale * ((given.x @ given.a.to(dtype).T) @ given.b.to(dtype).T)
