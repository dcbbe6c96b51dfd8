"""Frozen weights in fp8 (e4m3) with a scale per row, multiplied as fp8 where a chip can, else dequantised.

    w ≈ q_w·s_w, one scale per output channel        s_w = max_k |w| / 448, q_w rounded to e4m3
    fp8_linear        y = (q_x·q_wᵀ)·s_x·s_w + bias,  s_x = max_k |x| / 448, one per token
    fp8_lora_linear   y + scale·B·A·dropout(x)

NVIDIA chips from sm_89 multiply fp8, by `torch._scaled_mm`; it rounds y to bf16, whatever x is. On other GPUs fp8 is
how a weight is stored, and no more: it is dequantised for each product, and x keeps its precision. A CPU follows the
definition. The LoRA is added after and sees x itself. Formats: arXiv 2209.05433.

Backward, with g = ∂/∂y: ∂/∂x = (q_g·q_w)·s_g with q_g·s_g ≈ g·s_w, a second `_scaled_mm`. It wants its second operand's
columns contiguous, so the codes are copied the other way round, which moves 2 bytes per weight; dequantising for a bf16
product would move 3, for half the rate.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ltxforge_kernels.fp8 import reference
from ltxforge_kernels.fp8.weight import FP8, Fp8Weight, quantise
from ltxforge_kernels.implementations import HAS_TRITON, pick
from ltxforge_kernels.lora_linear import lora_branch
from ltxforge_kernels.scaled_rows import dequantise_rows

if HAS_TRITON:
    from ltxforge_kernels.fp8 import launch
else:
    launch = None

__all__ = [
    "Fp8Weight", "dequantise", "fp8_linear", "fp8_lora_linear", "multiplies_fp8", "quantise", "stored_linear",
]  # fmt: skip


def dequantise(w: Fp8Weight, dtype: torch.dtype, *, implementation: str) -> Tensor:
    """The weight [N, K] in the dtype, with the same bits in every implementation."""
    return pick(implementation, dequantise_rows, launch and launch.dequantise_op)(*w, dtype)


def fp8_linear(x: Tensor, w: Fp8Weight, bias: Tensor | None = None, *, implementation: str) -> Tensor:
    """[..., N] in the dtype of x; differentiable in x alone.

    Args:
        x: [..., K].
        w: fp8 [N, K]; triton wants N and K in multiples of 16 where fp8 is multiplied.
        bias: [N].
        implementation: "triton", "compile" or "eager", from the plan.
    """
    require_fit(x, w, bias)
    if not multiplies_fp8(x.device):
        return stored_linear(x, w, bias, implementation=implementation)
    linear = pick(implementation, reference.fp8_linear, launch and launch.fp8_linear)
    return linear(x.reshape(-1, x.shape[-1]), *w, bias).reshape(*x.shape[:-1], w.values.shape[0])


def stored_linear(x: Tensor, w: Fp8Weight, bias: Tensor | None = None, *, implementation: str) -> Tensor:
    """`fp8_linear` of a dequantised weight, on every device: x keeps its precision."""
    require_fit(x, w, bias)
    return pick(implementation, reference.stored_linear, launch and launch.stored_linear)(x, *w, bias)


def fp8_lora_linear(
    x: Tensor,
    w: Fp8Weight,
    bias: Tensor | None = None,
    a: Tensor | None = None,
    b: Tensor | None = None,
    scale: float = 1.0,
    kept: Tensor | None = None,
    keep: float = 1.0,
    *,
    implementation: str,
) -> Tensor:
    """[..., N] in the dtype of x; differentiable in x, a and b. Arguments as in `fp8_linear` and `lora_branch`."""
    if (a is None) != (b is None):
        raise ValueError("a LoRA has both a and b, or neither")
    base = fp8_linear(x, w, bias, implementation=implementation)
    return base if a is None else lora_branch(x, base, a, b, scale, kept, keep, implementation=implementation)


@torch.compiler.assume_constant_result
def multiplies_fp8(device: torch.device) -> bool:
    """Whether products are fp8's on this device, or of a dequantised weight."""
    if device.type != "cuda":
        return True
    return torch.version.hip is None and torch.cuda.get_device_capability(device) >= (8, 9)


def require_fit(x: Tensor, w: Fp8Weight, bias: Tensor | None) -> None:
    """Refuse what does not fit together: it is a mistake of the caller."""
    if w.values.dtype != FP8 or w.values.ndim != 2 or w.scale.shape != w.values.shape[:1]:
        raise ValueError(
            f"an fp8 weight is [N, K] of {FP8} with scale [N], not {list(w.values.shape)} of {w.values.dtype}, "
            f"{list(w.scale.shape)}"
        )
    outputs, inputs = w.values.shape
    if x.ndim == 0 or x.shape[-1] != inputs:
        raise ValueError(f"x is {list(x.shape)}, not [..., {inputs}]")
    if bias is not None and bias.shape != (outputs,):
        raise ValueError(f"bias is {list(bias.shape)}, not [{outputs}]")
