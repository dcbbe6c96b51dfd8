"""Triton kernels of flow matching: noising, the loss's residual with its partial sums, their sum, and the gradient.

One program holds TOKENS whole tokens of one sample, WIDTH = the power of two at or above C wide. Tensors [B, T, C] are
contiguous; sigma and weight are [B, T] by two strides, of which the token's is 0 where a sample has one value.
Counts of tokens are never specialised on: another length of video compiles nothing anew.
"""

import triton
import triton.language as tl


@triton.jit
def tile(tokens, C: tl.constexpr, TOKENS: tl.constexpr, WIDTH: tl.constexpr):
    """Sample, token numbers [TOKENS], which of them exist, offsets [TOKENS, WIDTH], and which of those exist."""
    sample = tl.program_id(1).to(tl.int64)
    token = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)
    channel = tl.arange(0, WIDTH)
    exists = token < tokens
    offset = (sample * tokens + token)[:, None] * C + channel[None, :]
    return sample, token, exists, offset, exists[:, None] & (channel < C)[None, :]


@triton.jit(do_not_specialize=["tokens", "sigma_sample_stride", "sigma_token_stride"])
def noise_kernel(
    latents,
    draws,
    sigma,
    output,
    tokens,
    sigma_sample_stride,
    sigma_token_stride,
    C: tl.constexpr,
    TOKENS: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """(1 − σ)·x0 + σ·ε, each product and the sum rounded as PyTorch does: no fused multiply-add."""
    sample, token, exists, offset, inside = tile(tokens, C, TOKENS, WIDTH)
    where = sigma + sample * sigma_sample_stride + token * sigma_token_stride
    level = tl.load(where, mask=exists, other=0.0).to(tl.float32)[:, None]
    clean = tl.load(latents + offset, mask=inside, other=0.0).to(tl.float32)
    drawn = tl.load(draws + offset, mask=inside, other=0.0).to(tl.float32)
    mixed = (1 - level) * clean + level * drawn
    tl.store(output + offset, mixed.to(output.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["tokens", "weight_sample_stride", "weight_token_stride"])
def residual_kernel(
    prediction,
    latents,
    draws,
    weight,
    residual,
    partial_sums,
    partial_weights,
    tokens,
    weight_sample_stride,
    weight_token_stride,
    C: tl.constexpr,
    KEEP: tl.constexpr,
    TOKENS: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """Σ w·r² and Σ w of the program's tokens, r = prediction − (ε − x0); with KEEP, w·r for the gradient."""
    sample, token, exists, offset, inside = tile(tokens, C, TOKENS, WIDTH)
    where = weight + sample * weight_sample_stride + token * weight_token_stride
    counted = tl.load(where, mask=exists, other=0.0).to(tl.float32)
    clean = tl.load(latents + offset, mask=inside, other=0.0).to(tl.float32)
    drawn = tl.load(draws + offset, mask=inside, other=0.0).to(tl.float32)
    predicted = tl.load(prediction + offset, mask=inside, other=0.0).to(tl.float32)
    difference = predicted - (drawn - clean)
    weighted = counted[:, None] * difference
    if KEEP:
        tl.store(residual + offset, weighted, mask=inside)
    part = sample * tl.num_programs(0) + tl.program_id(0)
    tl.store(partial_sums + part, tl.sum(tl.sum(weighted * difference, 1), 0))
    tl.store(partial_weights + part, tl.sum(counted, 0))


@triton.jit(do_not_specialize=["parts"])
def finish_kernel(partial_sums, partial_weights, loss, scale, parts, C: tl.constexpr, PARTS: tl.constexpr):
    """One program per sample adds its parts in a fixed order: loss, and the scale 1 / (C·max(Σ w, 1)) of both."""
    sample = tl.program_id(0).to(tl.int64)
    squares = tl.zeros((PARTS,), tl.float32)
    weights = tl.zeros((PARTS,), tl.float32)
    for first in range(0, parts, PARTS):
        part = first + tl.arange(0, PARTS)
        squares += tl.load(partial_sums + sample * parts + part, mask=part < parts, other=0.0)
        weights += tl.load(partial_weights + sample * parts + part, mask=part < parts, other=0.0)
    each = 1.0 / (C * tl.maximum(tl.sum(weights, 0), 1.0))
    tl.store(scale + sample, each)
    tl.store(loss + sample, tl.sum(squares, 0) * each)


@triton.jit(do_not_specialize=["tokens"])
def gradient_kernel(
    residual,
    scale,
    upstream,
    output,
    tokens,
    C: tl.constexpr,
    TOKENS: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """∂/∂prediction = 2·w·r·scale·upstream, rounded once, to the prediction's dtype."""
    sample, _, _, offset, inside = tile(tokens, C, TOKENS, WIDTH)
    factor = 2.0 * tl.load(scale + sample) * tl.load(upstream + sample).to(tl.float32)
    kept = tl.load(residual + offset, mask=inside, other=0.0)
    tl.store(output + offset, (kept * factor).to(output.dtype.element_ty), mask=inside)
