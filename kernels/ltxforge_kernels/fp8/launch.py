"""Launches of fp8: our quantising and dequantising, `torch._scaled_mm` for the products, and the torch.library ops.

What `_scaled_mm` wants of its operands is checked here on every device, so that a CPU finds what a GPU would refuse.
"""

from __future__ import annotations

import torch
import triton
from torch import Tensor

from ltxforge_kernels.configurations import configuration
from ltxforge_kernels.dequantised_linear import DequantisedLinear
from ltxforge_kernels.fp8 import kernel
from ltxforge_kernels.fp8.weight import FP8
from ltxforge_kernels.target import INTERPRETER, architecture, launching_on

# Codes are those of the reference to the bit.
EXACT = {"enable_fp_fusion": False}
# The first chip that converts and multiplies e4m3.
OLDEST_ARCH = 89
MULTIPLE = 16


def stored_linear(x: Tensor, values: Tensor, scale: Tensor, bias: Tensor | None) -> Tensor:
    """A product of the dequantised weight: our dequantising, PyTorch's product."""
    return DequantisedLinear.apply(x, values, scale, bias, dequantise_op)


def fp8_linear(x: Tensor, values: Tensor, scale: Tensor, bias: Tensor | None) -> Tensor:
    """The op's `fp8_linear` on a GPU that multiplies fp8, for x [M, K]."""
    return linear_op(x, values, scale, bias)


def has_fp8(arch: int | str) -> bool:
    """Whether a chip converts to e4m3 by itself."""
    return arch == INTERPRETER or (isinstance(arch, int) and arch >= OLDEST_ARCH)


def launch_quantise(x: Tensor, factor: Tensor | None) -> tuple[Tensor, Tensor]:
    """x [M, K]·factor [K] as codes fp8 [M, K] and scale float32 [M]."""
    rows, width = x.shape
    codes = torch.empty((rows, width), dtype=FP8, device=x.device)
    scale = x.new_empty(rows, dtype=torch.float32)
    if rows:
        chosen = configuration("fp8.quantise", architecture(x), x.dtype, width).options()
        options = {"HAS_FACTOR": factor is not None, "WIDTH": triton.next_power_of_2(width), **chosen, **EXACT}
        factor = None if factor is None else factor.contiguous()
        with launching_on(x):
            kernel.quantise_kernel[(rows,)](x.contiguous(), factor, codes, scale, width, **options)
    return codes, scale


def launch_dequantise(values: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """The weight [N, K] in the dtype."""
    output = torch.empty(values.shape, dtype=dtype, device=values.device)
    if output.numel():
        outputs, width = values.shape
        chosen = configuration("fp8.dequantise", architecture(values), dtype, width).options()
        grid = (triton.cdiv(width, chosen["COLUMNS"]), triton.cdiv(outputs, chosen["ROWS"]))
        bits = values.contiguous().view(torch.uint8)
        with launching_on(values):
            kernel.dequantise_kernel[grid](bits, scale.contiguous(), output, outputs, width, **chosen, **EXACT)
    return output


def launch_linear(x: Tensor, values: Tensor, scale: Tensor, bias: Tensor | None) -> Tensor:
    """y [M, N] in the dtype of x."""
    codes, row_scale = launch_quantise(x, None)
    # What `_scaled_mm` adds is bf16: a bias of more bits is added after.
    fused = bias if bias is not None and bias.dtype == torch.bfloat16 else None
    y = product(codes, row_scale, values.contiguous().t(), scale.contiguous(), fused).to(x.dtype)
    return y if bias is fused else (y + bias).to(x.dtype)


def launch_backward(upstream: Tensor, values: Tensor, scale: Tensor) -> Tensor:
    """∂/∂x [M, K] in the dtype of the gradient [M, N]; the channels' scales go into it before it is quantised."""
    codes, row_scale = launch_quantise(upstream, scale)
    turned = values.t().contiguous().t()
    return product(codes, row_scale, turned, scale.new_ones(values.shape[1]), None).to(upstream.dtype)


def product(left: Tensor, left_scale: Tensor, right: Tensor, right_scale: Tensor, bias: Tensor | None) -> Tensor:
    """(left [M, K]·left_scale [M]) @ (right [K, N]·right_scale [N]) + bias, bf16 [M, N]."""
    require_layout(left, left_scale, right, right_scale)
    if left.shape[0] == 0:
        return left.new_empty((0, right.shape[1]), dtype=torch.bfloat16)
    return torch._scaled_mm(
        left,
        right,
        scale_a=left_scale[:, None],
        scale_b=right_scale[None, :],
        bias=None if bias is None else bias.contiguous(),
        out_dtype=torch.bfloat16,
    )


def require_layout(left: Tensor, left_scale: Tensor, right: Tensor, right_scale: Tensor) -> None:
    """What rowwise `_scaled_mm` takes on a GPU.

    Raises:
        ValueError: an operand that it would refuse there, in its words or in none.
    """
    if left.dtype != FP8 or right.dtype != FP8:
        raise ValueError(f"both operands are {FP8}, not {left.dtype} and {right.dtype}")
    if left.ndim != 2 or right.ndim != 2 or left.shape[1] != right.shape[0]:
        raise ValueError(f"operands are [M, K] and [K, N], not {list(left.shape)} and {list(right.shape)}")
    if right.shape[0] % MULTIPLE or right.shape[1] % MULTIPLE:
        raise ValueError(f"fp8 products want K and N in multiples of {MULTIPLE}, not {list(right.shape)}")
    if left.stride() != (left.shape[1], 1) or right.stride() != (1, right.shape[0]):
        raise ValueError(
            f"the first operand is row-major and the second column-major: {left.stride()}, {right.stride()}"
        )
    for scale, size in ((left_scale, left.shape[0]), (right_scale, right.shape[1])):
        if scale.dtype != torch.float32 or scale.shape != (size,) or not scale.is_contiguous():
            raise ValueError(f"a scale is float32 [{size}] without gaps, not {scale.dtype} {list(scale.shape)}")


@torch.library.custom_op("ltxforge::fp8_dequantise", mutates_args=())
def dequantise_op(values: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    return launch_dequantise(values, scale, dtype)


@dequantise_op.register_fake
def _(values: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    return values.new_empty(values.shape, dtype=dtype)


@torch.library.custom_op("ltxforge::fp8_linear", mutates_args=())
def linear_op(x: Tensor, values: Tensor, scale: Tensor, bias: Tensor | None) -> Tensor:
    return launch_linear(x, values, scale, bias)


@linear_op.register_fake
def _(x: Tensor, values: Tensor, scale: Tensor, bias: Tensor | None) -> Tensor:
    return x.new_empty((x.shape[0], values.shape[0]))


@torch.library.custom_op("ltxforge::fp8_linear_backward", mutates_args=())
def backward_op(upstream: Tensor, values: Tensor, scale: Tensor) -> Tensor:
    return launch_backward(upstream, values, scale)


@backward_op.register_fake
def _(upstream: Tensor, values: Tensor, scale: Tensor) -> Tensor:
    return upstream.new_empty((upstream.shape[0], values.shape[1]))


def keep_for_gradient(ctx: torch.autograd.function.FunctionCtx, inputs: tuple, output: Tensor) -> None:
    _, values, scale, _ = inputs
    ctx.save_for_backward(values, scale)


def gradient(ctx: torch.autograd.function.FunctionCtx, upstream: Tensor) -> tuple[Tensor | None, ...]:
    of_x = backward_op(upstream, *ctx.saved_tensors) if ctx.needs_input_grad[0] else None
    return of_x, None, None, None


linear_op.register_autograd(gradient, setup_context=keep_for_gradient)
