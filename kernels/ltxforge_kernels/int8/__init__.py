"""Frozen weights in int8: weight-only, and W8A8 with scales, bias and LoRA in the product's own epilogue.

    w ≈ q_w·s_w, one scale per output channel         s_w = max_k |w| / 127,  q_w = round(w / s_w)
    int8_linear        y = x·(q_w·s_w)ᵀ + bias
    w8a8_lora_linear   y = (q_x·q_wᵀ)·s_x·s_w + bias + h·Bᵀ,   h = scale·dropout(q_x·s_x)·Aᵀ,  s_x = max_k |x| / 127

W8A8 quantises each token as it comes (LLM.int8, arXiv 2208.07339, without its outliers: `guard` says which layers have
them) and sums int8 products in int32, exactly. Its LoRA sees the same q_x·s_x in forward and backward, so that int8 x
and its scales are all that is kept of x. Backward, with g = ∂/∂y:

    ∂/∂x = (q_g·q_w)·s_g + dropout(scale·g·B·A),  q_g·s_g ≈ g·s_w        ∂/∂A = (scale·g·B)ᵀ·dropout(q_x·s_x)
    ∂/∂B = gᵀ·h

The channels' scales go into g before it is quantised, so that the same int8 weight serves both directions. Letters: M
tokens, K values in, N values out, R rank. Bytes moved beside the operands of a bf16 product: int8_linear reads N·K and
writes 2·N·K; W8A8 reads 2·M·K, writes M·K, and the product reads half of what a bf16 product reads.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ltxforge_kernels.implementations import HAS_TRITON, pick
from ltxforge_kernels.int8 import reference
from ltxforge_kernels.int8.weight import Int8Weight, quantise
from ltxforge_kernels.scaled_rows import dequantise_rows

if HAS_TRITON:
    from ltxforge_kernels.int8 import launch
else:
    launch = None

__all__ = ["Int8Weight", "dequantise", "int8_linear", "quantise", "w8a8_lora_linear"]


def dequantise(w: Int8Weight, dtype: torch.dtype, *, implementation: str) -> Tensor:
    """The weight [N, K] in the dtype, with the same bits in every implementation."""
    return pick(implementation, dequantise_rows, launch and launch.dequantise_op)(*w, dtype)


def int8_linear(x: Tensor, w: Int8Weight, bias: Tensor | None = None, *, implementation: str) -> Tensor:
    """[..., N] in the dtype of x; differentiable in x alone.

    The scale goes into the weight as it is dequantised: scaling the product instead would be as exact, and would read
    and write all of y once more.

    Args:
        x: [..., K].
        w: int8 [N, K].
        bias: [N].
        implementation: "triton", "compile" or "eager", from the plan.
    """
    require_fit(x, w, bias)
    return pick(implementation, reference.int8_linear, launch and launch.int8_linear)(x, *w, bias)


def w8a8_lora_linear(
    x: Tensor,
    w: Int8Weight,
    bias: Tensor | None = None,
    a: Tensor | None = None,
    b: Tensor | None = None,
    scale: float = 1.0,
    kept: Tensor | None = None,
    keep: float = 1.0,
    *,
    implementation: str,
) -> Tensor:
    """[..., N] in the dtype of x; differentiable in x, a and b.

    Args:
        x: [..., K].
        w: int8 [N, K].
        bias: [N].
        a: [R, K], rounded to the dtype of x at use; None without a LoRA, as b.
        b: [N, R].
        scale: of the LoRA, alpha / R.
        kept: bool [..., K], what dropout lets through to the LoRA; None without dropout.
        keep: the probability that a value is kept; unused without `kept`.
        implementation: "triton", "compile" or "eager", from the plan.
    """
    require_fit(x, w, bias)
    require_lora(x, w, a, b, kept, keep)
    rows = x.reshape(-1, x.shape[-1])
    if kept is not None:
        kept, scale = kept.reshape(rows.shape), scale / keep
    linear = pick(implementation, reference.w8a8_lora_linear, launch and launch.w8a8_lora_linear)
    return linear(rows, *w, bias, a, b, scale, kept).reshape(*x.shape[:-1], w.values.shape[0])


def require_fit(x: Tensor, w: Int8Weight, bias: Tensor | None) -> None:
    """Refuse what does not fit together: it is a mistake of the caller."""
    if w.values.dtype != torch.int8 or w.values.ndim != 2 or w.scale.shape != w.values.shape[:1]:
        raise ValueError(f"an int8 weight is [N, K] with scale [N], not {list(w.values.shape)}, {list(w.scale.shape)}")
    outputs, inputs = w.values.shape
    if x.ndim == 0 or x.shape[-1] != inputs:
        raise ValueError(f"x is {list(x.shape)}, not [..., {inputs}]")
    if bias is not None and bias.shape != (outputs,):
        raise ValueError(f"bias is {list(bias.shape)}, not [{outputs}]")


def require_lora(
    x: Tensor, w: Int8Weight, a: Tensor | None, b: Tensor | None, kept: Tensor | None, keep: float
) -> None:
    """As `require_fit`, of the LoRA."""
    if (a is None) != (b is None):
        raise ValueError("a LoRA has both a and b, or neither")
    outputs, inputs = w.values.shape
    if a is not None and (a.ndim != 2 or a.shape[0] == 0 or a.shape[1] != inputs):
        raise ValueError(f"a is {list(a.shape)}, not [R, {inputs}]")
    if b is not None and b.shape != (outputs, a.shape[0]):
        raise ValueError(f"b is {list(b.shape)}, not [{outputs}, {a.shape[0]}]")
    if kept is not None and (kept.shape != x.shape or kept.dtype != torch.bool or not 0 < keep <= 1):
        raise ValueError(f"kept is {kept.dtype} {list(kept.shape)} at {keep}, not bool {list(x.shape)} within (0, 1]")
