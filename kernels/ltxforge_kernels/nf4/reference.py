"""NF4 in plain PyTorch: the definition, which is bitsandbytes' own to the bit.

Blocks are scaled and values rounded in float32, whatever dtype the weight or the result has.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import linear

from ltxforge_kernels.nf4.double import expand, in_blocks
from ltxforge_kernels.nf4.tables import midpoints, nf4_map
from ltxforge_kernels.nf4.weight import Nf4Weight, keep_weight, kept_weight

# What an all-zero block is divided by.
SMALLEST = 1e-38


def pack(weight: Tensor, blocksize: int) -> tuple[Tensor, Tensor]:
    """Codes uint8 [⌈N·K/2⌉, 1] and absmax float32 [blocks] of a weight [N, K]."""
    flat = weight.flatten().float()
    blocks = in_blocks(flat, blocksize)
    absmax = blocks.abs().amax(dim=1)
    scaled = blocks * (1 / absmax.clamp(min=SMALLEST))[:, None]
    if flat.numel() % blocksize:
        # bitsandbytes divides in a last block that is not full, and keeps its largest value from 0.
        last = absmax[-1:].clamp(min=SMALLEST)
        absmax = torch.cat([absmax[:-1], last])
        scaled = torch.cat([scaled[:-1], blocks[-1:] / last])
    even = flat.numel() + flat.numel() % 2
    codes = torch.bucketize(scaled.flatten()[:even], midpoints(nf4_map(weight.device))).to(torch.uint8)
    return (codes[::2] << 4 | codes[1::2])[:, None], absmax


def block_scales(weight: Nf4Weight) -> Tensor:
    """absmax float32 [blocks], whether or not it is quantised."""
    if not weight.double:
        return weight.absmax
    nested = (weight.nested_absmax, weight.nested_quant_map, weight.nested_offset)
    return expand(weight.absmax, *nested, weight.nested_blocksize)


def dequantise(weight: Nf4Weight, dtype: torch.dtype) -> Tensor:
    """[N, K]: each code's value times its block's absmax, rounded once more to the dtype."""
    rows, columns = weight.shape
    high, low = weight.packed.flatten() >> 4, weight.packed.flatten() & 15
    codes = torch.stack([high, low], dim=1).flatten()[: rows * columns]
    blocks = in_blocks(weight.quant_map[codes.int()], weight.blocksize)
    values = blocks * block_scales(weight)[:, None]
    return values.flatten()[: rows * columns].reshape(rows, columns).to(dtype)


class Linear(torch.autograd.Function):
    """x·Wᵀ + b that keeps the packed weight for its gradient, never the one that it multiplies with.

    Without `setup_context`: torch.compile (2.13) would count `weight` as one argument where nothing wants a gradient.
    """

    @staticmethod
    def forward(ctx: torch.autograd.function.FunctionCtx, x: Tensor, bias: Tensor | None, *weight: object) -> Tensor:
        keep_weight(ctx, weight)
        return linear(x, dequantise(Nf4Weight.of(weight), x.dtype), bias)

    @staticmethod
    def backward(ctx: torch.autograd.function.FunctionCtx, upstream: Tensor) -> tuple[Tensor | None, ...]:
        weight = kept_weight(ctx)
        of_x = upstream @ dequantise(weight, upstream.dtype) if ctx.needs_input_grad[0] else None
        of_bias = upstream.sum_to_size(upstream.shape[-1:]) if ctx.needs_input_grad[1] else None
        return of_x, of_bias, *(None for _ in weight.arguments)


def nf4_linear(x: Tensor, weight: Nf4Weight, bias: Tensor | None) -> Tensor:
    """[..., N]; arguments as in the op."""
    return Linear.apply(x, bias, *weight.arguments)
