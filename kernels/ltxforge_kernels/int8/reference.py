"""Int8 products in plain PyTorch: the definition, with exact integer sums and everything else in float32.

Rounding has no derivative, so the backward pass of W8A8 is a definition too, and not autograd's of the forward.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ltxforge_kernels.dequantised_linear import DequantisedLinear
from ltxforge_kernels.int8.weight import quantise_rows
from ltxforge_kernels.precision import at_least_float32
from ltxforge_kernels.scaled_rows import dequantise_rows


def int8_linear(x: Tensor, values: Tensor, scale: Tensor, bias: Tensor | None) -> Tensor:
    """[..., N]; arguments as in the op."""
    return DequantisedLinear.apply(x, values, scale, bias, dequantise_rows)


def w8a8_lora_linear(
    x: Tensor,
    values: Tensor,
    column_scale: Tensor,
    bias: Tensor | None,
    a: Tensor | None,
    b: Tensor | None,
    scale: float,
    kept: Tensor | None,
) -> Tensor:
    """[M, N] of x [M, K]; other arguments as in the op, `scale` with 1 / keep in it."""
    return W8A8LoraLinear.apply(x, values, column_scale, bias, a, b, scale, kept)


class W8A8LoraLinear(torch.autograd.Function):
    """Keeps x as int8 with its scales, the mask, and h [M, R]."""

    @staticmethod
    def forward(
        ctx: torch.autograd.function.FunctionCtx,
        x: Tensor,
        values: Tensor,
        column_scale: Tensor,
        bias: Tensor | None,
        a: Tensor | None,
        b: Tensor | None,
        scale: float,
        kept: Tensor | None,
    ) -> Tensor:
        wide = at_least_float32(x).dtype
        codes, row_scale = quantise_rows(x)
        y = exact_product(codes, values.t()).to(wide) * row_scale.to(wide)[:, None] * column_scale.to(wide)
        h = None
        if a is not None:
            h = (dropped(codes, kept).to(wide) @ rounded(a, x).t()) * (row_scale.to(wide) * scale)[:, None]
            y = y + h @ rounded(b, x).t()
        if bias is not None:
            y = y + bias
        ctx.save_for_backward(codes, row_scale, values, column_scale, a, b, kept, h)
        ctx.scale = scale
        return y.to(x.dtype)

    @staticmethod
    def backward(ctx: torch.autograd.function.FunctionCtx, upstream: Tensor) -> tuple[Tensor | None, ...]:
        codes, row_scale, values, column_scale, a, b, kept, h = ctx.saved_tensors
        wide = at_least_float32(upstream)
        of_x = of_a = of_b = of_h = None
        if a is not None:
            of_h = (wide @ rounded(b, upstream)) * ctx.scale
        if ctx.needs_input_grad[0]:
            folded, folded_scale = quantise_rows(upstream, column_scale)
            of_x = exact_product(folded, values).to(wide.dtype) * folded_scale.to(wide.dtype)[:, None]
            if a is not None:
                of_x = of_x + dropped(of_h @ rounded(a, upstream), kept)
            of_x = of_x.to(upstream.dtype)
        if ctx.needs_input_grad[4]:
            of_a = ((of_h * row_scale[:, None]).t() @ dropped(codes, kept).to(wide.dtype)).to(a.dtype)
        if ctx.needs_input_grad[5]:
            of_b = (wide.t() @ h).to(b.dtype)
        return of_x, None, None, None, of_a, of_b, None, None


def rounded(factor: Tensor, like: Tensor) -> Tensor:
    """A or B as the products see it: rounded to the dtype of the activations, in the precision of the reference."""
    return at_least_float32(factor.to(like.dtype))


def dropped(values: Tensor, kept: Tensor | None) -> Tensor:
    """Values with zeros where the mask says so."""
    return values if kept is None else values * kept


def exact_product(left: Tensor, right: Tensor) -> Tensor:
    """left [M, K] @ right [K, N], both int8, as int32 [M, N].

    On CUDA `_int_mm` wants more than 16 rows, and K and N in multiples of 8: padded with zeros there, and cut again.
    """
    if not left.is_cuda:
        return torch._int_mm(left, right)
    rows, columns = left.shape[0], right.shape[1]
    more_rows, more_inner, more_columns = max(0, 17 - rows), -left.shape[1] % 8, -columns % 8
    left = F.pad(left, (0, more_inner, 0, more_rows))
    return torch._int_mm(left, F.pad(right, (0, more_columns, 0, more_inner)))[:rows, :columns]
