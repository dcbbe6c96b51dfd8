"""RMSNorm and modulation in plain PyTorch: the definition, in float32 whatever comes in."""

from __future__ import annotations

import torch
from torch import Tensor

from ltxforge_kernels.precision import at_least_float32


def adaln_rms_norm(
    hidden: Tensor,
    table: Tensor | None,
    index: Tensor | None,
    shift: int | None,
    scale: int | None,
    eps: float = 1e-6,
) -> Tensor:
    """[B, T, D]; arguments as in the op."""
    normed = rms_norm(at_least_float32(hidden), eps)
    if table is not None:
        normed = modulated(normed, table, index, shift, scale)
    return normed.to(hidden.dtype)


def rms_norm(wide: Tensor, eps: float) -> Tensor:
    """The norm alone, in the dtype that comes in."""
    return wide * torch.rsqrt(wide.square().mean(dim=-1, keepdim=True) + eps)


def modulated(normed: Tensor, table: Tensor, index: Tensor | None, shift: int, scale: int) -> Tensor:
    """n·(1 + scale) + shift, in diffusers' order."""
    return normed * (1 + spread(table, index, scale)) + spread(table, index, shift)


def spread(table: Tensor, index: Tensor | None, row: int) -> Tensor:
    """One row of a table [U, K, D] as something that broadcasts against [B, T, D]."""
    chosen = at_least_float32(table[:, row])
    return chosen[:, None] if index is None else chosen[index]
