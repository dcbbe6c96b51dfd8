"""Fp8 products in plain PyTorch: the definition, codes multiplied and summed in float32 (or float64).

Rounding has no derivative, so the backward pass is a definition too, and not autograd's of the forward.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ltxforge_kernels.dequantised_linear import DequantisedLinear
from ltxforge_kernels.fp8.weight import quantise_rows
from ltxforge_kernels.precision import at_least_float32
from ltxforge_kernels.scaled_rows import dequantise_rows


def stored_linear(x: Tensor, values: Tensor, scale: Tensor, bias: Tensor | None) -> Tensor:
    """[..., N] of x [..., K] as it is: fp8 is how the weight is stored, and no more."""
    return DequantisedLinear.apply(x, values, scale, bias, dequantise_rows)


def fp8_linear(x: Tensor, values: Tensor, scale: Tensor, bias: Tensor | None) -> Tensor:
    """[M, N] of x [M, K]; arguments as in the op."""
    return Fp8Linear.apply(x, values, scale, bias)


class Fp8Linear(torch.autograd.Function):
    """Keeps the weight alone; differentiable in x."""

    @staticmethod
    def forward(
        ctx: torch.autograd.function.FunctionCtx, x: Tensor, values: Tensor, scale: Tensor, bias: Tensor | None
    ) -> Tensor:
        ctx.save_for_backward(values, scale)
        wide = at_least_float32(x).dtype
        codes, row_scale = quantise_rows(x)
        y = (codes.to(wide) @ values.to(wide).t()) * row_scale.to(wide)[:, None] * scale.to(wide)
        return (y if bias is None else y + bias).to(x.dtype)

    @staticmethod
    def backward(ctx: torch.autograd.function.FunctionCtx, upstream: Tensor) -> tuple[Tensor | None, ...]:
        values, scale = ctx.saved_tensors
        of_x = None
        if ctx.needs_input_grad[0]:
            wide = at_least_float32(upstream).dtype
            codes, row_scale = quantise_rows(upstream, scale)
            of_x = ((codes.to(wide) @ values.to(wide)) * row_scale.to(wide)[:, None]).to(upstream.dtype)
        return of_x, None, None, None
