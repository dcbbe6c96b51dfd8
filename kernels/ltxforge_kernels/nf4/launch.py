"""Launches of NF4: what is allocated, which blocks, when the small product holds, and the torch.library ops.

A launch writes into memory that it is given, where it is given some, so that a streamer can keep two of them.
"""

from __future__ import annotations

import math

import torch
import triton
from torch import Tensor
from torch.nn.functional import linear

from ltxforge_kernels.configurations import configuration
from ltxforge_kernels.nf4 import kernel
from ltxforge_kernels.nf4.reference import SMALLEST
from ltxforge_kernels.nf4.tables import midpoints, nf4_map
from ltxforge_kernels.nf4.weight import Nf4Weight, block_count, keep_weight, kept_weight, packed_size
from ltxforge_kernels.target import architecture, launching_on

# Triton 3.10 changes the default. A nested scale's product and sum are rounded apart.
UNFUSED = {"enable_fp_fusion": False}
# Up to here the weight is unpacked inside the product, beyond it into memory for cuBLAS. A hypothesis that no GPU has
# measured: with one tile of tokens each weight is still unpacked once; the crossover is expected at 128 to 256.
SMALL_PRODUCT_TOKENS = 128


def pack(weight: Tensor, blocksize: int) -> tuple[Tensor, Tensor]:
    """The op on a GPU."""
    return pack_op(weight, blocksize)


def dequantise(weight: Nf4Weight, dtype: torch.dtype) -> Tensor:
    """The op on a GPU."""
    return unpack_op(dtype, *weight.arguments)


def nf4_linear(x: Tensor, weight: Nf4Weight, bias: Tensor | None) -> Tensor:
    """The op on a GPU."""
    return linear_op(x, bias, *weight.arguments)


def launch_pack(weight: Tensor, blocksize: int) -> tuple[Tensor, Tensor]:
    """Codes uint8 [⌈N·K/2⌉, 1] and absmax float32 [blocks] of a weight [N, K]."""
    weight = weight.contiguous()
    blocks = block_count(weight.shape, blocksize)
    packed = weight.new_empty((packed_size(weight.shape), 1), dtype=torch.uint8)
    absmax = weight.new_empty((blocks,), dtype=torch.float32)
    if blocks == 0:
        return packed, absmax
    chosen = configuration("nf4.pack", architecture(weight), weight.dtype, blocksize).options()
    elements = chosen.pop("ELEMENTS")
    chosen["BLOCKS"] = max(1, elements // blocksize)
    bounds = midpoints(nf4_map(weight.device))
    with launching_on(weight):
        kernel.pack_kernel[(triton.cdiv(blocks, chosen["BLOCKS"]),)](
            weight,
            bounds,
            packed,
            absmax,
            weight.numel(),
            packed.numel(),
            BLOCKSIZE=blocksize,
            ENDS_FULL=weight.numel() % blocksize == 0,
            SMALLEST=SMALLEST,
            **chosen,
            **UNFUSED,
        )
    return packed, absmax


def launch_unpack(
    weight: Nf4Weight, dtype: torch.dtype, out: Tensor | None = None, *, gather: bool | None = None
) -> Tensor:
    """[N, K] of the dtype, in `out` where that is given: contiguous, of this shape and dtype.

    `gather` says how codes are looked up, where the table of configurations is not to: for the bench.
    """
    if out is None:
        out = weight.packed.new_empty(weight.shape, dtype=dtype)
    elif tuple(out.shape) != weight.shape or out.dtype != dtype or not out.is_contiguous():
        raise ValueError(f"out is {out.dtype} {list(out.shape)}, not contiguous {dtype} {list(weight.shape)}")
    if out.numel() == 0:
        return out
    chosen = configuration("nf4.unpack", architecture(out), dtype, weight.blocksize).options()
    chosen["GATHER"] = chosen["GATHER"] if gather is None else int(gather)
    # Whole blocks, the widest of which are 4096 elements.
    chosen["BYTES"] = max(chosen["BYTES"], weight.blocksize // 2)
    with launching_on(out):
        kernel.unpack_kernel[(triton.cdiv(weight.packed.numel(), chosen["BYTES"]),)](
            *sources(weight), out, out.numel(), weight.packed.numel(), **format_of(weight), **chosen, **UNFUSED
        )
    return out


def launch_small_product(x: Tensor, weight: Nf4Weight, bias: Tensor | None) -> Tensor:
    """x·Wᵀ + b [T, N] for few tokens x [T, K], the weight unpacked on the way; see `fits_small_product`."""
    x = x.contiguous()
    rows, depth = weight.shape
    output = x.new_empty((x.shape[0], rows))
    if output.numel() == 0:
        return output
    chosen = configuration("nf4.small_product", architecture(x), x.dtype, depth).options()
    chosen["DEPTH"] = min(chosen["DEPTH"], depth & -depth)
    grid = (triton.cdiv(rows, chosen["ROWS"]), triton.cdiv(x.shape[0], chosen["TOKENS"]))
    with launching_on(x):
        kernel.small_product_kernel[grid](
            x,
            *sources(weight),
            bias,
            output,
            x.shape[0],
            rows,
            depth,
            HAS_BIAS=bias is not None,
            **format_of(weight),
            **chosen,
            **UNFUSED,
        )
    return output


def launch_linear(x: Tensor, weight: Nf4Weight, bias: Tensor | None) -> Tensor:
    """x·Wᵀ + b [..., N]."""
    if fits_small_product(x, weight):
        product = launch_small_product(x.reshape(-1, x.shape[-1]), weight, bias)
        return product.reshape(*x.shape[:-1], weight.shape[0])
    return linear(x, launch_unpack(weight, x.dtype), bias)


def fits_small_product(x: Tensor, weight: Nf4Weight) -> bool:
    """Few tokens of 16 bits, and blocks that end where rows do."""
    depth = weight.shape[1]
    tokens = math.prod(x.shape[:-1])
    aligned = depth > 0 and depth % max(weight.blocksize, 64) == 0
    return aligned and tokens <= SMALL_PRODUCT_TOKENS and x.dtype in (torch.bfloat16, torch.float16)


def sources(weight: Nf4Weight) -> tuple[Tensor | None, ...]:
    """What a kernel reads of a weight, in its order."""
    nested = (weight.nested_absmax, weight.nested_quant_map, weight.nested_offset)
    parts = (weight.packed, weight.absmax, weight.quant_map, *nested)
    return tuple(None if part is None else part.contiguous() for part in parts)


def format_of(weight: Nf4Weight) -> dict[str, int]:
    return {"BLOCKSIZE": weight.blocksize, "DOUBLE": weight.double, "NESTED_BLOCKSIZE": weight.nested_blocksize}


# A weight's fields, in `Nf4Weight`'s order.
WEIGHT = (
    "Tensor packed, Tensor absmax, Tensor quant_map, int blocksize, int[] shape, ScalarType dtype, "
    "Tensor? nested_absmax, Tensor? nested_quant_map, Tensor? nested_offset, int nested_blocksize"
)


@torch.library.custom_op("ltxforge::nf4_pack", mutates_args=())
def pack_op(weight: Tensor, blocksize: int) -> tuple[Tensor, Tensor]:
    return launch_pack(weight, blocksize)


@pack_op.register_fake
def _(weight: Tensor, blocksize: int) -> tuple[Tensor, Tensor]:
    packed = weight.new_empty((packed_size(weight.shape), 1), dtype=torch.uint8)
    return packed, weight.new_empty((block_count(weight.shape, blocksize),), dtype=torch.float32)


@torch.library.custom_op("ltxforge::nf4_unpack", mutates_args=(), schema=f"(ScalarType to, {WEIGHT}) -> Tensor")
def unpack_op(to: torch.dtype, *weight: object) -> Tensor:
    return launch_unpack(Nf4Weight.of(weight), to)


@unpack_op.register_fake
def _(to: torch.dtype, *weight: object) -> Tensor:
    return weight[0].new_empty(weight[4], dtype=to)


@torch.library.custom_op(
    "ltxforge::nf4_linear", mutates_args=(), schema=f"(Tensor x, Tensor? bias, {WEIGHT}) -> Tensor"
)
def linear_op(x: Tensor, bias: Tensor | None, *weight: object) -> Tensor:
    return launch_linear(x, Nf4Weight.of(weight), bias)


@linear_op.register_fake
def _(x: Tensor, bias: Tensor | None, *weight: object) -> Tensor:
    return x.new_empty((*x.shape[:-1], weight[4][0]))


@torch.library.custom_op(
    "ltxforge::nf4_linear_backward", mutates_args=(), schema=f"(Tensor upstream, {WEIGHT}) -> Tensor"
)
def backward_op(upstream: Tensor, *weight: object) -> Tensor:
    return upstream @ launch_unpack(Nf4Weight.of(weight), upstream.dtype)


@backward_op.register_fake
def _(upstream: Tensor, *weight: object) -> Tensor:
    return upstream.new_empty((*upstream.shape[:-1], weight[4][1]))


def keep_for_gradient(ctx: torch.autograd.function.FunctionCtx, inputs: tuple, output: Tensor) -> None:
    keep_weight(ctx, inputs[2:])


def gradient(ctx: torch.autograd.function.FunctionCtx, upstream: Tensor) -> tuple[Tensor | None, ...]:
    weight = kept_weight(ctx).arguments
    of_x = backward_op(upstream, *weight) if ctx.needs_input_grad[0] else None
    of_bias = upstream.sum_to_size(upstream.shape[-1:]) if ctx.needs_input_grad[1] else None
    return of_x, of_bias, *(None for _ in weight)


linear_op.register_autograd(gradient, setup_context=keep_for_gradient)
