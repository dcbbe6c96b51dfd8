"""RMSNorm and modulation in plain PyTorch: the definition, in float32 whatever comes in."""

from __future__ import annotations

import torch
from torch import Tensor

from ltxforge_kernels.precision import at_least_float32


def adaln_rms_norm(
    hidden: Tensor, table: Tensor, index: Tensor | None, shift: int, scale: int, eps: float = 1e-6
) -> Tensor:
    """[B, T, D]; arguments as in the op."""
    wide, rows = at_least_float32(hidden), at_least_float32(table)
    normed = wide * torch.rsqrt(wide.square().mean(dim=-1, keepdim=True) + eps)
    added, factor = (spread(rows[:, row], index) for row in (shift, scale))
    return (normed * (1 + factor) + added).to(hidden.dtype)


def spread(row: Tensor, index: Tensor | None) -> Tensor:
    """[U, D] as something that broadcasts against [B, T, D]."""
    return row[:, None] if index is None else row[index]
