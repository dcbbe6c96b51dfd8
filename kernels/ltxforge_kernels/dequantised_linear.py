"""A linear layer whose frozen weight is stored in few bits and is whole only while a product runs.

What is kept for the backward pass is the stored weight, never the dequantised one, which is made again there.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

# values and scale as stored, and the dtype of the result.
Dequantise = Callable[[Tensor, Tensor, torch.dtype], Tensor]


class DequantisedLinear(torch.autograd.Function):
    """x [..., K] @ dequantised [N, K]ᵀ + bias; differentiable in x alone."""

    @staticmethod
    def forward(
        ctx: torch.autograd.function.FunctionCtx,
        x: Tensor,
        values: Tensor,
        scale: Tensor,
        bias: Tensor | None,
        dequantise: Dequantise,
    ) -> Tensor:
        ctx.save_for_backward(values, scale)
        ctx.dequantise = dequantise
        return F.linear(x, dequantise(values, scale, x.dtype), None if bias is None else bias.to(x.dtype))

    @staticmethod
    def backward(ctx: torch.autograd.function.FunctionCtx, upstream: Tensor) -> tuple[Tensor | None, ...]:
        values, scale = ctx.saved_tensors
        of_x = upstream @ ctx.dequantise(values, scale, upstream.dtype) if ctx.needs_input_grad[0] else None
        return of_x, None, None, None, None
