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
    wide = at_least_float32(hidden)
    normed = wide * torch.rsqrt(wide.square().mean(dim=-1, keepdim=True) + eps)
    if table is not None:
        normed = normed * (1 + spread(table, index, scale)) + spread(table, index, shift)
    return normed.to(hidden.dtype)


def spread(table: Tensor, index: Tensor | None, row: int) -> Tensor:
    """One row of a table [U, K, D] as something that broadcasts against [B, T, D]."""
    chosen = at_least_float32(table[:, row])
    return chosen[:, None] if index is None else chosen[index]
