"""Launches of the int8 products: what is allocated, which blocks, and the torch.library ops with fakes and gradients.

Results that an op does not need are empty tensors, since an op's outputs are always tensors.
"""

from __future__ import annotations

import torch
import triton
from torch import Tensor

from ltxforge_kernels.configurations import configuration
from ltxforge_kernels.dequantised_linear import DequantisedLinear
from ltxforge_kernels.int8 import kernel
from ltxforge_kernels.target import architecture, launching_on

# Codes are those of the reference to the bit; products may fuse.
EXACT, FUSED = {"enable_fp_fusion": False}, {"enable_fp_fusion": True}


def int8_linear(x: Tensor, values: Tensor, scale: Tensor, bias: Tensor | None) -> Tensor:
    """The op's `int8_linear` on a GPU: our dequantising, PyTorch's product."""
    return DequantisedLinear.apply(x, values, scale, bias, dequantise_op)


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
    """The op's `w8a8_lora_linear` on a GPU, for x [M, K]."""
    return forward_op(x, values, column_scale, bias, a, b, scale, kept)[0]


def launch_quantise(x: Tensor, factor: Tensor | None) -> tuple[Tensor, Tensor]:
    """x [M, K]·factor [K] as codes int8 [M, K] and scale float32 [M]."""
    rows, width = x.shape
    codes = torch.empty((rows, width), dtype=torch.int8, device=x.device)
    scale = x.new_empty(rows, dtype=torch.float32)
    if rows:
        chosen = configuration("int8.quantise", architecture(x), x.dtype, width).options()
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
        chosen = configuration("int8.dequantise", architecture(values), dtype, width).options()
        grid = (triton.cdiv(width, chosen["COLUMNS"]), triton.cdiv(outputs, chosen["ROWS"]))
        with launching_on(values):
            kernel.dequantise_kernel[grid](
                values.contiguous(), scale.contiguous(), output, outputs, width, **chosen, **EXACT
            )
    return output


def launch_product(
    name: str,
    x: Tensor,
    row_scale: Tensor,
    w: Tensor,
    column_scale: Tensor | None,
    bias: Tensor | None,
    lora: tuple[Tensor, Tensor] | None,
    kept: Tensor | None,
    dtype: torch.dtype,
) -> Tensor:
    """[M, N] of codes x [M, K] and w [K, N]; `lora` is h [M, R] and its other factor [R, N]. See the kernel."""
    rows, inner = x.shape
    outputs = w.shape[1]
    output = torch.empty((rows, outputs), dtype=dtype, device=x.device)
    if output.numel() == 0:
        return output
    h, factor = lora or (None, None)
    strides = (w.stride(1), w.stride(0), *((factor.stride(1), factor.stride(0)) if lora else (0, 0)))
    chosen = configuration(f"int8.{name}", architecture(x), dtype, outputs).options()
    grid = (triton.cdiv(rows, chosen["BM"]) * triton.cdiv(outputs, chosen["BN"]),)
    with launching_on(x):
        kernel.product_kernel[grid](
            x,
            w,
            row_scale,
            None if column_scale is None else column_scale.contiguous(),
            None if bias is None else bias.contiguous(),
            h,
            factor,
            as_bytes(kept if lora else None),
            output,
            rows,
            outputs,
            inner,
            *strides,
            **rank_options(h),
            HAS_COLUMN_SCALE=column_scale is not None,
            HAS_BIAS=bias is not None,
            HAS_LORA=lora is not None,
            HAS_KEPT=lora is not None and kept is not None,
            EVEN=inner % chosen["BK"] == 0,
            **chosen,
            **FUSED,
        )
    return output


def launch_project(
    x: Tensor, row_scale: Tensor, kept: Tensor | None, factor: Tensor, scale: float, plain_too: bool
) -> tuple[Tensor | None, Tensor]:
    """scale·x @ factor [M, R], if asked for, and the same times row_scale [M]; x [M, K] codes or values."""
    rows, inner = x.shape
    shape = (rows, factor.shape[1])
    plain = torch.empty(shape, dtype=factor.dtype, device=x.device) if plain_too else None
    scaled = torch.empty(shape, dtype=factor.dtype, device=x.device)
    if scaled.numel() == 0:
        return plain, scaled
    chosen = configuration("int8.project", architecture(x), factor.dtype, inner).options()
    with launching_on(x):
        kernel.project_kernel[(triton.cdiv(rows, chosen["BM"]),)](
            x,
            row_scale,
            as_bytes(kept),
            factor,
            plain,
            scaled,
            scale,
            rows,
            inner,
            *factor.stride(),
            **rank_options(scaled),
            HAS_PLAIN=plain_too,
            HAS_KEPT=kept is not None,
            **chosen,
            **FUSED,
        )
    return plain, scaled


def launch_over_tokens(h: Tensor, x: Tensor, kept: Tensor | None) -> Tensor:
    """hᵀ @ x as float32 [R, K], of h [M, R] and x [M, K], codes or values. Parts are added in their order."""
    rows, width = x.shape
    rank = h.shape[1]
    if rows == 0:
        return x.new_zeros((rank, width), dtype=torch.float32)
    chosen = configuration("int8.over_tokens", architecture(x), h.dtype, width).options()
    parts = chosen.pop("PARTS")
    partial = x.new_empty((parts, rank, width), dtype=torch.float32)
    each = triton.cdiv(triton.cdiv(rows, chosen["BM"]), parts) * chosen["BM"]
    options = {**rank_options(h), "HAS_KEPT": kept is not None, **chosen, **FUSED}
    with launching_on(x):
        kernel.over_tokens_kernel[(triton.cdiv(width, chosen["BK"]), parts)](
            h, x, as_bytes(kept), partial, rows, each, width, **options
        )
    return partial.sum(dim=0)


def launch_forward(
    x: Tensor,
    values: Tensor,
    column_scale: Tensor,
    bias: Tensor | None,
    a: Tensor | None,
    b: Tensor | None,
    scale: float,
    kept: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """y [M, N], x's codes [M, K] and scale [M], and h [M, R] in x's dtype, of rank 0 without a LoRA."""
    codes, row_scale = launch_quantise(x, None)
    h, lora = x.new_empty((x.shape[0], 0)), None
    if a is not None:
        _, h = launch_project(codes, row_scale, kept, a.to(x.dtype).t(), scale, plain_too=False)
        lora = (h, b.to(x.dtype).t())
    y = launch_product("forward", codes, row_scale, values.contiguous().t(), column_scale, bias, lora, None, x.dtype)
    return y, codes, row_scale, h


def launch_backward(
    upstream: Tensor,
    values: Tensor,
    column_scale: Tensor,
    a: Tensor | None,
    b: Tensor | None,
    scale: float,
    kept: Tensor | None,
    codes: Tensor,
    row_scale: Tensor,
    h: Tensor,
    of_input: bool,
    of_lora: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """∂/∂x [M, K], ∂/∂A [R, K] and ∂/∂B [N, R], each empty where it is not asked for."""
    upstream, dtype = upstream.contiguous(), upstream.dtype
    of_x, of_a, of_b, of_h = upstream.new_empty(0), upstream.new_empty(0), upstream.new_empty(0), None
    if a is not None:
        of_h, of_h_scaled = launch_project(upstream, row_scale, None, b.to(dtype), scale, plain_too=True)
    if of_input:
        folded = launch_quantise(upstream, column_scale)
        lora = None if a is None else (of_h, a.to(dtype))
        of_x = launch_product("backward", *folded, values.contiguous(), None, None, lora, kept, dtype)
    if of_lora:
        of_a = launch_over_tokens(of_h_scaled, codes, kept).to(a.dtype)
        of_b = launch_over_tokens(h, upstream, None).t().contiguous().to(b.dtype)
    return of_x, of_a, of_b


def rank_options(h: Tensor | None) -> dict[str, int]:
    """R, and the rank that tensor cores take: a power of two from 16."""
    rank = 0 if h is None else h.shape[1]
    return {"R": rank, "RANK": max(16, triton.next_power_of_2(rank))}


def as_bytes(kept: Tensor | None) -> Tensor | None:
    """A mask as the kernels read it."""
    return None if kept is None else kept.contiguous().view(torch.uint8)


@torch.library.custom_op("ltxforge::int8_dequantise", mutates_args=())
def dequantise_op(values: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    return launch_dequantise(values, scale, dtype)


@dequantise_op.register_fake
def _(values: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    return values.new_empty(values.shape, dtype=dtype)


@torch.library.custom_op("ltxforge::w8a8_lora_linear", mutates_args=())
def forward_op(
    x: Tensor,
    values: Tensor,
    column_scale: Tensor,
    bias: Tensor | None,
    a: Tensor | None,
    b: Tensor | None,
    scale: float,
    kept: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return launch_forward(x, values, column_scale, bias, a, b, scale, kept)


@forward_op.register_fake
def _(
    x: Tensor,
    values: Tensor,
    column_scale: Tensor,
    bias: Tensor | None,
    a: Tensor | None,
    b: Tensor | None,
    scale: float,
    kept: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    rows, rank = x.shape[0], 0 if a is None else a.shape[0]
    return (
        x.new_empty((rows, values.shape[0])),
        x.new_empty(x.shape, dtype=torch.int8),
        x.new_empty(rows, dtype=torch.float32),
        x.new_empty((rows, rank)),
    )


@torch.library.custom_op("ltxforge::w8a8_lora_linear_backward", mutates_args=())
def backward_op(
    upstream: Tensor,
    values: Tensor,
    column_scale: Tensor,
    a: Tensor | None,
    b: Tensor | None,
    scale: float,
    kept: Tensor | None,
    codes: Tensor,
    row_scale: Tensor,
    h: Tensor,
    of_input: bool,
    of_lora: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    kept_for = (values, column_scale, a, b, scale, kept, codes, row_scale, h)
    return launch_backward(upstream, *kept_for, of_input, of_lora)


@backward_op.register_fake
def _(
    upstream: Tensor,
    values: Tensor,
    column_scale: Tensor,
    a: Tensor | None,
    b: Tensor | None,
    scale: float,
    kept: Tensor | None,
    codes: Tensor,
    row_scale: Tensor,
    h: Tensor,
    of_input: bool,
    of_lora: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    empty = (upstream.new_empty(0), upstream.new_empty(0))
    of_x = upstream.new_empty(codes.shape) if of_input else upstream.new_empty(0)
    return of_x, *(empty if not of_lora else (a.new_empty(a.shape), b.new_empty(b.shape)))


def keep_for_gradient(ctx: torch.autograd.function.FunctionCtx, inputs: tuple, output: tuple) -> None:
    _, values, column_scale, _, a, b, ctx.scale, kept = inputs
    _, codes, row_scale, h = output
    ctx.mark_non_differentiable(codes, row_scale, h)
    ctx.save_for_backward(values, column_scale, a, b, kept, codes, row_scale, h)


def gradient(ctx: torch.autograd.function.FunctionCtx, upstream: Tensor, *_: None) -> tuple[Tensor | None, ...]:
    values, column_scale, a, b, kept, codes, row_scale, h = ctx.saved_tensors
    of_input, of_a, of_b = (ctx.needs_input_grad[position] for position in (0, 4, 5))
    given = (upstream, values, column_scale, a, b, ctx.scale, kept, codes, row_scale, h)
    results = backward_op(*given, of_input, of_a or of_b)
    x, lora_a, lora_b = (
        result if asked else None for result, asked in zip(results, (of_input, of_a, of_b), strict=True)
    )
    return x, None, None, None, lora_a, lora_b, None, None


forward_op.register_autograd(gradient, setup_context=keep_for_gradient)
